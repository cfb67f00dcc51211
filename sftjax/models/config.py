"""DecoderConfig: every way in which the supported families differ, as one field each. No code asks for a family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary embedding and its context extension, in the words of Hugging Face's `rope_scaling`."""

    theta: float = 10_000.0
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn
    factor: float = 1.0
    original_max_positions: int = 0  # the length before extension (dynamic, llama3, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: what cos and sin are multiplied by
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and switches of one Decoder. Letters as everywhere: V, D, F, L, N, K, H."""

    vocab: int  # V
    width: int  # D
    mlp_width: int  # F
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    max_positions: int = 2048
    tied: bool = False  # the output head is the embedding, transposed
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over H on queries and keys, before RoPE
    windows: tuple[int | None, ...] = ()  # per layer: keys seen, the query's own included; () or None = all
    rope: Rope = Rope()
    norm_eps: float = 1e-6
    activation: str = "silu"  # silu | gelu | gelu_tanh
    init_std: float = 0.02
