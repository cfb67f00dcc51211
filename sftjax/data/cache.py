"""Store: the encoded rows of one source as flat files that are mapped, not read; and the cache of stores, by content.

    tokens.bin    int32    all rows end to end; offsets.npy [n + 1] says where each begins
    weights.bin   float32  the loss weight of each token
    examples.bin  bytes    what each row was made from, as JSON; example_offsets.npy
    rows.npy               per row: source, line, hashes of its content and its prompt, trained tokens, whether a terminator
                           ends them, whether it is a preference between equals
    parts.npy              the row's answers, each with its prompt: length, slot, where the answer begins; part_offsets.npy
    rejected.jsonl         rows that could not be used, with the reason
    meta.json              the source's files by name; two sha256, of tokens and weights, and of those with all else that the
                           rows say: labels, ranks, other columns; written last

A store holds every usable row of its source and decides nothing: splits, lengths and weights are applied when it is read,
so changing them costs no tokenisation. It appears under its key by a rename, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from sftjax.config import UserError
from sftjax.data.example import Answer, Example, Message
from sftjax.data.formats import Rejected
from sftjax.hf.staging import unfinished

VERSION = 8  # of what encoding a row means and how a store is laid out; part of every key
ROW = np.dtype(
    [
        *(("source", "<i4"), ("line", "<i8"), ("key", "<u8"), ("prompt", "<u8")),
        *(("trained", "<i8"), ("terminated", "?"), ("tied", "?")),
    ]
)
PART = np.dtype([("length", "<i4"), ("slot", "<i4"), ("answer", "<i4")])
PACK_ROW, PACK_PART = Struct("<iqQQq??").pack, Struct("<iii").pack  # the same, of plain numbers


class Row(NamedTuple):
    """One encoded row, on its way into a store."""

    source: str
    line: int
    key: int  # 64 bits of the hash of what the row says; of a preference, what it says with all its answers
    prompt: int  # 64 bits of the hash of a preference's prompt; else the key
    terminated: bool  # the last answer's terminator is trained, of each part
    tied: bool  # a preference between equals, which is none
    ids: np.ndarray
    weights: np.ndarray
    parts: Sequence[tuple[int, int]]  # (length, slot) of each answer with its prompt, end to end in ids
    example: bytes


class Store:
    """The rows of one source. Nothing is copied to memory but offsets and a few numbers a row."""

    def __init__(self, path: Path, files: Sequence[str]):
        """The store at `path`; `files` are the source's files as they are called today, in the order it was written from."""
        meta = json.loads((path / "meta.json").read_text("utf-8"))
        today = dict(zip(meta["files"], files))
        self.sources = [today[name] for name in meta["sources"]]
        self.tokens_sha256: str = meta["tokens_sha256"]
        self.rows_sha256: str = meta["rows_sha256"]
        self.rows = np.load(path / "rows.npy")
        self.offsets = np.load(path / "offsets.npy")
        self.example_offsets = np.load(path / "example_offsets.npy")
        self.parts = np.load(path / "parts.npy")
        self.part_offsets = np.load(path / "part_offsets.npy")
        self.tokens = flat(path / "tokens.bin", np.int32)
        self.weights = flat(path / "weights.bin", np.float32)
        self.examples = flat(path / "examples.bin", np.uint8)
        with (path / "rejected.jsonl").open(encoding="utf-8") as f:
            rejected = [Rejected(**json.loads(line)) for line in f]
        self.rejected = [replace(row, source=today[row.source]) for row in rejected]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        here = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[here], self.weights[here]

    def part(self, i: int) -> np.ndarray:
        """The parts of row i, as PART."""
        return self.parts[self.part_offsets[i] : self.part_offsets[i + 1]]

    def example(self, i: int) -> Example:
        text = self.examples[self.example_offsets[i] : self.example_offsets[i + 1]].tobytes()
        return loads(text, self.sources[self.rows["source"][i]], int(self.rows["line"][i]))

    def where(self, i: int) -> str:
        return f"{self.sources[self.rows['source'][i]]}:{self.rows['line'][i]}"


def flat(path: Path, dtype: type) -> np.ndarray:
    """A file of numbers, mapped; an empty file cannot be."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def write(path: Path, rows: Iterable[Row | Rejected], files: Sequence[str]) -> None:
    """Writes a store to the empty directory `path`, row by row; `files` are those the rows come from."""
    sources: dict[str, int] = {}
    # some 80 bytes a row are held: as objects of Python they would be 400, and gigabytes of millions of rows
    facts, parts = bytearray(), bytearray()
    offsets, example_offsets, part_offsets = array("q", [0]), array("q", [0]), array("q", [0])
    digest, whole = hashlib.sha256(), hashlib.sha256()
    with ExitStack() as stack:
        tokens, weights, examples = (
            stack.enter_context((path / f"{n}.bin").open("wb")) for n in ("tokens", "weights", "examples")
        )
        bad = stack.enter_context((path / "rejected.jsonl").open("w", encoding="utf-8"))
        for row in rows:
            if isinstance(row, Rejected):
                bad.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
                continue
            encoded = row.ids.astype(np.int32).tobytes(), row.weights.astype(np.float32).tobytes()
            for file, held in zip((tokens, weights), encoded):
                file.write(held)
                digest.update(held)  # row by row, so that where a row ends counts too
                whole.update(held)
            whole.update(json.dumps([row.tied, *row.parts]).encode() + row.example)
            examples.write(row.example)
            offsets.append(offsets[-1] + len(row.ids))
            example_offsets.append(example_offsets[-1] + len(row.example))
            at, trained = 0, []
            for length, slot in row.parts:
                counts = np.flatnonzero(row.weights[at + 1 : at + length])  # a first token has nothing to be predicted from
                parts += PACK_PART(length, slot, int(counts[0]) + 1 if len(counts) else length)
                trained.append(len(counts))
                at += length
            part_offsets.append(part_offsets[-1] + len(row.parts))
            count = sum(trained) if all(trained) else 0  # an answer without a trained token has nothing to be compared by
            source = sources.setdefault(row.source, len(sources))
            facts += PACK_ROW(source, row.line, row.key, row.prompt, count, row.terminated, row.tied)
    np.save(path / "rows.npy", np.frombuffer(facts, ROW))
    np.save(path / "parts.npy", np.frombuffer(parts, PART))
    np.save(path / "offsets.npy", np.frombuffer(offsets, np.int64))
    np.save(path / "example_offsets.npy", np.frombuffer(example_offsets, np.int64))
    np.save(path / "part_offsets.npy", np.frombuffer(part_offsets, np.int64))
    meta = {"files": list(files), "sources": list(sources), "tokens_sha256": digest.hexdigest()}
    meta["rows_sha256"] = whole.hexdigest()
    (path / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), "utf-8")


@contextmanager
def entry(root: Path, key: str) -> Iterator[Path]:
    """A new directory to fill, which becomes `root/key` when the block ends well and vanishes when it does not: at once, or where
    the process is killed, when the next entry begins."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        fresh = unfinished(root / "rows")
        fresh.mkdir()  # not by tempfile, whose directories are for one user alone
        try:
            yield fresh
            for path in (*fresh.iterdir(), fresh):
                sync(path)
            try:
                os.rename(fresh, root / key)
            except OSError:
                if not (root / key).exists():  # else another process was quicker, with the same content
                    raise
            sync(root)  # the rename itself
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as e:
        raise UserError(
            f"{root}: the tokenised data cannot be written ({e.strerror or e}); name another place with --config.data.cache_dir"
        ) from e


def sync(path: Path) -> None:
    """What a file or directory holds is on the disk, whatever happens to the power."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def content_key(example: Example) -> int:
    """64 bits of a hash of what the example says, wherever it stands and whatever its loss weights."""

    def plain(messages: Sequence[Message] | None) -> list[tuple[Any, ...]]:
        return [(m.role, m.content, m.extra) for m in messages or ()]

    whole = [plain(example.messages), example.completion, example.text, example.tools]
    if example.answers is not None:
        whole.append([(a.rank, a.said if isinstance(a.said, str) else plain(a.said)) for a in example.answers])
    said = json.dumps(whole, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "little")


def dumps(example: Example) -> bytes:
    """The example as JSON, without its place."""

    def plain(messages: Sequence[Message]) -> list[tuple[Any, ...]]:
        return [(m.role, m.content, m.loss, m.extra) for m in messages]

    answers = example.answers and [(a.said if isinstance(a.said, str) else plain(a.said), a.rank) for a in example.answers]
    fields = {
        "messages": example.messages and plain(example.messages),
        "completion": example.completion,
        "text": example.text,
        "tools": example.tools,
        "label": example.label,
        "answers": answers,
        "columns": example.columns,
        "tags": example.tags or None,
    }
    return json.dumps({k: v for k, v in fields.items() if v is not None}, ensure_ascii=False, default=str).encode()


def loads(text: bytes, source: str, line: int) -> Example:
    """The reverse of `dumps`."""

    def turns(held: list[list[Any]]) -> tuple[Message, ...]:
        return tuple(Message(*m) for m in held)

    fields = json.loads(text)
    if "messages" in fields:
        fields["messages"] = turns(fields["messages"])
    if "answers" in fields:
        fields["answers"] = tuple(Answer(s if isinstance(s, str) else turns(s), rank) for s, rank in fields["answers"])
    for name in ("completion", "tools", "tags"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return Example(source, line, **fields)
