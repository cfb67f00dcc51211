"""Llama 2, 3, 3.1, 3.2. `attention_bias` is on q, k, v and o; `mlp_bias` on gate, up and down; no windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import Family, base, flag


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    bias = flag(raw, "attention_bias")
    return replace(base(raw, max_positions=2048), qkv_bias=bias, o_bias=bias, mlp_bias=flag(raw, "mlp_bias"))


FAMILY = Family("LlamaForCausalLM", config_from_hf)
