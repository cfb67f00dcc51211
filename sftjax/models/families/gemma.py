"""Gemma: Llama with norms that multiply by 1 + scale, embeddings scaled by sqrt(D), a tanh GELU and a head of its embedding.

arXiv:2403.08295. Files of the first release say `gelu`, and mean its tanh form.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import Family, base, flag, refuse

SILENT = {"tie_word_embeddings": True, **dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")}


def gemma(raw: dict[str, Any], act: str, *, max_positions: int, kv_heads: int) -> DecoderConfig:
    """What all Gemmas share; `act` is the key of the activation."""
    refuse(raw, "use_bidirectional_attention", "mlp_bias")
    config = base(SILENT | raw, act=act, head_dim=256, max_positions=max_positions, kv_heads=kv_heads)
    bias = flag(raw, "attention_bias")
    return replace(config, qkv_bias=bias, o_bias=bias, norm_offset=True, embed_scale=config.width**0.5)


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    tanh = {"hidden_act": "gelu_pytorch_tanh"} if raw.get("hidden_act") == "gelu" else {}
    return gemma(raw | tanh, "hidden_act", max_positions=8192, kv_heads=16)


FAMILY = Family("GemmaForCausalLM", config_from_hf)
