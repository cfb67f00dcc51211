"""Held-out loss by row: what training's evaluation sums over batches, summed over the tokens of each row instead.

loss = sum of weight * -log p / sum of weights,  perplexity = exp(loss)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from sftjax import hosts
from sftjax.data.batch import Batch
from sftjax.data.rows import Rows
from sftjax.data.stream import eval_batches
from sftjax.evaluate.metrics import Sums, ratio
from sftjax.losses.tokens import Forward, logprobs, shift


def row_losses(forward: Forward, params: Any, rows: Rows, *, batch_size: int, max_length: int, mesh: Mesh) -> Sums:
    """Sums whose figure is the loss: [weighted -log p, weights] of each of `rows`, in the batches that training evaluates on."""
    bins = rows.plan(seed=0, epoch=0, max_length=max_length, packing=True)
    counted = jax.jit(lambda params, batch: token_losses(forward, params, batch))
    out = np.zeros((2, len(rows)))
    at = 0
    for batch in eval_batches(rows, batch_size, max_length):
        losses, weights = jax.device_get(counted(params, hosts.to_devices(batch, mesh)))
        for b in range(min(batch_size, len(bins) - at)):
            for n, (row, _, _) in enumerate(bins[at + b]):
                mine = (batch.segments[b] > n * rows.slots) & (batch.segments[b] <= (n + 1) * rows.slots)
                out[:, row] += losses[b, mine].sum(dtype=float), weights[b, mine].sum(dtype=float)
        at += batch_size
    return ratio(*out)


def token_losses(forward: Forward, params: Any, batch: Batch) -> tuple[Array, Array]:
    """(weight * -log p, weight), [B, T] each, where the token before stands."""
    hidden, head, *_ = forward(params, batch, None)
    targets, weights = shift(batch)
    return jnp.where(weights > 0, -weights * logprobs(hidden, head, targets), 0.0), weights


def perplexity(loss: Sums) -> Sums:
    """exp of the loss, of the same rows."""
    return Sums(loss.rows, lambda x: np.exp(np.minimum(loss.figure(x), 700)))
