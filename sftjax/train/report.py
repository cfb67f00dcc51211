"""report.html: one page about one run, from the files in its directory. Opens without a network.

Reads config.json, manifest.json, metrics.jsonl, summary.json, samples.jsonl and eval/eval.json, each of which may be absent; a
line of samples is {"prompt", "expected", "base", "tuned", "base_stopped", "tuned_stopped", "exact_base", "exact_tuned"}. Rows
are anyone's text: the template escapes all of it, and the page's content security policy runs no script but its own.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftjax import config as schema
from sftjax.config import UserError
from sftjax.evaluate import table
from sftjax.evaluate.figures import verdict
from sftjax.train import chart, tables
from sftjax.train.files import directory, replace, writing
from sftjax.train.fit import judge, rewarded
from sftjax.train.manifest import leaves, show
from sftjax.train.progress import compact, duration
from sftjax.train.run import clean, lines, read_json, read_metrics

SHOWN_SAMPLES = 200
EXACT = (("fixed", "wrong → correct"), ("kept", "correct in both"), ("broken", "correct → wrong"), ("missed", "wrong in both"))
REWARDED = (("fixed", "earns more"), ("kept", "earns the same"), ("broken", "earns less"))
SHOWN_TEXT = 4000  # characters of a prompt or an answer
# what a task's loss is a mean over; of the others, trained tokens
COUNTED = {"dpo": "pair", "kto": "answer", "grpo": "answer", "ppo": "action", "classify by head": "text", "reward": "pair"}


def write_report(workdir: str | Path) -> Path:
    """Writes W/report.html and gives its path. Raises UserError where the directory holds no run."""
    import jinja2

    workdir = directory(workdir)
    if not (workdir / "metrics.jsonl").exists() and not (workdir / "summary.json").exists():
        raise UserError(f"--workdir={workdir}: neither metrics.jsonl nor summary.json is there; run sftjax train first")
    loader = jinja2.PackageLoader("sftjax.train", ".")
    env = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = env.get_template("report.html.jinja").render(view(workdir), nonce=secrets.token_hex(16))
    with writing(workdir):
        replace(workdir / "report.html", html.encode(errors="replace"))
    return workdir / "report.html"


def view(workdir: Path) -> dict[str, Any]:
    """All that the template shows, formatted."""
    summary, manifest = read_json(workdir / "summary.json") or {}, read_json(workdir / "manifest.json") or {}
    config = leaves(read_json(workdir / "config.json") or {}) or manifest.get("config", {})
    metrics = read_metrics(workdir / "metrics.jsonl")
    train, evals = ([line for line in metrics if line["kind"] == kind] for kind in ("train", "eval"))
    data, device = manifest.get("data", {}), manifest.get("device", {})
    total = summary.get("steps") or max((line["step"] for line in metrics), default=None)
    earned = real(evals, "reward")
    fit = rewarded(earned) if earned else judge(real(train, "loss"), real(evals, "loss"), total)
    return {
        "title": Path(str(config.get("model.path") or workdir.name)).name,
        "kicker": [str(config[key]) for key in ("task", "method") if config.get(key)],
        "workdir": str(workdir),
        "created": manifest.get("created", "")[:16].replace("T", " "),
        "device": f"{device['count']} x {device['kind']}" if device else "",
        "headlines": headlines(summary),
        "facts": facts(summary),
        "fit": fit,
        "loss": loss_chart(train, evals, fit.best_step, what_runs(config)),
        "preferences": [c for c in (*policy_charts(train, evals), *preference_charts(train, evals)) if c],
        "charts": [c for c in small_charts(train) if c],
        "bad_steps": sum(1 for line in train if line.get("loss") is None),
        "confusion": tables.confusion(summary),
        "calibration": tables.calibration(summary),
        "samples": samples(workdir / "samples.jsonl"),
        "timeline": timeline([line for line in metrics if line["kind"] == "sample"]),
        "evaluation": evaluation(read_json(workdir / "eval" / "eval.json")),
        "lengths": lengths_chart(data.get("lengths")),
        "max_length": config.get("data.max_length"),
        "rows": row_counts(data),
        "sources": data.get("sources", []),
        "config": config_rows(config),
        "versions": manifest.get("versions", {}),
        "hashes": {name: value for name, value in manifest.get("hashes", {}).items() if value},
    }


def what_runs(config: Mapping[str, Any]) -> str:
    """The task, with what makes another of it."""
    by_head = config.get("task") == "classify" and config.get("classify.by") == "head"
    return "classify by head" if by_head else str(config.get("task"))


def headlines(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """What changed from before training to after: label, before, after, and whether that is better."""
    out = []
    for label, key, form, sign in (
        ("Held-out reward", "reward", lambda x: f"{x:.3f}", 1),
        ("Evaluation loss", "eval_loss", loss_text, -1),
        ("Test loss", "test_loss", loss_text, -1),
        ("Exact match", "exact_match", percent, 1),
        ("Accuracy" if "classes" in summary else "Preference accuracy", "accuracy", percent, 1),
        ("Macro-F1", "macro_f1", lambda x: f"{x:.3f}", 1),
        ("Log-prob of a chosen answer", "logps_chosen", lambda x: f"{x:.1f}", 1),
    ):
        after, before = summary.get(key), summary.get(f"{key}_before")
        if after is not None:
            moved = 0 if before is None else sign * (after - before)
            verdict = "better" if moved > 0 else "worse" if moved < 0 else ""
            out.append(
                {"label": label, "before": "" if before is None else form(before), "after": form(after), "verdict": verdict}
            )
    return out


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rest of the summary that a person asks for, where it is known."""
    known = (
        ("Steps", "steps", lambda x: f"{x:,}"),
        ("Tokens", "tokens", compact),
        ("Trained tokens", "trained_tokens", compact),
        ("Tokens/s", "tokens_per_s", compact),
        ("KL from the reference", "kl", lambda x: f"{x:.3g}"),
        ("MFU", "mfu", percent),
        ("Time", "total_s", duration),
        ("Compiling", "compile_s", duration),
        ("Peak memory", "peak_memory_mib", lambda x: f"{x / 1024:.1f} GiB" if x >= 1024 else f"{x:.0f} MiB"),
    )
    return [(label, form(summary[key])) for label, key, form in known if summary.get(key) is not None]


def loss_text(x: float) -> str:
    return f"{x:.3f}" if x >= 0.1 else f"{x:.2g}"


def percent(x: float) -> str:
    return f"{100 * x:.1f} %" if 0 < x < 0.9995 else f"{100 * x:.0f} %"


def points(rows: list[dict[str, Any]], name: str) -> chart.Points:
    return [(line["step"], line[name]) for line in rows if name in line]


def real(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in rows if line.get(name) is not None]


def loss_chart(train: list[dict[str, Any]], evals: list[dict[str, Any]], best_step: int | None, task: str) -> chart.Chart | None:
    raw = points(train, "loss")
    series = [
        chart.Series("train", raw, "raw"),
        chart.Series("train, smoothed", chart.smooth(raw), "train"),
        chart.Series("evaluation", points(evals, "loss"), "eval", dots=True),
    ]
    mark = (best_step, f"best, step {best_step}") if best_step else None
    return chart.lines(f"Loss per {COUNTED.get(task, 'trained token')}", series, mark=mark)


def preference_charts(train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> list[chart.Chart | None]:
    """What a preference loss is about, in training and held out; nothing of a run without one."""

    def sides(metric: str) -> list[chart.Series]:
        named = (("chosen", "better"), ("rejected", "worse"))
        trained = [chart.Series(name, chart.smooth(points(train, f"{metric}/{name}")), f"{look} faint") for name, look in named]
        held_out = [chart.Series(f"{n}, held out", points(evals, f"{metric}/{n}"), look, dots=True) for n, look in named]
        return trained + held_out

    def both(metric: str) -> list[chart.Series]:
        return [
            chart.Series("train, smoothed", chart.smooth(points(train, metric)), "train"),
            chart.Series("evaluation", points(evals, metric), "eval", dots=True),
        ]

    return [
        chart.lines("Reward of an answer", sides("rewards")),
        chart.lines("Log-prob of an answer", sides("logps")),
        chart.lines("Margin: chosen over rejected reward", both("rewards/margins"), zero=True),
        chart.lines("Accuracy: pairs whose chosen reward is higher", both("rewards/accuracies"), zero=True),
        chart.lines("Accuracy: texts whose own label scores highest", both("accuracy"), zero=True),
        None if real(train, "reward") else chart.lines("KL from the reference, nats an answer", both("kl"), zero=True),
    ]


def policy_charts(train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> list[chart.Chart | None]:
    """What a policy earns and how it changes; nothing of a run without rewards."""
    if not real(train, "reward"):
        return []

    def both(metric: str) -> list[chart.Series]:
        series = [chart.Series("of the policy's answers, smoothed", chart.smooth(points(train, metric)), "train")]
        return [*series, chart.Series("held out", points(evals, metric), "eval", dots=True)]

    def alone(**metrics: str) -> list[chart.Series]:
        looks = ("train", "eval")
        return [chart.Series(name, points(train, metric), look) for (name, metric), look in zip(metrics.items(), looks)]

    functions = [name for name in train[-1] if name.startswith("rewards/")]
    each, ppo = functions if len(functions) > 1 else [], "kl_coef" in train[-1]
    return [
        chart.lines("Reward of an answer", both("reward")),
        *(chart.lines(f"Reward by {name.removeprefix('rewards/')}", both(name)) for name in each),
        chart.lines(
            "Spread of the rewards: without one there is nothing to learn",
            [chart.Series("std", points(train, "reward_std"), "train")],
            zero=True,
        ),
        chart.lines(f"KL from the reference, nats {'an answer' if ppo else 'a token'}", alone(KL="kl"), zero=True),
        chart.lines("Entropy of a token, nats", [chart.Series("entropy", points(train, "entropy"), "train")], zero=True),
        chart.lines("Share of clipped actions", alone(policy="clip_fraction", value="value_clip_fraction"), zero=True),
        chart.lines("Tokens of an answer", both("length"), zero=True),
        chart.lines("Share of answers that stopped by themselves", both("stopped"), zero=True),
        chart.lines("KL of a step's updates, nats a token", alone(KL="approx_kl"), zero=True),
        chart.lines("Share of the returns' variance that the value explains", alone(share="explained_variance")),
        chart.lines("Loss of the policy, and of the value", alone(policy="policy_loss", value="value_loss")),
        chart.lines("Coefficient of the KL penalty", alone(kl_coef="kl_coef"), zero=True),
    ]


def small_charts(train: list[dict[str, Any]]) -> list[chart.Chart | None]:
    norm, speed, balance = (points(train, name) for name in ("grad_norm", "tokens_per_s", "router_balance"))
    return [
        chart.lines("Learning rate", [chart.Series("learning rate", points(train, "lr"), "train")], zero=True),
        chart.lines("Gradient norm", [chart.Series("gradient norm", norm, "train")], zero=True),
        chart.lines("Tokens/s", [chart.Series("tokens/s", speed, "train")], zero=True),
        chart.lines(
            "Balance of the routers; even ones have a token's number of experts", [chart.Series("balance", balance, "train")]
        ),
    ]


def lengths_chart(lengths: Mapping[str, Any] | None) -> chart.Chart | None:
    if not lengths:
        return None
    groups = [("all tokens", "train", lengths["counts"])]
    if "trained_counts" in lengths:
        groups.append(("trained tokens", "eval", lengths["trained_counts"]))
    return chart.histogram("Rows by length in tokens", lengths["edges"], groups, "rows")


def samples(path: Path) -> dict[str, Any] | None:
    """The held-out prompts and both models' answers, with how many were mended, kept, broken and missed."""
    if not path.exists():
        return None
    rows = [row for _, row in lines(path)]
    if not rows:
        return None
    fates = {(False, True): "fixed", (True, True): "kept", (True, False): "broken", (False, False): "missed"}
    cards = []
    for row in rows:
        fate = by_reward(row) if "reward_tuned" in row else fates[bool(row.get("exact_base")), bool(row.get("exact_tuned"))]
        texts = {name: text(row.get(name)) for name in ("prompt", "expected", "base", "tuned")}
        texts |= {f"{m}_reward": f"{row[f'reward_{m}']:.3f}" if f"reward_{m}" in row else "" for m in ("base", "tuned")}
        stopped = {f"{model}_stopped": bool(row.get(f"{model}_stopped", True)) for model in ("base", "tuned")}
        cards.append({**texts, **stopped, "fate": fate})
    counts = {fate: sum(card["fate"] == fate for card in cards) for fate in ("fixed", "kept", "broken", "missed")}
    stops = [sum(bool(card[f"{model}_stopped"]) for card in cards) / len(cards) for model in ("base", "tuned")]
    return {
        "total": len(cards),
        "words": REWARDED if "reward_tuned" in rows[0] else EXACT,
        "counts": counts,
        "shares": {fate: 100 * n / len(cards) for fate, n in counts.items()},
        "cards": cards[:SHOWN_SAMPLES],
        "stop_before": percent(stops[0]),
        "stop": percent(stops[1]),
    }


def by_reward(row: Mapping[str, Any]) -> str:
    """Of an answer with a reward: it earns more than before, less, or the same."""
    before, after = row["reward_base"], row["reward_tuned"]
    return "fixed" if after > before else "broken" if after < before else "kept"


def timeline(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each prompt that was answered while training went on, with its answers by step; equal ones in a row are told once."""
    asked: dict[str, dict[str, Any]] = {}
    for line in lines:
        for a in line["answers"]:
            one = asked.setdefault(a["prompt"], {"prompt": text(a["prompt"]), "expected": text(a["expected"]), "answers": []})
            now = {"text": text(a["text"]), "stopped": a["stopped"], "right": a["exact"]}
            if one["answers"] and {key: one["answers"][-1][key] for key in now} == now:
                one["answers"][-1]["until"] = line["step"]
            else:
                one["answers"].append({"step": line["step"], "until": line["step"], **now})
    return list(asked.values())


def evaluation(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `sftjax eval` found, in words; `spans` are an interval's place on a scale from 0 to 1, where that is one."""
    if not found:
        return None
    models, (whole, *tagged) = found["models"], found["figures"]

    def row(name: str, of: Mapping[str, Any]) -> dict[str, Any]:
        spans = [(m, 100 * of[m]["low"], 100 * of[m]["high"], 100 * of[m]["value"]) for m in models if of[m]]
        scaled = name not in table.DIGITS
        return {
            "name": table.name_of(name),
            "cells": [table.told(name, of[m]) for m in models],
            "difference": table.told(name, of.get("difference"), sign=True),
            "verdict": verdict(name, of.get("difference")),
            "spans": spans if scaled else [],
        }

    first = [name for name in (*found["metrics"][:1], "loss") if name in whole["figures"]]
    of, losses = found["of"], {"loss", "margin"} & whole["figures"].keys()
    measured = [f"the loss of {found['rows']:,}"] * bool(losses) + [f"the answers of {found['answered']:,}"]
    changed = found.get("changed", {})
    return {
        "what": f"Step {of['step']}, {of['split']} rows: {', '.join(measured)}.",
        "intervals": found["intervals"],
        "how": [f"{table.name_of(name)}: {how}" for name, how in found["how"].items()],
        "models": models,
        "rows": [row(name, of) for name, of in whole["figures"].items()],
        "first": [table.name_of(name) for name in first],
        "tags": [
            {
                "tag": one["tag"],
                "figures": [row(name, one["figures"][name]) if name in one["figures"] else None for name in first],
            }
            | {"n": max(of["rows"] for of in one["figures"].values())}
            for one in tagged
        ],
        "changed": [
            {key: text(value) for key, value in row.items() if key != "change"}
            | {"way": way, "change": f"{100 * row['change']:+.1f}"}
            for way, rows in changed.items()
            for row in rows
        ],
    }


def text(value: Any) -> str:
    """A prompt or an answer as plain text; messages a turn a line."""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        value = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value)
    value = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    return value if len(value) <= SHOWN_TEXT else f"{value[:SHOWN_TEXT]} ... ({len(value) - SHOWN_TEXT:,} more characters)"


def row_counts(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Counts of the data report, a reason under its heading; shares are of the rows read."""
    out: list[dict[str, Any]] = []
    read = data.get("read")
    for name, value in data.items():
        if name in ("lengths", "sources"):
            continue
        if isinstance(value, Mapping):
            numbers = {key: n for key, n in value.items() if isinstance(n, (int, float))}
            out += [{"name": f"{label(name)}: {label(key)}", "n": n, "share": None} for key, n in numbers.items()]
        elif isinstance(value, (int, float)):
            out.append({"name": label(name), "n": value, "share": None})
    for row in out:
        if read and row["name"].startswith(("read", "kept", "dropped")):
            row["share"] = 100 * row["n"] / read
    return out


def label(name: Any) -> str:
    return str(name).replace("_", " ")


def config_rows(config: Mapping[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
    """(key, value, default) of every key: first those that the run changed."""
    defaults = leaves(clean(schema.default())[0])
    rows = [(key, show(value), show(defaults.get(key)), value == defaults.get(key)) for key, value in config.items()]
    return {
        "changed": [row[:3] for row in rows if not row[3]],
        "default": [row[:3] for row in rows if row[3]],
    }
