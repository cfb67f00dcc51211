"""Apart: how a CPU decodes, with each layer's weights and cache as arrays of their own and fewer, larger products.

A product there copies what it takes of a stack, at every token. So stacks are taken to pieces before, a program that is given
the pieces joins them, and the compiler sees through that to the pieces. Elsewhere a stack is one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sftjax import sharding
from sftjax.models.decoder import Decoder

STACKS = "lower", "layers"
LARGEST = 2**31  # bytes of layers that are copied


class Fused(NamedTuple):
    """Kernels of one input that can be one kernel."""

    block: str
    parts: tuple[str, ...]
    name: str


QKV = Fused("attn", ("q", "k", "v"), "qkv")
GATE_UP = Fused("mlp", ("gate", "up"), "gate_up")


def split(stack: Any, pieces: int) -> list[Any]:
    """A tree of arrays [L, ...] as so many trees, each of as many of its layers."""
    leaves, structure = jax.tree.flatten(stack)
    return [jax.tree.unflatten(structure, piece) for piece in zip(*(jnp.split(x, pieces) for x in leaves))]


def join(pieces: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *pieces)


def take_apart(model: Decoder, params: Any) -> tuple[Decoder, Any]:
    """The model that decodes, and its parameters, whose stacks are pieces."""
    stacks = {name: params[name] for name in STACKS if name in params}
    size = sum(x.nbytes for x in jax.tree.leaves(stacks))
    if jax.default_backend() != "cpu" or size > LARGEST or sharding.mesh_in_use() is not None:
        return model, params | {name: [stack] for name, stack in stacks.items()}
    fused = tuple(f for f in (QKV, GATE_UP) if all(_plain(stack[f.block], f.parts) for stack in stacks.values()))
    c = model.config
    c = replace(c, fused_qkv=c.fused_qkv or QKV in fused, fused_mlp=c.fused_mlp or GATE_UP in fused)
    return model.clone(scan=False, config=c), params | _pieces(stacks, fused)


def put_together(params: Any) -> Any:
    return params | {name: join(params[name]) for name in STACKS if name in params}


def _plain(block: Any, parts: Sequence[str]) -> bool:
    return all(part in block and isinstance(block[part]["kernel"], jax.Array) for part in parts)


@partial(jax.jit, static_argnames="fused")
def _pieces(stacks: dict[str, Any], fused: tuple[Fused, ...]) -> dict[str, list[Any]]:
    pieces = {}
    for name, stack in stacks.items():
        for block, parts, whole in fused:
            inside = dict(stack[block])
            kernels = [inside.pop(part) for part in parts]
            inside[whole] = jax.tree.map(lambda *xs: jnp.concatenate(xs, -1), *kernels)
            stack = stack | {block: inside}
        pieces[name] = split(stack, len(jax.tree.leaves(stack)[0]))
    return pieces
