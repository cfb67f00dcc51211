"""Rows with their raw fields, for prompts to speak of, and the answer that is right."""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftjax.config import UserError
from sftjax.data.example import Example, RowError
from sftjax.data.formats import Rejected, fail_on, to_example
from sftjax.data.layouts import detect, pick
from sftjax.data.readers import read, resolve
from sftjax.evaluate.prompts import Variant, answer_of, shown
from sftjax.generate.questions import UNASKED, by_default, only_asks
from sftjax.generate.questions import ask as ask_alone

FEW = 20  # different answers, each of them some times, are labels


@dataclass(frozen=True)
class Row:
    """`example` is the row as training reads it, where a prompt or the answer needs that."""

    where: str
    fields: Mapping[str, Any]
    example: Example | None
    answer: str


def read_rows(path: str, variants: Sequence[Variant], *, expected: str | None, most: int | None, seed: int) -> list[Row]:
    """The rows of a path, glob, directory or hub id, in order; `most` of them, chosen at random, where there are more.

    `expected` names the field that holds the answer; None is the answer that training would learn. Raises UserError with the
    rows that cannot be used, and for a field that none of them has.
    """
    named = [*dict.fromkeys(field for v in variants for field in v.fields), *([expected] if expected is not None else [])]
    numbers = tuple(named) if named and all(field.isdigit() for field in named) else ()
    held = [(file, line, row) for file in resolve(path) for line, row in read(file, numbers)]
    check_fields(named, [row for _, _, row in held if isinstance(row, dict)], path)
    if most is not None and most < len(held):
        held = [held[i] for i in sorted(random.Random(seed).sample(range(len(held)), most))]
    through = expected is None or any(v.input is None for v in variants)
    layout = found_layout([row for _, _, row in held], path) if through else None
    rows: list[Row] = []
    rejected: list[Rejected] = []
    for file, line, row in held:
        try:
            if isinstance(row, RowError):
                raise row
            fields = {"text": row} if isinstance(row, str) else row
            if not isinstance(fields, dict):
                raise RowError("", "must be an object with named fields")
            example = example_of(fields, layout, file, line) if through else None
            rows.append(Row(f"{file}:{line}", fields, example, answer_in(fields, expected, example)))
        except RowError as e:
            rejected.append(Rejected(file, line, e.field, e.reason))
    fail_on(rejected, *UNASKED)
    return rows


def check_fields(named: Sequence[str], rows: Sequence[Mapping[str, Any]], path: str) -> None:
    seen = list(dict.fromkeys(str(key) for row in rows for key in row))
    for field in named:
        if rows and not any(pick(row, field) is not None for row in rows):
            near = difflib.get_close_matches(field, seen, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(name[:40] for name in seen[:20])}"
            if path.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
                hint += "; without a header line columns are numbered, {0}, {1}"
            raise UserError(f"{path}: no row has a field {field}, which the prompts or --expected name; {hint}")


def found_layout(rows: Sequence[Any], path: str) -> Any:
    held = [{"text": row} if isinstance(row, str) else row for row in rows]
    full = [row for row in held if isinstance(row, dict) and not only_asks(row)]
    if not full:
        return None
    try:
        return detect(full, path)
    except UserError as e:
        seen = ", ".join(list(dict.fromkeys(str(key) for row in full for key in row))[:20])
        raise UserError(
            f"{path}: its columns ({seen}) are of no format that training reads, so that every prompt needs an input that "
            'names them, such as "Label this: {text}", and --expected=FIELD the one with the answer'
        ) from e


def example_of(fields: Mapping[str, Any], layout: Any, file: str, line: int) -> Example:
    if only_asks(fields):
        return ask_alone(dict(fields), True, file, line)
    return to_example(fields, layout, by_default(), source=file, line=line)


def answer_in(fields: Mapping[str, Any], expected: str | None, example: Example | None) -> str:
    if expected is None:
        assert example is not None
        return answer_of(example)
    answer = shown(pick(fields, expected))
    if not answer.strip():
        raise RowError(expected, "is missing or empty")
    return answer


def are_labels(rows: Sequence[Row]) -> bool:
    """Whether the answers are labels: their format says so, or there are few and they come again and again."""
    answers = {row.answer for row in rows}
    return all(row.example and row.example.label is not None for row in rows) or len(answers) <= min(FEW, len(rows) // 5)
