"""One training step: sum the gradients of micro-batches, divide once by what they counted, clip, update.

    g = (sum over micro-batches of d loss_sum) / (sum of counts)

so a step does not depend on how its batch is cut. Where the loss or a gradient is not finite nothing is updated and the
step is counted as bad. `over_minibatches` makes of it a step that goes over a batch several times, with an update for each part.

In float16, which ends at 65504 and below at 6e-8, the sum is scaled before it is differentiated and its gradients are divided by
the same power of two (arXiv:1710.03740, section 3.2): `LossScale`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sftjax import sharding, tree
from sftjax.data.batch import Batch
from sftjax.losses.tokens import Loss

# Of a sum over a few thousand tokens, 16 is what others begin with of their mean, 2^16. Below LEAST no scale is to blame.
FIRST_SCALE, LEAST, GROWS_AFTER = 2.0**4, 2.0**-10, 200


class LossScale(NamedTuple):
    """Dynamic: halved where a gradient overflows, doubled after GROWS_AFTER steps without."""

    scale: Array  # float32, a power of two
    good: Array  # int32, steps since it changed

    def after(self, finite: Array, overflow: Array) -> LossScale:
        good = jnp.where(overflow, 0, self.good + finite)
        grows = good == GROWS_AFTER
        scale = jnp.where(overflow, self.scale / 2, jnp.where(grows, self.scale * 2, self.scale))
        return LossScale(scale, jnp.where(grows, 0, good))


class State(NamedTuple):
    """What a step changes, and all that a checkpoint must hold of it."""

    step: Array  # int32, steps taken, bad ones too
    trainable: Any
    opt_state: Any
    bad: Array  # int32, bad updates in a row
    skipped: Array  # int32, updates in all that updated nothing
    scale: LossScale | None = None  # of float16
    kept: Any = ()  # arrays that a task keeps from step to step, such as an adaptive coefficient


Step = Callable[[State, Any, Any], tuple[State, dict[str, Array]]]


def init_state(trainable: Any, optimizer: optax.GradientTransformation, dtype: Any = None, kept: Any = ()) -> State:
    """`dtype` is what the loss computes in: float16 needs a scale."""
    step, bad, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: each is donated
    scale = LossScale(jnp.asarray(FIRST_SCALE), jnp.zeros((), jnp.int32)) if dtype == jnp.float16 else None
    return State(step, trainable, optimizer.init(trainable), bad, skipped, scale, kept)


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, seed: int, micro_batches: int = 1, clip: float = 0.0
) -> Step:
    """`(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    The batch is [B, T] with B a multiple of `micro_batches`. `clip` bounds the global gradient norm; 0 is off.
    Metrics: loss (per counted token), grad_norm (before clipping), tokens, trained_tokens, and each of the loss's own sums
    divided by the count; of float16 loss_scale too, after the step.
    """

    def sums(
        trainable: Any, frozen: Any, batch: Batch, key: Array, scale: Array | None
    ) -> tuple[Array, tuple[Array, Array, dict[str, Array]]]:
        total, count, metrics = loss(tree.join(trainable, frozen), batch, key)
        return total if scale is None else total * scale, (total, count, metrics)

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad = jax.grad(sums, has_aux=True)
        by = state.scale and state.scale.scale

        def micro(i: Array | int, part: Batch) -> Any:
            grads, (total, count, metrics) = grad(state.trainable, frozen, part, jax.random.fold_in(key, i), by)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            return grads if by is None else jax.tree.map(lambda g: g / by, grads), total, count, metrics

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
            return State(state.step + 1, trainable, opt_state, jnp.zeros_like(state.bad), state.skipped, state.scale, state.kept)

        # the scale's fault, and not the loss's: it is halved until the gradients fit, which says nothing against the run
        overflow = jnp.isfinite(total) & ~jnp.isfinite(norm) & (by > LEAST) if by is not None else jnp.asarray(False)

        def skip(state: State) -> State:
            return state._replace(step=state.step + 1, bad=state.bad + jnp.where(overflow, 0, 1), skipped=state.skipped + 1)

        after = state.scale and state.scale.after(finite, overflow)
        state = jax.lax.cond(finite, update, skip, state)._replace(scale=after)
        shown = {"loss": total / count_or_1} | {name: value / count_or_1 for name, value in metrics.items()}
        counts = {"tokens": (batch.segments > 0).sum(), "trained_tokens": (batch.weights > 0).sum()}
        counts |= {"loss_scale": after.scale} if after else {}
        return state, shown | counts | {"grad_norm": norm, "bad": state.bad, "skipped": state.skipped}

    return step


def over_minibatches(update: Step, *, seed: int, epochs: int = 1, minibatches: int = 1) -> Step:
    """`update` over a batch's rows `epochs` times, `minibatches` of B / minibatches rows a time: so many updates, one program.

    The rows of each epoch are shuffled by a key of (seed, number of the step). `State.step` counts such steps, not updates;
    the learning rate is the same for all updates of one (train.loop), so a schedule over N steps means what it says, whatever
    the updates in each. Metrics are means over the updates, but for tokens and trained_tokens, which are the batch's, and
    bad and skipped, which count updates. B must be a multiple of `minibatches`.
    """
    updates = epochs * minibatches
    if updates == 1:
        return update

    def step(state: State, frozen: Any, batch: Any) -> tuple[State, dict[str, Array]]:
        rows, taken = batch.tokens.shape[0], state.step
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), taken), updates)
        orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, epochs))

        def one(state: State, xs: tuple[Array, Array]) -> tuple[State, dict[str, Array]]:
            i, chosen = xs
            part = jax.tree.map(lambda x: sharding.constrain(x[chosen], sharding.BATCH, sharding.along(x.shape[1])), batch)
            return update(state._replace(step=taken * updates + i), frozen, part)

        state, metrics = jax.lax.scan(one, state, (jnp.arange(updates), orders.reshape(updates, -1)))
        means = {name: x.astype(jnp.float32).mean() for name, x in metrics.items()}
        counts = {name: metrics[name].sum() // epochs for name in ("tokens", "trained_tokens")}
        last = {name: metrics[name][-1] for name in ("bad", "skipped", "loss_scale") if name in metrics}
        return state._replace(step=taken + 1), means | counts | last

    return step
