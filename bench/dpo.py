"""DPO with LoRA in sftjax and in TRL's DPOTrainer: the same base, the same real pairs, a process each from start to end, in turn.

    D=SHARED/data/llamafactory
    python bench/dpo.py --model=CASE/model --pairs $D/dpo_en_demo.json $D/dpo_zh_demo.json \\
        --trl-python=P --out=bench/results/dpo.md

The pairs are written once by `sftjax data pairs`; of each file those are taken, from its beginning, whose answers have at most
512 tokens each with their prompt: nobody drops or cuts any. One epoch, sigmoid loss, beta 0.1, LoRA of rank 8 on every linear
module, AdamW at 1e-4, float32, the reference by switching the adapter off, no evaluation. A step is 4 rows of 1,024 tokens in
sftjax, packed, which hold some 8 pairs, and 8 pairs in TRL, padded to the longest. TRL's loop is timed from its first step to
its last, sftjax's with compiling; "whole process" has imports, tokenising, and of sftjax the checkpoint, the report and an
export that is read back. `--precompute` adds both with the reference's log-probs computed beforehand, outside of the loop's time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from sft import COLUMNS, REPO, child, hardware, middle, version

LIMIT = 512  # tokens of an answer with its prompt


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, type=Path, help="a Hugging Face folder")
    p.add_argument("--pairs", required=True, nargs="+", type=Path, help="files of pairs")
    p.add_argument("--rows", type=int, default=48, help="pairs of each file (default 48)")
    p.add_argument("--repeats", type=int, default=2, help="the first of sftjax is cold, the others are warm (default 2)")
    p.add_argument("--precompute", action="store_true", help="with precompute_ref_log_probs too")
    p.add_argument("--trl-python", required=True, help="interpreter with trl and peft")
    p.add_argument("--out", type=Path, help="markdown file for the table")
    a = p.parse_args()
    measured: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = chosen(a, Path(scratch))
        for repeat, early in itertools.product(range(a.repeats), [0, 1] if a.precompute else [0]):
            kind = " precomputed" * early
            runs = {
                f"sftjax{kind}, {'warm' if repeat else 'cold'}": functools.partial(sftjax, a, Path(scratch), data, early, repeat),
                f"TRL{kind}": functools.partial(peer, a, data, early),
            }
            for name, run in runs.items():
                measured.setdefault(name, []).append(got := run())
                print(name, json.dumps(got), file=sys.stderr, flush=True)
    middles = {name: {k: middle([m[k] for m in ms]) for k in ms[0]} for name, ms in sorted(measured.items())}
    text = page(middles, a)
    print(text)
    if a.out:
        a.out.write_text(text)


def chosen(a: argparse.Namespace, scratch: Path) -> Path:
    """The pairs that both are given: a file of prompt, chosen and rejected."""
    from transformers import AutoTokenizer

    tokenizer, out = AutoTokenizer.from_pretrained(a.model), scratch / "pairs.jsonl"
    kept: list[str] = []
    for i, source in enumerate(a.pairs):
        written = scratch / f"{i}.jsonl"
        child([sys.executable, "-m", "sftjax.cli", "data", "pairs", f"--data={source}", f"--out={written}"], {})
        fitting = [line for line in written.read_text("utf-8").splitlines() if longest(tokenizer, json.loads(line)) <= LIMIT]
        kept += fitting[: a.rows]
    out.write_text("".join(line + "\n" for line in kept), "utf-8")
    return out


def longest(tokenizer: Any, row: dict[str, Any]) -> int:
    whole = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
    return max(len(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]) for turns in whole)


def sftjax(a: argparse.Namespace, scratch: Path, data: Path, early: int, repeat: int) -> dict[str, Any]:
    work = scratch / f"run{early}{repeat}"
    settings = {
        "model.path": a.model,
        "model.dtype": "float32",
        "lora.rank": 8,
        "lora.alpha": 16,
        "data.train": data,
        "data.split": "1,0,0",
        "data.max_length": 2 * LIMIT,
        "data.cache_dir": work / "data",
        "dpo.sft_weight": 0,
        "dpo.precompute_ref_log_probs": bool(early),
        "optim.lr": 1e-4,
        "optim.lr_width": "none",
        "optim.schedule": "linear",
        "optim.warmup": 0,
        "train.steps": "none",
        "train.epochs": 1,
        "train.batch_size": 4,
        "train.eval_every": "none",
        "train.log_every": 1,
    }
    options = [f"--config.{key}={value}" for key, value in settings.items()]
    env = {"JAX_COMPILATION_CACHE_DIR": str(scratch / f"xla{early}")}
    cli = [sys.executable, "-m", "sftjax.cli"]
    _, train = child([*cli, "train", f"--config={REPO / 'configs/dpo.py'}", f"--workdir={work}", *options], env)
    _, export = child([*cli, "export", f"--workdir={work}", f"--out={work / 'out'}"], env)
    summary = json.loads((work / "summary.json").read_text())
    loop_s = summary["compile_s"] + summary["tokens"] / summary["tokens_per_s"]  # TRL has nothing to compile
    return {
        "tokens": summary["tokens"],
        "steps": summary["steps"],
        "tokens_per_s": summary["tokens"] / loop_s,
        "steady_tokens_per_s": summary["steady_tokens_per_s"],
        "process_s": train["process_s"] + export["process_s"],
        "cpu_s": train["cpu_s"] + export["cpu_s"],
        "peak_rss_mib": max(train["peak_rss_mib"], export["peak_rss_mib"]),
    }


def peer(a: argparse.Namespace, data: Path, early: int) -> dict[str, Any]:
    script = [str(REPO / "bench/peers/trl_dpo.py"), f"--model={a.model}", f"--data={data}", f"--precompute={early}"]
    with tempfile.TemporaryDirectory() as caches:
        out, took = child([a.trl_python, *script], {"HF_HOME": caches})
    return json.loads(out.splitlines()[-1]) | took


def page(middles: dict[str, dict[str, Any]], a: argparse.Namespace) -> str:
    """The table and its ratios as markdown."""
    shown = {title: key for title, key in COLUMNS.items() if all(key[0] in m for m in middles.values())}
    lines = ["| |pairs' tokens|steps|" + "|".join(shown) + "|", "|---|" + "---:|" * (len(shown) + 2)]
    for name, m in middles.items():
        cells = [f"{m['tokens']:,.0f}", f"{m['steps']:.0f}", *(format(m[k], f) for k, f in shown.values())]
        lines.append(f"|{name}|" + "|".join(cells) + "|")
    lines.append("")
    for name, ours in middles.items():
        if name.startswith("sftjax"):
            peers = middles["TRL" + name.removeprefix("sftjax").split(",")[0]]
            faster = [ours[k] / peers[k] for k in ("tokens_per_s", "steady_tokens_per_s")]
            smaller = [peers[k] / ours[k] for k in ("process_s", "cpu_s", "peak_rss_mib")]
            values = zip(("in the loop", "steady", "whole process", "CPU seconds", "memory"), [*faster, *smaller])
            lines.append(f"- {name}, times better than TRL: " + ", ".join(f"{k} {v:.2f}" for k, v in values))
    said = f"--model=CASE/model --pairs ... --rows={a.rows} --repeats={a.repeats}{' --precompute' * a.precompute} --trl-python=P"
    theirs = version(a.trl_python, "trl", "peft", "torch", "transformers")
    versions = f"sftjax: {version(sys.executable, 'jax', 'jaxlib')}; TRL: {theirs}"
    head = [
        f"# DPO with LoRA, float32, on {hardware()}",
        "",
        f"`python bench/dpo.py {said}`, {time.strftime('%Y-%m-%d')}, load average at the end "
        f"{os.getloadavg()[1]:.1f}. {versions}.",
        f"Medians of {a.repeats} rounds; sftjax cold is one run.",
        "",
    ]
    return "\n".join([*head, *lines, ""])


if __name__ == "__main__":
    main()
