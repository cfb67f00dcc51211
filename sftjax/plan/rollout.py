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

from sftjax import sharding
from sftjax.generate.shapes import power
from sftjax.models.decoder import Cache, head, init_cache
from sftjax.plan.chips import Chip
from sftjax.plan.flops import count
from sftjax.plan.step import Dry, compiling_for
from sftjax.weights import kinds

LOGITS = 12  # bytes of each logit that is drawn from: itself, the noise and their sum
GROWN = 1.5  # a cache that has doubled is there beside its half


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
        return self.job.config.grpo.max_completion_length

    @property
    def slots(self) -> int:
        return power(self.job.rows, least=self.shards)

    @cached_property
    def cache(self) -> Cache:
        c = self.job.decoder.config
        return jax.eval_shape(partial(init_cache, c, self.slots, power(self.job.length, least=64), self.job.decoder.dtype))

    @cached_property
    def params(self) -> Any:
        return jax.eval_shape(partial(kinds.cast, dtype=self.job.decoder.dtype), self.job.params)

    def bytes(self) -> float:
        """On one chip, beside the run's state: the cache, weights that are not in the compute dtype, and a pass's logits."""
        c, tensor = self.job.decoder.config, self.sizes["tensor"]
        pairs = zip(jax.tree.leaves(self.params), jax.tree.leaves(self.job.params))
        copied = sum(x.size * x.dtype.itemsize for x, own in pairs if x.dtype != own.dtype)
        cache = GROWN * nbytes(self.cache) / self.shards / (tensor if c.kv_heads % tensor == 0 else 1)
        return cache + copied / self.sizes["fsdp"] / tensor + LOGITS * self.slots * c.vocab / self.shards / tensor

    @cached_property
    def flops(self) -> float:
        """Of all chips: every token of a prompt and of an answer passes once."""
        job, c = self.job, self.job.decoder.config
        ids = jax.ShapeDtypeStruct((self.slots, 1), jnp.int32)
        decoder = replace(job.decoder, remat="none")

        def one(params: Any, ids: Any, cache: Cache) -> Any:
            hidden, cache, _ = decoder.apply({"params": params}, ids, ids, ids, cache)  # type: ignore[misc]
            return kinds.matmul(hidden, head(params, c)), cache

        with compiling_for(job.platform):
            a_pass = count(one, self.params, ids, self.cache).flops
        return a_pass * job.length

    def seconds(self, chip: Chip, devices: int, efficiency: float) -> float:
        """Every pass reads the weights, which fsdp's chips fetch from each other, and the cache. Then who is to be compared
        with the policy looks at the answers, all at once."""
        assert chip.flops and chip.bandwidth
        tensor, fsdp = self.sizes["tensor"], self.sizes["fsdp"]
        weights = nbytes(self.params) / tensor
        c = self.job.config.grpo
        looks = bool(c.beta) + (c.num_iterations * c.num_mini_batches > 1)  # of the reference, and of the policy that answered
        once = self.flops / devices / chip.flops
        read = self.longest * (weights + nbytes(self.cache) / self.shards / tensor) / chip.bandwidth
        fetched = self.longest * weights * (fsdp - 1) / fsdp / (chip.link / 2) if fsdp > 1 else 0.0
        return (max(once, read, fetched) + looks * once) / efficiency


def nbytes(part: Any) -> float:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part))
