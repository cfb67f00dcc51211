"""Rows sorted by expert: every one is multiplied with its own expert's matrix, however tokens are routed, and with no other."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close

from sftjax import tree
from sftjax.weights import grouped, kinds
from sftjax.weights.grouped import collect, group, product, spread
from sftjax.weights.kinds import Adapter, Dora, LowRank
from sftjax.weights.quantize import int8, nf4

RANDOM = np.random.default_rng(3)
E, ACTIVE, IN, OUT, RANK = 5, 2, 128, 12, 3


def normal(*shape, std=1.0):
    return jnp.asarray(std * RANDOM.standard_normal(shape, np.float32))


def routing(tokens, experts=E, active=ACTIVE, seed=0):
    """[tokens, active] experts, different ones for each token."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :active]


# the last number makes blocks of 16 rows, so that experts end within one
ROUTINGS = {
    "one token": routing(1),
    "few tokens": routing(4),
    "random": routing(70),
    "all to two": np.tile([3, 1], (70, 1)),
    "the last has none": routing(70, experts=4),
    "only the last": np.full((70, 1), E - 1),
    "one block too many": np.concatenate([np.zeros((65, 1), int), routing(4, active=1)]),
    "all experts": routing(33, active=E),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_every_choice_has_a_row_of_its_own_in_a_block_of_its_expert(name):
    choices = ROUTINGS[name].reshape(-1)
    groups = jax.tree.map(np.asarray, jax.jit(partial(group, experts=E))(choices))
    assert len(set(groups.place)) == len(choices)  # no row twice, and no choice without
    np.testing.assert_array_equal(groups.experts[groups.place], choices)
    np.testing.assert_array_equal(groups.source[groups.place], np.arange(len(choices)))
    assert (groups.source == len(choices)).sum() == len(groups.source) - len(choices)
    assert groups.sizes.sum() == len(groups.source) and (np.diff(groups.expert) >= 0).all()
    m = len(groups.source) // len(groups.expert)
    assert len(groups.source) <= len(choices) + E * m


def by_definition(x, w, choices):
    """One-hot over everything: [M, in], [E, in, out] -> [M, k, out]."""
    return jnp.einsum("mke,mi,eio->mko", jax.nn.one_hot(choices, w.shape[0]), x, w)


def by_groups(x, w, choices, matmul=product):
    groups = group(choices.reshape(-1), w.shape[0])
    y = collect(matmul(spread(choices.shape[1], x, groups), w, groups=groups), groups)
    return y.reshape(*choices.shape, -1)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_value_and_gradients_are_those_of_the_one_hot_definition(name, backend, monkeypatch):
    monkeypatch.setattr(grouped.jax, "default_backend", lambda: backend)  # ragged_dot runs here too, at its price
    choices = jnp.asarray(ROUTINGS[name])
    x, w, dy = normal(len(choices), IN), normal(E, IN, OUT, std=IN**-0.5), normal(*choices.shape, OUT)

    def both(fn):
        y, pull = jax.vjp(lambda x, w: fn(x, w, choices), x, w)
        return y, pull(dy)

    ours, exact = jax.jit(lambda: (both(by_groups), both(by_definition)))()
    assert_trees_close(ours, exact)


def test_an_expert_that_no_one_chose_gets_no_gradient_and_gives_nothing():
    choices = jnp.asarray(ROUTINGS["the last has none"])
    x, w = normal(len(choices), IN), normal(E, IN, OUT).at[-1].set(jnp.nan)
    y, dw = jax.jit(jax.value_and_grad(lambda w: by_groups(x, w, choices).sum()))(w)
    assert np.isfinite(y) and (dw[-1] == 0).all() and (dw[0] != 0).any()


def test_a_gradient_over_many_rows_is_summed_in_float32():
    """Of 49152 ones in blocks of 128: in bfloat16 the sum would stay at 32768, where 128 is less than half a step."""
    choices = jnp.zeros((2**15 + 2**14, 1), jnp.int32)
    x, w = jnp.ones((len(choices), 4), jnp.bfloat16), jnp.ones((2, 4, 4), jnp.bfloat16)
    dw = jax.jit(jax.grad(lambda w: by_groups(x, w, choices).sum(dtype=jnp.float32)))(w)
    assert dw.dtype == jnp.bfloat16 and (dw[0] == len(choices)).all()


# -- every kind of weight, as a loop over experts has it


def over(base, scale=0.7):
    return LowRank(base, normal(E, IN, RANK, std=IN**-0.5), normal(E, RANK, OUT), scale)


def directed(low):
    return Dora(low, kinds.norms(low) * (1 + 0.3 * normal(E, OUT)))


def bottleneck(base):
    return Adapter(base, normal(E, OUT, 4), normal(E, 4), normal(E, 4, OUT), normal(E, OUT))


KINDS = {
    "array": lambda w: w,
    "nf4": nf4,
    "int8": int8,
    "lora": over,
    "lora over nf4": lambda w: over(nf4(w)),
    "pissa over int8": lambda w: over(over(int8(w), -0.7)),
    "dora": lambda w: directed(over(w)),
    "qdora": lambda w: directed(over(nf4(w))),
    "adapter": bottleneck,
    "adapter over int8": lambda w: bottleneck(int8(w)),
}


def by_loop(x, w, choices):
    """Every token through every expert, and then its own chosen: [M, k, out]."""
    one = [kinds.matmul(x, jax.tree.map(lambda part, e=e: part[e], w)) for e in range(E)]
    return jnp.take_along_axis(jnp.stack(one, 1), choices[..., None], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_is_that_of_a_loop_over_experts(kind):
    w = KINDS[kind](normal(E, IN, OUT, std=IN**-0.5))
    mask = jax.tree.map(lambda _: True, w) if kind == "array" else kinds.trained(w)
    chosen, rest = tree.split(w, mask)

    def both(fn, x, dy, choices):
        y, pull = jax.vjp(lambda x, t: fn(x, tree.join(t, rest), choices), x, chosen)
        return y, pull(dy)

    sorted_by_expert = partial(by_groups, matmul=kinds.matmul)
    names = ("few tokens", "random")
    args = [(normal(len(c), IN), normal(*c.shape, OUT), jnp.asarray(c)) for c in map(ROUTINGS.get, names)]
    ours, exact = jax.jit(lambda: [[both(fn, *a) for a in args] for fn in (sorted_by_expert, by_loop)])()
    assert len(jax.tree.leaves(ours[0][1][1])) == sum(jax.tree.leaves(mask))
    assert_trees_close(ours, exact)


def test_a_kernel_kept_in_float32_is_multiplied_in_the_rows_dtype():
    choices = jnp.asarray(ROUTINGS["random"])
    x, w = normal(len(choices), IN).astype(jnp.bfloat16), normal(E, IN, OUT)
    y, pull = jax.vjp(lambda w: by_groups(x, w, choices), w)
    assert y.dtype == jnp.bfloat16 and pull(y)[0].dtype == jnp.float32
    np.testing.assert_array_equal(y, by_groups(x, w.astype(jnp.bfloat16), choices))


# -- what it costs


def walk(jaxpr):
    """(equation, how often it is run) of a program and all within."""
    for eqn in jaxpr.eqns:
        yield eqn, 1
        times = eqn.params.get("length", 1)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                for within, often in walk(inner):
                    yield within, often * times


def cost(fn, *args):
    """(FLOPs of matrix products, elements of the largest array made) of a program."""
    flops = most = 0
    for eqn, times in walk(jax.make_jaxpr(fn)(*args).jaxpr):
        most = max([most, *(math.prod(v.aval.shape) for v in eqn.outvars)])
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            flops += 2 * times * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
    return flops, most


def test_cost_is_of_the_rows_and_not_of_experts(monkeypatch):
    """With eight times the experts a few more blocks are begun; nothing is made of tokens x experts x width."""
    monkeypatch.setattr(grouped, "MOST", 8)
    M, k, D = 1024, 2, 64
    flops = {}
    for experts in (4, 32):
        choices = jnp.asarray(routing(M, experts, k))
        x, w = normal(M, D), normal(experts, D, D)
        blocks = len(group(choices.reshape(-1), experts).expert)
        flops[experts], most = cost(jax.grad(lambda x, w, c=choices: by_groups(x, w, c).sum(), (0, 1)), x, w)
        assert flops[experts] == 3 * 2 * blocks * 8 * D * D  # y, dx and dw
        assert most <= max(blocks * 8 * D, experts * D * D)
    assert flops[32] < 1.15 * flops[4]
