"""Files to raw rows, each with the line it starts on: .json .jsonl .csv .tsv .parquet .txt (.gz too), hub datasets.

A row that cannot be read comes as a RowError in its place, and reading goes on. In a .txt file a blank line ends a
row; a file without blank lines has one row a line. Everything streams but a .json, held as text, that is not JSON Lines.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftjax.config import UserError
from sftjax.data.example import RowError
from sftjax.data.lines import BOM, decode, numbered, open_bytes, reason, troubles
from sftjax.data.read_json import one_a_line, read_document, read_lines
from sftjax.data.read_table import read_table

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")  # owner/name[:subset[:split]]


def kind(path: str) -> str | None:
    """Which of SUFFIXES a path ends in, before an optional .gz."""
    suffix = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    suffix = {".ndjson": ".jsonl"}.get(suffix, suffix)
    return suffix if suffix in SUFFIXES and not path.lower().endswith(".parquet.gz") else None


def resolve(spec: str) -> list[str]:
    """The files that a path, a glob or a directory stands for, sorted; a hub id stands for itself. Raises UserError."""
    if "://" in spec:
        found = _remote(spec)
    else:
        path = os.path.expanduser(spec)
        if os.path.isfile(path):
            found = [path]
        elif os.path.isdir(path):
            found = _walk(path)
        elif glob.has_magic(path):
            found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p) and kind(p))
        elif HUB_ID.fullmatch(spec) and not kind(spec):
            return [spec]
        else:
            raise UserError(_missing(spec, path))
    if not found:
        raise UserError(f"{spec}: no data files there; read are {', '.join(SUFFIXES)}, and .gz of the text ones")
    if unknown := [path for path in found if not kind(path)]:
        raise UserError(f"{unknown[0]}: not a kind of file that is read: {', '.join(SUFFIXES)}, and .gz of the text ones")
    return found


def _walk(folder: str) -> list[str]:
    files = [p.relative_to(folder) for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    files = [p for p in files if not any(part.startswith(".") for part in p.parts)]
    arrow = {p.parent for p in files if p.suffix == ".arrow"}
    if saved := [str(p.parent) for p in files if p.name == "dataset_info.json" and p.parent in arrow]:
        what = "a dataset" if saved == ["."] else f"datasets ({', '.join(saved)})"
        raise UserError(
            f"{folder}: holds {what} saved with save_to_disk; write the one to read with to_parquet or to_json instead"
        )
    return sorted(os.path.join(folder, p) for p in files if kind(p.name))


def _missing(spec: str, path: str) -> str:
    folder, name = os.path.split(path)
    near: list[str] = []
    if os.path.isdir(folder or "."):
        near = difflib.get_close_matches(name, os.listdir(folder or "."), n=1)
    hint = f"; did you mean {os.path.join(folder, near[0])}?" if near else f" in {os.getcwd()}"
    return f"{spec}: no such file{hint}"


def _remote(spec: str) -> list[str]:
    import fsspec

    known = troubles(spec, ValueError, ImportError)
    try:
        system, path = fsspec.core.url_to_fs(spec)
        if glob.has_magic(path):
            found = system.glob(path)
        else:
            found = system.find(path) if system.isdir(path) else [path] if system.exists(path) else []
        scheme = spec.split("://")[0]
        return sorted(f"{scheme}://{str(p).lstrip('/')}" for p in found if kind(str(p)))
    except known as e:
        raise UserError(f"{spec}: cannot be reached: {reason(e)}") from e


def read(path: str, numbers: tuple[str, ...] = ()) -> Iterator[tuple[int, Any]]:
    """(line, row) of one file or hub id from `resolve`; a RowError in the place of a row that cannot be read.

    `numbers` names columns of a .csv or .tsv without a header by their position, from "0".
    """
    rows = _rows(path, numbers)
    first = next(rows, None)
    if first is None:
        yield 1, NoRows("", _without_rows(path))
        return
    yield first
    yield from rows


class NoRows(RowError):
    """In the place of a file's first row: it has none."""


def _without_rows(path: str) -> str:
    if kind(path) is None:
        return "has no rows"
    with open_bytes(path) as file:
        if all(not line.removeprefix(BOM).strip() for line in file):
            return "the file is empty"
    return "the file has a header line and no rows" if kind(path) in (".csv", ".tsv") else "the file has no rows"


def _rows(path: str, numbers: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    match kind(path):
        case None:
            yield from read_hub(path)
        case ".parquet":
            yield from read_parquet(path)
        case ".txt":
            yield from read_text(path)
        case ".json":
            with open_bytes(path) as file:
                lines = one_a_line(file)
                file.seek(0)
                yield from read_lines(file, path) if lines else read_document(file.read(), path)  # no name holds the bytes
        case ".jsonl":
            with open_bytes(path) as file:
                start = file.readline(64).removeprefix(BOM).strip()
                file.seek(0)
                whole = start == b"{" or start.startswith(b"[")  # an indented object or an array: a .json by another name
                yield from read_document(file.read(), path) if whole else read_lines(file, path)
        case suffix:
            with open_bytes(path) as file:
                yield from read_table(file, path, tabs=suffix == ".tsv", numbers=numbers)


def read_text(path: str) -> Iterator[tuple[int, Any]]:
    """{"text": block} of each block between blank lines, or of each line where no blank line parts two."""
    with open_bytes(path) as file:
        blocks = _parted(file)
    held: list[str] = []
    begin, bad = 0, None
    with open_bytes(path) as file:
        for line in numbered(file, path):
            if line.raw.strip():
                begin = begin or line.number
                try:
                    held.append(decode(line))
                except RowError as e:
                    bad = bad or e
            if begin and not (blocks and line.raw.strip()):
                yield begin, bad or {"text": "\n".join(held)}
                held, begin, bad = [], 0, None
    if begin:
        yield begin, bad or {"text": "\n".join(held)}


def _parted(file: Any) -> bool:
    text = gap = False
    for raw in file:
        blank = not raw.strip()
        if gap and not blank:
            return True
        text, gap = text or not blank, text and blank
    return False


def read_parquet(path: str) -> Iterator[tuple[int, Any]]:
    """The rows of a .parquet file, numbered from 1."""
    import pyarrow
    from pyarrow import parquet

    with open_bytes(path) as file:
        try:
            batches = parquet.ParquetFile(file).iter_batches(batch_size=1024)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield number, {name: present(cell) for name, cell in row.items()}
        except pyarrow.ArrowException as e:
            raise UserError(f"{path}: is not a Parquet file that can be read: {e}") from e


def read_hub(name: str) -> Iterator[tuple[int, Any]]:
    """The rows of a hub dataset `owner/name[:subset[:split]]` (split: train), numbered from 1."""
    import datasets
    from datasets.exceptions import DatasetsError

    repo, subset, split = (*name.split(":"), "", "")[:3]
    try:
        rows: Any = datasets.load_dataset(repo, subset or None, split=split or "train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as e:
        said = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"{name}: no such file here, and not to be had from the hub as a dataset: {said}") from e
    for number, row in enumerate(rows, 1):
        yield number, {name: present(cell) for name, cell in row.items()}


def present(value: Any) -> Any:
    """`value` without the keys that are null at any depth: Arrow gives every struct the keys of all the others."""
    if isinstance(value, dict):
        return {key: present(inner) for key, inner in value.items() if inner is not None}
    return [present(inner) for inner in value] if isinstance(value, list) else value
