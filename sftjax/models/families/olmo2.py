"""OLMo 2: norms after attention and MLP and none before, RMS norms over all queries and all keys. arXiv:2501.00656."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import Family, base, flag, refuse


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    refuse(raw, "mlp_bias", "layer_types")  # layer_types: an OLMo 3 under OLMo 2's name
    config, bias = base({"rms_norm_eps": 1e-5} | raw, max_positions=2048), flag(raw, "attention_bias")
    return replace(config, qkv_bias=bias, o_bias=bias, qk_norm="all", pre_norms=False, post_norms=True)


FAMILY = Family("Olmo2ForCausalLM", config_from_hf)
