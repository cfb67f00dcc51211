"""JSON to numbered rows: one object a line, one array, an object that holds the array, or objects one after another.

Rows are decoded one at a time, so that each knows its line and a bad one does not take the others with it. What
Python's json lets pass and a data file must not hold is refused: repeated keys, NaN, half of a surrogate pair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from sftjax.config import UserError
from sftjax.data.example import RowError
from sftjax.data.lines import BOM, WIDE, decode, not_utf8, numbered

WRAPPERS = ("data", "rows", "examples", "train", "instances", "items", "records")  # {"data": [row, row]}
SPACE = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
RAW = re.compile("[\ud800-\udfff]")  # what surrogateescape makes of bytes that are not UTF-8

Rows = Iterator[tuple[int, Any]]  # line, and the row or the RowError in its place


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(next(key for key in keys if keys.count(key) > 1), "appears twice in one object")
    return row


def _constant(name: str) -> Any:
    raise RowError("", f"holds {name}, which is not JSON; write null or a number")


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
LENIENT = json.JSONDecoder()


def value(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at `at`, or the RowError that says why it cannot be used; and where it ends.

    Raises json.JSONDecodeError where it has no end.
    """
    try:
        found, end = STRICT.raw_decode(text, at)
    except RowError as e:
        return e, LENIENT.raw_decode(text, at)[1]
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, at) from None
    if SURROGATE.search(text, at, end):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return RowError("", "holds half of a surrogate pair (\\ud800-\\udfff), which is no character"), end
    return found, end


def loads(text: str) -> Any:
    """The one value that `text` is. Raises RowError."""
    try:
        found, end = value(text, _skip(text, 0))
    except json.JSONDecodeError as e:
        raise RowError("", f"is not JSON: {_plain(e)} at column {e.colno}") from None
    except ValueError as e:  # a number of thousands of digits
        raise RowError("", f"cannot be read: {e}") from None
    if isinstance(found, RowError):
        raise found
    if (end := _skip(text, end)) < len(text):
        raise RowError("", f"is not JSON: something follows the first value, at column {end + 1}")
    return found


def read_lines(file: Iterable[bytes], path: str) -> Rows:
    """One JSON value a line; blank lines are passed over."""
    for line in numbered(file, path):
        if not line.raw.strip():
            continue
        try:
            yield line.number, loads(decode(line))
        except RowError as e:
            yield line.number, e


def read_document(raw: bytes, path: str) -> Rows:
    """The rows of a whole .json file, whichever way it holds them. The bytes are let go of before the first row."""
    if raw.startswith(WIDE):
        raise UserError(f"{path}: is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)")
    # a byte order mark becomes as many spaces, so that offsets stay those of the file
    text = _text(b" " * len(BOM) + raw[len(BOM) :] if raw.startswith(BOM) else raw)
    start = _skip(text, 0)
    if text.startswith("[", start):
        return _located(path, text, _elements(text, start, whole=True))
    inner = _wrapped(text, start)
    return _located(path, text, _values(text, start) if inner is None else _elements(text, inner, whole=False))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def one_a_line(file: Iterable[bytes]) -> bool:
    """Whether the first line is a whole object and is not the only one: JSON Lines under another name."""
    head = list(islice((line for line in file if line.strip()), 2))
    if len(head) < 2 or not head[0].removeprefix(BOM).lstrip().startswith(b"{"):
        return False
    try:
        LENIENT.decode(_text(head[0].removeprefix(BOM)).strip())
    except (ValueError, RecursionError):
        return False
    return True


def _elements(text: str, at: int, *, whole: bool) -> Iterator[tuple[int, Any, int]]:
    """(start, row, end) of each element of the array that opens at `at`; `whole` when it should be all there is."""
    at = _skip(text, at + 1)
    while not text.startswith("]", at):
        row, end = _value(text, at)
        yield at, row, end
        at = _skip(text, end)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            raise Broken(at, "a comma or ] is missing after the row before")
    if whole and (at := _skip(text, at + 1)) < len(text):
        raise Broken(at, "something follows the array")


def _values(text: str, at: int) -> Iterator[tuple[int, Any, int]]:
    """(start, row, end) of JSON values that follow one another."""
    while at < len(text):
        row, end = _value(text, at)
        yield at, row, end
        at = _skip(text, end)


class Broken(Exception):
    """Not one row is bad but the document, from offset `at`: what follows is lost, so this cannot be skipped like a row."""

    def __init__(self, at: int, why: object):
        super().__init__(f"is not JSON: {why}; mend it, for the rows after it cannot be told apart")
        self.at = at


def _value(text: str, at: int) -> tuple[Any, int]:
    """As `value`. Raises Broken."""
    try:
        return value(text, at)
    except json.JSONDecodeError as e:
        raise Broken(min(e.pos, len(text)), _plain(e)) from None
    except ValueError as e:  # a number of thousands of digits
        raise Broken(at, e) from None


def _located(path: str, text: str, found: Iterator[tuple[int, Any, int]]) -> Rows:
    """Offsets turned to lines in one pass over the text, or to the row's number where all of it is one line; rows with bytes
    that are not UTF-8 turned to RowErrors."""
    number, seen, offset, dirty = 1, 0, 0, RAW.search(text) is not None
    feed = text.find("\n", _skip(text, 0))
    flat, count = feed < 0 or _skip(text, feed) == len(text), 0
    try:
        for count, (start, row, end) in enumerate(found, 1):
            number = count if flat else number + text.count("\n", seen, start)
            if dirty:
                offset += len(text[seen:start].encode("utf-8", "surrogateescape"))
                if bad := RAW.search(text, start, end):
                    before = len(text[start : bad.start()].encode("utf-8", "surrogateescape"))
                    row = not_utf8(ord(bad[0]) - 0xDC00, offset + before)
            seen = start
            yield number, row
    except Broken as e:
        number = count + 1 if flat else number + text.count("\n", seen, e.at)
        raise UserError(f"{path}:{number}: {e}") from None


def _wrapped(text: str, at: int) -> int | None:
    """Where the array of rows opens, when the document is one object with the rows under a name in WRAPPERS."""
    try:
        while text[at : at + 1] in ("{", ","):
            key, at = LENIENT.raw_decode(text, _skip(text, at + 1))
            at = _skip(text, _skip(text, at) + 1)  # past the colon
            if key in WRAPPERS and text.startswith("[", at):
                return at
            at = _skip(text, LENIENT.raw_decode(text, at)[1])
    except (ValueError, RecursionError):
        return None  # reading it as rows will say what is wrong, and where
    return None


def _skip(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def _plain(e: json.JSONDecodeError) -> str:
    return e.msg[0].lower() + e.msg[1:].removesuffix(" starting at")
