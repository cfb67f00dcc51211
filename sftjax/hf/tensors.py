"""safetensors files, one tensor at a time: where each lies, a view of it, and a writer that never holds two.

    8 bytes: n, little-endian | n bytes: JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes, end to end

Views are memory maps of single tensors, opened when asked for: a checkpoint of any size is never resident as a whole,
and a tensor can be copied byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sftjax.config import UserError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MXFP4 = "_blocks", "_scales"  # ends of names whose tensors may be bytes: `hf.mxfp4` makes one of two
MAX_HEADER = 100_000_000  # the format's own bound
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        """The tensor, mapped and read-only; unmapped as soon as nothing refers to it."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape or (1,)).reshape(self.shape)

    def take(self, index: tuple[slice, ...]) -> np.ndarray:
        """The tensor's part at `index`, a slice for each axis."""
        return self.view()[index]


def read(file: Path) -> dict[str, Stored]:
    """`{name: Stored}` of one file. Raises UserError where it is cut short, corrupt or of an unsupported dtype."""
    length = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        if start == b"version ":
            raise UserError(f"{file}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > min(length - 8, MAX_HEADER):
            raise UserError(f"{file}: not a whole safetensors file ({length} bytes); fetch it again")
        try:
            header = json.loads(f.read(size))
        except ValueError as e:
            raise UserError(f"{file}: its safetensors header is corrupt; fetch it again") from e
    header.pop("__metadata__", None)
    return {name: _stored(file, name, entry, 8 + size, length) for name, entry in header.items()}


def _stored(file: Path, name: str, entry: dict[str, Any], start: int, length: int) -> Stored:
    known = DTYPES | ({"U8": np.dtype(np.uint8)} if name.endswith(MXFP4) else {})
    if entry["dtype"] not in known:
        raise UserError(f"{file}: {name} is {entry['dtype']}; supported are {', '.join(known)}")
    dtype, shape = known[entry["dtype"]], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if last - first != dtype.itemsize * math.prod(shape):
        raise UserError(
            f"{file}: the header gives {name} {last - first} bytes for {entry['dtype']} {list(shape)}; fetch it again"
        )
    if start + last > length:
        raise UserError(f"{file}: cut short, {name} ends at byte {start + last} of {length}; fetch it again")
    return Stored(file, dtype, shape, start + first)


def read_dir(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint directory, single or sharded. Raises UserError that says what is missing."""
    single, index = directory / "model.safetensors", directory / INDEX
    if single.is_file():
        return read(single)
    if not index.is_file():
        other = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
        found = f"only {other[0]}" if other else "none"
        raise UserError(f"{directory}: sftjax reads safetensors only (model.safetensors or {INDEX}) and found {found}")
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as e:
        raise UserError(f"{index}: not a safetensors index (JSON with a weight_map)") from e
    tensors: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        if not (directory / name).is_file():
            raise UserError(f"{directory}: {INDEX} names {name}, which is not there; fetch it again")
        tensors |= read(directory / name)
    if lost := sorted(set(weight_map) - set(tensors)):
        raise UserError(f"{directory}: {INDEX} names {lost[0]}, which {weight_map[lost[0]]} does not hold")
    return tensors


@dataclass(frozen=True)
class Tensor:
    """One tensor to be written: `fetch` is called when its turn comes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes `tensors` in order, holding one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, t in tensors.items():
        header[name] = {"dtype": CODES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors start aligned
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, t in tensors.items():
            x = t.fetch()
            assert x.shape == t.shape and x.dtype == t.dtype, f"{name}: {x.dtype}{x.shape} for {t.dtype}{t.shape}"
            f.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def write_dir(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: float) -> None:
    """model.safetensors, or shards of at most `max_shard_bytes` (a larger tensor has its own) with their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, t in tensors.items():
        if shards[-1] and sum(s.nbytes for s in shards[-1].values()) + t.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = t
    if len(shards) == 1:
        return write(directory / "model.safetensors", shards[0])
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
