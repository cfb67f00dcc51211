"""Moments in 8 bits: close to what they stand for, right in the mean, and a training as in 32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sftjax import sharding
from sftjax.config import default
from sftjax.train import eight_bit
from sftjax.train.eight_bit import dither, scale_by_adam_8bit, signed, to_signed, to_unsigned, unsigned
from sftjax.train.optim import optimizer
from sftjax.train.places import begin
from sftjax.train.step import init_state

KEY = jax.random.key(0)
SETTINGS = (0.9, 0.999, 1e-8)


def test_codes_stand_for_what_they_were_made_of():
    """To 3 % within an order of magnitude of the largest, and over all seven decades to half a code."""
    x = jnp.asarray(np.geomspace(1e-7, 1, 1000, dtype=np.float32))
    one = jnp.ones(())
    m = signed(to_signed(-x, one), one)
    v = unsigned(to_unsigned(jnp.square(x), one, jnp.full(x.shape, 0.5)), one)
    near = x >= 0.1
    assert np.abs(-m / x - 1)[near].max() < 0.03 and np.abs(jnp.sqrt(v) / x - 1)[near].max() < 0.03
    assert (m <= 0).all() and np.abs(-m - x).max() < 0.013 and np.abs(jnp.sqrt(v) - x).max() < 0.01
    assert (v > 0).all()  # a step is divided by its root
    assert to_signed(0 * x, 0 * one).any() == to_unsigned(0 * x, 0 * one, 0 * x).any() == False  # noqa: E712


def test_what_lies_between_two_codes_is_right_in_the_mean():
    x = jnp.full((64, 256), 0.37)
    uniform = dither(x.shape, jnp.asarray(3))
    v = unsigned(to_unsigned(x, jnp.ones(()), uniform), jnp.ones(()))
    assert len(np.unique(v)) == 2
    np.testing.assert_allclose(v.mean(), 0.37, rtol=1e-4)
    assert abs(float(uniform.mean()) - 0.5) < 0.01 and abs(np.corrcoef(uniform[:-1].ravel(), uniform[1:].ravel())[0, 1]) < 0.02
    again = dither(x.shape, jnp.asarray(4))
    assert abs(np.corrcoef(uniform.ravel(), again.ravel())[0, 1]) < 0.02


def test_v_follows_gradients_that_fall():
    """By a thousandth of itself a step, far less than lies between two codes."""
    exact, ours = optax.scale_by_adam(*SETTINGS), scale_by_adam_8bit(*SETTINGS)
    start = jnp.zeros((16, 256))
    top = jnp.where(jnp.arange(256) == 0, 1.0, 0.3)  # the largest of each block stays where it is

    @jax.jit
    def run(states):
        def step(states, i):
            g = jnp.where(jnp.arange(256) == 0, 1.0, jnp.where(i < 300, 1.0, 0.1)) * top * jnp.ones((16, 1))
            return tuple(t.update(g, s)[1] for t, s in zip((exact, ours), states)), None

        return jax.lax.scan(step, states, jnp.arange(1300))[0]

    want, got = run((exact.init(start), ours.init(start)))
    v = eight_bit.unsigned(eight_bit.cut(got.nu), eight_bit.widened(got.nu_scale, eight_bit.block(start.shape)[0])).reshape(
        16, 256
    )
    assert want.nu[0, 1] < 0.5 * 0.09 * (1 - 0.999**300)
    np.testing.assert_allclose(v[:, 1:].mean(), want.nu[:, 1:].mean(), rtol=0.02)


@pytest.mark.parametrize("shape", [(256, 64), (3, 96, 224)], ids=["rows", "a stack's columns"])
def test_a_training_as_with_32_bits(shape):
    """After a hundred steps 6 % of the way apart, in length, and at the same loss to 2 %."""
    target = jax.random.normal(KEY, shape)
    spectrum = jnp.logspace(0, -2, shape[-2])

    @jax.jit
    def train():
        transforms = optax.scale_by_adam(*SETTINGS), scale_by_adam_8bit(*SETTINGS)

        def step(both, i):
            x = jax.random.normal(jax.random.fold_in(KEY, i), (32, shape[-2])) * spectrum
            new, losses = [], []
            for transform, (p, state) in zip(transforms, both):
                loss, g = jax.value_and_grad(lambda p: jnp.square(x @ (p - target)).mean())(p)
                update, state = transform.update(g, state)
                new.append((p - 0.01 * update, state))
                losses.append(loss)
            return tuple(new), jnp.stack(losses)

        start = tuple((jnp.zeros(shape), t.init(jnp.zeros(shape))) for t in transforms)
        return jax.lax.scan(step, start, jnp.arange(100))

    ((want, _), (got, _)), losses = train()
    assert 0 < jnp.linalg.norm((got - want).ravel()) < 0.06 * jnp.linalg.norm(want.ravel())
    np.testing.assert_allclose(losses[-1, 1], losses[-1, 0], rtol=0.02)
    assert losses[-1, 0] < 0.6 * losses[0, 0]


def of(**changes):
    c = default().optim
    c.update({"name": "adamw_8bit"} | changes)
    return optimizer(c, lambda _: 0.1)


def test_two_bytes_a_number_but_of_what_is_small_or_looked_up():
    kernel, small = jnp.zeros((2, 256, 512)), jnp.zeros((2, 16, 8))
    params = {"embed": {"embedding": jnp.zeros((512, 256))}, "layers": {"q": {"kernel": kernel}, "k": {"kernel": small}}}
    state = of().init(params)
    held = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        for name in ("embedding", "'q'", "'k'"):
            if name in jax.tree_util.keystr(path):
                held[name] = held.get(name, 0) + x.nbytes
    assert held == {"embedding": 8 * 512 * 256, "'q'": int(kernel.size * (2 + 2 * 4 / 256)), "'k'": 8 * small.size}


def test_codes_lie_where_their_weight_lies():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    kernel = jax.device_put(jnp.zeros((2, 256, 512)), jax.NamedSharding(mesh, jax.P(None, "fsdp", None)))
    params = {"layers": {"attn": {"q": {"kernel": kernel}}}}
    given = []
    state = begin(lambda p: given.append(p) or init_state(p, of()), params, mesh)
    assert given and all(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(given))  # nothing is made whole, and cut then
    codes = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert [x.dtype for x in codes] == [jnp.int8, jnp.uint8] and all(x.sharding == kernel.sharding for x in codes)


def test_offloaded_moments_lie_in_the_host_and_move_nothing_else():
    mesh = sharding.make_mesh(data=1)
    params = {"layers": {"attn": {"q": {"kernel": jax.device_put(jnp.ones((2, 256, 64)), jax.NamedSharding(mesh, jax.P()))}}}}
    grads = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), params)
    found = []
    for offload in (False, True):
        transform = of(name="adamw", offload=offload)
        state = begin(lambda p, t=transform: init_state(p, t), params, mesh, offload=offload)
        params = state.trainable
        homes = jax.tree.map(lambda x: x.sharding, (state.trainable, state.opt_state))
        update = jax.jit(transform.update, out_shardings=homes)
        updates, after = update(grads, state.opt_state, params)
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(after) if x.ndim}
        assert kinds == {"pinned_host" if offload else "device"}
        assert {x.sharding.memory_kind for x in jax.tree.leaves((updates, state.trainable))} == {"device"}
        found.append((updates, after))
    jax.tree.map(np.testing.assert_array_equal, *found)
