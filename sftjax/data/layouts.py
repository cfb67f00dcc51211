"""The columns of a source to its layout: which format it is, and under which names.

    messages           messages: turns of role/content, with tools and tool calls
    sharegpt           conversations: turns of from/value (or role/content)
    alpaca             instruction, output; maybe input, system, history [[user, assistant], ...], tools
    prompt_completion  prompt, completion: raw text without a template, or both as turns
    label              text, label: the label is the answer to data.label_prompt
    text               text: plain text, every token trained

A column may have another name in the file: the usual ones (question/answer, ...) are known, any other is given as
data.columns, which may also reach inside (`instances.0.output`) or count the columns of a file without a header.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftjax.config import UserError

# format -> the columns it must have; in the order in which they are recognised
NEEDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "label": ("text", "label"),
    "text": ("text",),
}
KEYS = ("role", "content")  # not columns of a row but the two keys of a turn, which may have other names too
TURNS = ("system", "tools", *KEYS)
MAY = {
    "messages": TURNS,
    "sharegpt": TURNS,
    "alpaca": ("input", "system", "history", "tools"),
    "prompt_completion": TURNS,
    "label": ("system",),
    "text": (),
}
ALIASES = {
    "instruction": ("question", "query", "prompt", "problem", "input"),
    "output": ("response", "answer", "solution", "target"),
    "input": ("context",),
    "conversations": ("conversation",),
    "system": ("system_prompt",),
    "tools": ("functions",),
}
CANONICAL = tuple(dict.fromkeys(name for format in NEEDS for name in NEEDS[format] + MAY[format]))
PREFERENCES = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("answers", "ranks"), ("answers", "scores"))


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of one source are read: the format, and the file's name for each of its columns."""

    format: str
    columns: Mapping[str, str]

    def __str__(self) -> str:
        renamed = [f"{own} as {name}" for name, own in self.columns.items() if own != name]
        return f"{self.format} ({', '.join(renamed)})" if renamed else self.format


def detect(rows: Sequence[Any], source: str, *, format: str = "auto", columns: Mapping[str, str] | None = None) -> Layout:
    """The layout of the source whose first rows these are. Raises UserError where it has none, or not that of `format`."""
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
    _refuse_preferences(rows, source, format, columns)
    for candidate in NEEDS if format == "auto" else (format,):
        if found := _fit(candidate, seen, columns):
            return Layout(candidate, found)
    raise UserError(_unknown(source, seen, format, columns))


def _fit(format: str, seen: list[str], columns: Mapping[str, str]) -> dict[str, str] | None:
    """The file's name of each column of `format`, or None where one it needs is missing or one mapped is foreign to it."""
    if not set(columns) <= {*NEEDS[format], *MAY[format]}:
        return None
    found = dict(columns)
    for name in NEEDS[format] + MAY[format]:
        if name not in found and name not in KEYS:
            usual = (own for own in (name, *ALIASES.get(name, ())) if own in seen and own not in found.values())
            if (own := next(usual, None)) is not None:
                found[name] = own
    return found if all(name in found for name in NEEDS[format]) else None


def _refuse_preferences(rows: Sequence[dict[str, Any]], source: str, format: str, columns: Mapping[str, str]) -> None:
    """Good and bad answers side by side would be trained on alike: only where the user says so."""
    if format != "auto":
        return
    for good, bad in PREFERENCES:
        if good not in columns.values() and any(good in row and bad in row for row in rows):
            hint = "; to train on the chosen answers alone: --config.data.columns.completion=chosen" if good == "chosen" else ""
            raise UserError(f"{source}: holds preferences ({good}, {bad}), which this task does not train on{hint}")
    marked = [row for row in rows if isinstance(row.get("label"), bool) and ("completion" in row or "messages" in row)]
    if marked:
        told = "messages" if "messages" in marked[0] else "prompt_completion"
        raise UserError(
            f"{source}: its label column says which answers are good and which are bad (KTO), and this task would "
            f"train on both; keep the good ones, or train on all with --config.data.format={told}"
        )


def _unknown(source: str, seen: list[str], format: str, columns: Mapping[str, str]) -> str:
    formats = NEEDS if format == "auto" else {format: NEEDS[format]}
    lacks = {name: [need for need in needs if need not in columns and need not in seen] for name, needs in formats.items()}
    near = [name for name in formats if len(lacks[name]) < len(formats[name])] or ["alpaca" if format == "auto" else format]
    options = " ".join(f"--config.data.columns.{need}=NAME" for need in lacks[near[0]])
    want = "no known format has its columns" if format == "auto" else f"is not of the format {format} by its columns"
    table = "".join(f"\n  {name:18}{', '.join(needs)}" for name, needs in formats.items())
    lines = [f"{source}: {want} ({_listing(seen)}); needed are{table}"]
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
