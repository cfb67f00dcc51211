"""Qwen3-MoE: Qwen3 with experts in the MLP's place, eight of 128 a token unless stated; one window over all layers, if any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import Family, base, flag, refuse, window
from sftjax.models.families.qwen2_moe import experts


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    refuse(raw, "mlp_bias", "layer_types")
    bias = flag(raw, "attention_bias")
    config = base(raw, max_positions=32_768, kv_heads=4)
    width = window(raw) if flag(raw, "use_sliding_window") else None
    windows = (width,) * config.layers if width else ()
    mixture = experts(raw, number=128, active_of=8, width=768)
    return replace(config, qk_norm="head", qkv_bias=bias, o_bias=bias, windows=windows, experts=mixture)


FAMILY = Family("Qwen3MoeForCausalLM", config_from_hf)
