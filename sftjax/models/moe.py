"""A mixture of experts in the MLP's place: a router gives each token to a few of many gated MLPs.

    p = softmax(x @ router);  y = sum over the k largest p_e of p_e * down_e(act(gate_e x) * up_e x)

arXiv:2101.03961, 2401.04088. Every token reaches all its experts, whatever the others chose: there is no capacity. Letters:
M tokens, E experts, k of them active, R rows sorted by expert (`weights.grouped`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from sftjax import sharding
from sftjax.models.config import DecoderConfig
from sftjax.models.layers import ACTIVATIONS, MLP, Dense, parameter
from sftjax.weights import kinds
from sftjax.weights.grouped import collect, group, spread


class Routed(NamedTuple):
    """What the routers did, summed over the tokens of segments: each [L, ...], in a layer without L."""

    chosen: Array  # [E]: tokens that each expert had
    probs: Array  # [E]
    tokens: Array


class Kernel(nn.Module):
    """A kernel for others to multiply with."""

    shape: tuple[int, ...]
    std: float

    @nn.compact
    def __call__(self) -> kinds.Weight:
        return parameter(self, "kernel", nn.initializers.normal(self.std), self.shape)


class Kernels(nn.Module):
    """The experts' own: gate and up [E, D, F], down [E, F, D]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self) -> tuple[kinds.Weight, ...]:
        c, e = self.config, self.config.experts
        assert e
        wide, narrow = (e.number, c.width, e.width), (e.number, e.width, c.width)
        shapes = {"gate": wide, "up": wide, "down": narrow}
        return tuple(Kernel(shape, c.init_std, name=name)() for name, shape in shapes.items())


class Mixture(nn.Module):
    """x [B, T, D] -> ([B, T, D], what the router did)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array, segments: Array) -> tuple[Array, Routed]:
        c, e = self.config, self.config.experts
        assert e
        # float32: a probability rounded to bfloat16 would tie with its neighbour
        probs = jax.nn.softmax(Dense(e.number, std=c.init_std, name="router")(x).astype(jnp.float32))
        weights, choices = jax.lax.top_k(probs, e.active)  # [B, T, k]
        if e.normalise:
            weights /= weights.sum(-1, keepdims=True)
        kernels = Kernels(c, name="experts")()
        keys = jax.random.split(self.make_rng("dropout"), 3) if self.has_rng("dropout") else None
        y = _sharded(c, x, choices, weights.astype(x.dtype), kernels, keys)
        if e.shared:
            share = jax.nn.sigmoid(Dense(1, std=c.init_std, name="shared_gate")(x))
            y += share * MLP(replace(c, mlp_width=e.shared), name="shared")(x)
        real = (segments > 0).astype(jnp.float32)
        chosen = jnp.zeros(e.number).at[choices].add(real[..., None])
        return y, Routed(chosen, jnp.einsum("bte,bt->e", probs, real), real.sum())


def _sharded(c: DecoderConfig, x: Array, choices: Array, weights: Array, kernels: Any, keys: Array | None) -> Array:
    """Each device gives its own tokens to all experts; the axis that splits heads elsewhere splits the tokens here."""
    mesh = sharding.mesh_in_use()
    if mesh is None:
        return _experts(c, x, choices, weights, kernels, keys)
    tokens = P(sharding.BATCH, sharding.HEADS if x.shape[1] % mesh.shape[sharding.HEADS] == 0 else None, None)

    def local(*args: Any) -> Array:
        return _experts(c, *args)

    whole = P()
    return jax.shard_map(local, mesh=mesh, in_specs=(tokens, tokens, tokens, whole, whole), out_specs=tokens, check_vma=False)(
        x, choices, weights, kernels, keys
    )


def _experts(c: DecoderConfig, x: Array, choices: Array, weights: Array, kernels: Any, keys: Array | None) -> Array:
    """x [B, T, D], choices and weights [B, T, k]."""
    e = c.experts
    assert e
    gate, up, down = kernels
    for_gate, for_up, for_down = (None,) * 3 if keys is None else keys
    groups = group(choices.reshape(-1), e.number)
    rows = spread(e.active, x.reshape(-1, c.width), groups)
    gated = checkpoint_name(kinds.matmul(rows, gate, for_gate, groups), "product")
    rows, gated = jax.lax.optimization_barrier((rows, gated))  # where kernels are dequantised, one of the two at a time
    inner = ACTIVATIONS[c.activation](gated) * checkpoint_name(kinds.matmul(rows, up, for_up, groups), "product")
    y = collect(checkpoint_name(kinds.matmul(inner, down, for_down, groups), "product"), groups)
    return (y.reshape(*choices.shape, c.width) * weights[..., None]).sum(2)
