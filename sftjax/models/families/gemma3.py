"""Gemma 3, its text models: norms on queries and keys for Gemma 2's cap on scores, five layers with a window for one without.

arXiv:2503.19786. Layers with a window turn by a rotary base of their own, which no context extension touches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import FULL, SLIDING, Family, layer_types, positive, refuse, size, window, windows
from sftjax.models.families.gemma import gemma
from sftjax.models.families.gemma2 import cap
from sftjax.models.families.rope import ropes

THETAS = {FULL: ("rope_theta", 1_000_000.0), SLIDING: ("rope_local_base_freq", 10_000.0)}
ROPES = ("rope_parameters", "rope_scaling", "rope_theta")


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    refuse(raw, "attn_logit_softcapping")  # transformers reads it and does not apply it
    plain = {key: value for key, value in raw.items() if key not in ROPES}
    config = gemma(plain, "hidden_activation", max_positions=131_072, kv_heads=4)
    every = size(raw, "sliding_window_pattern", 6)
    kinds = layer_types(raw, [SLIDING if layer % every else FULL for layer in range(1, config.layers + 1)])
    turns = ropes(raw, config.max_positions, config.head_dim, THETAS)
    if turns[FULL].kind == "linear":  # max_position_embeddings, unlike others', is what the factor has reached
        turns[FULL] = replace(turns[FULL], original_max_positions=int(config.max_positions // turns[FULL].factor))
    return replace(
        config,
        qk_norm="head",
        post_norms=True,
        windows=windows(kinds, window(raw)),
        rope=turns[FULL],
        ropes=tuple(turns[kind] for kind in kinds),
        attn_scale=positive(raw, "query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=cap(raw, "final_logit_softcapping", None),
    )


FAMILY = Family("Gemma3ForCausalLM", config_from_hf, classifier="Gemma3TextForSequenceClassification")
