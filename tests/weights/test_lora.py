"""Transforms of the tree: they start as nothing, merge into what they were, add up, and land on the modules named."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import batch, config, params

from sftjax import tree
from sftjax.config import UserError
from sftjax.models.decoder import Decoder, forward
from sftjax.weights import lora as module
from sftjax.weights import select
from sftjax.weights.adapter import adapter
from sftjax.weights.kinds import Dora, LowRank, Tokens, dense, matmul
from sftjax.weights.lora import combine, lora, merge, over_base, rates, still
from sftjax.weights.quantize import nf4
from sftjax.weights.targets import match
from sftjax.weights.tokens import tokens

CONFIG = config(qkv_bias=True)
BATCH = batch([[12, 9]], 24)
KEY = jax.random.key(0)
run = jax.jit(lambda p, key=None: matmul(*forward(Decoder(CONFIG))(p, BATCH, key)))


def adapted(p, **options):
    """With random b, as after some training."""

    def leaf(path, w):
        if isinstance(w, Dora):
            return Dora(leaf(path, w.base), w.magnitude)
        return replace(w, b=jax.random.normal(tree.fold_path(KEY, path), w.b.shape)) if isinstance(w, LowRank) else w

    return tree.map_leaves(leaf, lora(p, KEY, rank=2, alpha=1.0, **options))


def test_at_the_start_nothing_changes():
    p = params(CONFIG)
    q = lora(p, KEY, rank=4, dropout=0.1)
    np.testing.assert_array_equal(run(q), run(p))
    np.testing.assert_array_equal(run(q, KEY), run(p))  # dropout of an update that is zero
    jax.tree.map(np.testing.assert_array_equal, merge(q), p)


METHODS = {
    "lora": partial(lora, key=KEY, rank=4, targets="q_proj,down_proj"),
    "rslora": partial(lora, key=KEY, rank=4, rslora=True),
    "dora": partial(lora, key=KEY, rank=4, dora=True),
    "pissa": partial(lora, key=KEY, rank=4, init="pissa"),
    "olora": partial(lora, key=KEY, rank=4, init="olora"),
    "dora from pissa": partial(lora, key=KEY, rank=4, dora=True, init="pissa"),
    "embedding and head": partial(lora, key=KEY, rank=4, targets="embed_tokens,lm_head"),
    "adapter": partial(adapter, key=KEY, width=4),
    "tokens": partial(tokens, ids=(3, 60)),
}
TO_THE_BIT = ("lora", "rslora", "embedding and head", "adapter")


@pytest.fixture(scope="module")
def bases():
    """{name: (params, logits)}: arrays, and the same in NF4."""
    p = params(CONFIG)
    small = tree.map_leaves(lambda path, w: nf4(w) if path in match(p, "all-linear") else w, p)
    return {"array": (p, run(p)), "nf4": (small, run(small))}


@pytest.mark.parametrize("base", ["array", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_nothing(method, base, bases):
    p, logits = bases[base]
    q = METHODS[method](p)
    assert any(jax.tree.leaves(select.added(q)))
    if method in TO_THE_BIT:
        np.testing.assert_array_equal(run(q), logits)
    else:
        np.testing.assert_allclose(run(q), logits, rtol=1e-4, atol=2e-5)


def test_merged_equals_adapted():
    p = params(CONFIG)
    q = adapted(p, targets=("lm_head", "q_proj", "down_proj"))
    np.testing.assert_allclose(run(merge(q)), run(q), rtol=1e-4, atol=1e-4)
    assert np.abs(run(q) - run(p)).max() > 0.1
    assert jax.tree.structure(merge(q)) == jax.tree.structure(p)
    half = merge(adapted(jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)))
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.fixture(scope="module")
def trained_dora():
    q = adapted(params(CONFIG), dora=True, targets="q_proj,lm_head")
    return tree.map_leaves(lambda _, w: Dora(w.base, w.magnitude * 1.3) if isinstance(w, Dora) else w, q)


def test_dora_merged_equals_adapted_and_still_equals_both(trained_dora):
    logits = run(trained_dora)
    assert np.abs(logits - run(params(CONFIG))).max() > 0.1
    np.testing.assert_allclose(run(merge(trained_dora)), logits, rtol=1e-4, atol=1e-4)
    resting = still(trained_dora)
    np.testing.assert_allclose(run(resting), logits, rtol=1e-5, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), merge(resting), merge(trained_dora))
    norm = jnp.linalg.norm(dense(resting["head"]["kernel"].base), axis=0)
    np.testing.assert_allclose(resting["head"]["kernel"].magnitude * norm, trained_dora["head"]["kernel"].magnitude, rtol=1e-5)


def test_dora_under_trained_tokens_rests_too(trained_dora):
    q = tokens(trained_dora, (3, 60))
    resting = still(q)
    assert resting["head"]["kernel"].base.divided
    np.testing.assert_allclose(run(resting), run(q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_two_pairs_over_a_base_are_one_of_twice_the_rank(init):
    w = adapted(params(CONFIG), targets="down_proj", init=init)["layers"]["mlp"]["down"]["kernel"]
    one = over_base(w)
    assert one.rank == 2 * w.rank and one.base is w.base.base and one.scale == w.scale
    np.testing.assert_allclose(dense(one), dense(w), rtol=1e-5, atol=1e-5)
    assert np.abs(dense(one) - one.base).max() > 0.1
    assert over_base(one) is one


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_starts_from_the_kernel_is_found_by_exact_products(init):
    """An accelerator's own are of bfloat16: what another device makes of the same kernel would be another base."""
    kernel = jnp.ones((24, 16))
    made = str(jax.make_jaxpr(lambda w: lora({"head": {"kernel": w}}, KEY, rank=4, init=init, targets="lm_head"))(kernel))
    products = [line for line in made.splitlines() if "precision=" in line]
    assert products and all("HIGHEST" in line for line in products)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_every_expert_starts_as_its_own_kernel_would(init):
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.standard_normal((2, 3, 24, 16)), jnp.float32)  # [L, E, in, out]
    whole = lora({"layers": {"mlp": {"experts": {"up": {"kernel": stack}}}}}, KEY, rank=4, init=init)
    pair = whole["layers"]["mlp"]["experts"]["up"]["kernel"]
    update = np.asarray(pair.scale * pair.a @ pair.b)
    for index in np.ndindex(2, 3):
        one = lora({"head": {"kernel": stack[index]}}, KEY, rank=4, init=init, targets="lm_head")["head"]["kernel"]
        np.testing.assert_allclose(update[index], one.scale * one.a @ one.b, atol=1e-3)


def test_combined_adapters_are_the_weighted_sum_of_their_updates():
    p = params(CONFIG)
    parts = [(adapted(p, targets="q_proj,up_proj"), 0.3), (adapted(p, targets="q_proj,down_proj", init="pissa"), -1.5)]
    both = combine(parts)
    for path, base in tree.flatten(p).items():
        update = sum(weight * (dense(tree.flatten(q)[path]) - base) for q, weight in parts)
        np.testing.assert_allclose(dense(tree.flatten(both)[path]) - base, update, rtol=1e-4, atol=1e-5, err_msg=path)
    assert tree.flatten(both)["layers/attn/q/kernel"].rank == 2 + 2 * 2
    assert tree.flatten(both)["layers/attn/o/kernel"] is tree.flatten(p)["layers/attn/o/kernel"]


@pytest.mark.parametrize(
    "other",
    [
        lambda p: adapted(p, targets="lm_head", dora=True),
        lambda p: adapted(p, targets="q_proj") | {"head": {"kernel": p["head"]["kernel"] + 1}},
        lambda p: tokens(p, (3,)),
    ],
    ids=["dora", "a module saved", "tokens"],
)
def test_what_is_no_sum_is_not_combined(other):
    p = params(CONFIG)
    for pair in ((adapted(p), other(p)), (other(p), adapted(p))):
        with pytest.raises(UserError, match=r"(lm_head|embed_tokens) is more than a LoRA .*; merge that adapter"):
            combine([(q, 0.5) for q in pair])


def test_a_bottleneck_adapter_does_not_merge():
    with pytest.raises(UserError, match=r"a bottleneck adapter \(method adapter\)"):
        merge(adapter(params(CONFIG), KEY, width=4))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_is_of_the_layers(target):
    with pytest.raises(UserError, match=f"adapter.targets: {target} takes no adapter; .* e.g. o_proj,down_proj"):
        adapter(params(CONFIG), KEY, targets=target)


def test_trained_tokens_go_on_where_they_stand():
    first = tokens(adapted(params(CONFIG), targets="lm_head"), (60, 3))
    first = tree.map_leaves(lambda _, w: replace(w, rows=w.rows + 1.001) if isinstance(w, Tokens) else w, first)
    second = tokens(first, (7, 3))
    for path in ("embed/embedding", "head/kernel"):
        had, now = tree.flatten(first)[path], tree.flatten(second)[path]
        assert now.ids == (3, 7, 60) and now.base is had.base
        np.testing.assert_array_equal(now.rows[np.array([0, 2])], had.rows)
    np.testing.assert_allclose(run(second), run(first), rtol=1e-5, atol=1e-5)


def test_lora_plus_is_a_rate_of_b_alone():
    q = tokens(lora(params(CONFIG), KEY, targets="q_proj,lm_head", dora=True), (3,))
    trainable, _ = tree.split(q, select.added(q))
    found = {jax.tree_util.keystr(path): rate for path, rate in jax.tree_util.tree_leaves_with_path(rates(trainable, 16.0))}
    assert jax.tree.structure(rates(trainable, 16.0)) == jax.tree.structure(trainable)
    assert len(found) == 8 and {path for path, rate in found.items() if rate == 16} == {k for k in found if k.endswith(".b")}
    assert set(found.values()) == {1.0, 16.0}


def test_lora_plus_speeds_up_what_starts_at_zero():
    q = lora(params(CONFIG), KEY, targets="all-linear,embed_tokens,lm_head")
    for path, w in tree.flatten(q).items():
        if isinstance(w, LowRank):
            rate = tree.flatten(rates(q, 16.0))[path]
            assert (rate.a, rate.b) == ((1.0, 16.0) if w.a.any() else (16.0, 1.0)), path


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_one_program_finds_the_start_of_all_kernels_of_a_shape(init):
    shapes = {w.shape for path, w in tree.flatten(params(CONFIG)).items() if path in match(params(CONFIG), "all-linear")}
    before = module._by_layer._cache_size()
    for seed in range(3):
        lora(params(CONFIG), jax.random.key(seed), rank=3, init=init)
    assert module._by_layer._cache_size() - before == len(shapes)


def test_dropout_moves_with_its_key_and_only_with_one():
    q = adapted(params(CONFIG), dropout=0.3)
    keys = jax.random.split(KEY)
    assert np.abs(run(q, keys[0]) - run(q, keys[1])).max() > 0.01
    np.testing.assert_array_equal(run(q, keys[0]), run(q, keys[0]))
    plain = tree.map_leaves(lambda _, w: LowRank(w.base, w.a, w.b, w.scale) if isinstance(w, LowRank) else w, q)
    np.testing.assert_array_equal(run(q), run(plain))
    np.testing.assert_array_equal(run(plain, keys[0]), run(plain))


def test_scale_and_shapes():
    q = tree.flatten(lora(params(CONFIG), KEY, rank=4, alpha=8.0))["layers/mlp/down/kernel"]
    assert (q.a.shape, q.b.shape, q.scale) == ((3, 40, 4), (3, 4, 24), 2.0)
    assert tree.flatten(lora(params(CONFIG), KEY, rank=4, alpha=8.0, rslora=True))["layers/attn/q/kernel"].scale == 4.0
    assert 0.8 < np.abs(q.a).max() * 40**0.5 <= 1 and not q.b.any()


def test_an_update_starts_from_the_name_of_its_leaf():
    a = tree.flatten(lora(params(CONFIG), KEY))
    b = tree.flatten(lora(params(CONFIG), KEY, targets=["up_proj"]))
    np.testing.assert_array_equal(a["layers/mlp/up/kernel"].a, b["layers/mlp/up/kernel"].a)
    assert np.abs(a["layers/mlp/up/kernel"].a - a["layers/mlp/gate/kernel"].a).min() > 0


ATTENTION = {f"layers/attn/{x}/kernel" for x in "qkvo"}
MLP = {f"layers/mlp/{x}/kernel" for x in ("gate", "up", "down")}


@pytest.mark.parametrize(
    "targets, chosen",
    [
        ("all-linear", ATTENTION | MLP),
        ("q_proj", {"layers/attn/q/kernel"}),
        (["q_proj", "v_proj"], {"layers/attn/q/kernel", "layers/attn/v/kernel"}),
        (["lm_head"], {"head/kernel"}),
        ("(q|k){1,1}_proj,lm_head", {"layers/attn/q/kernel", "layers/attn/k/kernel", "head/kernel"}),
        (r"mlp\.\w+", MLP),
        (r".*\.(k|o)_proj", {"layers/attn/k/kernel", "layers/attn/o/kernel"}),
        (["self_attn.q_proj", "(gate|up)_proj"], {"layers/attn/q/kernel", "layers/mlp/gate/kernel", "layers/mlp/up/kernel"}),
    ],
)
def test_targets(targets, chosen):
    assert match(params(CONFIG), targets) == chosen


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"targets": ["q_proj", "v_porj"]},
            r"nothing is named 'v_porj'; did you mean v_proj\? there are down_proj, embed_tokens, gate_proj",
        ),
        ({"targets": ["proj"]}, "nothing is named 'proj'"),
        ({"targets": ["(q_proj"]}, "not a regular expression"),
        ({"rank": 0}, "lora.rank=0: .* needs a rank of at least 1"),
        ({"rank_pattern": {"down_porj": 2}}, r"lora.rank_pattern: nothing is named 'down_porj'; did you mean down_proj\?"),
        ({"alpha_pattern": {"lm_head": 2.0}}, "lora.alpha_pattern: 'lm_head' names nothing that lora.targets does"),
        ({"rank_pattern": {"all-linear": 2}}, "lora.rank_pattern: nothing is named 'all-linear'"),
        ({"rank": 20, "init": "pissa"}, "lora.rank=20: layers.self_attn.k_proj is 24 x 16, lora.init=pissa finds no more there"),
        ({"dropout": 0.1, "targets": "q_proj,lm_head"}, "lora.dropout=0.1: does not reach lm_head, which lora.targets names"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        lora(params(CONFIG), KEY, **options)


def test_a_tied_head_is_no_target():
    with pytest.raises(UserError, match="lm_head"):
        lora(params(config(tied=True)), KEY, targets="lm_head")
    with pytest.raises(UserError, match=r"lora.dora: this model's embedding is its head too"):
        lora(params(config(tied=True)), KEY, targets="embed_tokens", dora=True)
