"""Any format that training reads, written as the one of its kind that everybody knows; reading that gives the same Examples.

    messages, sharegpt, alpaca   messages, tools
    prompt_completion            prompt, completion: raw text, or turns
    label                        text, label: what it is asked with is data.label_prompt's affair, in training
    text                         text
    prompt                       prompt: turns; and all other columns, which reward functions may want
    pair                         prompt, chosen, rejected
    ranking, tree                prompt, answers, ranks
    unpaired                     prompt, completion, label

Beside them are a row's `tags`, and `system` where it is no turn. Each row is read back as it is written.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from ml_collections import ConfigDict

from sftjax.config import UserError, default
from sftjax.data.conversation import ROLES
from sftjax.data.example import Example, Message, RowError
from sftjax.data.fields import Wishes
from sftjax.data.formats import PEEK, SHOWN, Rejected, fail_on, layouts, read_examples, to_example
from sftjax.data.layouts import Layout, detect
from sftjax.data.lines import json_line, json_lines, whole
from sftjax.data.pairs import written
from sftjax.data.read_json import loads

KNOWN_AS = {"sharegpt": "messages", "alpaca": "messages", "tree": "ranking"}  # the others are what they are
BESIDE = {  # columns that a row may have besides
    **dict.fromkeys(("messages", "prompt", "pair", "ranking", "unpaired"), ("tools", "tags")),
    "prompt_completion": ("system", "tools", "tags"),
    "label": ("system", "tags"),
    "text": ("tags",),
}


def convert(
    spec: Any,
    out: str,
    config: ConfigDict | None = None,
    *,
    want: str = "any",
    force: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes the rows of `spec` to the JSON lines `out`. `config` is a whole config, which says how they are read.

    Returns {"format", "rows", "written", "bad", "needs"}: bad cannot be used, or not said in that format; `needs` are the
    overrides that reading `out` needs, as key=value. `out` is whole or not there. Raises UserError.
    """
    data, target = copy.deepcopy((config or default()).data), json_lines(out, force=force)
    data.label_prompt = "{text}"
    how = layouts(spec, data, want)
    format = one_format(how)
    bad: list[Rejected] = []
    count, roles = Counter[str](), Counter[str]()

    def refuse(row: Rejected) -> None:
        count["bad"] += 1
        if len(bad) < SHOWN:
            bad.append(row)

    def good() -> Iterator[tuple[Example, dict[str, Any]]]:
        for example in read_examples(spec, data, say, want):
            count["rows"] += 1
            if isinstance(example, Rejected):
                refuse(example)
            else:
                yield example, as_columns(example, format)

    rows = good()
    first = list(islice(rows, PEEK))
    if not first:
        fail_on(bad, total=count["bad"])
    layout, needs = detect([row for _, row in first], out, want=want), []
    if layout.format != format:  # by the other columns of a prompt
        layout, needs = detect([row for _, row in first], out, format=format, want=want), [f"data.format={format}"]
    with whole(target) as file:
        for example, row in chain(first, rows):
            line = json_line(row)
            if lost := difference(example, line, layout):
                refuse(Rejected(example.source, example.line, lost.field, lost.reason))
                continue
            file.write(line)
            count["written"] += 1
            roles.update(message.role for message in example.turns())
        if data.on_bad_row == "error" or not count["written"]:
            fail_on(bad, total=count["bad"])
    needs += [f"data.roles.{role}={role}" for role in sorted(roles) if ROLES.get(role) != role]
    return {"format": format, "rows": count["rows"], "written": count["written"], "bad": count["bad"], "needs": needs}


def one_format(how: dict[str, Layout]) -> str:
    """What all sources become. Raises UserError where that is not one."""
    becomes = {path: KNOWN_AS.get(layout.format, layout.format) for path, layout in how.items()}
    first = next(iter(becomes), "")
    for path, format in becomes.items():
        if format != becomes[first]:
            raise UserError(
                f"{first} becomes {becomes[first]} and {path} {format}, and a file holds rows of one format; give each a file of "
                "its own"
            )
    return becomes.get(first, "text")


def as_columns(example: Example, format: str) -> dict[str, Any]:
    """The example as a row of that format."""
    messages, system = example.messages or (), None
    if format in ("label", "prompt_completion") and messages and messages[0].role == "system" and messages[0].loss is None:
        messages, system = messages[1:], messages[0].content  # of a column, or the config's: a prompt's own turn weighs 0
    said = [written(answer.said) for answer in example.answers or ()]
    prompt = written(messages or example.text or "")
    match format:
        case "messages":
            row = {"messages": written(messages)}
        case "prompt_completion":
            row = dict(zip(("prompt", "completion"), example.completion or cut(messages)))
            row["completion"] = row["completion"] or None  # of a row that only asks
        case "label":
            row = {"text": messages[0].content, "label": example.label}
        case "text" | "prompt":
            row = {format: prompt}
        case "pair":
            row = {"prompt": prompt, "chosen": said[0], "rejected": said[1]}
        case "unpaired":
            row = {"prompt": prompt, "completion": said[0], "label": example.answers[0].rank == 1}  # type: ignore[index]
        case _:
            row = {"prompt": prompt, "answers": said, "ranks": [answer.rank for answer in example.answers or ()]}
    more = {"system": system, "tools": list(example.tools or ()), "tags": list(example.tags)}
    return (example.columns or {}) | row | {name: more[name] for name in BESIDE[format] if more[name]}


def cut(messages: tuple[Message, ...]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The turns of a prompt, which train nothing unless they say so, and those of its completion."""
    answers = [i for i, m in enumerate(messages) if m.role == "assistant" or m.loss]
    at = next((i for i, m in enumerate(messages) if m.loss is None), answers[-1])
    return written(tuple(replace(m, loss=m.loss or None) for m in messages[:at])), written(messages[at:])


def difference(example: Example, line: str, layout: Layout) -> RowError | None:
    """Why the line does not read as the example; None where it does."""
    roles = {message.role: message.role for message in example.turns()}
    try:
        again = to_example(loads(line), layout, Wishes(roles, asks=example.columns is not None), source="", line=0)
    except RowError as e:
        return RowError(e.field, f"{e.reason}, as {layout.format} has it")
    same = alone(again) == alone(example)
    return None if same else RowError("", f"cannot be said as {layout.format}: it would be read as something else")


def alone(example: Example) -> Example:
    """The example without its place; its tags count once."""
    columns = example.columns and {name: held for name, held in example.columns.items() if name != "tags"}
    return replace(example, source="", line=0, columns=columns)
