"""Attention in chunks equals the whole softmax, forward and backward, for any segments and windows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.models import attention as module
from sftjax.models import blocks
from sftjax.models.attention import attention
from sftjax.models.blocks import FAR
from sftjax.models.splash import splash


def naive(q, k, v, segments, sinks=None, *, window=None, scale, softcap=None):
    """The definition, with its [B, N, T, T] scores. A sink is one more key, whose value is zero."""
    T, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    behind = jnp.arange(T)[:, None] - jnp.arange(T)
    seen = (behind >= 0) & (behind < (FAR if window is None else window))
    seen = seen & (segments[:, :, None] == segments[:, None, :])
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))], -1)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1)[..., :T], v)


def inputs(T, B=2, N=4, K=2, H=6, seed=0):
    """q, k, v, segments (padding at both ends, cuts anywhere) and a cotangent."""
    rng = np.random.default_rng(seed)
    q, k, v, do = (rng.standard_normal((B, T, n, H), np.float32) for n in (N, K, K, N))
    segments = 1 + np.cumsum(rng.random((B, T)) < 3 / T, 1)
    segments[0, : T // 9] = 0
    segments[-1, T - T // 7 :] = 0
    return tuple(map(jnp.asarray, (q, k, v, segments.astype(np.int32), do)))


def both(fn, q, k, v, segments, do, sinks=None, **how):
    """The output and the gradients of q, k and v, and of sinks where there are some."""

    @jax.jit
    def run(q, k, v, segments, do, sinks):
        o, pull = jax.vjp(lambda q, k, v, sinks: fn(q, k, v, segments, sinks=sinks, scale=0.4, **how), q, k, v, sinks)
        return o, *(d for d in pull(do) if d is not None)

    return run(q, k, v, segments, do, sinks)


SINKS = jnp.asarray([1.5, -2.0, 0.3, 30.0])  # the last leaves its head's keys next to nothing


# shorter than a chunk, a chunk, several with a rest; windows smaller and larger than a chunk; more than sixteen blocks of 128
@pytest.mark.parametrize("T, window", [(1, None), (70, 5), (128, None), (300, None), (300, 50), (300, 200), (2100, None)])
def test_output_and_gradients_equal_the_definition(T, window):
    x = inputs(T) if T < 2048 else inputs(T, B=1, N=2, K=1, H=4)
    for ours, exact in zip(both(attention, *x, windows=(window,)), both(naive, *x, window=window)):
        np.testing.assert_allclose(ours, exact, atol=2e-5)


@pytest.mark.parametrize("window, softcap", [(None, 2.0), (150, None)])
def test_blocks_of_a_long_row_equal_the_definition(window, softcap, monkeypatch):
    monkeypatch.setattr(module, "LONG", 128)
    monkeypatch.setattr(blocks, "SIDE", 128)
    x = inputs(450, B=1)
    for ours, exact in zip(
        both(attention, *x, windows=(window,), softcap=softcap), both(naive, *x, window=window, softcap=softcap)
    ):
        np.testing.assert_allclose(ours, exact, atol=2e-5)


@pytest.mark.parametrize("T, window", [(70, 5), (300, None), (300, 150), (300, 50)])
def test_sinks_take_their_share(T, window):
    x = *inputs(T), SINKS
    found = list(zip(both(attention, *x, windows=(window,)), both(naive, *x, window=window), strict=True))
    for ours, exact in found:
        np.testing.assert_allclose(ours, exact, atol=2e-5, rtol=1e-5)
    assert len(found) == 5 and np.abs(found[4][1][:3]).min() > 0.1


@pytest.mark.parametrize("window, softcap", [(None, 2.0), (150, None)])
def test_sinks_beside_the_blocks_of_a_long_row(window, softcap, monkeypatch):
    monkeypatch.setattr(module, "LONG", 128)
    monkeypatch.setattr(blocks, "SIDE", 128)
    x = *inputs(450, B=1), SINKS
    for ours, exact in zip(
        both(attention, *x, windows=(window,), softcap=softcap), both(naive, *x, window=window, softcap=softcap), strict=True
    ):
        np.testing.assert_allclose(ours, exact, atol=2e-5, rtol=1e-5)


def test_a_traced_choice_of_windows_is_the_window_chosen():
    x, windows = inputs(200), (1, 60, None)
    run = jax.jit(lambda which: both(attention, *x, windows=windows, which=which))  # one program, as in a scan over layers
    for which, window in enumerate(windows):
        for ours, exact in zip(run(jnp.asarray(which)), both(naive, *x, window=window)):
            np.testing.assert_allclose(ours, exact, atol=2e-5)


def test_a_soft_cap_bounds_the_scores():
    x = inputs(150)
    for ours, exact in zip(both(attention, *x, softcap=0.7), both(naive, *x, softcap=0.7)):
        np.testing.assert_allclose(ours, exact, atol=2e-5)


@pytest.mark.parametrize("T, window, softcap", [(70, 5, 0.7), (150, None, None)])
def test_the_kernel_of_a_tpu_is_the_same_function(T, window, softcap):
    x = inputs(T, B=1, N=4, K=2, H=16)
    kernel = partial(splash, window=window, softcap=softcap, interpret=True)
    for sinks in (None, SINKS):
        for ours, exact in zip(both(kernel, *x, sinks), both(naive, *x, sinks, window=window, softcap=softcap), strict=True):
            np.testing.assert_allclose(ours, exact, atol=2e-5, rtol=1e-5)


def test_vmapped_on_accelerators_equals_mapped_on_cpu(monkeypatch):
    x = inputs(150)
    mapped = both(attention, *x, SINKS, windows=(40,))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "while" not in jax.jit(partial(attention, scale=0.4)).lower(*x[:4]).as_text()  # it is the other path
    for a, b in zip(both(attention, *x, SINKS, windows=(40,)), mapped, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_is_close_and_stays_bfloat16():
    x = inputs(150)
    half = [y if y.dtype == jnp.int32 else y.astype(jnp.bfloat16) for y in x]
    for ours, exact in zip(both(attention, *half), both(naive, *x)):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), exact, atol=0.03 * np.abs(exact).max())
