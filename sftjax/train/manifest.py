"""The manifest: what a run was made of, by content, so that a resumed run is known to be the same one.

    {"created", "versions", "device", "config": {"optim.lr": 1e-4, ...},
     "hashes": {"data", "template", "tokenizer", "base", "adapter", "rewards"}, "data": rows by reason, tokens, "lengths"}

Hashes are sha256. Weights may be many gigabytes, so of each safetensors file its header (every tensor's name, shape, dtype and
place) counts, of every tensor the first and last 4 KiB, and of embeddings and heads the beginning of each row, since training may
change those of a few tokens. Whatever else is trained changes everywhere: two checkpoints are told apart, one number changed by
hand may not be.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax import config as schema
from sftjax.config import UserError
from sftjax.hf import tensors
from sftjax.train.run import clean

PACKAGES = ("sftjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "safetensors")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
# keys that change only logging, checkpointing, placement or recomputation: free to change on resume
FREE = {
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.sequence",
    "mesh.expert",
    "model.scan",
    "model.remat",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.tensorboard",
    "train.generate_every",
    "train.max_bad_steps",
    "eval.metrics",
    "data.workers",
    "data.cache_dir",
    "data.on_bad_row",  # the rows kept are in the data's hash
}
# keys that only say where something lies -> the hash that says what lies there
PLACES = {"model.path": "base", "model.revision": "base", "model.adapter": "adapter", "data.template": "template"}
EDGE = 2**12  # bytes
ROWS = re.compile(r"embed|head|score")


def manifest(
    config: ConfigDict,
    *,
    data_report: Mapping[str, Any],
    data_hash: str,
    template: str | None,
    base_dir: Path,
    adapter_dir: Path | None = None,
    tokenizer_dir: Path | None = None,
    lengths: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of a run about to start. `data_hash` is the pipeline's; `lengths` is a `length_histogram`.

    `tokenizer_dir` None is `base_dir`.
    """
    import jax

    devices = jax.devices()
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
        "config": leaves(clean(config)[0]),
        "hashes": {
            "data": data_hash,
            "template": hash_template(template),
            "tokenizer": hash_tokenizer(tokenizer_dir or base_dir),
            "base": hash_weights(base_dir),
            "adapter": hash_weights(adapter_dir) if adapter_dir else None,
        },
        "data": {**data_report, **({"lengths": lengths} if lengths else {})},
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What keeps `new` from continuing a run whose manifest was `old`, a sentence each; [] where nothing does.

    ["config.optim.lr: 1e-4 -> 2e-4", "data: contents changed"]

    A key that `old` lacks, because an older sftjax wrote it, counts as its default. A model or template that only moved is
    no change: its hash speaks for it. Other versions and devices are no change either.
    """
    before, after = old.get("hashes", {}), new.get("hashes", {})
    changed = [part for part in after if part in before and before[part] != after[part]]
    defaults = leaves(clean(schema.default())[0])
    a, b = (leaves(clean(m.get("config", {}))[0]) for m in (old, new))
    out = []
    for key in [*b, *(key for key in a if key not in b)]:
        was, now = a.get(key, defaults.get(key)), b.get(key)
        same_thing = key in PLACES and before.get(PLACES[key]) and PLACES[key] not in changed
        if was != now and key not in FREE and not same_thing:
            out.append(f"config.{key}: {show(was)} -> {show(now)}")
    return out + [f"{part}: contents changed" for part in changed]


def length_histogram(lengths: Any, trained: Any = None, bins: int = 24) -> dict[str, list[int]]:
    """How many rows have edges[i] <= tokens < edges[i + 1]; `trained_counts` the same for their trained tokens."""
    lengths = np.asarray(lengths, np.int64)
    top = int(lengths.max()) + 1 if lengths.size else 1
    width = max(1, -(-top // bins))
    edges = np.arange(0, top + width, width)
    out = {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}
    if trained is not None:
        out["trained_counts"] = np.histogram(np.asarray(trained, np.int64), edges)[0].tolist()
    return out


def hash_weights(directory: Path) -> str:
    """Of config.json (adapter_config.json) and every *.safetensors in `directory`, as the module says."""
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (directory / name).is_file():
            digest.update(name.encode() + (directory / name).read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name}\0{hash_file(path.resolve(), stat.st_size, stat.st_mtime_ns)}\0".encode())
    return digest.hexdigest()


@functools.cache  # the base of several models is read once
def hash_file(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256(f"{size}\0".encode())
    with path.open("rb") as file:
        try:
            stored = tensors.read(path)
        except UserError:  # damaged, which loading tells of, or nothing that we load
            return hashlib.file_digest(file, "sha256").hexdigest()
        for name, tensor in stored.items():
            digest.update(f"{name}\0{tensor.dtype}{tensor.shape}{tensor.offset}\0".encode())
            if ROWS.search(name) and len(tensor.shape) == 2:
                digest.update(tensor.view()[:, :16].tobytes())
            end = tensor.offset + tensor.dtype.itemsize * math.prod(tensor.shape)
            for start in sorted({tensor.offset, max(tensor.offset, end - EDGE)}):
                digest.update(os.pread(file.fileno(), min(EDGE, end - start), start))
    return digest.hexdigest()


def hash_tokenizer(directory: Path) -> str:
    """Of every file that makes a tokenizer; the chat template has a hash of its own."""
    digest = hashlib.sha256()
    for name in TOKENIZER:
        if (directory / name).is_file():
            digest.update(f"{name}\0".encode() + hashlib.sha256((directory / name).read_bytes()).digest())
    return digest.hexdigest()


def hash_template(template: str | None) -> str | None:
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a nested dict; an empty dict is a value."""
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return out


def show(value: Any) -> str:
    """A value as one would type it: 1e-4 for 0.0001."""
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{Decimal(repr(value)):e}".replace("e-0", "e-")
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
