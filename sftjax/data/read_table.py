"""Tables to numbered rows: .csv with its quotes, .tsv, with a header line or with columns by number.

A .csv record may span lines and knows the one it starts on. A .tsv record is a line: a quote there is a character like
any other, except that a field wholly in quotes is taken out of them, and that a record whose quotes stay open goes on
in the next lines as far as together they have no more fields than there are columns.
"""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from sftjax.config import UserError
from sftjax.data.example import RowError
from sftjax.data.lines import Line, decode, numbered

REACH = 1000  # lines that a quoted field of a .tsv may span

Record = tuple[int, list[str] | RowError]


def read_table(file: Iterable[bytes], path: str, *, tabs: bool, numbers: tuple[str, ...] = ()) -> Iterator[tuple[int, Any]]:
    """(line, {column: text}) of each record. `numbers`: the columns wanted, by position, from a file without a header."""
    lines = (line for line in numbered(file, path))
    records = _tsv(lines) if tabs else _csv(lines, path)
    names: list[str] | None = None
    for number, record in records:
        if isinstance(record, RowError):
            yield number, record
        elif names is None:
            headless = bool(numbers) and not set(numbers) <= {cell.strip() for cell in record}
            names = [str(i) for i in range(len(record))] if headless else _header(record, path)
            if headless:
                yield number, dict(zip(names, record))
        elif len(record) != len(names):
            yield number, RowError("", f"fields: {len(record)}, where the first line has {len(names)}; {_cause(tabs)}")
        else:
            yield number, dict(zip(names, record))


def _cause(tabs: bool) -> str:
    return "is there a tab or a line break inside a field?" if tabs else 'a field with a comma in it needs "quotes"'


def _header(record: list[str], path: str) -> list[str]:
    names = [cell.strip() for cell in record]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}:1: the header names a column twice: {', '.join(sorted(map(repr, twice)))}; rename one")
    return names


def _csv(lines: Iterator[Line], path: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # the default refuses a field above 128 KiB
    first = next((line for line in lines if line.raw.strip()), None)
    if first is None:
        return
    last, bad = first.number, None  # the line read last, and what was wrong with a line of this record

    def feed() -> Iterator[str]:
        nonlocal last, bad
        for line in _chain(first, lines):
            last = line.number
            try:
                yield decode(line) + "\n"
            except RowError as e:
                bad = bad or e
                yield line.raw.decode("utf-8", "replace") + "\n"

    reader = csv.reader(feed(), delimiter=_delimiter(first.raw), strict=True)
    start, record = first.number, None
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            if "end of data" in str(e):
                raise UserError(
                    f"{path}:{start}: a quote opened in this row is never closed; the rows after it are lost in it"
                ) from e
            bad = bad or RowError("", f"is not CSV ({e}), up to line {last}; is a quote not closed, or not doubled?")
        if bad or record:  # a blank line is an empty record
            yield start, bad or record or []
        start, record, bad = last + 1, None, None


def _chain(first: Line, rest: Iterator[Line]) -> Iterator[Line]:
    yield first
    yield from rest


def _delimiter(header: bytes) -> str:
    """The comma, unless the header has none: spreadsheets write ; where the comma is the decimal point."""
    return next((mark for mark in ",;\t" if mark.encode() in header), ",")


def _tsv(lines: Iterator[Line]) -> Iterator[Record]:
    width, ahead = 0, deque[Line]()
    while line := ahead.popleft() if ahead else next(lines, None):
        if not line.raw.strip():
            continue
        width = width or line.raw.count(b"\t") + 1
        more = _rest(line.raw, width, lines, ahead)
        try:
            cells = "\n".join(decode(part) for part in (line, *more)).split("\t")
            yield line.number, [_unquoted(cell) for cell in cells]
        except RowError as e:
            yield line.number, e


def _rest(raw: bytes, width: int, lines: Iterator[Line], ahead: deque[Line]) -> list[Line]:
    """The lines taken from `ahead` that close the quotes of `raw`'s last field; none where none close them."""
    cell = raw.rpartition(b"\t")[2]
    odd = cell.startswith(b'"') and cell.count(b'"') % 2 == 1
    seen, tabs = 0, raw.count(b"\t")
    while odd and seen < REACH:
        if seen == len(ahead):
            following = next(lines, None)
            if following is None:
                return []
            ahead.append(following)
        part = ahead[seen].raw
        tabs += part.count(b"\t")
        if tabs >= width:
            return []  # too many fields for one record: the quote was only a character
        odd = odd != (part.count(b'"') % 2 == 1)
        seen += 1
    return [] if odd else [ahead.popleft() for _ in range(seen)]


def _quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _quoted(cell) else cell
