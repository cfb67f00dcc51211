"""`sftjax compare`: models x prompts over one file of rows. Is my prompt good enough, do I need to fine-tune at all?

OUT/answers.jsonl      every answer as it comes: run again, and only what is missing is asked
OUT/predictions.jsonl  a line a row, model and prompt: what was asked, answered and expected, and its scores
OUT/compare.json       the figures with intervals, costs, differences, the verdict
OUT/compare.html       the same for reading, with the rows on which they differ
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sftjax.check import refuse_metrics
from sftjax.config import UserError
from sftjax.data.chat import as_dict
from sftjax.data.example import RowError
from sftjax.data.formats import Rejected
from sftjax.evaluate.answered import Row, are_labels, read_rows
from sftjax.evaluate.contenders import Contender, Local, Options, Remote, check_asks, parse
from sftjax.evaluate.endpoint import Reply
from sftjax.evaluate.kept import Kept, key, open_out
from sftjax.evaluate.metrics import METRICS, all_sums, fitting, row_scores
from sftjax.evaluate.prompts import Ask, Variant, ask, read_variants
from sftjax.evaluate.table import line as in_line
from sftjax.evaluate.table import told
from sftjax.evaluate.verdict import Cell, figures, rivals, verdict
from sftjax.generate.answer import refuse
from sftjax.generate.sampling import choose
from sftjax.train.run import full_disk, replace

AS_GIVEN = "as given"  # the prompt where no file of prompts is
IN_PAGE = 100  # rows that compare.html shows
SHOWN = 4000  # characters of a text there


@dataclass(frozen=True)
class Asked:
    """One model with one prompt, over all rows."""

    contender: Contender
    variant: Variant
    asks: Sequence[Ask]
    replies: Sequence[Reply]

    @property
    def answers(self) -> list[str]:
        return [reply.text for reply in self.replies]

    @property
    def expected(self) -> list[str]:
        return [ask.expected for ask in self.asks]


def run_compare(
    models: Sequence[str],
    *,
    data: str,
    out: str,
    prompts: str | None = None,
    expected: str | None = None,
    metrics: Sequence[str] = (),
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

    `models` as --model has them (contenders.py), `prompts` a file of variants (prompts.py), `metrics` names of METRICS and
    CORPUS_SUMS of which the first decides. Raises UserError for what is wrong, before the first answer wherever that can be
    known.
    """
    contenders = parse(models)
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
    with full_disk(where):
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


def many(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("s" if n != 1 else "")


def ask_all(variant: Variant, rows: Sequence[Row]) -> list[Ask]:
    """Every row through one prompt. Raises UserError with those that cannot be asked so."""
    asks, rejected = [], []
    for row in rows:
        try:
            asks.append(ask(variant, row.fields, row.example, row.answer))
        except RowError as e:
            file, _, line = row.where.rpartition(":")
            rejected.append(Rejected(file, int(line), e.field, e.args[0].removeprefix(f"{e.field}: ")))
    refuse(rejected)
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


# What came of it


def judge(
    asked: Sequence[Asked], rows: Sequence[Row], metrics: Sequence[str], prices: Mapping[str, tuple[float, float]]
) -> tuple[dict[str, Any], list[dict[str, list[float]]]]:
    """compare.json's figures, and every cell's scores by row."""
    deciding = metrics[0]
    by_row = [name for name in metrics if name in METRICS] or ["exact_match"]
    of_all = figures([all_sums(metrics, a.answers, a.expected) for a in asked])
    cells = [Cell(a.contender.name, a.variant.name, of) for a, of in zip(asked, of_all)]
    scores = [row_scores(by_row, a.answers, a.expected) for a in asked]
    pair = rivals(cells, deciding)
    at = [cells.index(cell) for cell in pair] if pair else []
    differ = disagreements([of[by_row[0]] for of in scores], at)
    result: dict[str, Any] = {
        "rows": len(rows),
        "metrics": list(metrics),
        "cells": [
            {"model": cell.model, "prompt": cell.prompt, "metrics": {name: f.plain() for name, f in cell.figures.items()}}
            | costs(a.replies, prices.get(cell.model))
            for cell, a in zip(cells, asked)
        ],
        "differences": [
            {
                "better": [a.model, a.prompt],
                "than": [b.model, b.prompt],
                **((a.figures[deciding] - b.figures[deciding]).plain() or {}),
            }
            for a, b in ordered(cells, deciding)
        ],
        "verdict": verdict(cells, deciding, len(rows)),
        "disagreements": {"by": by_row[0], "rivals": at, "rows": differ},
    }
    return result, scores


def ordered(cells: Sequence[Cell], metric: str) -> Iterator[tuple[Cell, Cell]]:
    """Every two cells, the better one first."""
    ranked = sorted(cells, key=lambda cell: -cell.figures[metric].value)
    for i, a in enumerate(ranked):
        for b in ranked[i + 1 :]:
            yield a, b


def costs(replies: Sequence[Reply], price: tuple[float, float] | None) -> dict[str, Any]:
    """Of one cell: tokens and seconds, dollars where there is a price; None where a server does not say."""
    n = len(replies)
    answered = [r for r in replies if r.refused is None]

    def sized(values: list[Any]) -> dict[str, float] | None:
        if any(v is None for v in values) or not values:
            return None
        return {"mean": sum(values) / len(values), "total": sum(values)}

    prompt, answer = sized([r.prompt_tokens for r in answered]), sized([r.answer_tokens for r in answered])
    paid = None if price is None or prompt is None or answer is None else prompt["total"] * price[0] + answer["total"] * price[1]
    return {
        "stop_rate": sum(r.stopped for r in replies) / n,
        "empty": sum(not r.text.strip() for r in replies) / n,
        "unanswered": n - len(answered),
        "why": next((r.refused for r in replies if r.refused), None),
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "seconds": sized([r.seconds for r in answered]),
        "dollars": None if paid is None else paid / 1e6,
    }


def disagreements(scores: Sequence[Sequence[float]], rivals: Sequence[int]) -> list[int]:
    """The rows on which the cells' scores differ, those first on which the two rivals differ most."""

    def apart(i: int) -> tuple[float, float]:
        of = [cell[i] for cell in scores]
        return (abs(of[rivals[0]] - of[rivals[1]]) if rivals else 0.0, max(of) - min(of))

    differing = [i for i in range(len(scores[0])) if apart(i)[1] > 0]
    return sorted(differing, key=lambda i: [-d for d in apart(i)])


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


# The terminal


def mean_of(cost: Mapping[str, float] | None, digits: int = 0) -> str:
    return "-" if cost is None else f"{cost['mean']:,.{digits}f}"


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of what is shown: the deciding metric as models x prompts, then every cell with its costs."""
    cells, metrics = result["cells"], result["metrics"]
    models, prompts = (list(dict.fromkeys(cell[which] for cell in cells)) for which in ("model", "prompt"))
    found = {(cell["model"], cell["prompt"]): cell for cell in cells}
    grid = [[model, *(told(metrics[0], found[model, prompt]["metrics"][metrics[0]]) for prompt in prompts)] for model in models]
    title = f"{metrics[0]}, in points of 100 with 95% intervals, over {many(result['rows'], 'row')}"
    refused, paid = any(cell["unanswered"] for cell in cells), any(cell["dollars"] is not None for cell in cells)
    head = ["model", "prompt", *metrics[1:], "stopped", "empty", *(["no answer"] if refused else [])]
    head += ["prompt tokens", "answer tokens", "tokens in all", "s a row", *(["dollars"] if paid else [])]
    lines = []
    for cell in cells:
        line = [cell["model"], cell["prompt"], *(told(name, cell["metrics"][name]) for name in metrics[1:])]
        line += [f"{cell['stop_rate']:.0%}", f"{cell['empty']:.0%}", *([str(cell["unanswered"])] if refused else [])]
        both = [cell["prompt_tokens"], cell["answer_tokens"]]
        whole = "-" if None in both else f"{sum(cost['total'] for cost in both):,.0f}"
        line += [mean_of(both[0]), mean_of(both[1]), whole, mean_of(cell["seconds"], 3)]
        line += ["-" if cell["dollars"] is None else f"{cell['dollars']:.4f}"] if paid else []
        lines.append(line)
    return [(title, ["model", *prompts], grid), ("every model and prompt; tokens and seconds are means", head, lines)]


def show_all(result: Mapping[str, Any], asked: Sequence[Asked], rows: Sequence[Row], most: int) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    for title, head, lines in tables(result):
        console.print(f"\n{title}")
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for i, name in enumerate(head):
            table.add_column(Text(in_line(name, 40)), justify="left" if name in ("model", "prompt") and i < 2 else "right")
        for line in lines:
            table.add_row(*(Text(in_line(text, 40)) for text in line))
        console.print(table)
    if any(cell["why"] for cell in result["cells"]):
        console.print()
    for cell in result["cells"]:
        if cell["why"]:
            what = f"{many(cell['unanswered'], 'row')} without an answer, which counts as a wrong one; the first: {cell['why']}"
            console.print(in_line(f"{cell['model']} with {cell['prompt']}: {what}", None), soft_wrap=True)
    differ = result["disagreements"]["rows"]
    if most > 0:
        some = f"{len(differ):,} of {many(len(rows), 'row')} {'is' if len(differ) == 1 else 'are'} scored differently by some"
        console.print(f"\n{some if differ else 'No row is scored differently by any'}; the first:")
    for i in (differ or range(len(rows)))[:most]:
        console.print(f"\n{in_line(rows[i].where, None)}  {in_line(question(asked[0].asks[i]))}", soft_wrap=True)
        names = [in_line(f"{a.contender.name}, {a.variant.name}", 40) for a in asked]
        width = max(map(len, [*names, "expected"]))
        console.print(f"  {'expected':{width}}  {in_line(rows[i].answer)}", soft_wrap=True)
        for name, a in zip(names, asked):
            own = f"  (expected: {in_line(a.expected[i])})" if a.expected[i] != rows[i].answer else ""
            console.print(f"  {name:{width}}  {in_line(a.answers[i])}{own}", soft_wrap=True)
    console.print()
    for sentence in result["verdict"]:
        console.print(in_line(sentence, None), soft_wrap=True)


def question(ask: Ask) -> str:
    """What the row asks, without what every row is told."""
    return ask.text if ask.text is not None else str(ask.messages[-1].content)


# The page


def page(
    result: Mapping[str, Any], asked: Sequence[Asked], rows: Sequence[Row], scores: Sequence[Mapping[str, list[float]]]
) -> str:
    """compare.html. What models and rows say is anyone's text: the template escapes it, and the page runs no script."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.PackageLoader("sftjax.evaluate", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    by = result["disagreements"]["by"]

    def cut(text: str) -> str:
        return text if len(text) <= SHOWN else text[:SHOWN] + " ..."

    shown = [
        {
            "where": rows[i].where,
            "question": cut(question(asked[0].asks[i])),
            "expected": cut(rows[i].answer),
            "answers": [
                {
                    "who": f"{a.contender.name}, {a.variant.name}",
                    "text": cut(a.answers[i]),
                    "expected": cut(a.expected[i]) if a.expected[i] != rows[i].answer else None,
                    "score": of[by][i],
                    "why": a.replies[i].refused or ("" if a.replies[i].stopped else "cut off"),
                }
                for a, of in zip(asked, scores)
            ],
        }
        for i in (result["disagreements"]["rows"] or range(len(rows)))[:IN_PAGE]
    ]
    of_prompts = [(v["name"], {k: x for k, x in v.items() if k != "name" and x}) for v in result["prompts"]]
    return env.get_template("compare.html.jinja").render(
        result=result, tables=tables(result), shown=shown, by=by, prompts=of_prompts, nonce=secrets.token_hex(16)
    )
