"""Attention on a TPU: JAX's splash kernel, which never leaves the chip's own memory for scores and skips blocks that see nothing.

The same function as `models.attention`, by the same letters. Causality and the window are the kernel's static mask, segments
its ids; rows are filled up to whole blocks with segment 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sftjax.models.layers import scaled

LANES, MOST = 128, 512  # a block is a multiple of the first, and 512 the size that fills a TPU's matrix unit from v4 on


def splash(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    sinks: Array | None = None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Array:
    """q [B, T, N, H], k and v [B, T, K, H], segments [B, T], sinks [N] -> [B, T, N, H]. `interpret` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, N, H = q.shape
    K = k.shape[2]
    padded = -(-T // LANES) * LANES
    block = next(n for n in range(min(MOST, padded), 0, -LANES) if padded % n == 0)
    q, k, v = (jnp.pad(x, [(0, 0), (0, padded - T), (0, 0), (0, 0)]) for x in (q, k, v))
    segments = jnp.pad(segments, [(0, 0), (0, padded - T)])
    shape = (padded, padded)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    sizes: dict[str, Any] = dict.fromkeys(
        ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block
    )
    run = kernel.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (N // K)),
        block_sizes=kernel.BlockSizes(**sizes),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    q = scaled(q, scale).reshape(B, padded, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, T, H]
    by_kv_head = None if sinks is None else sinks.reshape(K, N // K)
    of_heads = jax.vmap(run, in_axes=(0, 0, 0, None, 0))
    o = jax.vmap(lambda q, k, v, s: of_heads(q, k, v, kernel.SegmentIds(s, s), by_kv_head))(q, k, v, segments)
    return o.transpose(0, 3, 1, 2, 4).reshape(B, padded, N, H)[:, :T]
