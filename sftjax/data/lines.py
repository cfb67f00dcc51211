"""Bytes to numbered lines: opening (plain, gzip, remote), the byte order mark, UTF-8 told to the byte. And lines, written.

Only `\\n` ends a line here; the other characters that Unicode calls line breaks occur inside ordinary JSON strings.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, TextIO, cast

from sftjax.config import UserError
from sftjax.data.example import RowError

BOM = b"\xef\xbb\xbf"
WIDE = (b"\xff\xfe", b"\xfe\xff")  # UTF-16, which Excel and PowerShell write


class Line(NamedTuple):
    number: int  # from 1
    offset: int  # of the first byte, in the (decompressed) file
    raw: bytes  # without its end


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """The bytes of a local or remote (`gs://...`) file, decompressed where its name ends in .gz. Raises UserError."""
    try:
        with _open(path) as file:
            yield file
    except troubles(path, EOFError, zlib.error) as e:  # gzip finds its damage only while being read
        raise UserError(f"{path}: cannot be read: {reason(e)}") from e


def troubles(path: object, *more: type[Exception]) -> tuple[type[Exception], ...]:
    """What goes wrong there that is no mistake in the program, and what `more` may."""
    if not str(path).startswith("gs://"):
        return OSError, *more
    try:
        from aiohttp import ClientError
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError
    except ModuleNotFoundError as e:
        raise UserError(f"{path}: a bucket needs the package gcsfs; pip install 'sftjax[gcs]'") from e
    return OSError, ClientError, HttpError, GoogleAuthError, *more


def reason(e: Exception) -> str:
    return getattr(e, "strerror", None) or (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def _open(path: str) -> BinaryIO:
    zipped = path.lower().endswith(".gz")
    if "://" in path:
        import fsspec

        remote: Any = fsspec.open(path, "rb", compression="gzip" if zipped else None)
        return remote.open()
    return cast(BinaryIO, gzip.open(path, "rb")) if zipped else open(path, "rb")


def numbered(file: Iterable[bytes], path: str) -> Iterator[Line]:
    """The lines of `file`, blank ones too. Raises UserError where the file is UTF-16."""
    offset = 0
    for number, raw in enumerate(file, 1):
        start = offset
        offset += len(raw)
        if number == 1:
            if raw.startswith(WIDE):
                raise UserError(f"{path}: is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)")
            if raw.startswith(BOM):
                raw, start = raw[len(BOM) :], len(BOM)
        yield Line(number, start, raw.rstrip(b"\r\n"))


def decode(line: Line) -> str:
    """The line as text. Raises RowError with the place of the first byte that is not UTF-8."""
    try:
        return line.raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise not_utf8(line.raw[e.start], line.offset + e.start) from e


def new_file(out: str, *, force: bool) -> Path:
    """Where `--out` asks for a file. Raises UserError where there is one already, unless `force`, or where none can be."""
    target = Path(out).expanduser()
    if target.exists() and (not force or target.is_dir()):
        raise UserError(
            f"--out={out}: {'is a directory' if target.is_dir() else 'exists already; give --force to write over it'}"
        )
    if not target.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {target.parent}")
    return target


@contextmanager
def whole(target: Path) -> Iterator[TextIO]:
    """A file to write, which is at `target` when the block ends well and nowhere when it does not. What is no file, such as a
    pipe, is written as it comes. Raises UserError."""
    target = target.resolve()
    part = target.with_name(f".{target.name}.part")
    try:
        if target.exists() and not target.is_file():
            with target.open("w", encoding="utf-8") as file:
                yield file
            return
        with part.open("w", encoding="utf-8") as file:
            yield file
        os.replace(part, target)
    except OSError as e:
        raise UserError(f"--out={target}: cannot be written ({e.strerror or e})") from e
    finally:
        part.unlink(missing_ok=True)


def json_lines(out: str, *, force: bool) -> Path:
    """As `new_file`, of a file that is read again by its name."""
    target = new_file(out, force=force)
    if target.suffix.lower() not in (".jsonl", ".ndjson") and (target.is_file() or not target.exists()):
        raise UserError(f"--out={out}: what is written is JSON lines, a row each; name it .jsonl")
    return target


def json_line(row: Any) -> str:
    """`row` as a line. What JSON has no word for, a date or a decimal, is its text, and a number that is none is null. Raises
    UserError for bytes, which have none."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_worded) + "\n"
    except ValueError:
        return json.dumps(_finite(row), ensure_ascii=False, default=_worded) + "\n"


def _worded(held: Any) -> str:
    if isinstance(held, bytes):
        raise UserError(f"a row holds bytes ({held[:8]!r}...), which JSON lines have no form for; take out that column first")
    return str(held)


def _finite(held: Any) -> Any:
    if isinstance(held, dict):
        return {key: _finite(inner) for key, inner in held.items()}
    if isinstance(held, (list, tuple)):
        return [_finite(inner) for inner in held]
    return None if isinstance(held, float) and not math.isfinite(held) else held


class Journal:
    """JSON objects, a line each, that outlast the program: `with Journal(path) as journal: journal.add({...})`.

    `held` is what was there. A last line that a kill left half-written is as good as absent.
    """

    def __init__(self, path: Path):
        raw = path.read_bytes() if path.exists() else b""
        self.held: list[dict[str, Any]] = []
        for line in raw.split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                self.held.append(row)
        self.file = path.open("ab", buffering=0)  # a line is with the kernel when it is written
        if raw and not raw.endswith(b"\n"):
            self.file.write(b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def clear(self) -> None:
        if self.held:
            self.held.clear()
            self.file.truncate(0)

    def add(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")


def not_utf8(byte: int, offset: int) -> RowError:
    return RowError(
        "",
        f"is not UTF-8: byte 0x{byte:02x} at offset {offset} of the file; convert it: iconv -f ITS_ENCODING -t UTF-8 (latin1, "
        "cp1252, GB18030, ...)",
    )
