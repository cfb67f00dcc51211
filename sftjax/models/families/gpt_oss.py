"""GPT-OSS: experts and router with biases, a clamped gated unit, a sink in every head, a window on every other layer.

arXiv:2508.10925. A checkpoint has one tensor for all of a layer's experts; the hub's own hold them in MXFP4 (`hf.mxfp4`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.config import UserError
from sftjax.models.config import Clamp, DecoderConfig, Experts
from sftjax.models.families.common import FULL, SLIDING, Family, base, flag, layer_types, positive, size, window, windows
from sftjax.models.families.qwen2_moe import active

MODULES = {
    "attn/sinks/bias": "self_attn.sinks",
    "mlp/router": "mlp.router",
    "mlp/experts/gate_up/kernel": "mlp.experts.gate_up_proj",
    "mlp/experts/gate_up/bias": "mlp.experts.gate_up_proj_bias",
    "mlp/experts/down/kernel": "mlp.experts.down_proj",
    "mlp/experts/down/bias": "mlp.experts.down_proj_bias",
}
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
SILENT = {"rope_theta": 150_000.0, "rms_norm_eps": 1e-5, "attention_bias": True, "sliding_window": 128}


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    if raw.get("rope_parameters") is None and not raw.get("rope_scaling"):
        raw = raw | {"rope_parameters": YARN}
    raw = SILENT | raw
    config = base(raw, max_positions=131_072, kv_heads=8, head_dim=64)
    if config.activation != "silu":  # transformers does not read it
        raise UserError(f"hidden_act={raw['hidden_act']!r} is not supported for model_type 'gpt_oss'")
    bias = flag(raw, "attention_bias")
    kinds = layer_types(raw, [FULL if layer % 2 else SLIDING for layer in range(config.layers)])
    number = size(raw, "num_experts" if "num_experts" in raw else "num_local_experts", 128)
    clamp = Clamp(positive(raw, "swiglu_alpha", 1.702), positive(raw, "swiglu_limit", 7.0))
    experts = Experts(number, active(raw, number, 4), config.mlp_width, bias=True, fused=True, clamp=clamp)
    return replace(config, qkv_bias=bias, o_bias=bias, sinks=True, windows=windows(kinds, window(raw)), experts=experts)


FAMILY = Family("GptOssForCausalLM", config_from_hf, MODULES, packings=("mxfp4",))
