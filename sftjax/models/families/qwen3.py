"""Qwen3: RMS norms on queries and keys, head_dim 128 unless stated, `attention_bias` on q, k, v and o, windows as Qwen2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import Family, base, flag, layer_windows, refuse


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    refuse(raw, "mlp_bias")
    bias = flag(raw, "attention_bias")
    config = base(raw, max_positions=32_768, kv_heads=32, head_dim=128)
    return replace(config, qk_norm="head", qkv_bias=bias, o_bias=bias, windows=layer_windows(raw))


FAMILY = Family("Qwen3ForCausalLM", config_from_hf)
