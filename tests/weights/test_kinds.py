"""Kinds of weight: one product, whatever stands there, and gradients that never form a frozen kernel's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.weights import kinds
from sftjax.weights.kinds import LowRank


def low_rank(fan_in=12, fan_out=8, rank=3, dtype=jnp.float32, dropout=0.0, seed=0):
    rng = np.random.default_rng(seed)
    base, a, b = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((fan_in, fan_out), (fan_in, rank), (rank, fan_out)))
    return LowRank(base.astype(dtype), a, b, 0.7, dropout)


FEW, MANY = 5, 64  # rows below and above four times fan_out: thin products, and the merged one


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_every_gradient_are_those_of_the_definition(rows, dtype):
    w = low_rank(dtype=dtype)
    x, dy = jax.random.normal(jax.random.key(0), (2, 2, rows, 12))

    def definition(x, w):
        return x @ w.base.astype(x.dtype) + w.scale * ((x @ w.a) @ w.b)

    (y, pull), (exact, pull_exact) = jax.vjp(kinds.matmul, x, w), jax.vjp(definition, x, w)
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4)
    for a, b in zip(jax.tree.leaves(pull(dy[..., :8])), jax.tree.leaves(pull_exact(dy[..., :8]))):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            a.astype(np.float32), b.astype(np.float32), rtol=1e-4 if dtype == jnp.float32 else 0.02, atol=1e-3
        )


@pytest.mark.parametrize("fan_in, fan_out", [(12, 8), (8, 12)])
def test_gradients_of_a_plain_product_are_those_of_the_definition(fan_in, fan_out):
    x, w = jax.random.normal(jax.random.key(0), (2, 3, fan_in)), jax.random.normal(jax.random.key(1), (fan_in, fan_out))
    dy = jax.random.normal(jax.random.key(2), (2, 3, fan_out))
    for a, b in zip(jax.vjp(kinds.matmul, x, w)[1](dy), jax.vjp(jnp.matmul, x, w)[1](dy)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_many_row_path_is_taken_where_it_pays():
    text = [str(jax.make_jaxpr(kinds.matmul)(jnp.ones((rows, 12)), low_rank())) for rows in (FEW, MANY)]
    assert "_low_rank_matmul" not in text[0] and "_low_rank_matmul" in text[1]
    bfloat16 = str(jax.make_jaxpr(kinds.matmul)(jnp.ones((MANY, 12), jnp.bfloat16), low_rank()))
    assert "_low_rank_matmul" not in bfloat16  # there the sum would round the update away


@pytest.mark.parametrize("rows, dtype", [(128, jnp.float32), (4096, jnp.float32), (4096, jnp.bfloat16)])
def test_a_frozen_base_costs_no_gradient(rows, dtype):
    """Forward and d/dx are two products of rows x in x out; with dW of the base they would be three."""
    w = low_rank(256, 256, rank=2)
    x = jnp.ones((rows, 256), dtype)

    def loss(x, a, b, base):
        return jnp.square(kinds.matmul(x, LowRank(base, a, b, 1.0))).sum()

    def flops(argnums):
        return jax.jit(jax.grad(loss, argnums)).lower(x, w.a, w.b, w.base).compile().cost_analysis()["flops"]

    product = 2 * rows * 256 * 256
    assert 1.9 * product < flops((0, 1, 2)) < 2.4 * product
    assert flops((0, 1, 2, 3)) > 2.9 * product


def test_dense_transpose_and_rows_agree_with_the_product():
    w = low_rank(dropout=0.1)
    x = jax.random.normal(jax.random.key(0), (3, 12))
    whole = kinds.dense(w)
    np.testing.assert_allclose(x @ whole, kinds.matmul(x, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kinds.dense(kinds.transpose(w)), whole.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        kinds.rows(w, jnp.array([[3, 0], [3, 11]])), whole[jnp.array([[3, 0], [3, 11]])], rtol=1e-5, atol=1e-5
    )
    assert kinds.transpose(w).shape == (8, 12) and kinds.transpose(w).dropout == 0.1
    assert kinds.dense(w, jnp.bfloat16).dtype == jnp.bfloat16


def test_kinds_nest():
    second = low_rank(seed=1)
    outer = LowRank(low_rank(), second.a, second.b, 0.3)
    for rows in (FEW, MANY):
        x = jax.random.normal(jax.random.key(0), (rows, 12))
        np.testing.assert_allclose(kinds.matmul(x, outer), x @ kinds.dense(outer), rtol=1e-4, atol=1e-4)


def test_dropout_is_of_the_update_alone_and_right_on_average():
    w = low_rank(dropout=0.25)
    x = jax.random.normal(jax.random.key(0), (4, 12))
    many = jax.vmap(lambda key: kinds.matmul(x, w, key))(jax.random.split(jax.random.key(1), 20_000))
    exact = kinds.matmul(x, w)
    np.testing.assert_allclose(many.mean(0), exact, atol=6 * many.std(0).max() / 20_000**0.5)
    assert many.std(0).min() > 0.01
    np.testing.assert_array_equal(kinds.matmul(x, w), kinds.matmul(x, low_rank()))  # no key, no dropout
    np.testing.assert_array_equal(kinds.matmul(x, low_rank(), jax.random.key(1)), kinds.matmul(x, low_rank()))  # rate 0
    still = LowRank(w.base, w.a, jnp.zeros_like(w.b), w.scale, w.dropout)
    np.testing.assert_array_equal(kinds.matmul(x, still, jax.random.key(1)), x @ w.base)
