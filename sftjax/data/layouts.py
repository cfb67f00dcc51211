"""The columns of a source to its layout: which format it is, and under which names.

    messages           messages: turns of role/content, with tools and tool calls
    sharegpt           conversations: turns of from/value (or role/content)
    alpaca             instruction, output; maybe input, system, history [[user, assistant], ...], tools
    prompt_completion  prompt, completion: raw text without a template, or both as turns
    label              text, label: the label is the answer to data.label_prompt
    text               text: plain text, every token trained
    prompt             prompt (or question, ...), text or turns: a row that only asks, for tasks that reward answers

and where several answers to one prompt are wanted (`want` is "pairs", "rankings" or "labels", data/preferences.py)

    pair               chosen, rejected; the prompt in a column of PROMPTS, or in both
    ranking            answers and a column of PROMPTS; maybe ranks or scores
    unpaired           label: good or bad, of a completion or output, or of the last of messages
    tree               message_tree_id: Open Assistant's trees

Any format may have tags beside: a text or a list of texts, by which evaluation tells kinds of rows apart. A column of that name
that holds something else is another thing's.
A column may have another name in the file: the usual ones (question/answer, ...) are known, any other is given as
data.columns, which may also reach inside (`instances.0.output`) or count the columns of a file without a header.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sftjax.config import UserError
from sftjax.data.example import RowError

# format -> the columns it must have
NEEDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "label": ("text", "label"),
    "text": ("text",),
    "prompt": ("instruction",),
    "pair": ("chosen", "rejected"),
    "ranking": ("answers",),
    "unpaired": ("label",),
    "tree": ("message_tree_id",),
}
FORMATS = {  # what is wanted -> the formats that have it, in the order in which they are recognised; "any" where no task says
    "answers": ("messages", "sharegpt", "alpaca", "prompt_completion", "label", "text"),
    "pairs": ("pair", "ranking", "tree"),
    "rankings": ("pair", "ranking", "tree"),
    "labels": ("unpaired", "pair"),
    "classes": ("label",),
    "prompts": ("messages", "sharegpt", "prompt_completion", "alpaca", "label", "prompt", "text"),
    "any": tuple(NEEDS),
}
WANTED = {"answers": "one answer a row", "pairs": "pairs", "rankings": "rankings", "labels": "answers labelled good or bad"}
WANTED |= {"classes": "a text and its label", "prompts": "a prompt"}
USUAL = {"answers": "alpaca", "pairs": "pair", "rankings": "ranking", "labels": "unpaired", "classes": "label"}
USUAL |= {"prompts": "prompt"}
PROMPTS = ("prompt", "messages", "conversations", "instruction")  # of a preference; the first that is there
ASKING = ("ranking", "unpaired")  # formats that need one of PROMPTS
ASKED = f", and one of {', '.join(PROMPTS)}"
KEYS = ("role", "content")  # not columns of a row but the two keys of a turn, which may have other names too
TURNS = ("system", "tools", *KEYS)
MAY = {
    "messages": (*TURNS, "tags"),
    "sharegpt": (*TURNS, "tags"),
    "alpaca": ("input", "system", "history", "tools", "tags"),
    "prompt_completion": (*TURNS, "tags"),
    "label": ("system", "tags"),
    "text": ("tags",),
    "prompt": ("input", "history", *TURNS, "tags"),
    "pair": (*PROMPTS, "input", "history", *TURNS, "tags"),
    "ranking": (*PROMPTS, "input", "history", "ranks", "scores", *TURNS, "tags"),
    "unpaired": (*PROMPTS, "input", "history", "completion", "output", *TURNS, "tags"),
    "tree": ("system", "tags"),
}
ALIASES = {
    "instruction": ("question", "query", "prompt", "problem", "input"),
    "output": ("response", "answer", "solution", "target"),
    "input": ("context",),
    "conversations": ("conversation",),
    "system": ("system_prompt",),
    "tools": ("functions",),
    "chosen": ("chosen_messages",),
    "rejected": ("rejected_messages",),
    "label": ("kto_tag",),
    "message_tree_id": ("message_id",),
}
CANONICAL = tuple(dict.fromkeys(name for format in NEEDS for name in NEEDS[format] + MAY[format]))
BLANK: tuple[Any, ...] = (None, "", [])
KNOWN = frozenset(CANONICAL).union(*ALIASES.values())
PREFERENCES = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("answers", "ranks"), ("answers", "scores"))


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of one source are read: the format, and the file's name for each of its columns, of which the config gave
    those of `given`."""

    format: str
    columns: Mapping[str, str]
    given: frozenset[str] = frozenset()

    def __str__(self) -> str:
        renamed = [f"{own} as {name}" for name, own in self.columns.items() if own != name]
        return f"{self.format} ({', '.join(renamed)})" if renamed else self.format

    def of(self, row: Mapping[str, Any]) -> Layout:
        """As this row has it, which the source's first rows may not show: with the columns that come first in it, and those that
        it has under another of their usual names. Raises RowError where it has one under two of them."""
        fresh = [name for name in row if name in KNOWN and name not in self.columns.values()]
        if not fresh:
            return self
        columns = dict(self.columns)
        for name, own in self.columns.items():
            if name in self.given:
                continue
            if own not in row:
                usual = (other for other in (name, *ALIASES.get(name, ())) if other in fresh and other not in columns.values())
                columns[name] = next(usual, own)
            elif name in fresh and own != name and row[name] not in BLANK and row[own] not in BLANK:
                raise RowError(name, f"stands beside {own}, which rows before have in its place; rename one of the two")
        return replace(self, columns=_fit(self.format, fresh, columns) or columns)


def detect(
    rows: Sequence[Any], source: str, *, format: str = "auto", columns: Mapping[str, str] | None = None, want: str = "answers"
) -> Layout:
    """The layout of the source whose first rows these are. Raises UserError where it has none, or not that of `format`,
    or where what it holds is not what is wanted."""
    columns = columns or {}
    rows = [row for row in rows if isinstance(row, dict)]
    seen = list(dict.fromkeys(str(key) for row in rows for key in row))
    for name, own in columns.items():
        if name not in CANONICAL:
            near = difflib.get_close_matches(name, CANONICAL, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(CANONICAL)}"
            raise UserError(f"--config.data.columns.{name}={own}: no format has a column {name}{hint}")
        if name not in KEYS and not any(own in row or pick(row, own) is not None for row in rows):
            raise UserError(f"--config.data.columns.{name}={own}: {source} has no such column; it has {_listing(seen)}")
    if want == "any":
        want = _held(rows, seen, format, columns)
    if want == "answers":
        _refuse_preferences(rows, source, format, columns)
    if format != "auto" and format not in FORMATS[want]:
        raise UserError(f"{source}: --config.data.format={format} has no {WANTED[want]}, which this task learns from")
    for candidate in FORMATS[want] if format == "auto" else (format,):
        if found := _fit(candidate, seen, columns):
            return Layout(candidate, found, frozenset(columns))
    raise UserError(_unknown(source, seen, format, columns, want))


def _fit(format: str, seen: list[str], columns: Mapping[str, str]) -> dict[str, str] | None:
    """The file's name of each column of `format`, or None where one it needs is missing or one mapped is foreign to it."""
    if not set(columns) <= {*NEEDS[format], *MAY[format]}:
        return None
    found = dict(columns)
    for name in NEEDS[format] + MAY[format]:
        if name in PROMPTS and format not in FORMATS["answers"] and any(prompt in found for prompt in PROMPTS):
            continue
        if name in ("input", "history") and "instruction" not in found:
            continue
        if name not in found and name not in KEYS:
            usual = (own for own in (name, *ALIASES.get(name, ())) if own in seen and own not in found.values())
            if (own := next(usual, None)) is not None:
                found[name] = own
    if format in ASKING and not any(prompt in found for prompt in PROMPTS):
        return None
    return found if all(name in found for name in NEEDS[format]) else None


def of_another(row: Any, layout: Layout | None, want: str) -> str:
    """What to add to the reason of a rejected row that has nothing of its source's format and all of another's; else nothing."""
    if layout is None or not isinstance(row, dict):
        return ""
    if any(pick(row, layout.columns[name]) not in BLANK for name in NEEDS[layout.format]):
        return ""
    seen = [name for name, held in row.items() if held not in BLANK]
    other = next((format for format in FORMATS[want] if format != layout.format and _fit(format, seen, {})), None)
    mend = "give each format a file of its own, --config.data.train=A,B"
    return f"; by its columns it is {other}, and the source is read as {layout.format}: {mend}" if other else ""


def _held(rows: Sequence[dict[str, Any]], seen: list[str], format: str, columns: Mapping[str, str]) -> str:
    """What the rows hold, where no task says what is wanted: preferences that show it, else answers, else what else there is."""
    kinds = ("answers", "pairs", "labels", "prompts")
    if format != "auto":
        return next(kind for kind in kinds if format in FORMATS[kind])
    if _compared(rows, columns):
        return "pairs"
    if _marked(rows):
        return "labels"
    return next((kind for kind in kinds if any(_fit(format, seen, columns) for format in FORMATS[kind])), "answers")


def _compared(rows: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> tuple[str, str] | None:
    """The columns of good and bad answers that stand side by side, but for good ones that the user reads as answers."""
    unread = [(good, bad) for good, bad in PREFERENCES if good not in columns.values()]
    return next(((good, bad) for good, bad in unread if any(good in row and bad in row for row in rows)), None)


def _marked(rows: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """The column that says which answers are good and which are bad, and the first row with it."""
    for row in rows:
        if isinstance(row.get("kto_tag"), bool):
            return "kto_tag", row
        if isinstance(row.get("label"), bool) and ("completion" in row or "messages" in row):
            return "label", row
    return None


def _refuse_preferences(rows: Sequence[dict[str, Any]], source: str, format: str, columns: Mapping[str, str]) -> None:
    """Good and bad answers side by side would be trained on alike: only where the user says so."""
    if format != "auto":
        return
    if compared := _compared(rows, columns):
        hint = "; to train on the chosen answers alone: --config.data.columns.completion=chosen" if "chosen" in compared else ""
        raise UserError(f"{source}: holds preferences ({', '.join(compared)}), which this task does not train on{hint}")
    if marked := _marked(rows):
        column, row = marked
        told = next((f for f in FORMATS["answers"] if _fit(f, list(row), columns)), "messages")
        raise UserError(
            f"{source}: its {column} column says which answers are good and which are bad (KTO), and this task would "
            f"train on both; keep the good ones, or train on all with --config.data.format={told}"
        )


def _unknown(source: str, seen: list[str], format: str, columns: Mapping[str, str], want: str) -> str:
    formats = {name: NEEDS[name] for name in (FORMATS[want] if format == "auto" else (format,))}
    lacks = {name: [need for need in needs if need not in columns and need not in seen] for name, needs in formats.items()}
    near = [name for name in formats if len(lacks[name]) < len(formats[name])] or [USUAL[want] if format == "auto" else format]
    options = " ".join(f"--config.data.columns.{need}=NAME" for need in lacks[near[0]])
    kinds = "known format" if want == "answers" else f"format with {WANTED[want]}, which this task learns from,"
    finding = f"no {kinds} has its columns" if format == "auto" else f"is not of the format {format} by its columns"
    needed = {name: ", ".join(needs) + (ASKED if name in ASKING else "") for name, needs in formats.items()}
    table = "".join(f"\n  {name:18}{columns}" for name, columns in needed.items())
    lines = [f"{source}: {finding} ({_listing(seen)}); needed are{table}"]
    if options:
        lines.append(f"to read it as {near[0]}, name the columns: {options}")
    if source.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        lines.append("without a header line, number them: --config.data.columns.text=0 --config.data.columns.label=1")
    return "\n".join(lines)


def _listing(seen: list[str]) -> str:
    short = [name if len(name) <= 40 else name[:40] + "..." for name in seen[:20]]
    return ", ".join(short) + (f", and {len(seen) - 20} more" if len(seen) > 20 else "") if seen else "none"


def pick(row: Mapping[str, Any], name: str) -> Any:
    """The value under a column's name, which may lead inside with dots and numbers; None where there is none."""
    if name in row:
        return row[name]
    held: Any = row
    for part in name.split("."):
        if isinstance(held, list) and part.isdigit() and int(part) < len(held):
            held = held[int(part)]
        elif isinstance(held, dict):
            held = held.get(part)
        else:
            return None
    return held
