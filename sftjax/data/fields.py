"""Fields: one raw row by canonical names, and what every format with turns makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftjax.data.conversation import conversation, listed, named, text, tools
from sftjax.data.example import Message, RowError
from sftjax.data.layouts import pick


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the config says about every row."""

    roles: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    label_prompt: str = "{text}"
    labels: Sequence[str] = ()
    asks: bool = False  # rows need no answer


class Row:
    """One row by canonical names. Errors speak of the file's own."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str]):
        self.row, self.columns = row, columns

    def name(self, column: str) -> str:
        return self.columns.get(column, column)

    def get(self, column: str) -> Any:
        return pick(self.row, self.columns[column]) if column in self.columns else None

    def text(self, column: str) -> str:
        return text(self.get(column), self.name(column))

    def filled(self, column: str) -> str:
        found = self.text(column)
        if not found.strip():
            raise RowError(self.name(column), "is empty")
        return found

    def maybe(self, column: str) -> str | None:
        """Text, or None where there is none or it is blank."""
        found = self.get(column)
        return None if found is None or not text(found, self.name(column)).strip() else found

    def turns(self, column: str, roles: Mapping[str, str]) -> tuple[Message, ...]:
        return conversation(self.get(column), self.name(column), roles, self.columns)


def dialogue(row: Row, wishes: Wishes, messages: tuple[Message, ...], **more: Any) -> dict[str, Any]:
    """The fields of an Example of `messages`: with the row's or the config's system prompt, and the row's tools."""
    own = row.maybe("system")
    first = messages[0].role
    if first == "system" and own is not None and own != messages[0].content:
        raise RowError(row.name("system"), "says other than the system turn; keep one of the two")
    system = own if own is not None else wishes.system
    if first not in ("system", "developer") and system:
        messages = (Message("system", system), *messages)
    return {"messages": messages, "tools": tools(row.get("tools"), row.name("tools")), **more}


def refuse_beside_raw_text(row: Row, wishes: Wishes, also: str = "") -> None:
    """Raises RowError where there is a system prompt, or the row has tools, which only a template has a place for."""
    given = {
        row.name("system"): row.maybe("system"),
        "--config.data.system": wishes.system,
        row.name("tools"): tools(row.get("tools"), row.name("tools")),
    }
    for place, held in given.items():
        if held:
            mend = f"make the prompt a list of turns, or read it as one with --config.data.columns.instruction=prompt{also}"
            raise RowError(place, f"has no place beside a prompt of raw text; {mend}")


def asked(row: Row) -> tuple[Message, ...]:
    """Alpaca's question: the history's turns, then instruction and input as the user's."""
    question = "\n".join(part for part in (row.text("instruction"), row.maybe("input")) if part)
    if not question.strip():
        raise RowError(row.name("instruction"), "is empty")
    messages: list[Message] = []
    for i, pair in enumerate(listed(row.get("history"), row.name("history"))):
        where = f"{row.name('history')}[{i}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(where, f"is {named(pair)}, must be a pair [question, answer]")
        messages += [Message("user", text(pair[0], where)), Message("assistant", text(pair[1], where))]
    return (*messages, Message("user", question))
