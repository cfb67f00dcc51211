"""Dense, MLP, Embed, RMS norm and rotary embeddings. A parameter is read where it stands, whatever kind of weight it is."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from sftjax import sharding
from sftjax.models.config import DecoderConfig, Rope
from sftjax.weights import kinds

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Dense(nn.Module):
    """x [..., in] -> [..., features]; kernel [in, features]."""

    features: int
    bias: bool = False
    std: float = 0.02

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = parameter(self, "kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        split = sharding.mesh_in_use() is not None
        axes = sharding.logical_axes("/".join((*self.path, "kernel")), 2) if split else None
        y = kinds.matmul(x, kernel, key, axes=axes)
        if self.bias:
            y += parameter(self, "bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return checkpoint_name(y, "product")


class MLP(nn.Module):
    """down(act(gate x) * up x)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        if c.fused_mlp:
            gate, up = jnp.split(Dense(2 * c.mlp_width, c.mlp_bias, c.init_std, name="gate_up")(x), 2, -1)
        else:
            gate = Dense(c.mlp_width, c.mlp_bias, c.init_std, name="gate")(x)
            x, gate = jax.lax.optimization_barrier((x, gate))  # where kernels are dequantised, one of the two at a time
            up = Dense(c.mlp_width, c.mlp_bias, c.init_std, name="up")(x)
        return Dense(c.width, c.mlp_bias, c.init_std, name="down")(ACTIVATIONS[c.activation](gate) * up)


class Embed(nn.Module):
    """ids [...] -> [..., D]; embedding [V, D]."""

    vocab: int
    width: int
    dtype: Any
    std: float = 0.02

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        return kinds.rows(parameter(self, "embedding", nn.initializers.normal(self.std), (self.vocab, self.width)), ids).astype(
            self.dtype
        )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, or * (1 + scale) with an offset. arXiv:1910.07467."""

    eps: float
    offset: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = parameter(self, "scale", start, (x.shape[-1],))
        wide = x.astype(jnp.float32)  # float32: the mean of thousands of squares
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        if self.offset:  # rounded once, at the end: as those that have it
            return ((1 + scale.astype(jnp.float32)) * wide).astype(x.dtype)
        return scale.astype(x.dtype) * wide.astype(x.dtype)


def parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    # get_variable, since `self.param` compares the shapes of a kind's parts with the initialiser's
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


def rope(
    positions: Array, segments: Array, head_dim: int, max_positions: int, c: Rope | None, lengths: Array | None = None
) -> tuple[Array, Array]:
    """cos and sin [B, T, 1, R], float32, for positions [B, T], R the part of H that turns. arXiv:2104.09864.

    kind      inverse frequencies
    linear    divided by factor (arXiv:2306.15595)
    dynamic   theta grows with the sequence beyond the trained length (NTK-aware); a sequence is one segment
    llama3    long wavelengths divided, short kept, between them blended
    yarn      the same by dimension, and cos and sin scaled (arXiv:2309.00071)
    longrope  each divided by a factor of its own, by another in sequences beyond the trained length (arXiv:2402.13753)

    A sequence's length is its segment's, or `lengths` [B, T or 1] where rows hold only a part of theirs.
    """
    if c is None:  # turned by nothing: of the shape of the others, which its layers are stacked with
        flat = jnp.ones((*positions.shape, 1, head_dim), jnp.float32)
        return flat, 0 * flat

    def whole() -> Array:  # [B, T or 1, 1]
        return (segment_lengths(positions, segments) if lengths is None else lengths)[..., None]

    head_dim = int(head_dim * c.partial)
    half = head_dim // 2
    exponents = jnp.arange(half, dtype=jnp.float32) * 2 / head_dim
    frequencies = c.theta**-exponents  # [H/2]
    if c.kind == "linear":
        frequencies /= c.factor
    elif c.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        blend = (c.original_max_positions / wavelengths - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
        blend = jnp.clip(blend, 0, 1)
        frequencies = blend * frequencies + (1 - blend) * frequencies / c.factor
    elif c.kind == "yarn":
        keep = yarn_ramp(half, head_dim, c)
        frequencies = keep * frequencies + (1 - keep) * frequencies / c.factor
    elif c.kind == "dynamic":
        reached = jnp.maximum(whole(), max_positions)
        grown = c.factor * reached / max_positions - (c.factor - 1)
        frequencies = (c.theta * grown ** (head_dim / (head_dim - 2))) ** -exponents  # [B, T, H/2]
    elif c.kind == "longrope":
        beyond = whole() > c.original_max_positions
        frequencies = frequencies / jnp.where(beyond, jnp.asarray(c.long_factor), jnp.asarray(c.short_factor))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], -1)[:, :, None]
    return jnp.cos(angles) * c.attention_factor, jnp.sin(angles) * c.attention_factor


def yarn_ramp(half: int, head_dim: int, c: Rope) -> Array:
    """[H/2]: 1 where a dimension turns more than beta_fast times in the trained length, 0 below beta_slow turns."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(c.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(c.theta))

    low, high = dimension(c.beta_fast), dimension(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return 1 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / max(high - low, 0.001), 0, 1)


def segment_lengths(positions: Array, segments: Array) -> Array:
    """[B, T] -> [B, T]: the length of the segment each token is in."""
    T = segments.shape[1]
    longest = jax.vmap(lambda p, s: jax.ops.segment_max(p, s, num_segments=T + 1))(positions, segments)
    return jnp.take_along_axis(longest, segments, axis=1) + 1


def scaled(x: Array, by: float) -> Array:
    """x * by, rounded once: a factor rounded to bfloat16 first would be off alike in every layer."""
    return x if by == 1 else (x.astype(jnp.float32) * by).astype(x.dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x [B, T, N, H], of which the first R turn by their position: pairs are (i, i + R/2), as Hugging Face lays them out."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = jnp.split(turned, 2, axis=-1)
    turned = (turned * cos + jnp.concatenate([-b, a], -1) * sin).astype(x.dtype)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned
