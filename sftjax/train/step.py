"""One training step: sum the gradients of micro-batches, divide once by what they counted, clip, update.

    g = (sum over micro-batches of d loss_sum) / (sum of counts)

so a step does not depend on how its batch is cut. Where the loss or a gradient is not finite nothing is updated and the
step is counted as bad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sftjax import tree
from sftjax.data.batch import Batch
from sftjax.losses.tokens import Loss


class State(NamedTuple):
    """What a step changes, and all that a checkpoint must hold of it."""

    step: Array  # int32, steps taken, bad ones too
    trainable: Any
    opt_state: Any
    bad: Array  # int32, bad steps in a row
    skipped: Array  # int32, bad steps in all


def init_state(trainable: Any, optimizer: optax.GradientTransformation) -> State:
    step, bad, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: each is donated
    return State(step, trainable, optimizer.init(trainable), bad, skipped)


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, seed: int, micro_batches: int = 1, clip: float = 0.0
) -> Callable[[State, Any, Batch], tuple[State, dict[str, Array]]]:
    """`(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    The batch is [B, T] with B a multiple of `micro_batches`. `clip` bounds the global gradient norm; 0 is off.
    Metrics: loss (per counted token), grad_norm (before clipping), tokens, trained_tokens, and each of the loss's own sums
    divided by the count.
    """

    def sums(trainable: Any, frozen: Any, batch: Batch, key: Array) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        total, count, metrics = loss(tree.join(trainable, frozen), batch, key)
        return total, (count, metrics)

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad = jax.value_and_grad(sums, has_aux=True)

        def micro(i: Array | int, part: Batch) -> Any:
            (total, (count, metrics)), grads = grad(state.trainable, frozen, part, jax.random.fold_in(key, i))
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), total, count, metrics

        if micro_batches == 1:
            grads, total, count, metrics = micro(0, batch)
        else:
            # rows are dealt out, so that a batch sharded over devices stays sharded in every micro-batch
            parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
            first = jax.tree.map(lambda x: x[0], parts)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, 0, first))

            def add(sums: Any, xs: Any) -> Any:
                return jax.tree.map(jnp.add, sums, micro(*xs)), None

            (grads, total, count, metrics), _ = jax.lax.scan(add, zeros, (jnp.arange(micro_batches), parts))

        count_or_1 = jnp.maximum(count, 1e-9)  # a batch that counts nothing has zero gradients
        norm = optax.tree.norm(grads) / count_or_1
        scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-9)) if clip else 1.0
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        def update(state: State) -> State:
            mean = jax.tree.map(lambda g, p: (g * (scale / count_or_1)).astype(p.dtype), grads, state.trainable)
            updates, opt_state = optimizer.update(mean, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            return State(state.step + 1, trainable, opt_state, jnp.zeros_like(state.bad), state.skipped)

        def skip(state: State) -> State:
            return state._replace(step=state.step + 1, bad=state.bad + 1, skipped=state.skipped + 1)

        state = jax.lax.cond(finite, update, skip, state)
        shown = {"loss": total / count_or_1} | {name: value / count_or_1 for name, value in metrics.items()}
        counts = {"tokens": (batch.segments > 0).sum(), "trained_tokens": (batch.weights > 0).sum()}
        return state, shown | counts | {"grad_norm": norm, "bad": state.bad, "skipped": state.skipped}

    return step
