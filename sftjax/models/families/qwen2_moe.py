"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, and one beside them that every token has, weighed by a gate of its own.

The chosen experts' probabilities are used as they are unless `norm_topk_prob`. Windows, off by default, are on every other
of the first `max_window_layers` layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.config import UserError
from sftjax.models.config import DecoderConfig, Experts
from sftjax.models.families.common import FULL, SLIDING, Family, base, flag, layer_types, refuse, size, window, windows


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    refuse(raw, "attention_bias", "mlp_bias")
    config = base(raw, max_positions=32_768, kv_heads=16)
    mixture = replace(experts(raw, number=60, active_of=4, width=1408), shared=size(raw, "shared_expert_intermediate_size", 5632))
    width = window(raw) if flag(raw, "use_sliding_window") else None
    first = size(raw, "max_window_layers", 28, least=0)
    kinds = [SLIDING if width and i < first and i % 2 == 0 else FULL for i in range(config.layers)]
    every = windows(layer_types(raw, kinds), width, "use_sliding_window and sliding_window do")
    return replace(config, qkv_bias=flag({"qkv_bias": True} | raw, "qkv_bias"), windows=every, experts=mixture)


def experts(raw: dict[str, Any], *, number: int, active_of: int, width: int) -> Experts:
    """What Qwen's mixtures read alike; the keywords are a family's defaults. Raises UserError where some layers have none."""
    if (step := size(raw, "decoder_sparse_step", 1)) != 1:
        raise UserError(f"decoder_sparse_step={step} is not supported; all layers must have experts")
    if raw.get("mlp_only_layers"):
        raise UserError(f"mlp_only_layers={raw['mlp_only_layers']} is not supported; all layers must have experts")
    # transformers 5 files Qwen3's under the second name
    n = size(raw, "num_experts" if "num_experts" in raw else "num_local_experts", number)
    width = size(raw, "moe_intermediate_size", width)
    return Experts(n, active(raw, n, active_of), width, normalise=flag(raw, "norm_topk_prob"))


def active(raw: dict[str, Any], number: int, default: int) -> int:
    """Experts of one token. Raises UserError where it is more than there are."""
    k = size(raw, "num_experts_per_tok", default)
    if k > number:
        raise UserError(f"num_experts_per_tok={k} is more than the {number} experts there are")
    return k


FAMILY = Family("Qwen2MoeForCausalLM", config_from_hf)
