"""Bytes on one chip while a step runs, from shapes alone.

    peak = parameters + optimiser + gradients + kept for the backward pass + temporaries + the program

Parameters, moments and gradients are exact: every array's share under the mesh. What the backward pass keeps is asked of jax
itself: the residuals of the decoder's vjp, by rematerialisation policy. Temporaries are the dearest of three moments: a layer's
backward pass, a block of logits, the update; how much of a layer is alive at once was fitted to what a TPU's compiler lays
out (`tests/golden_plan.py`; the estimates are within 15 % of it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from sftjax import sharding, tree
from sftjax.data.batch import Batch
from sftjax.losses.tokens import block_size
from sftjax.models.decoder import REMAT, Decoder, forward
from sftjax.plan.rollout import Rollout
from sftjax.plan.step import Dry, Learner, abstract_mesh, compiling_for, placed
from sftjax.weights.quantize import Quantised

POLICIES = ("none", *REMAT)
ALIVE = 0.7  # of what a layer's backward pass computes again, the share that is alive at once
LOGITS = 6  # bytes of each logit of a block: itself in float32, and its gradient; twice where an entropy is taken of them
PROGRAM = 0.06 * 2**30
ANSWERS = "or answers under way, more"
T = 384  # tokens that a decoder is traced with: what it keeps grows as they do


@dataclass(frozen=True)
class Kept:
    """Bytes that a decoder keeps for its backward pass: for a token, of them those that `tensor` splits, and for any number."""

    token: float
    split: float
    constant: float

    def bytes(self, tokens: float, tensor: int) -> float:
        return tokens * (self.token - self.split + self.split / tensor) + self.constant


@dataclass
class Memory:
    """Bytes on one chip by what they are, in the order of the table."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def update(self) -> float:
        """The peak of a step's update alone, which is all of the step where no answers come before it."""
        return self.peak - self.parts.get(ANSWERS, 0.0)


def kept(job: Dry, remat: str) -> Kept:
    """What the vjp of all that learns keeps under a rematerialisation policy, its own inputs not counted."""
    each = [kept_by(learner, remat, job.platform) for learner in job.learners]
    return Kept(sum(k.token for k in each), sum(k.split for k in each), sum(k.constant for k in each))


def kept_by(learner: Learner, remat: str, platform: str) -> Kept:
    d = learner.decoder
    decoder = Decoder(d.config, d.dtype, d.scan, remat, d.lower)
    batch = Batch(*(jax.ShapeDtypeStruct((1, T), t) for t in (jnp.int32, jnp.float32, jnp.int32, jnp.int32)))

    def residuals(trainable: Any, frozen: Any, batch: Batch) -> list[Any]:
        hidden = lambda t: forward(decoder)(tree.join(t, frozen), batch).hidden  # noqa: E731
        return jax.tree.leaves(jax.vjp(hidden, trainable)[1])

    with compiling_for(platform):
        jaxpr = jax.make_jaxpr(residuals)(learner.trainable, learner.frozen, batch).jaxpr
    given = {id(v) for v in jaxpr.invars}
    found: dict[int, Any] = {id(v): v.aval for v in jaxpr.outvars if isinstance(v, Var) and id(v) not in given}
    weights = {x.size for x in jax.tree.leaves((learner.trainable, learner.frozen))}
    token = split = constant = 0.0
    for x in found.values():
        nbytes = x.size * x.dtype.itemsize
        if x.memory_space == jax.memory.Space.Host:  # offloaded
            continue
        if x.size in weights:  # a kernel cast to the compute dtype
            constant += nbytes
        else:
            token += nbytes / T
            split += nbytes / T if x.shape[-1:] != (d.config.width,) and x.size > d.config.layers * T * 64 else 0
    return Kept(token, split, constant)


def total(part: Any, host: bool = False) -> float:
    """Bytes on one chip of a tree of shapes with shardings; with `host`, in the host's memory for it."""
    here = [x for x in jax.tree.leaves(part) if (x.sharding.memory_kind == "pinned_host") == host]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in here)


def once(part: Any) -> Any:
    """Without the arrays that came before: a base that several models share."""
    arrays, structure = jax.tree.flatten(part)
    first = {id(x): i for i, x in reversed([*enumerate(arrays)])}
    return jax.tree.unflatten(structure, [x if first[id(x)] == i else None for i, x in enumerate(arrays)])


@dataclass
class Estimator:
    """A job on a mesh of `sizes`; `at(rows)` is its memory with so many rows at a time on one chip."""

    job: Dry
    sizes: Mapping[str, int]
    policies: dict[str, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        job, mesh = self.job, abstract_mesh(dict(self.sizes))
        state, frozen, _ = placed(job, mesh)
        passed, frozen = total(frozen), once(frozen)
        self.parameters = by_kind(frozen, state.trainable)
        self.trained, self.frozen, self.optimiser = total(state.trainable), total(frozen), total(state.opt_state)
        self.shared = passed - self.frozen  # bytes that the step is given more than once
        self.offloaded = total(state.opt_state, host=True)
        self.rollout = Rollout(job, self.sizes) if job.acting else None
        self.wide = wide_kernel(job, self.sizes)
        head = next((name for name in ("score", "head") if name in job.params), "embed")
        self.head_trains = bool(jax.tree.leaves(state.trainable.get(head)))
        # a tied head's gradient and the embedding's are two until they are summed
        self.tied = total(state.trainable["embed"]) if job.decoder.config.tied else 0.0

    @property
    def shards(self) -> int:
        """Over how many chips a batch is split."""
        return math.prod(self.sizes[axis] for axis in sharding.BATCH)

    @property
    def rows(self) -> float:
        """Rows at a time on one chip, as the config says."""
        return self.job.rows / self.job.micro_batches / self.shards

    def tokens(self, rows: float | None = None) -> float:
        """Tokens at a time on one chip."""
        return (rows or self.rows) * self.job.length / self.sizes["sequence"]

    def kept(self, remat: str) -> Kept:
        if remat not in self.policies:
            self.policies[remat] = kept(self.job, remat)
        return self.policies[remat]

    def at(self, rows: float | None = None, remat: str | None = None) -> Memory:
        job, c = self.job, self.job.decoder.config
        rows, remat = rows or self.rows, remat or job.decoder.remat
        tokens, tensor = self.tokens(rows), self.sizes["tensor"]
        keeps, whole = self.kept(remat).bytes(tokens, tensor), self.kept("none").bytes(tokens, tensor)
        width, outputs = jnp.dtype(job.decoder.dtype).itemsize, len(c.labels) or c.vocab
        hidden = 3 * tokens * c.width * width  # after the last layer: itself, normed, its gradient
        layer = (
            ALIVE * max(whole - keeps, 0) / len(job.learners) / (c.layers - job.decoder.lower)
            + 2 * tokens * c.width * width
            + self.wide
        )
        with compiling_for(job.platform):
            block = max(block_size(self.head_trains), rows * outputs / tensor)  # a token of each row at least
        logits = LOGITS * (2 if job.acting and job.acting.entropy else 1) * min(block, tokens * outputs / tensor)
        parts = {**self.parameters, "optimiser": self.optimiser}
        parts["gradients"] = self.trained * (2 if job.accumulates else 1) + self.tied
        parts[f"activations kept (remat={remat})"] = keeps
        parts["logits block"] = logits
        parts["or a layer's temporaries, more"] = max(0.0, layer - logits, hidden - logits)  # they come after the logits
        if self.offloaded:  # all of it comes for the update, when these are gone
            parts["optimiser, in passing"] = max(0.0, self.offloaded - keeps - max(logits, layer, hidden))
        if self.rollout:  # the update comes after its answers
            update = keeps + max(logits, layer, hidden) + parts["gradients"] + parts.get("optimiser, in passing", 0.0)
            parts[ANSWERS] = max(0.0, self.rollout.bytes() - update)
        parts["program"] = PROGRAM
        return Memory(parts)


def by_kind(frozen: Any, trained: Any) -> dict[str, float]:
    """{"frozen nf4": bytes on one chip, "frozen bfloat16": ..., "trained float32": ...}."""
    out: dict[str, float] = {}
    for part, name in ((frozen, "frozen"), (trained, "trained")):
        for w in jax.tree.leaves(part, is_leaf=lambda x: isinstance(x, Quantised)):
            if nbytes := total(w):  # of what trains, a quantised base is a hole
                kind = type(w).__name__.lower() if isinstance(w, Quantised) else str(w.dtype)
                out[f"{name} {kind}"] = out.get(f"{name} {kind}", 0) + nbytes
    return out


def wide_kernel(job: Dry, sizes: Mapping[str, int]) -> float:
    """Bytes of the widest layer's kernel made whole for its product: dequantised, or gathered from its shards."""
    width = jnp.dtype(job.decoder.dtype).itemsize
    widest = 0.0
    for path, w in tree.flatten(job.params).items():
        if path.startswith(("layers/", "lower/")) and path.endswith("kernel"):
            base = w
            while hasattr(base, "base"):
                base = base.base
            if isinstance(base, Quantised) or sizes["fsdp"] > 1 or base.dtype.itemsize != width:
                shards = sizes["tensor"] * (sizes["expert"] if "/experts/" in path else 1)
                widest = max(widest, math.prod(base.shape[1:]) * width / shards)
    return 2 * widest
