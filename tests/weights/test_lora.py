"""LoRA starts as nothing, merges into what it was, and lands on the modules its targets name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import batch, config, params

from sftjax import tree
from sftjax.config import UserError
from sftjax.models.decoder import Decoder, forward
from sftjax.weights.kinds import LowRank, matmul
from sftjax.weights.lora import lora, match, merge

CONFIG = config(qkv_bias=True)
BATCH = batch([[12, 9]], 24)
KEY = jax.random.key(0)
run = jax.jit(lambda p, key=None: matmul(*forward(Decoder(CONFIG))(p, BATCH, key)))


def adapted(p, **options):
    """With random b, as after some training."""

    def leaf(path, w):
        if not isinstance(w, LowRank):
            return w
        return LowRank(w.base, w.a, jax.random.normal(tree.fold_path(KEY, path), w.b.shape), w.scale, w.dropout)

    return tree.map_leaves(leaf, lora(p, KEY, rank=2, alpha=1.0, **options))


def test_at_the_start_nothing_changes():
    p = params(CONFIG)
    q = lora(p, KEY, rank=4, dropout=0.1)
    np.testing.assert_array_equal(run(q), run(p))
    np.testing.assert_array_equal(run(q, KEY), run(p))  # dropout of an update that is zero
    jax.tree.map(np.testing.assert_array_equal, merge(q), p)


def test_merged_equals_adapted():
    p = params(CONFIG)
    q = adapted(p, targets=("lm_head", "q_proj", "down_proj"))
    np.testing.assert_allclose(run(merge(q)), run(q), rtol=1e-4, atol=1e-4)
    assert np.abs(run(q) - run(p)).max() > 0.1
    assert jax.tree.structure(merge(q)) == jax.tree.structure(p)
    half = merge(adapted(jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)))
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


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
        ({"targets": ["q_proj", "v_porj"]}, r"nothing is named 'v_porj'; did you mean v_proj\? there are down_proj, gate_proj"),
        ({"targets": ["proj"]}, "nothing is named 'proj'"),
        ({"targets": ["(q_proj"]}, "not a regular expression"),
        ({"rank": 0}, "lora.rank=0"),
        ({"dropout": 0.1, "targets": "q_proj,lm_head"}, "lora.dropout=0.1: does not reach lm_head, which lora.targets names"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        lora(params(CONFIG), KEY, **options)


def test_a_tied_head_is_no_target():
    with pytest.raises(UserError, match="lm_head"):
        lora(params(config(tied=True)), KEY, targets="lm_head")
