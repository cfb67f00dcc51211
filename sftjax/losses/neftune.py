"""NEFTune: embeddings plus uniform(-1, 1) * alpha / sqrt(L * D), L the row's own length. arXiv:2310.05914, algorithm 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from sftjax.data.batch import Batch
from sftjax.losses.tokens import Forward
from sftjax.models.layers import segment_lengths


def neftune(forward: Forward, *, alpha: float) -> Forward:
    """The same forward with noisy embeddings wherever it is given a key. In a packed row L is the segment's length."""

    def noisy(params, batch: Batch, key: Array | None = None):
        if key is None:
            return forward(params, batch)
        noise_key, key = jax.random.split(key)
        lengths = segment_lengths(batch.positions, batch.segments)[..., None]

        def add(x: Array) -> Array:  # [B, T, D]
            size = alpha * jax.lax.rsqrt((lengths * x.shape[-1]).astype(jnp.float32))
            return x + (size * jax.random.uniform(noise_key, x.shape, jnp.float32, -1, 1)).astype(x.dtype)

        return forward(params, batch, key, on_embed=add)

    return noisy
