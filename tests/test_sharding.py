"""Eight virtual devices compute what one does, each holding its share."""

import itertools
import math
import os
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tiny import assert_trees_close, batch, config, params

from sftjax import sharding, tree
from sftjax.config import UserError, default
from sftjax.losses import dpo, masked_xent, neftune
from sftjax.models import moe
from sftjax.models.config import Clamp, Experts
from sftjax.models.decoder import Decoder, forward
from sftjax.plan import flops
from sftjax.tasks.job import check_batch
from sftjax.weights import select
from sftjax.weights.adapter import adapter
from sftjax.weights.kinds import Kind
from sftjax.weights.lora import lora, without
from sftjax.weights.quantize import int8, nf4
from sftjax.weights.targets import match
from sftjax.weights.tokens import tokens

CONFIG = config(
    layers=2,
    kv_heads=4,
    qkv_bias=True,
    qk_norm="all",
    windows=(7, None),
    post_norms=True,
    sinks=True,
    attn_softcap=3.0,
    logit_softcap=5.0,
)
ROWS = [[20], [9, 8], [3], [-4, 12], [6, 6, 6], [20], [], [17]]
BATCH = batch(ROWS, 20)
TIED = replace(CONFIG, tied=True)
BLOCKS = config(width=128, mlp_width=128, layers=2, kv_heads=2, head_dim=32)  # a half has whole blocks of 64 in every dimension
TARGETS = "q_proj,o_proj,down_proj,lm_head"
MIXED = replace(CONFIG, experts=Experts(4, 2, 16, shared=8, bias=True, fused=True, clamp=Clamp(1.7, 0.5)))
MIXED_BLOCKS = replace(BLOCKS, experts=Experts(4, 2, 128))


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
    "dpo": (CONFIG, low_rank),
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


def compiled(loss, trainable, frozen, b):
    """The loss and its gradient. Unoptimised: what is compiled once and runs once, for milliseconds."""
    step = jax.jit(jax.value_and_grad(lambda t, f, b: loss(tree.join(t, f), b, jax.random.key(1))[0]))
    return step.lower(trainable, frozen, b).compile(compiler_options={"xla_backend_optimization_level": 0})


def make_loss(method):
    c = METHODS[method][0]
    if method == "dpo":
        return dpo(forward(Decoder(c)), reference=without)
    if method == "lora":
        return masked_xent(neftune(forward(Decoder(c)), alpha=5))
    return masked_xent(forward(Decoder(c, remat="minimal")), router_balance=0.1 if c.experts else 0.0)


def make_params(method):
    c, transform = METHODS[method]
    p = transform(params(c))
    return p, select.everything(p) if method in EVERYTHING else select.added(p)


@pytest.fixture(scope="module")
def made():
    """`made(method)`: parameters and which of them train; `made(method, loss=True)`: its loss and gradients on one device."""

    @cache
    def of(method, loss=False):
        if not loss:
            return make_params(method)
        p, mask = of(method)
        arguments = (*tree.split(p, mask), BATCH)
        return compiled(make_loss(method), *arguments)(*arguments)

    return of


DATA, FSDP, TENSOR = {"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "tensor": 4}
SEQUENCE, EXPERT = {"data": 2, "sequence": 4}, {"data": 2, "expert": 4}
# three axes are three pairs: these hold every pair of axes, but data with tensor, which is above
DFS, FTS = {"data": 2, "fsdp": 2, "sequence": 2}, {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}
DTE, FES = {"data": 2, "tensor": 2, "expert": 2}, {"data": 1, "fsdp": 2, "expert": 2, "sequence": 2}
TRIED = [("full", mesh) for mesh in (DATA, FSDP, TENSOR, SEQUENCE, DFS, FTS)]
TRIED += [(method, mesh) for method in ("lora", "qlora", "dpo") for mesh in (DFS, FTS)]
TRIED += [(method, FTS) for method in ("dora", "int8", "adapter", "tokens")]
TRIED += [*(("mixture", mesh) for mesh in (EXPERT, DTE, FES)), ("lora on experts", FES), ("qlora on experts", DTE)]
if os.environ.get("SFTJAX_EVERY_MESH"):  # each axis and each pair of them for each method: half an hour
    for method, (c, _) in METHODS.items():
        axes = ("fsdp", "tensor", "sequence", *(["expert"] if c.experts else []))
        TRIED += [(method, DATA), *((method, {"data": 4, axis: 2}) for axis in axes)]
        TRIED += [(method, {"data": 2, one: 2, other: 2}) for one, other in itertools.combinations(axes, 2)]


@pytest.mark.parametrize("method, axes", TRIED, ids=str)
def test_sharded_equals_single(method, axes, made):
    mesh = sharding.make_mesh(**axes)
    p, mask = made(method)
    p = jax.tree.map(jax.device_put, p, sharding.shardings(p, mesh))
    q = p["layers"]["attn"]["q"]["kernel"]
    while isinstance(q, Kind):
        q = q.base
    held = q if isinstance(q, jax.Array) else q.codes
    lead, fan_in, fan_out = held.shape
    assert held.addressable_shards[0].data.shape == (lead, fan_in // mesh.shape["fsdp"], fan_out // mesh.shape["tensor"])
    b = jax.device_put(BATCH, sharding.batch_sharding(mesh))
    rows, columns = 8 // math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert")), 20 // mesh.shape["sequence"]
    assert b.tokens.addressable_shards[0].data.shape == (rows, columns)
    arguments = (*tree.split(p, mask), b)
    with jax.set_mesh(mesh):
        step = compiled(make_loss(method), *arguments)
        loss, grads = step(*arguments)
    expected = made(method, loss=True)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    assert_trees_close(grads, expected[1])
    if method == "qlora" and mesh.shape["fsdp"] > 1:  # with experts tokens are gathered too
        assert_codes_travel(step.as_text())


def assert_codes_travel(text):
    """Kernels are gathered within the loop over layers, one layer at a time, and as bytes."""
    gathers = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text[: text.index("\nENTRY")])
    sizes = [(kind, math.prod(map(int, shape.split(",")))) for kind, shape in gathers]
    codes = 64 * 64  # of the smallest kernel, k's: half of its 128 inputs, of 64 outputs a byte each
    assert {size for kind, size in sizes if kind == "u8"} >= {codes}
    assert all(size < codes for kind, size in sizes if kind != "u8"), sizes


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
    placed = sharding.shardings(shapes, sharding.make_mesh(data=2, fsdp=2, tensor=2))
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
        (
            {"expert": 4},
            {"experts": Experts(6, 2, 16)},
            r"layers/mlp/experts/down/kernel \(2, 6, 16, 24\): 6 does not .* --config.mesh.expert=2",
        ),
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
    b = batch(ROWS, 24)
    with jax.set_mesh(sharding.make_mesh(data=1, sequence=8)), pytest.raises(UserError, match=r"4 heads .*mesh\.sequence=4"):
        jax.eval_shape(forward(Decoder(c)), params(c), b)


def test_every_leaf_of_a_low_rank_part_is_checked():
    p = lora({"layers": {"mlp": {"down": {"kernel": jnp.zeros((1, 6, 8))}}}}, jax.random.key(0), rank=2)
    with pytest.raises(UserError, match=r"layers/mlp/down/kernel.base \(1, 6, 8\): 6 does not divide over 4"):
        sharding.shardings(p, sharding.make_mesh(data=2, tensor=4))


def test_the_mesh_takes_the_rest_or_says_what_is_wrong():
    ones = {"data": 1, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1}
    assert dict(sharding.make_mesh().shape) == ones | {"data": 8}
    assert dict(sharding.make_mesh(data=2, sequence=-1, tensor=2).shape) == ones | {"data": 2, "sequence": 2, "tensor": 2}
    assert sharding.make_mesh(data=1).size == 1  # one device, however many there are
    with pytest.raises(UserError, match="only one axis may be -1, not data and fsdp"):
        sharding.make_mesh(data=-1, fsdp=-1)
    with pytest.raises(UserError, match="data=3 x expert=2 does not make the 8 devices"):
        sharding.make_mesh(data=3, expert=2)
    with pytest.raises(UserError, match="fsdp=3 does not divide the 8 devices here, of which data is to take the rest"):
        sharding.make_mesh(data=-1, fsdp=3)


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="no sharding rule for layers/mlp/gatekernel"):
        sharding.logical_axes("layers/mlp/gatekernel", 3)


LONG = config(layers=1, heads=4, kv_heads=2, windows=(500,))


def test_a_long_row_over_devices_equals_it_on_one_and_no_device_has_its_square():
    """A window, segments that lie across devices, keys that do not divide over them. SFTJAX_LONG_ROW=32768 takes its minutes."""
    T = int(os.environ.get("SFTJAX_LONG_ROW", 2048))
    p, b = params(LONG), batch([[T // 3, T // 2, T // 8], [T]], T)
    loss = masked_xent(forward(Decoder(LONG)))
    none = jax.tree.map(lambda _: None, p)  # is frozen
    expected = compiled(loss, p, none, b)(p, none, b)
    mesh = sharding.make_mesh(data=2, sequence=4)
    placed = jax.tree.map(jax.device_put, p, sharding.shardings(p, mesh)), none, jax.device_put(b, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = compiled(loss, *placed)
    got = step(*placed)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    assert_trees_close(got[1], expected[1])
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"(?:f32|pred|s32)\[([\d,]+)\]", step.as_text())]
    assert 0 < max(sizes) <= LONG.heads // 4 * T * T // 4  # one chunk of queries against all keys, of a device's one head


def share_of_experts(mesh, choices):
    """Loss and gradients of a mixture alone, whose tokens have chosen already."""
    c = replace(CONFIG, experts=Experts(4, 2, 16))
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.standard_normal((8, 20, n)), jnp.float32) for n in (c.width, 2))
    experts = params(c)["layers"]["mlp"]["experts"]
    kernels = tuple(moe.Linear(experts[name]["kernel"][0], None) for name in ("gate", "up", "down"))

    def loss(x, weights, kernels):
        return jnp.square(moe._sharded(c, x, choices, weights, kernels, None)).sum()

    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, weights, kernels)


@pytest.mark.parametrize("popular", [(0, 1), (3, 0), None], ids=["of one device", "of two", "even"])
def test_no_token_is_lost_however_uneven_the_routing(popular):
    """All tokens to the experts of one device: four turns there and none elsewhere."""
    choices = np.random.default_rng(1).permuted(np.tile(np.arange(4), (8, 20, 1)), axis=-1)[..., :2]
    choices = jnp.asarray(choices if popular is None else np.broadcast_to(popular, choices.shape), jnp.int32)
    got = share_of_experts(sharding.make_mesh(data=4, expert=2), choices)
    expected = share_of_experts(sharding.make_mesh(data=1), choices)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    assert_trees_close(got[1], expected[1])


def test_a_device_computes_its_experts_share():
    """FLOPs of all devices together, of one turn: a quarter is spare, and every other block of rows may be part empty."""
    c = config(layers=1, experts=Experts(8, 2, 128))
    p, b = jax.eval_shape(lambda: params(c)), batch([[512]] * 8, 512)
    work = {}
    for experts in (1, 8):
        mesh = sharding.make_mesh(data=8 // experts, expert=experts)
        with jax.set_mesh(mesh):
            work[experts] = flops.count(lambda p, b: forward(Decoder(c))(p, b).hidden, p, b).flops
    assert work[8] < 1.4 * work[1]


def test_rows_that_do_not_divide_are_named():
    c = default()
    with pytest.raises(UserError, match=r"mesh.sequence=3 does not divide 128, .* use --config.mesh.sequence=1"):
        check_batch(c, AbstractMesh((1, 1, 1, 3, 1), sharding.MESH))
    c.data.max_length = 1001
    with pytest.raises(UserError, match=r"data.max_length=1001 does not .*mesh.sequence=8; use --config.data.max_length=1000"):
        check_batch(c, AbstractMesh((1, 1, 1, 8, 1), sharding.MESH))
