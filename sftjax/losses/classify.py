"""Classification by a score head: cross entropy of the labels, -log softmax(h_T @ W)[label] of each text.

    tokens     x_1  x_2  ...  x_T  label        the label's number stands where a token would follow the text
    weights     0    0   ...   0     1

so that rows of labels are packed, cut and sharded as any other; no position of the text sees its label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sftjax.data.batch import Batch
from sftjax.losses.tokens import Forward, Loss, shift
from sftjax.models.heads import token_scores


def classify(forward: Forward, *, class_weights: Sequence[float] = (), label_smoothing: float = 0.0) -> Loss:
    """`(params, batch, key) -> (sum, count, {"accuracy": sum})` over the texts of a batch.

    class_weights    what a text of each label counts, in the loss, the count and the accuracy; () = one
    label_smoothing  s of (1 - s) * nll + s * mean over the labels of -log p

    Where several labels score the same, each is right in its share: a new head, which says nothing, is right 1 / C of the time.
    """
    weighed = jnp.asarray(class_weights, jnp.float32) if len(class_weights) else None

    def loss(params: Any, batch: Batch, key: Array | None = None) -> tuple[Array, Array, dict[str, Array]]:
        targets, weights = shift(batch)
        targets = jnp.where(weights > 0, targets, 0)
        if weighed is not None:
            weights = weights * weighed[targets]
        scores = token_scores(forward(params, batch, key))  # [B, T, C]
        logps = jax.nn.log_softmax(scores)
        own = jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
        nll = -jnp.take_along_axis(logps, targets[..., None], -1)[..., 0]
        top = scores.max(-1)
        right = (own == top) / (scores == top[..., None]).sum(-1)
        each = (1 - label_smoothing) * nll - label_smoothing * logps.mean(-1) if label_smoothing else nll
        return (weights * each).sum(), weights.sum(), {"accuracy": jax.lax.stop_gradient((weights * right).sum())}

    return loss


def predicted(forward: Forward) -> Any:
    """`(params, batch) -> [C, C]` int32: texts of label i (rows) that are taken for label j (columns)."""

    def run(params: Any, batch: Batch) -> Array:
        targets, weights = shift(batch)
        scores = token_scores(forward(params, batch, None))
        C, counted = scores.shape[-1], weights > 0
        cell = jnp.where(counted, C * targets + scores.argmax(-1), C * C)
        return jnp.zeros(C * C + 1, jnp.int32).at[cell].add(1)[: C * C].reshape(C, C)

    return run
