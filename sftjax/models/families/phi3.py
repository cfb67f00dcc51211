"""Phi-3, 3.5 and 4-mini: q, k and v are one kernel and gate and up another; longrope, once called su or yarn; no biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import Family, base, refuse, size

# None of them was published with another: what the file calls so is longrope, and transformers reads it as that.
FORMER = ("su", "yarn")


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    refuse(raw, "attention_bias", "mlp_bias", "lm_head_bias")
    raw = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096} | raw
    for where in ("rope_scaling", "rope_parameters"):
        given = raw.get(where) or {}
        if given.get("rope_type", given.get("type")) in FORMER:
            raw[where] = {key: value for key, value in given.items() if key != "type"} | {"rope_type": "longrope"}
    config = base(raw, max_positions=4096, partial=True)
    windows = (size(raw, "sliding_window"),) * config.layers if raw.get("sliding_window") else ()
    return replace(config, fused_qkv=True, fused_mlp=True, windows=windows)


FAMILY = Family("Phi3ForCausalLM", config_from_hf)
