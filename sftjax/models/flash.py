"""Attention on an NVIDIA GPU: cuDNN's flash kernel, which keeps no scores and skips what causality and packing hide.

The same function as `models.attention`, by the same letters. From Hopper on the kernel takes a packed row as what it is, texts
one after another, each with its offset and its length: a text is a run of equal segment ids, the padding one of them. How many
a row may have is fixed when it is compiled, and dear: each has a place for a whole row in the kernel's grid and in its
workspace, [texts, N, T, H] of float32 backward. So rows go one after another, and there are kernels for few and for many texts,
TEXTS; a batch with more goes the other way, which the caller gives, and heads with sinks always do. Before Hopper the kernel
knows no offsets, and serves batches whose rows hold one text each. Nothing is kept for the backward pass but q, k and v: the
kernel's own statistics are [texts, N, T].

Written against jax's source and lowered for CUDA in the tests; it has not been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from sftjax.models.blocks import How

TEXTS = (12, 32)  # in a row: the first that has room for a batch's rows is taken
Attend = Callable[..., Any]  # (q, k, v, segments) -> o, or with do (q, k, v, segments, do) -> (dq, dk, dv)


def serves(q: Array, how: How) -> bool:
    """Is there such a kernel for this device, and for these heads, this dtype and every layer's window?"""
    if jax.default_backend() != "gpu" or how.softcap or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    widest = 256 if capability() >= 9 else 128
    seen = all(window is None or window >= q.shape[1] for window in how.windows)
    return capability() >= 8 and seen and q.shape[-1] <= widest and q.shape[-1] % 8 == 0


def capability() -> float:
    """Of the GPU: 8.0 is Ampere, 9.0 Hopper; 0 of what is no NVIDIA GPU."""
    found = str(getattr(jax.devices()[0], "compute_capability", ""))
    return float(found) if found.replace(".", "", 1).isdigit() else 0.0


def flash(q: Array, k: Array, v: Array, segments: Array, *, scale: float, otherwise: Attend) -> Array:
    """q [B, T, N, H], k and v [B, T, K, H], segments [B, T] -> [B, T, N, H]; `otherwise` where the kernel cannot do the batch."""
    return _flash((scale, capability() >= 9, otherwise), q, k, v, segments)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(how: tuple[float, bool, Attend], q: Array, k: Array, v: Array, segments: Array) -> Array:
    return jax.lax.switch(choice(segments, how[1]), choices(how), q, k, v, segments)


def _flash_fwd(how, q, k, v, segments):
    q, k, v, o = checkpoint_name((q, k, v, _flash(how, q, k, v, segments)), "attention")
    return o, (q, k, v, segments)


def _flash_bwd(how, residuals, do):
    return *jax.lax.switch(choice(residuals[3], how[1]), choices(how, backward), *residuals, do), None


_flash.defvjp(_flash_fwd, _flash_bwd)


def starts(segments: Array) -> Array:
    """[B, T]: does a run of equal ids begin here?"""
    return jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)], constant_values=True)


def choice(segments: Array, packs: bool) -> Array:
    """Which of `choices` has room: for the row of most texts; or, without offsets, is there one in each row, which begins it?"""
    begins = starts(segments)
    if packs:
        return (begins.sum(1).max() > jnp.asarray(TEXTS)).sum()
    one = (begins & (segments > 0)).sum(1) == (segments[:, 0] > 0)
    return 1 - one.all().astype(jnp.int32)


def choices(how: tuple[float, bool, Attend], turned: Callable[[Attend], Attend] = lambda fn: fn) -> list[Attend]:
    scale, packs, otherwise = how
    if packs:
        return [*(by_row(turned(partial(packed, scale=scale, most=n))) for n in TEXTS), turned(otherwise)]
    return [turned(partial(alone, scale=scale)), turned(otherwise)]


def backward(fn: Attend) -> Attend:
    return lambda q, k, v, segments, do: jax.vjp(lambda q, k, v: fn(q, k, v, segments), q, k, v)[1](do)


def by_row(fn: Attend) -> Attend:
    """`fn` of a batch, for one row after another."""
    return lambda *rows: jax.lax.map(lambda row: jax.tree.map(lambda x: x[0], fn(*(x[None] for x in row))), rows)


def texts(segments: Array, most: int) -> tuple[Array, Array]:
    """(lengths [B, most], offsets [B, most + 1]) of the runs in each row, int32, -1 where there are no more."""
    T = segments.shape[1]
    begins = starts(segments)
    at = jnp.sort(jnp.where(begins, jnp.arange(T), T), axis=1)[:, :most]  # T where there are no more
    at = jnp.pad(at, [(0, 0), (0, most + 1 - at.shape[1])], constant_values=T).astype(jnp.int32)
    lengths = at[:, 1:] - at[:, :-1]
    return jnp.where(lengths > 0, lengths, -1), jnp.where(at < T, at, -1)


def packed(q: Array, k: Array, v: Array, segments: Array, *, scale: float, most: int) -> Array:
    """By offsets: from Hopper on."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention  # jax.nn's has no offsets

    lengths, offsets = texts(segments, most)
    mask = MaskType.PADDING_CAUSAL
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))  # jax steps through keys by the queries' heads
    return dot_product_attention(q, k, v, None, None, lengths, lengths, offsets, offsets, scale=scale, mask_type=mask)


def alone(q: Array, k: Array, v: Array, segments: Array, *, scale: float) -> Array:
    """Rows of one text: causality hides the padding after it."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
