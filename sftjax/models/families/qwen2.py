"""Qwen2 and 2.5: q, k and v always have biases, o and the MLP never; a window on the upper layers, off by default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import Family, base, layer_windows, refuse


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    refuse(raw, "attention_bias", "mlp_bias", "use_mrope")
    return replace(base(raw, max_positions=32_768, kv_heads=32), qkv_bias=True, windows=layer_windows(raw))


FAMILY = Family("Qwen2ForCausalLM", config_from_hf)
