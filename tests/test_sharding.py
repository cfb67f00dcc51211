"""Eight virtual devices compute what one does, each holding its share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, batch, config, params

from sftjax import sharding, tree
from sftjax.config import UserError
from sftjax.losses import masked_xent
from sftjax.models.decoder import Decoder, forward
from sftjax.weights import select
from sftjax.weights.lora import lora

CONFIG = config(layers=2, kv_heads=4, qkv_bias=True, qk_norm=True, windows=(7, None))
ROWS = [[20], [9, 8], [3], [-4, 12], [6, 6, 6], [20], [], [17]]
BATCH = batch(ROWS, 20)
LOSS = masked_xent(forward(Decoder(CONFIG)))


def value_and_grad(trainable, frozen, b):
    run = jax.value_and_grad(lambda t, f, b: LOSS(tree.join(t, f), b, None)[0])
    return jax.jit(run)(trainable, frozen, b)


def make_params(method):
    p = params(CONFIG)
    if method == "full":
        return p, select.everything(p)
    q = lora(p, jax.random.key(0), rank=2, alpha=1.0, targets=["q_proj", "o_proj", "down_proj", "lm_head"])
    q = jax.tree.map(lambda x: x + 0.1, q)  # away from b = 0, where a has no gradient
    return q, select.low_rank(q)


@pytest.fixture(scope="module")
def single():
    """{method: (loss, gradients)} on one device."""
    out = {}
    for method in ("full", "lora"):
        p, mask = make_params(method)
        out[method] = value_and_grad(*tree.split(p, mask), BATCH)
    return out


MESHES = [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize("method, axes", [*(("full", m) for m in MESHES), ("lora", MESHES[1]), ("lora", MESHES[3])], ids=str)
def test_sharded_equals_single(method, axes, single):
    mesh = sharding.make_mesh(**axes)
    p, mask = make_params(method)
    p = jax.tree.map(jax.device_put, p, sharding.shardings(p, mesh))
    q = p["layers"]["attn"]["q"]["kernel"]
    q = q if method == "full" else q.base
    assert q.addressable_shards[0].data.shape == (2, 24 // mesh.shape["fsdp"], 32 // mesh.shape["tensor"])
    b = jax.device_put(BATCH, sharding.batch_sharding(mesh))
    assert b.tokens.addressable_shards[0].data.shape == (8 // (mesh.shape["data"] * mesh.shape["fsdp"]), 20)
    with jax.set_mesh(mesh):
        loss, grads = value_and_grad(*tree.split(p, mask), b)
    np.testing.assert_allclose(loss, single[method][0], rtol=1e-5)
    assert_trees_close(grads, single[method][1])


def test_low_rank_parts_lie_as_their_kernel_does():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    p, _ = make_params("lora")
    placed = tree.flatten(sharding.shardings(p, mesh))
    down = placed["layers/mlp/down/kernel"]
    assert [tuple(x.spec) for x in (down.base, down.a, down.b)] == [
        (None, "tensor", "fsdp"),
        (None, "tensor", None),
        (None, None, "fsdp"),
    ]
    assert {path for path, x in placed.items() if path.endswith("scale") and any(x.spec)} == set()


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
