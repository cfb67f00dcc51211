"""Adam's two moments in 8 bits each, quantised by blocks: arXiv:2110.02861.

    m = s * sign(c) (|c| / 127)^3      v = s * (c / 255)^4      c in 8 bits, s of a block of 256, float32

Like the paper's, the codes lie close together near 0 and reach over many decades; a power needs no table to look them up in.
Within an order of magnitude of s the error is at most 3 % of m and 3 % of v's root, in which steps are measured. s follows the
block's largest gradient as its moment does each one, and so bounds it: s can be updated before the new moments are known, and
an update is one fused loop that stores nothing in float32.

A step changes v by a thousandth, less than half of what lies between two codes: rounded to the nearest it would never move.
So v is rounded up or down at random, in proportion, by a hash of (place, step): its mean is right, and a resumed run's is the
same. It is never rounded to 0, by whose root a step would be divided.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

BLOCK = 256  # numbers that share a scale, at most
TINY = 1e-38  # of a block of zeros
LEAST = 4096  # numbers of an array; smaller ones, and vectors, keep float32 as in the paper's own code


class EightBitState(NamedTuple):
    """Codes of their parameters' shapes, so that they lie where those lie; scales [..., blocks] or [..., blocks, out]."""

    count: Array  # type: ignore[assignment]  # int32; a tuple has a method of this name
    mu: Any  # int8
    mu_scale: Any
    nu: Any  # uint8
    nu_scale: Any


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """optax.scale_by_adam for arrays that are `blocked`."""

    def init(params: Any) -> EightBitState:
        def zeros(dtype: Any, shape: Any = lambda shape: shape) -> Any:
            return jax.tree.map(lambda p: jnp.zeros(shape(p.shape), dtype), params)

        scales = [zeros(jnp.float32, scales_shape) for _ in range(2)]
        return EightBitState(jnp.zeros((), jnp.int32), zeros(jnp.int8), scales[0], zeros(jnp.uint8), scales[1])

    def update(grads: Any, state: EightBitState, params: Any = None) -> tuple[Any, EightBitState]:
        count = state.count + 1
        correction = [1 - b ** count.astype(jnp.float32) for b in (b1, b2)]

        def one(g: Array, *old: Array) -> tuple[Array, ...]:
            mu, mu_scale, nu, nu_scale = old
            g, axis = cut(g.astype(jnp.float32)), block(mu.shape)[0]
            m = b1 * signed(cut(mu), widened(mu_scale, axis)) + (1 - b1) * g
            v = b2 * unsigned(cut(nu), widened(nu_scale, axis)) + (1 - b2) * jnp.square(g)
            step = (m / correction[0]) / (jnp.sqrt(v / correction[1]) + eps)
            top = jnp.abs(g).max(axis)
            mu_scale, nu_scale = b1 * mu_scale + (1 - b1) * top, b2 * nu_scale + (1 - b2) * jnp.square(top)
            new_mu = to_signed(m, widened(mu_scale, axis))
            new_nu = to_unsigned(v, widened(nu_scale, axis), dither(v.shape, count))
            return *(x.reshape(mu.shape) for x in (step, new_mu)), mu_scale, new_nu.reshape(mu.shape), nu_scale

        leaves, structure = jax.tree.flatten(grads)
        found = [*zip(*map(one, leaves, *map(jax.tree.leaves, state[1:])))] or [()] * 5  # none, where no array is blocked
        steps, *rest = (jax.tree.unflatten(structure, part) for part in found)
        return steps, EightBitState(count, *rest)

    return optax.GradientTransformation(init, update)


def blocked(x: Any) -> bool:
    """Is `x` a matrix, or a stack of them, with enough numbers in rows or columns that blocks divide?"""
    return x.ndim >= 2 and x.size >= LEAST and block(x.shape)[1] >= 32


def block(shape: tuple[int, ...]) -> tuple[int, int]:
    """(axis, numbers in a block): along the last axis but one (-2), which a TPU cuts for nothing, or the last if larger."""
    rows, columns = (max(n for n in range(1, min(BLOCK, size) + 1) if size % n == 0) for size in shape[-2:])
    return (-1, columns) if columns > rows else (-2, rows)


def cut(x: Array) -> Array:
    """[..., blocks, block] along the last axis, or [..., blocks, block, out] along the one before."""
    axis, n = block(x.shape)
    return x.reshape(*x.shape[:-1], -1, n) if axis == -1 else x.reshape(*x.shape[:-2], -1, n, x.shape[-1])


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    axis, n = block(shape)
    return (*shape[:-1], shape[-1] // n) if axis == -1 else (*shape[:-2], shape[-2] // n, shape[-1])


def widened(scale: Array, axis: int) -> Array:
    """A scale for each block of an array that is cut."""
    return jnp.expand_dims(scale, axis)


def signed(codes: Array, scale: Array) -> Array:
    c = codes.astype(jnp.float32) / 127
    return scale * c * c * c


def to_signed(x: Array, scale: Array) -> Array:
    return jnp.round(127 * jnp.cbrt(x / jnp.maximum(scale, TINY))).astype(jnp.int8)


def unsigned(codes: Array, scale: Array) -> Array:
    return scale * fourth(codes.astype(jnp.float32) / 255)


def fourth(x: Array) -> Array:
    return jnp.square(jnp.square(x))


def to_unsigned(x: Array, scale: Array, uniform: Array) -> Array:
    """Up or down, as `uniform` in [0, 1) has it."""
    x = x / jnp.maximum(scale, TINY)
    below = jnp.floor(255 * jnp.sqrt(jnp.sqrt(x)))
    low, high = fourth(below / 255), fourth((below + 1) / 255)
    code = below + (uniform * (high - low) < x - low)
    return jnp.clip(code, (x > 0).astype(jnp.float32), 255).astype(jnp.uint8)


def dither(shape: tuple[int, ...], count: Array) -> Array:
    """[0, 1) for every place, others at every step: an integer hash, which costs a few operations and no memory."""
    x = count.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    for i in range(len(shape)):
        x = x + jax.lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(math.prod(shape[i + 1 :]) % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return ((x ^ (x >> 16)) >> 8).astype(jnp.float32) * 2.0**-24
