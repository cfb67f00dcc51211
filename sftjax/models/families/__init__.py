"""The families: `model_type` -> the table that turns its Hugging Face config and tensor names into ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.config import UserError
from sftjax.models.config import DecoderConfig
from sftjax.models.families import (
    gemma,
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from sftjax.models.families.common import Family, Name, labels

__all__ = ["FAMILIES", "Family", "Name", "config_from_hf", "config_to_hf", "family_of"]

# where a null says something: no window, no cap, as many as heads
NULLS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads")
FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "granite": granite.FAMILY,
    "smollm3": smollm3.FAMILY,
    "phi3": phi3.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
}


def family_of(raw: dict[str, Any]) -> Family:
    """The family of a config.json. Raises UserError that names what is not supported."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        why = ", for it takes more than text" if raw.get("text_config") else ""
        raise UserError(f"model_type={kind!r} is not supported{why}; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    classes = raw.get("architectures") or [family.architecture]
    if classes not in [[known] for known in family.classes]:
        needs = " or ".join(family.classes)
        raise UserError(f"architectures={classes} is not supported for model_type {kind!r}; it needs {needs}")
    method = (raw.get("quantization_config") or {}).get("quant_method", "unknown")
    if raw.get("quantization_config") and method not in family.packings:
        raise UserError(f"quantization_config (quant_method {method!r}) is not supported; use the unquantised checkpoint")
    return family


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    """A config.json as a DecoderConfig. Raises UserError that names the key at fault."""
    family = family_of(raw)
    raw = {key: value for key, value in raw.items() if value is not None or key in NULLS}  # any other is as good as absent
    config = family.config_from_hf(raw)
    if raw.get("architectures") in (None, [], [family.architecture]):
        return config
    return replace(config, labels=labels(raw), tied=False)


def config_to_hf(config: DecoderConfig, raw: dict[str, Any]) -> dict[str, Any]:
    """The source's config.json `raw` with what training changed: the vocabulary's size, the head. Raises UserError."""
    family = family_of(raw)
    out = family.config_to_hf(config, raw)
    if not config.labels:
        return out
    if len(family.classes) == 1:
        raise UserError(f"transformers has no class with a score head for model_type {raw['model_type']!r}")
    out |= {"architectures": family.classes[1:], "id2label": {str(i): label for i, label in enumerate(config.labels)}}
    out |= {"label2id": {label: i for i, label in enumerate(config.labels)}}
    return out | ({"problem_type": "single_label_classification"} if len(config.labels) > 1 else {})
