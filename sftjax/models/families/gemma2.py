"""Gemma 2: Gemma with norms after attention and MLP too, soft caps on scores and logits, a window on every other layer.

arXiv:2408.00118. Scores are scaled by `query_pre_attn_scalar`, whatever the head's width. A null cap is none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import FULL, SLIDING, Family, layer_types, positive, window, windows
from sftjax.models.families.gemma import gemma


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    config = gemma(raw, "hidden_activation", max_positions=8192, kv_heads=4)
    alternate = [FULL if layer % 2 else SLIDING for layer in range(config.layers)]
    return replace(
        config,
        post_norms=True,
        windows=windows(layer_types(raw, alternate), window(raw)),
        attn_scale=positive(raw, "query_pre_attn_scalar", 256) ** -0.5,
        attn_softcap=cap(raw, "attn_logit_softcapping", 50.0),
        logit_softcap=cap(raw, "final_logit_softcapping", 30.0),
    )


def cap(raw: dict[str, Any], key: str, default: float | None) -> float | None:
    return None if raw.get(key, default) is None else positive(raw, key, default or 0.0)


FAMILY = Family("Gemma2ForCausalLM", config_from_hf)
