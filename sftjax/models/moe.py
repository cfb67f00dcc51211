"""A mixture of experts in the MLP's place: a router gives each token to a few of many gated MLPs.

    p = softmax(router x);  y = sum over the k largest p_e of p_e * down_e(act(gate_e x) * up_e x)

arXiv:2101.03961, 2401.04088. Every token reaches all its experts, whatever the others chose: there is no capacity. Letters:
M tokens, E experts, k of them active, R rows sorted by expert (`weights.grouped`).

Over a mesh each device routes its own tokens. Where `expert` splits the experts over n devices, each gathers the tokens of all
n, computes what its own experts make of them, and the n parts are added and dealt out again:

    all-gather x [M, D] -> [n M, D];  y = own experts' share of sum over k p_e * MLP_e(x) [n M, D];  reduce-scatter -> [M, D]

An all-to-all would move k / n of that, but to a device that may be sent nothing or everything: with static shapes and no token
dropped each would hold room for all. Here the choices that fall to a device come in turns of R = 1.25 k M rows, an even
device's share and a quarter, as many turns as there are: one when routing is near even, n at the very most. So memory and FLOPs
of a device are those of its share, and what is uneven costs time, never a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from sftjax.weights.grouped import Groups, biased, collect, group, group_turn, ranked, spread

SPARE = 1.25  # rows of a turn over those of a device whose experts are as popular as others'


class Routed(NamedTuple):
    """What the routers did, summed over the tokens of segments: each [L, ...], in a layer without L."""

    chosen: Array  # [E]: tokens that each expert had
    probs: Array  # [E]
    tokens: Array


class Linear(NamedTuple):
    """The experts' kernels [E, in, out] and, where they have them, biases [E, out]."""

    kernel: kinds.Weight
    bias: Array | None

    def __call__(self, rows: Array, key: Array | None, groups: Groups) -> Array:
        y = kinds.matmul(rows, self.kernel, key, groups)
        return checkpoint_name(y if self.bias is None else biased(y, self.bias, groups), "product")


class Parameters(nn.Module):
    """A Linear for others to apply."""

    shape: tuple[int, int, int]
    bias: bool
    std: float

    @nn.compact
    def __call__(self) -> Linear:
        E, _, out = self.shape
        kernel = parameter(self, "kernel", nn.initializers.normal(self.std), self.shape)
        return Linear(kernel, parameter(self, "bias", nn.initializers.zeros, (E, out)) if self.bias else None)


class Kernels(nn.Module):
    """The experts' own: gate and up [E, D, F], or the two as one [E, D, 2F], and down [E, F, D]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self) -> tuple[Linear, ...]:
        c, e = self.config, self.config.experts
        assert e
        wide = {"gate_up": 2 * e.width} if e.fused else {"gate": e.width, "up": e.width}
        shapes = {name: (e.number, c.width, out) for name, out in wide.items()} | {"down": (e.number, e.width, c.width)}
        return tuple(Parameters(shape, e.bias, c.init_std, name=name)() for name, shape in shapes.items())


class Mixture(nn.Module):
    """x [B, T, D] -> ([B, T, D], what the router did)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array, segments: Array) -> tuple[Array, Routed]:
        c, e = self.config, self.config.experts
        assert e
        # float32: a probability rounded to bfloat16 would tie with its neighbour
        probs = jax.nn.softmax(Dense(e.number, e.bias, c.init_std, name="router")(x).astype(jnp.float32))
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
    """Each device brings its own tokens; the axes that split rows or heads elsewhere split the rows' tokens here."""
    mesh = sharding.mesh_in_use()
    if mesh is None:
        return _experts(c, x, choices, weights, kernels, keys)
    split: tuple[str, ...] = ()
    for axis in (sharding.SEQUENCE, sharding.HEADS):
        if x.shape[1] % math.prod(mesh.shape[a] for a in (*split, axis)) == 0:
            split += (axis,)
    tokens, shards = P(sharding.BATCH, split or None, None), mesh.shape[sharding.EXPERT]
    held = tuple(  # whole but for the experts: what is quantised travels as its codes
        Linear(
            sharding.parts(kernel, ("expert", None, None), lambda axes: P(*map(sharding.RULES.get, axes))),
            P(sharding.EXPERT),  # type: ignore[arg-type]  # of the form of what it places
        )
        for kernel, _ in kernels
    )

    def local(x: Array, choices: Array, weights: Array, kernels: Any, keys: Array | None) -> Array:
        if keys is not None:  # or rows of two devices would drop the same
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, jax.lax.axis_index((*sharding.BATCH, *split)))
        if shards == 1:
            return _experts(c, x, choices, weights, kernels, keys)
        gather = partial(jax.lax.all_gather, axis_name=sharding.EXPERT, axis=0, tiled=True)
        y = _share(c, shards, gather(x), gather(weights), gather(choices), kernels, keys)
        return jax.lax.psum_scatter(y, sharding.EXPERT, scatter_dimension=0, tiled=True)

    return jax.shard_map(local, mesh=mesh, in_specs=(tokens, tokens, tokens, held, P()), out_specs=tokens, check_vma=False)(
        x, choices, weights, kernels, keys
    )


def _experts(c: DecoderConfig, x: Array, choices: Array, weights: Array, kernels: Any, keys: Array | None) -> Array:
    """x [B, T, D], choices and weights [B, T, k]."""
    assert c.experts
    return _mixed(c, x, weights, group(choices.reshape(-1), c.experts.number), kernels, keys)


def _mixed(c: DecoderConfig, x: Array, weights: Array, groups: Groups, kernels: Any, keys: Array | None) -> Array:
    """Of the choices that have a place among the groups' rows, their weighted sum by token."""
    e = c.experts
    assert e
    for_gate, for_up, for_down = (None,) * 3 if keys is None else keys
    rows = spread(e.active, x.reshape(-1, c.width), groups)
    if e.fused:
        gate_up, down = kernels
        both = gate_up(rows, for_gate, groups)
        gated, raised = both[:, ::2], both[:, 1::2]
    else:
        gate, up, down = kernels
        gated = gate(rows, for_gate, groups)
        rows, gated = jax.lax.optimization_barrier((rows, gated))  # where kernels are dequantised, one of the two at a time
        raised = up(rows, for_up, groups)
    y = collect(down(_unit(c, gated, raised), for_down, groups), groups)
    return (y.reshape(*weights.shape, c.width) * weights[..., None]).sum(2)


def _unit(c: DecoderConfig, gate: Array, up: Array) -> Array:
    """The experts' gated unit."""
    assert c.experts
    if (clamp := c.experts.clamp) is None:
        return ACTIVATIONS[c.activation](gate) * up
    gate, up = jnp.minimum(gate, clamp.limit), jnp.clip(up, -clamp.limit, clamp.limit)
    return gate * jax.nn.sigmoid(clamp.alpha * gate) * (up + 1)


def _turns(c: DecoderConfig, shards: int, choices: Array) -> tuple[Array, Callable[..., Array]]:
    """(how many turns, turn i of them) of the choices [B, T, k] that fall to this device's experts."""
    assert c.experts
    experts = c.experts.number // shards
    first = jax.lax.axis_index(sharding.EXPERT) * experts
    flat = choices.reshape(-1)
    rows = min(flat.size, math.ceil(SPARE * flat.size / shards))
    ranks = ranked(flat, first, experts)

    def turn(i: Array, x: Array, weights: Array, kernels: Any, keys: Array | None) -> Array:
        groups = group_turn(flat, first, experts, ranks, i, rows)
        return _mixed(c, x, weights, groups, kernels, None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, i))

    return -(-ranks[0] // rows), turn


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _share(c: DecoderConfig, shards: int, x: Array, weights: Array, choices: Array, kernels: Any, keys: Array | None) -> Array:
    """What this device's experts add to the tokens, [B, T, D]. Backward each turn is computed again: their number is data's."""
    number, turn = _turns(c, shards, choices)
    return jax.lax.fori_loop(0, number, lambda i, y: y + turn(i, x, weights, kernels, keys), jnp.zeros_like(x))


def _share_fwd(c, shards, x, weights, choices, kernels, keys):
    trained = [() if leaf.perturbed else None for leaf in jax.tree.leaves(kernels)]  # told by structure: no array is a bool
    values = jax.tree.map(lambda leaf: leaf.value, (x, weights, choices, kernels, keys))
    return _share(c, shards, *values), (*values, trained)


def _share_bwd(c, shards, residuals, dy):
    x, weights, choices, kernels, keys, trained = residuals
    number, turn = _turns(c, shards, choices)
    leaves, structure = jax.tree.flatten(kernels)
    those = [i for i, flag in enumerate(trained) if flag is not None]  # a frozen kernel gets no gradient

    def add(i, sums):
        def of(x, weights, parts):
            whole = list(leaves)
            for at, part in zip(those, parts):
                whole[at] = part
            return turn(i, x, weights, jax.tree.unflatten(structure, whole), keys)

        _, pull = jax.vjp(of, x, weights, [leaves[at] for at in those])
        return jax.tree.map(lambda s, d: s + d.astype(s.dtype), sums, pull(dy))

    zeros = jnp.zeros_like(x), jnp.zeros_like(weights), [jnp.zeros(leaves[at].shape, jnp.float32) for at in those]
    dx, dweights, dparts = jax.lax.fori_loop(0, number, add, zeros)
    dleaves: list[Any] = [None] * len(leaves)
    for at, d in zip(those, dparts):
        dleaves[at] = d.astype(leaves[at].dtype)
    return dx, dweights, None, jax.tree.unflatten(structure, dleaves) if those else None, None


_share.defvjp(_share_fwd, _share_bwd, symbolic_zeros=True)
