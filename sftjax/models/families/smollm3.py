"""SmolLM3: Llama, of which every fourth layer has no positions (NoPE); those layers may have a window. arXiv:2501.18795."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sftjax.config import UserError
from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import FULL, SLIDING, Family, base, flag, layer_types, size, windows

SILENT = {"tie_word_embeddings": True, "rope_theta": 2_000_000.0}


def config_from_hf(raw: dict[str, Any]) -> DecoderConfig:
    config, bias = base(SILENT | raw, max_positions=32_768, kv_heads=4), flag(raw, "attention_bias")
    every = size(raw, "no_rope_layer_interval", 4)
    turned = raw.get("no_rope_layers")  # of each layer, whether it turns: 1 where it does, whatever the key says
    if turned is None:
        turned = [layer % every for layer in range(1, config.layers + 1)]
    if len(turned) < config.layers:
        raise UserError(f"no_rope_layers has {len(turned)} entries for num_hidden_layers={config.layers}")
    turned = turned[: config.layers]
    width = size(raw, "sliding_window") if flag(raw, "use_sliding_window") and raw.get("sliding_window") is not None else None
    kinds = layer_types(raw, [FULL if turns or width is None else SLIDING for turns in turned])
    return replace(
        config,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag(raw, "mlp_bias"),
        ropes=() if all(turned) else tuple(config.rope if turns else None for turns in turned),
        windows=windows(kinds, width, "use_sliding_window and sliding_window do"),
    )


FAMILY = Family("SmolLM3ForCausalLM", config_from_hf)
