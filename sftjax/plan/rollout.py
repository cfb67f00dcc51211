"""What a step's answers take, where a policy learns from its own: a cache beside the run's state, and a pass for every token.

As generate.flight makes them: a slot for each answer, their number and the cache's positions powers of two, the weights in the
compute dtype. Every prompt and answer is taken to be as long as it may be, which is what must fit. Reward functions, and models
that reward, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from sftjax import sharding, tree
from sftjax.chips import Chip
from sftjax.generate.flight import AHEAD
from sftjax.generate.shapes import power
from sftjax.models.decoder import Cache, head, init_cache
from sftjax.plan.flops import count
from sftjax.plan.step import Dry, compiling_for
from sftjax.weights import kinds
from sftjax.weights.lora import still
from sftjax.weights.quantize import Quantised

LOGITS = 12  # bytes of each logit that is drawn from: itself, the noise and their sum


@dataclass(frozen=True)
class Rollout:
    """The answers of one step of `job` on a mesh of `sizes`."""

    job: Dry
    sizes: Mapping[str, int]

    @property
    def shards(self) -> int:
        return math.prod(self.sizes[axis] for axis in sharding.BATCH)

    @property
    def longest(self) -> int:
        """Tokens of an answer, which are as many passes."""
        return self.job.config[self.job.config.task].max_completion_length

    @property
    def slots(self) -> int:
        return power(self.job.rows, least=self.shards)

    @cached_property
    def cache(self) -> Cache:
        c = self.job.decoder.config
        return jax.eval_shape(partial(init_cache, c, self.slots, power(self.job.length, least=64), self.job.decoder.dtype))

    @cached_property
    def params(self) -> Any:
        return jax.eval_shape(lambda params: kinds.cast(still(params), self.job.decoder.dtype), self.job.params)

    @property
    def cached(self) -> float:
        """Bytes of the cache on one chip."""
        tensor = self.sizes["tensor"] if self.job.decoder.config.kv_heads % self.sizes["tensor"] == 0 else 1
        return sum(x.size * x.dtype.itemsize for x in self.cache) / self.shards / tensor

    def bytes(self) -> float:
        """On one chip, beside the run's state: the cache, weights that are not in the compute dtype, and a pass's logits."""
        c, tensor = self.job.decoder.config, self.sizes["tensor"]
        own = dict(tree.flatten(self.job.params))
        cut = "lower" in self.job.params  # its two stacks become one, which is another
        copied = sum(
            x.size * x.dtype.itemsize
            for path, w in tree.flatten(self.params).items()
            for x, was in zip(jax.tree.leaves(w), jax.tree.leaves(own[path]))
            if x.dtype != was.dtype or (cut and path.startswith(("lower/", "layers/")))
        )
        grown = 1.5 if self.longest > AHEAD else 1.0  # when it has doubled, it is there beside its half
        return grown * self.cached + copied / self.sizes["fsdp"] / tensor + LOGITS * self.slots * c.vocab / self.shards / tensor

    @cached_property
    def a_pass(self) -> float:
        """FLOPs of all chips for a token of every answer."""
        job, c = self.job, self.job.decoder.config
        ids = jax.ShapeDtypeStruct((self.slots, 1), jnp.int32)
        decoder = replace(job.decoder, remat="none")

        def one(params: Any, ids: Any, cache: Cache) -> Any:
            hidden, cache, _ = decoder.apply({"params": params}, ids, ids, ids, cache)  # type: ignore[misc]
            return kinds.matmul(hidden, head(params, c)), cache

        with compiling_for(job.platform):
            return count(one, self.params, ids, self.cache).flops

    def seconds(self, chip: Chip, devices: int, efficiency: float) -> float:
        """The prompts, then a pass for every token, which reads the weights, that fsdp's chips fetch from each other, and the
        cache; then each that is to look at the answers does so, at all of them at once.
        """
        assert chip.flops and chip.bandwidth and self.job.acting
        fsdp = self.sizes["fsdp"]
        weights = self.read() / self.sizes["tensor"]
        once = self.a_pass / devices / chip.flops
        fetched = weights * (fsdp - 1) / fsdp / (chip.link / 2) if fsdp > 1 else 0.0
        passes = self.longest * max(once, (weights + self.cached) / chip.bandwidth, fetched)
        length, looks = self.job.length, self.job.acting.looks
        return (passes + (length - self.longest) * once + looks * length * once) / efficiency

    def read(self) -> float:
        """Bytes of the weights that a pass reads; what is quantised is written wide, and read again."""
        width = jnp.dtype(self.job.decoder.dtype).itemsize
        whole = jax.tree.leaves(self.params, is_leaf=lambda w: isinstance(w, Quantised))
        wide = sum(2 * math.prod(w.shape) * width for w in whole if isinstance(w, Quantised))
        return wide + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.params))
