"""Hugging Face's module names and our paths, by the table in `weights.targets`.

model.layers.3.self_attn.q_proj  <->  layers/attn/q, 3      model.embed_tokens  <->  embed      lm_head, score  <->  head, score
"""

from __future__ import annotations

import re

from sftjax.weights.targets import MODULES

EMBED, HEAD, SCORE = "model.embed_tokens", "lm_head", "score"
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
NODES = {module: node for node, module in MODULES.items()}


def node_of(module: str) -> tuple[str, int | None]:
    """(node, layer) of a module, layer None outside the layers. A name that no table has comes back as it is."""
    if match := LAYER.fullmatch(module):
        return f"layers/{NODES.get(match[2], match[2])}", int(match[1])
    return NODES.get(module.removeprefix("model."), module), None


def module_of(node: str, layer: int | None = None) -> str:
    """The inverse of `node_of`; without a layer, the end of the name that all layers' modules share."""
    lead, _, rest = node.partition("/")
    if lead == "layers":
        return MODULES[rest] if layer is None else f"model.layers.{layer}.{MODULES[rest]}"
    return {"head": HEAD, "score": SCORE}.get(node) or f"model.{MODULES[node]}"
