"""`sftjax compare`: models x prompts over one file of rows. Is my prompt good enough, do I need to fine-tune at all?

OUT/answers.jsonl      every answer as it comes: run again, and only what is missing is asked
OUT/predictions.jsonl  a line a row, model and prompt: what was asked, answered and expected, and its scores
OUT/compare.json       the figures with intervals, costs, differences, the verdict
OUT/compare.html       the same for reading, with the rows on which they differ
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from sftjax.check import refuse_metrics
from sftjax.config import UserError, parts
from sftjax.data.chat import as_dict
from sftjax.data.example import RowError
from sftjax.data.formats import Rejected, fail_on
from sftjax.evaluate.answered import Row, are_labels, read_rows
from sftjax.evaluate.contenders import Contender, Local, Options, Remote, check_asks, parse
from sftjax.evaluate.judge import Asked, judge
from sftjax.evaluate.kept import Kept, key, open_out
from sftjax.evaluate.metrics import fitting, row_scores
from sftjax.evaluate.prompts import Ask, Variant, ask, read_variants
from sftjax.evaluate.shown import many, page, show_all
from sftjax.generate.questions import UNASKED
from sftjax.generate.sampling import choose
from sftjax.train.files import replace, writing

AS_GIVEN = "as given"  # the prompt where no file of prompts is


def run_compare(
    models: str | Sequence[str],
    *,
    data: str,
    out: str,
    prompts: str | None = None,
    expected: str | None = None,
    metrics: str | Sequence[str] = (),
    rows: int | None = None,
    show: int = 5,
    quantize: str | None = None,
    batch_size: int | None = None,
    key_envs: Sequence[str] = (),
    prices: Sequence[str] = (),
    timeout: float | None = None,
    parallel: int | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Asks every model every row through every prompt; prints and writes what came of it, and returns compare.json.

    `models` as --model has them (contenders.py), one or several, `prompts` a file of variants (prompts.py), `metrics` names of
    METRICS and CORPUS_SUMS of which the first decides. Raises UserError for what is wrong, before the first answer wherever
    that can be known.
    """
    models = [models] if isinstance(models, (str, Path)) else list(models)
    for name, value in [*(("models", model) for model in models), ("data", data), ("out", out), ("prompts", prompts or "")]:
        if not isinstance(value, (str, Path)):
            raise UserError(f"{name}: needs a path, not a {type(value).__name__}; docs/comparing.md says what lies there")
    contenders = parse([str(model) for model in models])
    metrics, data, prompts = parts(metrics), str(data), prompts and str(prompts)
    counts = {"--rows": rows, "--max-new-tokens": options.max_new_tokens}
    of_local = {"--quantize": quantize, "--batch-size": batch_size}
    of_remote = {"--parallel": parallel, "--timeout": timeout}
    check_numbers(options, counts | of_local | of_remote)
    check_kinds(contenders, of_local, of_remote)
    variants = read_variants(prompts) if prompts else [Variant(AS_GIVEN)]
    refuse_metrics(metrics, "--metrics")
    key_of, price_of = by_name("--key-env", key_envs, contenders), priced(prices, contenders)
    given = read_rows(data, variants, expected=expected, most=rows, seed=options.seed)
    asks = {v.name: ask_all(v, given) for v in variants}
    metrics = metrics or fitting([row.answer for row in given], labels=are_labels(given))
    row_scores(metrics, ["a"], ["a"])  # a library that is missing is told now
    opened = [
        Local(c, quantize, batch_size or 16) if c.path else Remote(c, key_of.get(c.name), timeout or 120.0, parallel or 4)
        for c in contenders
    ]
    for model in opened:
        check_asks(model, list(asks.items()), [row.where for row in given])
    where = open_out(out)
    err = Console(stderr=True)
    requests = len(opened) * len(variants) * len(given)
    size = f"{many(len(opened), 'model')} x {many(len(variants), 'prompt')} x {many(len(given), 'row')}"
    err.print(f"{size}: {requests:,} answers, by {', '.join(metrics)}", highlight=False)
    with Kept(where / "answers.jsonl") as kept:
        for model in opened:
            collect(model, asks, kept, options, err)
            for note in model.notes:
                err.print(f"{model.contender.name} {note}", highlight=False, markup=False)
        asked = [
            Asked(m.contender, v, asks[v.name], [kept.replies[key(m.identity, a, options.telling())] for a in asks[v.name]])
            for m in opened
            for v in variants
        ]
    result, scores = judge(asked, given, metrics, price_of)
    result = {"data": data, "options": asdict(options) | {"quantize": quantize}, **result}
    result["models"] = [asdict(m.contender) | {"notes": m.notes} for m in opened]
    result["prompts"] = [asdict(v) for v in variants]
    with writing(where):
        replace(where / "predictions.jsonl", b"".join(predictions(asked, given, scores)))
        replace(where / "compare.json", (json.dumps(result, ensure_ascii=False, indent=1) + "\n").encode(errors="replace"))
        replace(where / "compare.html", page(result, asked, given, scores).encode(errors="replace"))
    show_all(result, asked, given, show)
    print(f"\n{where}/compare.html, compare.json, predictions.jsonl")
    return result


def check_numbers(options: Options, given: Mapping[str, Any]) -> None:
    for name, number in given.items():
        if name == "--timeout" and number is not None and not number > 0:
            raise UserError(f"{name}={number:g}: needs seconds, more than 0")
        if isinstance(number, int) and number < 1:
            raise UserError(f"{name}={number}: needs at least 1")
    choose(temperature=options.temperature, top_p=options.top_p)  # which refuses what no model can sample with


def check_kinds(contenders: Sequence[Contender], of_local: Mapping[str, Any], of_remote: Mapping[str, Any]) -> None:
    """Raises UserError for an option of local models where there are only endpoints, or the other way round."""
    for options, kind, there in (
        (of_local, "local models", any(c.path for c in contenders)),
        (of_remote, "endpoints", any(c.url for c in contenders)),
    ):
        for name, value in options.items():
            if value is not None and not there:
                raise UserError(f"{name}={value}: is for {kind}, of which there are none")


def ask_all(variant: Variant, rows: Sequence[Row]) -> list[Ask]:
    """Every row through one prompt. Raises UserError with those that cannot be asked so."""
    asks, rejected = [], []
    for row in rows:
        try:
            asks.append(ask(variant, row.fields, row.example, row.answer))
        except RowError as e:
            file, _, line = row.where.rpartition(":")
            rejected.append(Rejected(file, int(line), e.field, e.args[0].removeprefix(f"{e.field}: ")))
    fail_on(rejected, *UNASKED)
    return asks


def by_name(option: str, values: Sequence[str], contenders: Sequence[Contender]) -> dict[str, str]:
    """{model's name: value} of [NAME=]VALUE; one without a name is for every endpoint. Raises UserError."""
    endpoints = [c.name for c in contenders if c.url]
    found: dict[str, str] = {}
    for value in values:
        name, named, what = value.rpartition("=")
        if not endpoints:
            raise UserError(f"{option}={value}: is for endpoints, of which there are none")
        if named and name not in endpoints:
            raise UserError(f"{option}={value}: no endpoint is called {name}; known are {', '.join(endpoints)}")
        found |= {name: what} if named else {each: what for each in endpoints if each not in found}
    return found


def priced(values: Sequence[str], contenders: Sequence[Contender]) -> dict[str, tuple[float, float]]:
    """{model's name: dollars a million tokens of prompt, of answer} of NAME=IN,OUT. Raises UserError."""
    names = [c.name for c in contenders]
    found: dict[str, tuple[float, float]] = {}
    for value in values:
        name, _, numbers = value.rpartition("=")
        if name not in names:
            raise UserError(f"--price={value}: no model is called {name or 'nothing'}; known are {', '.join(names)}")
        try:
            a, b = map(float, numbers.split(","))
        except ValueError:
            a = b = -1
        if not (0 <= a < float("inf") and 0 <= b < float("inf")):
            raise UserError(f"--price={value}: needs dollars a million tokens of prompts and of answers, e.g. {name}=0.15,0.60")
        found[name] = (a, b)
    return found


def collect(model: Local | Remote, asks: Mapping[str, Sequence[Ask]], kept: Kept, options: Options, err: Console) -> None:
    """Asks the model what is not kept yet. The same question is asked once."""
    rounds: list[tuple[str, list[Ask]]] = []
    keys: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name, all_of in asks.items():
        named = [(key(model.identity, a, options.telling()), a) for a in all_of]
        if isinstance(model, Remote):
            model.reached |= any(k in kept for k, _ in named)
        missing = {k: a for k, a in named if k not in kept and k not in seen}
        seen |= missing.keys()
        if missing:
            rounds.append((name, list(missing.values())))
            keys[name] = list(missing)
    if not rounds:
        return
    total = sum(len(asks) for _, asks in rounds)
    bars = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bars, console=err) as progress:
        task = progress.add_task(model.contender.name, total=total)
        for name, i, reply in model.each(rounds, options):
            kept[keys[name][i]] = reply
            progress.advance(task)


def predictions(asked: Sequence[Asked], rows: Sequence[Row], scores: Sequence[Mapping[str, list[float]]]) -> Iterator[bytes]:
    for i, row in enumerate(rows):
        for a, of in zip(asked, scores):
            reply, put = a.replies[i], a.asks[i]
            line: dict[str, Any] = {"row": row.where, "model": a.contender.name, "prompt": a.variant.name}
            line |= {"messages": [as_dict(m) for m in put.messages]} if put.text is None else {"text": put.text}
            line |= {"answer": reply.text, "expected": put.expected, "stopped": reply.stopped}
            line |= {"prompt_tokens": reply.prompt_tokens, "answer_tokens": reply.answer_tokens, "seconds": reply.seconds}
            line |= {"refused": reply.refused} if reply.refused else {}
            line |= {name: values[i] for name, values in of.items()}
            yield json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n"
