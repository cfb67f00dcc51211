"""Mistral: Llama without biases, with one window over all layers. An absent `sliding_window` is 4096, a null one is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import Family, base, refuse, window


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    refuse(raw, "attention_bias", "mlp_bias", "layer_types")  # layer_types: a Ministral under Mistral's name
    config = base(raw, max_positions=131_072, kv_heads=8)
    width = window(raw)
    return replace(config, windows=(width,) * config.layers if width else ())


FAMILY = Family("MistralForCausalLM", config_from_hf)
