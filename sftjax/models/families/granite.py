"""Granite: Llama whose embeddings, scores, residual sums and logits are scaled by numbers that its file states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import Family, positive
from sftjax.models.families.llama import config_from_hf as llama


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    return replace(
        llama(raw),
        embed_scale=positive(raw, "embedding_multiplier", 1.0),
        attn_scale=positive(raw, "attention_multiplier", 1.0),
        residual_scale=positive(raw, "residual_multiplier", 1.0),
        logit_scale=1 / positive(raw, "logits_scaling", 1.0),
    )


FAMILY = Family("GraniteForCausalLM", config_from_hf, classifier=None)
