"""Sources to Examples: files are read, each source's layout is found, and every row is checked against it.

A row that cannot be used comes as a Rejected in its place, with file, line, field and reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from sftjax.config import UserError
from sftjax.data import preferences
from sftjax.data.conversation import check_answered, named, refuse_media
from sftjax.data.example import Example, Message, RowError
from sftjax.data.fields import Row, Wishes, asked, dialogue, refuse_beside_raw_text
from sftjax.data.layouts import Layout, detect, of_another
from sftjax.data.readers import NoRows, read, resolve
from sftjax.data.sources import Source, sources

PEEK = 100  # readable rows that a source's layout is found from
LABELS = 100  # above this many, {labels} in a prompt is a mistake
SHOWN = 10  # bad rows spelled out before the total
ASKING = ("messages", "conversations", "instruction", "input", "history", "prompt", "text", "system", "tools")


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is not used, and why."""

    source: str
    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.field + ': ' if self.field else ''}{self.reason}"


class Read(NamedTuple):
    """A row of a file, how its source is read, and what the row is: an Example, or several of a tree, or why it is none."""

    file: str
    line: int
    layout: Layout | None
    found: list[Example] | Rejected


def read_examples(
    spec: Any, data: Any, say: Callable[[str], None] | None = None, want: str = "answers"
) -> Iterator[Example | Rejected]:
    """Every row of the sources in `spec` (as config.data.train has them), in order. `data` is config.data.

    `say` is told how each source was understood; `want` is a key of layouts.FORMATS. Raises UserError where a source cannot
    be found, has no known layout, or does not hold what is wanted.
    """
    for row in read_rows(spec, data, say, want):
        yield from [row.found] if isinstance(row.found, Rejected) else row.found


def read_rows(spec: Any, data: Any, say: Callable[[str], None] | None = None, want: str = "answers") -> Iterator[Read]:
    """The same, a Read for each row of the files."""
    known = _labels(data) if want in ("answers", "classes", "prompts", "any") else ()
    given = Wishes(dict(data.roles), data.system, data.label_prompt, known)
    for source in sources(spec):
        layout, rows = open_source(source, data, want)
        if layout and say:
            untold = "; plain text has no place for data.system" if layout.format == "text" and data.system else ""
            say(f"{source.path}: read as {layout}{untold}")
        wishes = replace(given, asks=want == "prompts" or (want == "any" and layout is not None and layout.format == "prompt"))
        for file, line, row in rows:
            try:
                if isinstance(row, RowError):
                    raise row
                yield Read(file, line, layout, to_examples(row, layout, wishes, source=file, line=line))
            except RowError as e:
                yield Read(file, line, layout, Rejected(file, line, e.field, e.reason + of_another(row, layout, want)))


def counted(n: int) -> str:
    return "1 row" if n == 1 else f"{n:,} rows"


def fail_on(
    rejected: Sequence[Rejected],
    fault: str = "cannot be used",
    mend: str = "\nmend them, or leave them out with --config.data.on_bad_row=skip",
    total: int = 0,
) -> None:
    """Raises UserError with the first bad rows and their total, where there are any; `total` where only the first are given."""
    if not rejected:
        return
    total = total or len(rejected)
    shown = "".join(f"\n  {bad}" for bad in rejected[:SHOWN])
    more = f"\n  ... and {total - SHOWN} more" if total > SHOWN else ""
    raise UserError(f"{counted(total)} {fault}:{shown}{more}{mend}")


def open_source(source: Source, data: Any, want: str = "answers") -> tuple[Layout | None, Iterator[tuple[str, int, Any]]]:
    """The layout of a source, None where no row of it is readable, and (file, line, row or RowError) of all its rows."""
    columns = {name: str(own) for name, own in (dict(data.columns) if source.columns is None else source.columns).items()}
    numbers = tuple(columns.values()) if all(own.isdigit() for own in columns.values()) else ()
    rows = ((file, line, row) for file in resolve(source.path) for line, row in read(file, numbers))
    held: list[tuple[str, int, Any]] = []
    first: list[Any] = []
    for item in rows:
        held.append(item)
        if isinstance(item[2], (dict, str)):
            first.append(as_row(item[2]))
        if len(first) == PEEK:
            break
    if held and all(isinstance(row, NoRows) for _, _, row in held):
        raise UserError(f"{held[0][0]}: {held[0][2].reason}; name one with rows")
    if not first:
        return None, chain(held, rows)
    return detect(first, source.path, format=source.format or data.format, columns=columns, want=want), chain(held, rows)


def _labels(data: Any) -> tuple[str, ...]:
    """All the labels in the training sources, sorted, where the prompt asks for them."""
    if "{text}" not in data.label_prompt:
        raise UserError(f"--config.data.label_prompt={data.label_prompt!r}: has no {{text}} in it, where the row's text goes")
    return labels(data, LABELS, "{labels} in --config.data.label_prompt") if "{labels}" in data.label_prompt else ()


def layouts(spec: Any, data: Any, want: str) -> dict[str, Layout]:
    """How each of the sources is read, by its path; without those that have no readable row. Raises UserError."""
    found = {source.path: open_source(source, data, want)[0] for source in sources(spec)}
    return {path: layout for path, layout in found.items() if layout}


def labels(data: Any, most: int, what_for: str) -> tuple[str, ...]:
    """All the labels in the training sources of `data`, sorted. Raises UserError where there are more than `most`."""
    found: set[str] = set()
    for source in sources(data.train):
        layout, rows = open_source(source, data)
        if layout is None or layout.format != "label":
            continue
        for _, _, row in rows:
            if not isinstance(row := as_row(row), dict):
                continue
            try:
                found.add(label_of(Row(row, layout.columns)))
            except RowError:
                continue  # told when the row itself is read
        if len(found) > most:
            raise UserError(f"{source.path}: more than {most} labels, too many for {what_for}")
    return in_order(found)


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Sorted, numbers by their size and before the rest."""
    return tuple(sorted(labels, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label)))


def as_row(row: Any) -> Any:
    """A bare string, as in a JSON list of strings, is a row of text."""
    return {"text": row} if isinstance(row, str) else row


def to_example(row: Any, layout: Layout | None, wishes: Wishes, *, source: str, line: int) -> Example:
    """The one Example that `row` is. Raises RowError, with the field as the file names it."""
    (example,) = to_examples(row, layout, wishes, source=source, line=line)
    return example


def to_examples(row: Any, layout: Layout | None, wishes: Wishes, *, source: str, line: int) -> list[Example]:
    """The Examples that `row` is: one, but for a tree of rankings. Raises RowError, with the field as the file names it."""
    row = as_row(row)
    if layout is None or not isinstance(row, dict):
        raise RowError("", f"the row is {named(row)}, must be an object with named fields")
    layout = layout.of(row)
    refuse_media({key: held for key, held in row.items() if key not in layout.columns.values()}, "")
    held = Row(row, layout.columns)
    tags = tags_of(held, "tags" in layout.given)
    if build := preferences.BUILD.get(layout.format):
        return [Example(source, line, tags=tags, **fields) for fields in build(held, wishes)]
    columns = {name: value for name, value in row.items() if name not in asking(layout)} if wishes.asks else None
    return [Example(source, line, tags=tags, columns=columns, **BUILD[layout.format](held, wishes))]


def asking(layout: Layout) -> set[str]:
    """The file's names of the columns that hold a prompt."""
    return {own for name, own in layout.columns.items() if name in ASKING and own != "tags"}


def tags_of(row: Row, told: bool) -> tuple[str, ...]:
    """The row's tags, "a" or ["a/b", "c"], each once. What is none is refused where one was `told` that it holds them."""
    held = row.get("tags")
    found = [held] if isinstance(held, str) else [] if held is None else held
    if not isinstance(found, (list, tuple)) or not all(isinstance(tag, str) for tag in found):
        if not told:
            return ()
        raise RowError(row.name("tags"), f"is {named(held)}, must be a text or a list of texts")
    return tuple(dict.fromkeys(stripped for tag in found if (stripped := tag.strip())))


def _turns(column: str) -> Callable[[Row, Wishes], dict[str, Any]]:
    def build(row: Row, wishes: Wishes) -> dict[str, Any]:
        messages = row.turns(column, wishes.roles)
        if not wishes.asks:
            check_answered(messages, row.name(column))
        return dialogue(row, wishes, messages)

    return build


def _alpaca(row: Row, wishes: Wishes) -> dict[str, Any]:
    if wishes.asks and not isinstance(row.get("output"), str):
        return _prompt(row, wishes)
    return dialogue(row, wishes, (*asked(row), Message("assistant", row.filled("output"))))


def _prompt(row: Row, wishes: Wishes) -> dict[str, Any]:
    turns = isinstance(row.get("instruction"), list)
    return dialogue(row, wishes, row.turns("instruction", wishes.roles) if turns else asked(row))


def _prompt_completion(row: Row, wishes: Wishes) -> dict[str, Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list):
        refuse_beside_raw_text(row, wishes, " --config.data.columns.output=completion")
        silent = wishes.asks and not isinstance(completion, str)
        return {"completion": (row.text("prompt"), "" if silent else row.filled("completion"))}
    asked = row.turns("prompt", wishes.roles)
    if isinstance(completion, str):
        answer: tuple[Message, ...] = (Message("assistant", row.filled("completion")),)
    else:
        answer = row.turns("completion", wishes.roles)
        check_answered(answer, row.name("completion"))
    # answers inside the prompt are context here: only the completion is trained
    context = tuple(Message(m.role, m.content, 0.0 if m.loss is None else m.loss, m.extra) for m in asked)
    return dialogue(row, wishes, context + answer)


def label_of(row: Row) -> str:
    """The label as text: a word, a whole number, or true and false."""
    held = row.get("label")
    if isinstance(held, float) and held.is_integer():
        held = int(held)  # a column of whole numbers with a gap comes as floats
    label = str(held).strip() if isinstance(held, (str, int)) else ""
    if not label:
        blank = held is None or isinstance(held, str)
        raise RowError(
            row.name("label"), "is missing or empty" if blank else f"is {named(held)}, must be a word or a whole number"
        )
    return label


def _label(row: Row, wishes: Wishes) -> dict[str, Any]:
    label = label_of(row)
    put = {"text": row.filled("text"), "labels": ", ".join(wishes.labels)}
    # one pass: a text that says "{labels}" is left alone
    asked = re.sub(r"\{(text|labels)\}", lambda m: put[m[1]], wishes.label_prompt)
    return dialogue(row, wishes, (Message("user", asked), Message("assistant", label)), label=label)


def _text(row: Row, wishes: Wishes) -> dict[str, Any]:
    return {"text": row.filled("text")}


BUILD: dict[str, Callable[[Row, Wishes], dict[str, Any]]] = {
    "messages": _turns("messages"),
    "sharegpt": _turns("conversations"),
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "label": _label,
    "text": _text,
    "prompt": _prompt,
}
