"""Hugging Face's module names and our paths, by the table in `weights.targets`.

model.layers.3.self_attn.q_proj  <->  layers/attn/q, 3      model.embed_tokens  <->  embed      lm_head, score  <->  head, score
"""

from __future__ import annotations

import re
from collections.abc import Collection

from sftjax.weights.targets import MODULES

EMBED, HEAD, SCORE = "model.embed_tokens", "lm_head", "score"
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def node_of(module: str, nodes: Collection[str] = ()) -> tuple[str, int | None]:
    """(node, layer) of a module, layer None outside the layers. A name that no table has comes back as it is.

    One name may be of two nodes, in models with norms after attention and in others: the first that is among `nodes`.
    """
    match = LAYER.fullmatch(module)
    lead, name = ("layers/", match[2]) if match else ("", module.removeprefix("model."))
    found = [lead + node for node, called in MODULES.items() if called == name] or [lead + name if match else module]
    return next((node for node in found if node in nodes), found[0]), int(match[1]) if match else None


def module_of(node: str, layer: int | None = None) -> str:
    """The inverse of `node_of`; without a layer, the end of the name that all layers' modules share."""
    lead, _, rest = node.partition("/")
    if lead == "layers":
        return MODULES[rest] if layer is None else f"model.layers.{layer}.{MODULES[rest]}"
    return {"head": HEAD, "score": SCORE}.get(node) or f"model.{MODULES[node]}"
