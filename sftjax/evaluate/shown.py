"""A comparison for reading: tables and disagreements in the terminal, and the page compare.html."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sftjax.evaluate.answered import Row
from sftjax.evaluate.judge import Asked
from sftjax.evaluate.prompts import Ask
from sftjax.evaluate.table import line as in_line
from sftjax.evaluate.table import told

IN_PAGE = 100  # rows that compare.html shows
SHOWN = 4000  # characters of a text there


def many(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("s" if n != 1 else "")


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
