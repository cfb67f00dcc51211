"""Kinds of weight: one product, whatever stands there, and gradients that never form a frozen kernel's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close

from sftjax import tree
from sftjax.config import UserError
from sftjax.weights import kinds
from sftjax.weights.kinds import Adapter, Dora, LowRank, Tokens
from sftjax.weights.quantize import Quantised, int8, nf4

RANDOM = np.random.default_rng(7)


def normal(*shape, std=1.0):
    return jnp.asarray(std * RANDOM.standard_normal(shape, np.float32))


def low_rank(fan_in=12, fan_out=8, rank=3, dtype=jnp.float32, dropout=0.0, seed=0):
    rng = np.random.default_rng(seed)
    base, a, b = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((fan_in, fan_out), (fan_in, rank), (rank, fan_out)))
    return LowRank(base.astype(dtype), a, b, 0.7, dropout)


FEW, MANY = 5, 64  # rows below and above four times fan_out: thin products, and the merged one
IN, OUT, RANK = 128, 16, 3
KERNEL = normal(IN, OUT, std=IN**-0.5)


def over(base, scale=0.7):
    return LowRank(base, normal(IN, RANK, std=IN**-0.5), normal(RANK, OUT), scale)


def directed(low):
    return Dora(low, kinds.norms(low) * (1 + 0.3 * normal(OUT)))


def bottleneck(base):
    return Adapter(base, normal(OUT, 4), normal(4), normal(4, OUT), normal(OUT))


KINDS = {
    "array": lambda w: w,
    "nf4": nf4,
    "int8": int8,
    "lora": over,
    "lora over nf4": lambda w: over(nf4(w)),
    "lora over int8": lambda w: over(int8(w)),
    "pissa": lambda w: over(over(w, -0.7)),
    "pissa over nf4": lambda w: over(over(nf4(w), -0.7)),
    "dora": lambda w: directed(over(w)),
    "dora over pissa": lambda w: directed(over(over(w, -0.7))),
    "qdora": lambda w: directed(over(nf4(w))),
    "adapter": bottleneck,
    "adapter over int8": lambda w: bottleneck(int8(w)),
    "tokens on a head": lambda w: Tokens(w, normal(3, IN), (0, 7, 15), 1),
    "tokens on an adapted head": lambda w: Tokens(over(w), normal(2, IN), (3, 4), 1),
    "tokens on a dora head": lambda w: Tokens(directed(over(w)), normal(2, IN), (3, 4), 1),
}


def written(w):
    """The definition of every kind that is one matrix, as the papers write it."""
    match w:
        case LowRank():
            return written(w.base) + w.scale * w.a @ w.b
        case Dora():
            v = written(w.base)
            return v * w.magnitude / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))
        case Tokens():
            at = (jnp.asarray(w.ids),) if w.axis == 0 else (slice(None), jnp.asarray(w.ids))
            return written(w.base).at[at].set(w.rows if w.axis == 0 else w.rows.T)
        case Quantised():
            return w.dequantise(jnp.float32)
        case _:
            return w.astype(jnp.float32)


def definition(x, w):
    if isinstance(w, Adapter):
        y = definition(x, w.base)
        return y + jax.nn.silu(y @ w.down + w.down_bias) @ w.up + w.up_bias
    return x.astype(jnp.float32) @ written(w)


def pulled(fn, w):
    """(xs, dys) -> y and the gradients of x and of what trains of w, for each x."""
    mask = kinds.trained(w)

    def run(xs, dys):
        chosen, rest = tree.split(w, mask)
        out = []
        for x, dy in zip(xs, dys):
            y, pull = jax.vjp(lambda x, t: fn(x, tree.join(t, rest)), x, chosen)
            out.append((y, pull(dy.astype(y.dtype))))
        return out

    return run


@pytest.mark.parametrize("dtype, rtol", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.04)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_of_every_kind_are_those_of_its_definition(kind, dtype, rtol):
    w = KINDS[kind](KERNEL.astype(dtype))
    xs = [jax.random.normal(jax.random.key(0), (2, rows, IN), dtype) for rows in (FEW, MANY)]
    dys = [jax.random.normal(jax.random.key(1), (2, rows, OUT), dtype) for rows in (FEW, MANY)]
    ours, exact = jax.jit(lambda *a: (pulled(kinds.matmul, w)(*a), pulled(definition, w)(*a)))(xs, dys)
    assert {y.dtype for y, _ in ours} == {jnp.dtype(dtype)}
    assert len(jax.tree.leaves(ours[0][1][1])) == sum(jax.tree.leaves(kinds.trained(w)))
    assert_trees_close(ours, exact, rtol=rtol)


HEADS = ("array", "lora", "dora", "tokens on a head", "tokens on an adapted head")


@pytest.mark.parametrize("kind", [kind for kind in HEADS if kind in KINDS])
def test_logits_are_float32_from_the_product_on(kind):
    """Of bfloat16 inputs, too: what LoRA adds goes through one narrow product more."""
    x = 8 * jax.random.normal(jax.random.key(0), (5, IN), jnp.bfloat16)
    w = jax.tree.map(lambda y: y.astype(jnp.bfloat16), KINDS[kind](KERNEL))
    wide = jax.tree.map(lambda y: y.astype(jnp.float32), w)
    got, pull = jax.vjp(lambda x: kinds.logits(x, w), x)
    exact = kind in ("array", "tokens on a head")
    np.testing.assert_allclose(got, definition(x, wide), rtol=1e-5 if exact else 0.02, atol=1e-4 if exact else 0.05)
    assert got.dtype == jnp.float32 and pull(got)[0].dtype == jnp.bfloat16
    capped = kinds.logits(x, kinds.Capped(w, 3.0))
    np.testing.assert_allclose(capped, 3.0 * jnp.tanh(got / 3.0), rtol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "adapter" not in kind])
def test_dense_is_the_written_matrix(kind):
    w = KINDS[kind](KERNEL)
    np.testing.assert_allclose(kinds.dense(w), written(w), rtol=1e-5, atol=1e-5)
    assert kinds.dense(w, jnp.bfloat16).dtype == jnp.bfloat16 and w.shape == (IN, OUT)
    half = KINDS[kind](KERNEL.astype(jnp.bfloat16))
    assert kinds.dense(half).dtype == jnp.bfloat16  # its base's own


def test_an_adapter_has_no_matrix():
    for kind in ("adapter", "adapter over int8"):
        with pytest.raises(UserError, match=r"a bottleneck adapter \(method adapter\).* cannot be merged"):
            kinds.dense(KINDS[kind](KERNEL))


@pytest.mark.parametrize("kind", KINDS)
def test_cast_for_a_product_changes_none(kind):
    w = KINDS[kind](KERNEL)
    half, x = kinds.cast(w, jnp.bfloat16), normal(FEW, IN).astype(jnp.bfloat16)
    np.testing.assert_array_equal(kinds.matmul(x, half), kinds.matmul(x, w))
    assert jax.tree.structure(half) == jax.tree.structure(w)
    assert all(x is y for x, y in zip(jax.tree.leaves(w), jax.tree.leaves(kinds.cast(w, jnp.float32)), strict=True))


def test_a_magnitude_is_never_rounded():
    """Less than half a step of bfloat16 above 1, at any depth."""
    low = over(KERNEL)
    divided = Dora(low, jnp.full(OUT, 1.003), divided=True)
    for w in (divided, Tokens(divided, normal(2, IN), (3, 4), 1), bottleneck(divided)):
        half = kinds.cast(w, jnp.bfloat16)
        dora = half if isinstance(half, Dora) else half.base
        assert (dora.magnitude == jnp.float32(1.003)).all()
        assert {x.dtype for x in jax.tree.leaves(dora.base)} == {jnp.dtype(jnp.bfloat16)}


EMBEDDINGS = {
    "array": lambda w: w,
    "lora": over,
    "dora": lambda w: directed(over(w)),
    "tokens": lambda w: Tokens(w, normal(3, OUT), (0, 7, 127), 0),
    "tokens over lora": lambda w: Tokens(over(w), normal(2, OUT), (3, 4), 0),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_rows_of_an_embedding_and_their_gradients(kind):
    w, ids = EMBEDDINGS[kind](KERNEL), jnp.array([[3, 0, 7], [3, 127, 5]])
    (dy,) = dys = [normal(2, 3, OUT)]
    exact = pulled(lambda _, w: written(w)[ids], w)([jnp.zeros(())], dys)
    assert_trees_close(pulled(lambda _, w: kinds.rows(w, ids), w)([jnp.zeros(())], [dy]), exact, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in EMBEDDINGS if kind != "dora"])
def test_a_tied_head_is_the_embedding_transposed(kind):
    w, xs, dys = EMBEDDINGS[kind](KERNEL), [normal(2, 5, OUT)], [normal(2, 5, IN)]
    np.testing.assert_allclose(kinds.dense(kinds.transpose(w)), written(w).T, rtol=1e-5, atol=1e-5)
    assert kinds.transpose(w).shape == (OUT, IN)
    tied = pulled(lambda x, w: kinds.matmul(x, kinds.transpose(w)), w)(xs, dys)
    assert_trees_close(tied, pulled(lambda x, w: x @ written(w).T, w)(xs, dys), rtol=1e-5)


def test_a_token_elsewhere_gets_no_gradient():
    """Tokens' rows stand in place of the base's: what the base has there, and LoRA adds there, is out of the model."""
    w = EMBEDDINGS["tokens over lora"](KERNEL)
    da = jax.grad(lambda a: kinds.rows(replace(w, base=replace(w.base, a=a)), jnp.arange(IN)).sum())(w.base.a)
    assert (np.abs(da).sum(1) == 0).nonzero()[0].tolist() == [3, 4]


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


def full(w):
    """The same with everything trained, so that a gradient of the base is asked for."""
    return jax.tree.map(lambda _: True, w)


@pytest.mark.parametrize("rows, dtype", [(512, jnp.float32), (4096, jnp.float32), (4096, jnp.bfloat16)])
@pytest.mark.parametrize("kind", ["lora", "dora", "lora over nf4", "qdora"])
def test_a_frozen_base_costs_no_gradient(kind, rows, dtype):
    """Forward and d/dx are two products of rows x in x out; with dW of the base, or of a @ b, they would be three."""
    base = jnp.ones((256, 256), dtype)
    low = LowRank(nf4(base) if kind in ("lora over nf4", "qdora") else base, jnp.ones((256, 2)), jnp.ones((2, 256)), 1.0)
    w = Dora(low, jnp.ones(256)) if "dora" in kind else low
    x = jnp.ones((rows, 256), dtype)

    def flops(mask):
        chosen, rest = tree.split(w, mask)
        grad = jax.grad(lambda x, t, f: jnp.square(kinds.matmul(x, tree.join(t, f))).sum(), (0, 1))
        return jax.jit(grad).lower(x, chosen, rest).compile().cost_analysis()["flops"]

    product = 2 * rows * 256 * 256
    assert 1.9 * product < flops(kinds.trained(w)) < 2.4 * product
    if kind == "lora":
        assert flops(full(w)) > 2.9 * product


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
