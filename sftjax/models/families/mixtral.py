"""Mixtral: Mistral with experts in the MLP's place, two of eight a token unless stated, their probabilities summing to 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig, Experts
from sftjax.models.families.common import Family, base, refuse, size
from sftjax.models.families.qwen2_moe import active

MODULES = {
    "mlp/router": "block_sparse_moe.gate",
    "mlp/experts/gate": "block_sparse_moe.experts.{}.w1",
    "mlp/experts/up": "block_sparse_moe.experts.{}.w3",
    "mlp/experts/down": "block_sparse_moe.experts.{}.w2",
}


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    refuse(raw, "attention_bias", "mlp_bias", "router_jitter_noise")
    config = base({"rope_theta": 1e6, "rms_norm_eps": 1e-5} | raw, max_positions=131_072, kv_heads=8)
    number = size(raw, "num_local_experts", 8)
    windows = (size(raw, "sliding_window"),) * config.layers if raw.get("sliding_window") else ()
    return replace(config, windows=windows, experts=Experts(number, active(raw, number, 2), config.mlp_width))


FAMILY = Family("MixtralForCausalLM", config_from_hf, MODULES)
