"""A mixture of experts: each token has its own experts and no other, whatever the rest chose; what that costs; its balance."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, batch, config, params, pieces, unpacked

from sftjax import sharding
from sftjax.losses import masked_xent
from sftjax.losses.tokens import balance, shift
from sftjax.models.config import Clamp, Experts
from sftjax.models.decoder import Decoder, forward, init_cache
from sftjax.models.layers import ACTIVATIONS
from sftjax.models.moe import Mixture, Routed
from sftjax.weights import select
from sftjax.weights.lora import lora
from sftjax.weights.targets import match

MIXED = config(experts=Experts(5, 2, 20, shared=28))
PACKED = batch([[20, 15], [-7, 30], [5, 9, 16]], 40)


def written(c, p, x):
    """The definition: every expert says something of every token, and the k likeliest are heard."""
    e = c.experts
    probs = jax.nn.softmax(x @ p["router"]["kernel"] + p["router"].get("bias", 0))
    kth = jnp.sort(probs)[..., -e.active, None]
    heard = jnp.where(probs >= kth, probs, 0)
    heard = heard / heard.sum(-1, keepdims=True) if e.normalise else heard

    def gated(kernels, x, expert=""):
        at = ("btd,edf->btef", "btef,efd->bted") if expert else ("btd,df->btf", "btf,fd->btd")

        def linear(at, name, x):
            return jnp.einsum(at, x, kernels[name]["kernel"]) + kernels[name].get("bias", 0)

        if "gate_up" in kernels:
            gate, up = jnp.moveaxis(linear(at[0], "gate_up", x).reshape(*x.shape[:2], e.number, e.width, 2), -1, 0)
        else:
            gate, up = linear(at[0], "gate", x), linear(at[0], "up", x)
        if expert and e.clamp:
            low, high = -e.clamp.limit, e.clamp.limit
            gate, up = jnp.where(gate > high, high, gate), jnp.where(up > high, high, jnp.where(up < low, low, up))
            inner = gate / (1 + jnp.exp(-e.clamp.alpha * gate)) * (up + 1)
        else:
            inner = ACTIVATIONS[c.activation](gate) * up
        return linear(at[1], "down", inner)

    y = (gated(p["experts"], x, "each") * heard[..., None]).sum(2)
    return y + jax.nn.sigmoid(x @ p["shared_gate"]["kernel"]) * gated(p["shared"], x) if e.shared else y


CLAMPED = Experts(5, 2, 12, bias=True, fused=True, clamp=Clamp(1.7, 0.6))
PLAIN = [Experts(5, 2, 20, shared=28), Experts(6, 3, 12, normalise=False), Experts(3, 3, 8), Experts(4, 2, 20, bias=True)]


@pytest.mark.parametrize("e", [*PLAIN, CLAMPED], ids=str)
def test_value_and_gradients_are_those_of_the_definition(e):
    c = config(experts=e, layers=1)
    p = jax.tree.map(lambda x: x[0], params(c)["layers"]["mlp"])
    x, dy = np.random.default_rng(1).standard_normal((2, 2, 40, c.width), np.float32)

    def both(fn):
        y, pull = jax.vjp(fn, p, jnp.asarray(x))
        return y, pull(jnp.asarray(dy))

    def ours(p, x):
        return Mixture(c).apply({"params": p}, x, jnp.ones(x.shape[:2], jnp.int32))[0]

    got, exact = jax.jit(lambda: (both(ours), both(lambda p, x: written(c, p, x))))()
    assert_trees_close(got, exact)


def test_where_experts_tie_the_first_are_taken():
    c = config(experts=Experts(5, 2, 20), layers=1)
    p = jax.tree.map(lambda x: x[0], params(c)["layers"]["mlp"])
    p["router"]["kernel"] *= 0
    _, routed = Mixture(c).apply({"params": p}, jnp.ones((1, 7, c.width)), jnp.ones((1, 7), jnp.int32))
    assert routed.chosen.tolist() == [7, 7, 0, 0, 0]
    np.testing.assert_allclose(routed.probs, 7 / 5, rtol=1e-6)


@pytest.fixture(scope="module")
def reference():
    """(parameters, loss, gradients), with the routers' balance in them."""
    p = params(MIXED)
    return p, *value_and_grad(Decoder(MIXED), p)


def value_and_grad(model, p, b=PACKED):
    loss = masked_xent(forward(model), router_balance=0.1)
    return jax.jit(jax.value_and_grad(lambda p: loss(p, b, None)[0]))(p)


@pytest.mark.parametrize("options", [{"scan": False}, {"remat": "minimal"}, {"remat": "block"}, {"lower": 2}], ids=str)
def test_unrolled_rematerialised_and_cut_change_nothing(options, reference):
    p, loss, grads = reference
    again, grads_again = value_and_grad(Decoder(MIXED, **options), select.cut(p, 1) if "lower" in options else p)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert_trees_close(select.uncut(grads_again), grads)


def test_a_token_has_its_experts_whoever_else_is_there(reference):
    """Packed or alone, with more or fewer others: no expert is ever full. The balance is that of the real tokens alone."""
    p, *_ = reference
    alone = unpacked(PACKED)
    run = jax.jit(lambda b: forward(Decoder(MIXED))(p, b))
    packed, apart = run(PACKED), run(alone)
    for i, (row, where) in enumerate(pieces(PACKED)):
        n = where.stop - where.start
        np.testing.assert_allclose(packed.hidden[row, where], apart.hidden[i, :n], atol=2e-5)
    assert_trees_close(packed.routed, apart.routed)
    real = (PACKED.segments > 0).sum()
    np.testing.assert_array_equal(packed.routed.tokens, real)
    np.testing.assert_array_equal(packed.routed.chosen.sum(-1), 2 * real)


def test_cached_decoding_equals_full(reference):
    p, *_ = reference
    model, b = Decoder(MIXED), batch([[12], [12]], 12)
    full = np.asarray(forward(model)(p, b).hidden)
    cache = init_cache(MIXED, 2, 12, jnp.float32)

    @jax.jit
    def run(tokens, positions, cache):
        return model.apply({"params": p}, tokens, jnp.ones_like(tokens), positions, cache)[:2]

    for start, end in [(0, 7), *((i, i + 1) for i in range(7, 12))]:
        hidden, cache = run(b.tokens[:, start:end], b.positions[:, start:end], cache)
        np.testing.assert_allclose(hidden, full[:, start:end], atol=2e-5)


# -- balance


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_balance_is_that_of_transformers(family, tmp_path):
    import torch
    import transformers

    from sftjax.hf.load import load_config, load_params

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 20, "moe_intermediate_size": 20, "initializer_range": 0.3}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    shape |= {"num_experts" if family == "qwen3_moe" else "num_local_experts": 5}
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[family](**shape), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    b = batch([[20], [9], [14]], 20)
    with torch.no_grad():
        mask = torch.tensor(np.asarray(b.segments))
        theirs = model(torch.tensor(np.asarray(b.tokens)), attention_mask=mask, output_router_logits=True).aux_loss
    c = load_config(tmp_path)
    np.testing.assert_allclose(balance(forward(Decoder(c))(load_params(tmp_path, c), b).routed), theirs, rtol=1e-5)


def test_balance_counts_in_the_loss_and_moves_the_routers(reference):
    p, loss, grads = reference
    run = forward(Decoder(MIXED))
    plain, count, metrics = masked_xent(run)(p, PACKED)
    assert set(metrics) == {"nll"}
    total, again, metrics = masked_xent(run, router_balance=0.1)(p, PACKED)
    np.testing.assert_allclose(count, again)
    np.testing.assert_allclose(count, shift(PACKED)[1].sum())
    np.testing.assert_allclose(metrics["router_balance"] / count, balance(run(p, PACKED).routed), rtol=1e-5)
    np.testing.assert_allclose([total, loss], plain + 0.1 * metrics["router_balance"], rtol=1e-5)
    without = jax.grad(lambda p: masked_xent(run)(p, PACKED)[0])(p)
    routers = [g["layers"]["mlp"]["router"]["kernel"] for g in (grads, without)]
    assert np.abs(routers[0] - routers[1]).max() > 1e-3 * np.abs(routers[1]).max()


def test_even_routers_are_the_least_that_balance_can_be():
    """k where all experts have as many tokens, E where one has all of each."""
    tokens = jnp.full(3, 60.0)
    assert balance(Routed(jnp.full((3, 4), 30.0), jnp.full((3, 4), 15.0), tokens)) == 2
    one = jnp.zeros((3, 4)).at[:, 0].set(60.0)
    assert balance(Routed(one, one, tokens)) == 4


# -- LoRA


def test_all_linear_are_the_experts_and_not_who_chooses_them():
    chosen = {path.removeprefix("layers/").removesuffix("/kernel") for path in match(params(MIXED), "all-linear")}
    gated = {f"mlp/{x}/{y}" for x in ("experts", "shared") for y in ("gate", "up", "down")}
    assert chosen == {f"attn/{x}" for x in "qkvo"} | gated
    assert match(params(MIXED), "experts.down_proj") == {"layers/mlp/experts/down/kernel"}


def test_dropout_reaches_the_experts(reference):
    p, *_ = reference
    low = lora(p, jax.random.key(0), rank=2, targets="experts.up_proj", dropout=0.5)
    low = jax.tree.map(lambda x, trains: x + 0.1 if trains else x, low, select.added(low))
    run = jax.jit(lambda key: forward(Decoder(MIXED))(low, PACKED, key).hidden)
    one, other = run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(one, run(jax.random.key(1)))
    assert np.abs(one - other)[np.asarray(PACKED.segments) > 0].mean() > 1e-3


def test_devices_drop_otherwise_each():
    """Rows of one text, each on a device of its own."""
    low = lora(params(MIXED), jax.random.key(0), rank=2, targets="experts.up_proj", dropout=0.5)
    low = jax.tree.map(lambda x, trains: x + 0.1 if trains else x, low, select.added(low))
    row = batch([[16]], 16)
    rows = jax.tree.map(lambda x: jnp.concatenate([x] * 8), row)
    mesh = sharding.make_mesh(data=8)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda p, key: forward(Decoder(MIXED))(p, rows, key).hidden)
        placed = sharding.placed(low, mesh)
        one, other = run(placed, jax.random.key(1))[:2]
        np.testing.assert_allclose(*run(placed, None)[:2], rtol=1e-5, atol=1e-5)
    assert np.abs(one - other).max() > 1e-2


# -- cost, of the compiled program


def made(text):
    """Shapes of all that a compiled program makes."""
    return {tuple(map(int, shape.split(","))) for shape in re.findall(r"= \w+\[([\d,]+)\]", text)}


def test_a_training_step_makes_nothing_of_tokens_x_experts_x_width():
    c = config(layers=1, experts=Experts(32, 2, 20))
    shapes = jax.eval_shape(lambda: params(c))
    b = batch([[128], [128]], 128)
    loss = masked_xent(forward(Decoder(c)))
    text = jax.jit(jax.grad(lambda p: loss(p, b, None)[0])).lower(shapes).compile().as_text()
    M, E, D, F = 256, 32, c.width, 20
    rows = 2 * M + E * 8  # no more than those that a block of 8 for each expert adds
    fine = max(rows * D, E * D * F, M * c.vocab, 2 * c.heads * 128 * 128)
    assert max(np.prod(shape) for shape in made(text)) <= fine < M * E * F


def test_decoding_a_token_copies_the_experts_of_no_layer():
    c = config(layers=4, experts=Experts(16, 2, 20))
    shapes = jax.eval_shape(lambda: (params(c), init_cache(c, 1, 8, jnp.float32)))
    one = jnp.ones((1, 1), jnp.int32)

    def step(p, cache):
        return Decoder(c).apply({"params": p}, one, one, one, cache)[:2]

    text = jax.jit(step).lower(*shapes).compile().as_text()
    whole = {16 * c.width * 20}
    entry = {(4, 16, c.width, 20), (4, 16, 20, c.width)}  # the parameters themselves, handed on
    assert not {shape for shape in made(text) if np.prod(shape) in whole} - entry
