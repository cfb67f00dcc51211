"""Rows to answer: any row that training reads, and rows that only ask.

{"messages": [..., {"role": "user", ...}]}       a conversation that ends with a question
{"prompt" | "question" | "instruction": "..."}   a question: a user's turn, or for a model without a template raw text
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sftjax.config import default
from sftjax.data.conversation import conversation, tools
from sftjax.data.example import Example, Message, RowError
from sftjax.data.formats import Rejected, Wishes, to_example
from sftjax.data.layouts import ALIASES, detect
from sftjax.data.readers import read, resolve

TURNS = ("messages", "conversations", "conversation")
ASKS = ("prompt", "question", "instruction", "query", "problem")
ANSWERS = ("completion", "label", "output", *ALIASES["output"])
UNASKED = ("cannot be asked", "")  # what formats.fail_on says of rows that cannot: there is no leaving them out


def read_questions(path: str, *, template: bool) -> Iterator[Example | Rejected]:
    """Every row of a path, glob, directory or hub id, in order. `template`: whether the model has one."""
    wishes = by_default()
    for file in resolve(path):
        rows = list(read(file))
        full = [row for _, row in rows if not isinstance(row, RowError) and not only_asks(row)]
        full = [{"text": row} if isinstance(row, str) else row for row in full]
        layout = detect(full, file) if full else None
        for line, row in rows:
            try:
                if isinstance(row, RowError):
                    raise row
                if only_asks(row):
                    yield ask(row, template, file, line)
                else:
                    yield to_example(row, layout, wishes, source=file, line=line)
            except RowError as e:
                yield Rejected(file, line, e.field, e.reason)


def by_default() -> Wishes:
    """How rows are read where no config says."""
    data = default().data
    return Wishes(system=data.system, label_prompt=data.label_prompt)


def only_asks(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    if any(row.get(key) is not None for key in ANSWERS):
        return False
    turns = next((row[key] for key in TURNS if isinstance(row.get(key), list) and row[key]), None)
    if turns is None:
        return any(row.get(key) for key in ASKS)
    last = turns[-1]
    return isinstance(last, dict) and last.get("role", last.get("from")) not in ("assistant", "gpt", "function_call")


def ask(row: dict[str, Any], template: bool, source: str, line: int) -> Example:
    """The Example of a row that only asks. Raises RowError."""
    key = next(key for key in (*TURNS, *ASKS) if row.get(key))
    if isinstance(row[key], list):
        messages = conversation(row[key], key, {}, {})
    elif not isinstance(row[key], str):
        raise RowError(key, "must be text, or a list of turns")
    elif not template:
        if row.get("system") or tools(row.get("tools"), "tools"):
            given = "system" if row.get("system") else "tools"
            raise RowError(given, "has no place in raw text, and the model has no chat template; leave it out")
        return Example(source, line, completion=(row[key], ""))
    else:
        more = [row["input"]] if isinstance(row.get("input"), str) and row["input"] else []
        messages = (Message("user", "\n".join([row[key], *more])),)
    system = row.get("system")
    if isinstance(system, str) and system and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return Example(source, line, messages=messages, tools=tools(row.get("tools"), "tools"))
