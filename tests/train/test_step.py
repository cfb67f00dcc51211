"""A step does not depend on how its batch is cut, padded or packed, and what is not finite changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import assert_trees_close, batch, config, params, unpacked

from sftjax import tree
from sftjax.data.batch import Batch
from sftjax.losses import masked_xent
from sftjax.models.decoder import Decoder, forward
from sftjax.train.step import FIRST_SCALE, GROWS_AFTER, init_state, make_step
from sftjax.weights import select
from sftjax.weights.lora import lora

CONFIG = config(layers=2)
LOSS = masked_xent(forward(Decoder(CONFIG)))
ROWS = [[20], [9, 8], [3], [-4, 12], [6, 6, 6], [20], [], [17]]
BATCH = batch(ROWS, 20)
OPTIMIZER = optax.sgd(0.1)  # updates in proportion to the gradient: what differs is seen


def take(state, frozen=None, b=BATCH, loss=LOSS, optimizer=OPTIMIZER, **options):
    frozen = jax.tree.map(lambda _: None, state.trainable) if frozen is None else frozen
    return jax.jit(make_step(loss, optimizer, seed=0, **options))(state, frozen, b)


@pytest.fixture(scope="module")
def p():
    return params(CONFIG)


@pytest.fixture(scope="module")
def whole(p):
    """(state, metrics) after a step on all rows at once."""
    return take(init_state(p, OPTIMIZER))


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_accumulated_equals_whole(micro_batches, p, whole):
    state, metrics = take(init_state(p, OPTIMIZER), micro_batches=micro_batches)
    assert_trees_close(state.trainable, whole[0].trainable)
    assert_trees_close(metrics, whole[1])


def test_packed_equals_padded(p, whole):
    state, metrics = take(init_state(p, OPTIMIZER), b=unpacked(BATCH))
    assert_trees_close(state.trainable, whole[0].trainable)
    assert_trees_close(metrics, whole[1])


def test_metrics_are_those_of_the_batch(p, whole):
    (total, count, _), grads = LOSS(p, BATCH, None), jax.jit(jax.grad(lambda p: LOSS(p, BATCH, None)[0]))(p)
    _, metrics = whole
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], total / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads) / count, rtol=1e-4)
    assert metrics["tokens"] == sum(n for row in ROWS for n in row if n > 0)
    assert metrics["trained_tokens"] == (np.asarray(BATCH.weights) * (np.asarray(BATCH.segments) > 0) > 0).sum()


def test_rows_with_nothing_in_them_do_not_matter(p, whole):
    empty = batch([[], []], 20, seed=1)
    b = Batch(*(jnp.concatenate([x, y]) for x, y in zip(BATCH, empty)))
    state, metrics = take(init_state(p, OPTIMIZER), b=b)
    assert_trees_close(state.trainable, whole[0].trainable)
    assert_trees_close(metrics, whole[1])


# -- what a step does with what a loss gives it, on a loss that is one line


def linear(params, batch, key):
    """Its gradient is the tokens' sum; infinite where a token is negative."""
    x = jnp.where(batch.tokens < 0, jnp.inf, batch.tokens.astype(jnp.float32))
    return (params["w"] * x).sum(), batch.weights.sum(), {}


def toy(tokens, weights=1.0):
    tokens = jnp.asarray([tokens], jnp.int32)
    return Batch(tokens, jnp.full(tokens.shape, weights), jnp.ones_like(tokens), jnp.arange(tokens.shape[1])[None])


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    optimizer = optax.adam(0.1)
    start = state = init_state({"w": jnp.ones(())}, optimizer)
    step = jax.jit(make_step(linear, optimizer, seed=0, clip=1.0))
    frozen = {"w": None}
    for expected in (1, 2):
        state, metrics = step(state, frozen, toy([1, -1]))
        assert (metrics["bad"], metrics["skipped"], state.step) == (expected, expected, expected)
        jax.tree.map(np.testing.assert_array_equal, state[1:3], start[1:3])
    state, metrics = step(state, frozen, toy([1, 2]))
    assert (metrics["bad"], metrics["skipped"], state.step) == (0, 2, 3)
    assert state.trainable["w"] < 1


def test_a_bad_micro_batch_is_a_bad_step():
    b = Batch(*(jnp.concatenate(x) for x in zip(toy([1, 2]), toy([1, -1]))))
    state, metrics = take(init_state({"w": jnp.ones(())}, OPTIMIZER), b=b, loss=linear, micro_batches=2)
    assert metrics["bad"] == 1 and state.trainable["w"] == 1


@pytest.mark.parametrize("clip, moved", [(0.0, 6.0), (9.0, 6.0), (1.5, 1.5)])
def test_clipping_bounds_the_norm_of_the_mean(clip, moved):
    sgd = optax.sgd(1.0)
    state, metrics = take(init_state({"w": jnp.ones(())}, sgd), b=toy([5, 7]), loss=linear, optimizer=sgd, clip=clip)
    np.testing.assert_allclose(metrics["grad_norm"], 6.0)
    np.testing.assert_allclose(1 - state.trainable["w"], moved, rtol=1e-6)


def test_a_batch_that_trains_nothing_moves_nothing(p):
    adam = optax.adam(0.1)
    state, metrics = take(init_state(p, adam), b=BATCH._replace(weights=jnp.zeros_like(BATCH.weights)), optimizer=adam)
    assert metrics["loss"] == 0 and metrics["bad"] == 0 and metrics["trained_tokens"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.trainable, p)


def test_keys_differ_from_step_to_step_and_between_micro_batches():
    def noise(params, batch, key):
        return params["w"] * jax.random.normal(key), jnp.ones(()), {}

    sgd = optax.sgd(1.0)
    step = jax.jit(make_step(noise, sgd, seed=0, micro_batches=1))
    state, seen = init_state({"w": jnp.zeros(())}, sgd), []
    for _ in range(3):
        before = state.trainable["w"]
        state, _ = step(state, {"w": None}, toy([1]))
        seen.append(float(before - state.trainable["w"]))
    assert len({round(x, 6) for x in seen}) == 3
    two = Batch(*(jnp.concatenate([x, x]) for x in toy([1])))
    both, _ = take(init_state({"w": jnp.zeros(())}, sgd), b=two, loss=noise, optimizer=sgd, micro_batches=2)
    assert abs(float(both.trainable["w"]) + seen[0]) > 1e-3  # not one draw used twice
    again, _ = step(init_state({"w": jnp.zeros(())}, sgd), {"w": None}, toy([1]))
    assert float(again.trainable["w"]) == -seen[0]


def test_only_the_trainable_tree_moves_and_gets_moments(p):
    q = lora(p, jax.random.key(0), rank=2)
    trainable, frozen = tree.split(q, select.added(q))
    adam = optax.adam(0.1)
    start = init_state(trainable, adam)
    assert tree.count(start.opt_state) == 2 * tree.count(trainable) + 1
    state, _ = take(start, frozen, optimizer=adam, micro_batches=2)
    moved = tree.flatten(tree.join(state.trainable, frozen))["layers/attn/q/kernel"]
    assert np.abs(moved.b).min() > 0 and moved.base is frozen["layers"]["attn"]["q"]["kernel"].base


# -- float16, whose scale comes and goes


def halves(dtype):
    return masked_xent(forward(Decoder(CONFIG, dtype)))


def scaled_state(p, optimizer, scale):
    state = init_state(p, optimizer, jnp.float16)
    return state._replace(scale=state.scale._replace(scale=jnp.asarray(scale)))


@pytest.mark.parametrize("scale, micro_batches", [(1.0, 1), (2.0**10, 2)])
def test_gradients_of_float16_are_float32s_within_its_rounding(scale, micro_batches, p, whole):
    state, metrics = take(scaled_state(p, OPTIMIZER, scale), loss=halves(jnp.float16), micro_batches=micro_batches)
    moved = lambda s: jax.tree.map(jnp.subtract, s.trainable, p)  # noqa: E731
    assert_trees_close(moved(state), moved(whole[0]), rtol=2**-7)  # a few roundings of 2^-11
    np.testing.assert_allclose(metrics["loss"], whole[1]["loss"], rtol=1e-3)
    assert metrics["loss_scale"] == scale and metrics["skipped"] == 0


def test_an_overflow_halves_the_scale_and_changes_nothing_else(p):
    adam = optax.adam(0.1)
    start = scaled_state(p, adam, 2.0**30)
    step = jax.jit(make_step(halves(jnp.float16), adam, seed=0))
    frozen = jax.tree.map(lambda _: None, p)
    state, metrics = step(start, frozen, BATCH)
    jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.opt_state), (start.trainable, start.opt_state))
    assert (state.scale.scale, state.skipped, state.bad, state.step) == (2.0**29, 1, 0, 1)
    assert np.isfinite(metrics["loss"])  # which is never scaled
    for _ in range(30):  # halved until the gradients fit
        state, metrics = step(state, frozen, BATCH)
    assert 1 < metrics["loss_scale"] < 2.0**20 and metrics["bad"] == 0 and np.isfinite(metrics["grad_norm"])
    assert state.opt_state[0].count == state.step - state.skipped


def test_the_scale_doubles_after_so_many_good_steps_and_is_not_to_blame_for_a_loss_that_is_none():
    state = init_state({"w": jnp.ones(())}, OPTIMIZER, jnp.float16)
    state = state._replace(scale=state.scale._replace(good=jnp.asarray(GROWS_AFTER - 2)))
    step, frozen = jax.jit(make_step(linear, OPTIMIZER, seed=0)), {"w": None}
    scales = []
    for tokens in ([1, 2], [1, -1], [1, 2], [1, 2]):  # the second's loss is infinite: a bad step, and no good one
        state, metrics = step(state, frozen, toy(tokens))
        scales.append(float(metrics["loss_scale"] / FIRST_SCALE))
    assert scales == [1, 1, 2, 2] and (state.scale.good, metrics["skipped"]) == (1, 1)
    assert step(state, frozen, toy([1, -1]))[1]["bad"] == 1


def test_other_dtypes_have_no_scale(p):
    for dtype in (None, jnp.bfloat16, jnp.float32):
        assert init_state(p, OPTIMIZER, dtype).scale is None
