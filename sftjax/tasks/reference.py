"""The reference of a preference loss: the model as training began, in as little memory as it takes.

An adapter that starts as nothing is left off, and the reference costs not a byte. What trains as a whole, or goes on from an
adapter, is kept as it was beside the params:  {"layers": ..., "reference": {"layers": ...}}  where what is frozen is shared.
Precomputed, it is a column of log-probs beside the tokens, made once before the first step and kept by content.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sftjax import hosts, tree
from sftjax.data import cache, pipeline
from sftjax.data.rows import Rows
from sftjax.data.stream import eval_batches
from sftjax.losses import token_logps
from sftjax.tasks.job import Job, eval_rows
from sftjax.train.manifest import FREE, PLACES, leaves
from sftjax.train.run import clean
from sftjax.weights import kinds
from sftjax.weights.lora import without

VERSION = 2  # of what a token's log-prob is; part of every key
# of a config, what decides how a run begins: where the reference is the model before its adapter, and where it is not
BEFORE, BEGINS = ("model", "tokens"), ("model", "tokens", "method", "lora", "freeze", "adapter", "seed")


def precomputed(config: ConfigDict) -> bool:
    return config.task in ("dpo", "kto") and config[config.task].precompute_ref_log_probs


def reference(job: Job) -> Callable[[Any], Any] | str:
    """`params -> params` of the reference, for `losses.dpo`, or "batch". What it needs is put into the job."""
    if precomputed(job.config):
        precompute(job)
        return "batch"
    if leaves_off(job):
        return without
    # the decoder computes in its own dtype, to which masters would be cast at every use
    began = kinds.cast(job.trainable, job.decoder.dtype)
    began = jax.tree.map(lambda x, y: jnp.copy(x) if x is y else y, job.trainable, began)  # training is given those away
    job.say(f"reference: the model as it is now, {tree.count(began):,} parameters kept beside what trains")
    job.frozen = job.frozen | {"reference": tree.join(began, job.frozen)}
    job.trainable = job.trainable | {"reference": None}
    return itemgetter("reference")


def leaves_off(job: Job) -> bool:
    """Whether the reference is the model with all that trains left off."""
    c = job.config
    return c.method in ("lora", "adapter", "tokens") and not c.model.adapter and not job.base.modules


def precompute(job: Job) -> None:
    """Puts the log-probs of every row's tokens, as the model begins, beside the job's rows: from the cache, or made now."""
    root = pipeline.cache_root(job.config.data)
    params = tree.join(job.trainable, job.frozen)
    params = without(params) if leaves_off(job) else params
    logps = jax.jit(token_logps(job.forward))
    began, made = time.perf_counter(), 0
    rows: dict[str, Any] = {}
    for name in ("train", "eval", "test"):
        of: Rows = getattr(job.splits, name)
        key = cache_key(job, of)
        missing = not (root / key).exists()
        if hosts.which(missing):  # on one of them; all compute it
            made += len(of)
            found = column(job, logps, params, of)
            with hosts.agreeing():
                if missing:
                    with cache.entry(root, key) as place:
                        found.tofile(place / "reference.bin")
        rows[name] = replace(of, reference=cache.flat(root / key / "reference.bin", np.float32))
    job.splits = replace(job.splits, **rows)
    job.stream.rows = job.splits.train
    took = f"computed in {time.perf_counter() - began:.1f} s" if made else "from the cache"
    job.say(f"reference: log-probs of {sum(map(len, rows.values())):,} rows, {took}")


def column(job: Job, logps: Callable[..., jax.Array], params: Any, rows: Rows) -> np.ndarray:
    """[sum of lengths] float32: the log-probs of all rows' tokens, end to end."""
    out = np.zeros(int(rows.lengths.sum()), np.float32)
    if not len(rows):
        return out
    rows = replace(rows, shares=[1.0] * len(rows.stores))  # each row once, however often an epoch holds it
    most, at, size = job.config.data.max_length, 0, eval_rows(job.config)
    bins = rows.plan(seed=0, epoch=0, max_length=most, packing=True)
    with jax.set_mesh(job.mesh):
        for batch in eval_batches(rows, size, most, hosts.own_rows(job.mesh, size)):
            found = hosts.fetch(logps(params, hosts.to_devices(batch, job.mesh)))
            for line, bin in zip(found, range(at, min(at + size, len(bins)))):
                for row, _, stop in bins[bin]:
                    begin = rows.begins[row]
                    out[begin : begin + stop], line = line[:stop], line[stop:]
            at += size
    return out


def cache_key(job: Job, rows: Rows) -> str:
    """sha256 of all that decides the column: the base, the adapter and how the run begins over them, the rows' tokens."""
    config, groups = leaves(clean(job.config)[0]), BEFORE if leaves_off(job) else BEGINS
    decides = {
        "version": VERSION,
        "hashes": [job.manifest["hashes"][part] for part in ("base", "adapter", "tokenizer")],
        "begins": {k: v for k, v in config.items() if k.split(".")[0] in groups and k not in (*FREE, *PLACES)},
        "dtype": str(job.decoder.dtype),
        "tokens": [store.tokens_sha256 for store in rows.stores],
    }
    whole = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode())
    for column in (rows.store, rows.index, rows.lengths, rows.other):
        whole.update(b"" if column is None else np.ascontiguousarray(column, np.int64).tobytes())
    return whole.hexdigest()
