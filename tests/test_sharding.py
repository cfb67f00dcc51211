"""Eight virtual devices compute what one does, each holding its share."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, batch, config, params

from sftjax import sharding, tree
from sftjax.config import UserError
from sftjax.losses import masked_xent
from sftjax.models.config import Experts
from sftjax.models.decoder import Decoder, forward
from sftjax.weights import select
from sftjax.weights.adapter import adapter
from sftjax.weights.kinds import Kind
from sftjax.weights.lora import lora
from sftjax.weights.quantize import int8, nf4
from sftjax.weights.targets import match
from sftjax.weights.tokens import tokens

CONFIG = config(
    layers=2, kv_heads=4, qkv_bias=True, qk_norm="all", windows=(7, None), post_norms=True, attn_softcap=3.0, logit_softcap=5.0
)
ROWS = [[20], [9, 8], [3], [-4, 12], [6, 6, 6], [20], [], [17]]
BATCH = batch(ROWS, 20)
TIED = replace(CONFIG, tied=True)
# a shard has whole blocks of 64 in every dimension, on fsdp=8 as on tensor=4
BLOCKS = config(width=512, mlp_width=256, layers=2, kv_heads=4, head_dim=64)
TARGETS = "q_proj,o_proj,down_proj,lm_head"
MIXED = replace(CONFIG, experts=Experts(3, 2, 16, shared=8))
MIXED_BLOCKS = replace(BLOCKS, experts=Experts(3, 2, 256))


def low_rank(p, targets=TARGETS, by=0.1, **options):
    q = lora(p, jax.random.key(0), rank=2, alpha=1.0, targets=targets, **options)
    return jax.tree.map(lambda x, trains: x + by if trains else x, q, select.added(q))  # away from b = 0, where a has no gradient


def quantised(p, kind):
    return tree.map_leaves(lambda path, w: kind(w) if path in match(p, "all-linear") else w, p)


METHODS = {
    "full": (CONFIG, lambda p: p),
    "lora": (CONFIG, low_rank),
    "dora": (CONFIG, lambda p: low_rank(p, dora=True)),
    "qlora": (BLOCKS, lambda p: low_rank(quantised(jax.tree.map(lambda x: 0.2 * x, p), nf4), by=0.01)),
    "int8": (CONFIG, lambda p: low_rank(quantised(p, int8), init="olora")),
    "adapter": (CONFIG, lambda p: jax.tree.map(lambda x: x + 0.01, adapter(p, jax.random.key(0), width=4))),
    "tokens": (TIED, lambda p: tokens(low_rank(p, "embed_tokens"), (3, 40, 63))),
    "mixture": (MIXED, lambda p: p),
    "lora on experts": (MIXED, lambda p: low_rank(p, "all-linear")),
    "qlora on experts": (
        MIXED_BLOCKS,
        lambda p: low_rank(quantised(jax.tree.map(lambda x: 0.2 * x, p), nf4), "all-linear", by=0.01),
    ),
}
EVERYTHING = ("full", "mixture")


def value_and_grad(c, trainable, frozen, b):
    loss = masked_xent(forward(Decoder(c)), router_balance=0.1 if c.experts else 0.0)
    return jax.jit(jax.value_and_grad(lambda t, f, b: loss(tree.join(t, f), b, None)[0]))(trainable, frozen, b)


def make_params(method):
    c, transform = METHODS[method]
    p = transform(params(c))
    return p, select.everything(p) if method in EVERYTHING else select.added(p)


@pytest.fixture(scope="module")
def single():
    """`single(method)`: loss and gradients on one device."""

    @cache
    def of(method):
        p, mask = make_params(method)
        return value_and_grad(METHODS[method][0], *tree.split(p, mask), BATCH)

    return of


MESHES = [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]


FSDP, TENSOR, ALL = MESHES[1:]
TRIED = [*(("full", mesh) for mesh in MESHES), ("lora", FSDP), ("lora", ALL), ("dora", ALL), ("qlora", FSDP), ("qlora", TENSOR)]
TRIED += [("int8", ALL), ("adapter", TENSOR), ("tokens", ALL), *(("mixture", mesh) for mesh in (FSDP, TENSOR, ALL))]
TRIED += [("lora on experts", ALL), ("qlora on experts", FSDP)]


@pytest.mark.parametrize("method, axes", TRIED, ids=str)
def test_sharded_equals_single(method, axes, single):
    mesh = sharding.make_mesh(**axes)
    p, mask = make_params(method)
    p = jax.tree.map(jax.device_put, p, sharding.shardings(p, mesh))
    c, q = METHODS[method][0], p["layers"]["attn"]["q"]["kernel"]
    while isinstance(q, Kind):
        q = q.base
    held = q if isinstance(q, jax.Array) else q.codes
    lead, fan_in, fan_out = held.shape
    assert held.addressable_shards[0].data.shape == (lead, fan_in // mesh.shape["fsdp"], fan_out // mesh.shape["tensor"])
    b = jax.device_put(BATCH, sharding.batch_sharding(mesh))
    assert b.tokens.addressable_shards[0].data.shape == (8 // (mesh.shape["data"] * mesh.shape["fsdp"]), 20)
    with jax.set_mesh(mesh):
        loss, grads = value_and_grad(c, *tree.split(p, mask), b)
    np.testing.assert_allclose(loss, single(method)[0], rtol=1e-5)
    assert_trees_close(grads, single(method)[1])


PLACES = {
    "lora": {"base": (None, "tensor", "fsdp"), "a": (None, "tensor", None), "b": (None, None, "fsdp")},
    "dora": {
        "base.base": (None, "tensor", "fsdp"),
        "base.a": (None, "tensor", None),
        "base.b": (None, None, "fsdp"),
        "magnitude": (None, "fsdp"),
    },
    "qlora": {
        "base.codes": (None, "tensor", "fsdp"),
        "base.absmax": (None, "tensor", "fsdp"),
        "base.scale": (None, None, None),
        "base.offset": (None, None, None),
        "a": (None, "tensor", None),
        "b": (None, None, "fsdp"),
    },
    "adapter": {
        "base": (None, "tensor", "fsdp"),
        "down": (None, "fsdp", None),
        "down_bias": (None, None),
        "up": (None, None, "fsdp"),
        "up_bias": (None, "fsdp"),
    },
}


@pytest.mark.parametrize("method", PLACES)
def test_parts_lie_as_their_kernel_does(method):
    shapes = jax.eval_shape(lambda: make_params(method)[0])
    placed = sharding.shardings(shapes, sharding.make_mesh(data=1, fsdp=4, tensor=2))
    down = jax.tree_util.tree_leaves_with_path(placed["layers"]["mlp"]["down"]["kernel"])
    assert {jax.tree_util.keystr(path, simple=True, separator="."): tuple(x.spec) for path, x in down} == PLACES[method]
    norms = {path: x for path, x in tree.flatten(placed).items() if path.endswith("norm/scale")}
    assert norms and not any(any(x.spec) for x in norms.values())


def test_rows_of_tokens_are_whole_over_the_vocabulary():
    shapes = jax.eval_shape(lambda: tokens(params(CONFIG), (3, 40, 63)))
    placed = sharding.shardings(shapes, sharding.make_mesh(data=1, fsdp=4, tensor=2))
    assert [tuple(placed[x][y].rows.spec) for x, y in (("embed", "embedding"), ("head", "kernel"))] == [(None, "fsdp")] * 2


@pytest.mark.parametrize(
    "axes, changes, message",
    [
        ({"fsdp": 8}, {"width": 20}, r"embed/embedding \(64, 20\): 20 does not divide over 8 devices; use --config.mesh.fsdp=4"),
        ({"tensor": 4}, {"mlp_width": 42}, r"layers/mlp/down/kernel \(2, 42, 24\): 42 does not .* --config.mesh.tensor=2"),
    ],
)
def test_a_shape_that_does_not_divide_is_named_with_its_axis(axes, changes, message):
    shapes = jax.eval_shape(lambda: params(config(layers=2, kv_heads=4, **changes)))
    with pytest.raises(UserError, match=message):
        sharding.shardings(shapes, sharding.make_mesh(data=-1, **axes))


def test_heads_that_do_not_divide_are_named():
    c = config(layers=1, kv_heads=2)  # 2 x 8 columns divide over 4 devices, 2 heads do not
    with jax.set_mesh(sharding.make_mesh(data=2, tensor=4)), pytest.raises(UserError, match=r"2 key-value heads.*mesh\.tensor=2"):
        forward(Decoder(c))(params(c), BATCH)


def test_every_leaf_of_a_low_rank_part_is_checked():
    p = lora({"layers": {"mlp": {"down": {"kernel": jnp.zeros((1, 6, 8))}}}}, jax.random.key(0), rank=2)
    with pytest.raises(UserError, match=r"layers/mlp/down/kernel.base \(1, 6, 8\): 6 does not divide over 4"):
        sharding.shardings(p, sharding.make_mesh(data=2, tensor=4))


def test_the_mesh_takes_the_rest_or_says_what_is_wrong():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.make_mesh(data=1).size == 1  # one device, however many there are
    with pytest.raises(UserError, match="only one axis may be -1, not data and fsdp"):
        sharding.make_mesh(data=-1, fsdp=-1)
    with pytest.raises(UserError, match="data=3 x fsdp=1 x tensor=1 does not make the 8 devices"):
        sharding.make_mesh(data=3)
    with pytest.raises(UserError, match="does not make the 8 devices"):
        sharding.make_mesh(data=-1, fsdp=3)


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="no sharding rule for layers/mlp/gatekernel"):
        sharding.logical_axes("layers/mlp/gatekernel", 3)
