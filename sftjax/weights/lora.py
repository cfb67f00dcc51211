"""LoRA as a transform of the tree. arXiv:2106.09685; rsLoRA: arXiv:2312.03732.

    {"q": [L, D, D]}  ->  {"q": LowRank(base [L, D, D], a [L, D, r], b [L, r, D], scale alpha / r)}

b starts at zero, so the model starts unchanged; `merge` is the way back.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sftjax import tree
from sftjax.config import UserError, parts
from sftjax.weights.kinds import LowRank, dense

# our modules in the words users know: those of Hugging Face checkpoints
MODULES = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "head": "lm_head",
}


def lora(
    params: Any,
    key: Array,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    rslora: bool = False,
) -> Any:
    """Puts a LowRank in place of each target kernel. Raises UserError where a target matches nothing.

    `targets` is "all-linear" (every kernel but the head's), or module names and regexes (a sequence, or text with
    commas between them) matched to the end of names such as `layers.self_attn.q_proj`. a is drawn from
    uniform(-1, 1) / sqrt(in), as PEFT draws it; both parts are float32.
    """
    if rank < 1:
        raise UserError(f"lora.rank={rank}: needs at least 1")
    chosen = match(params, targets)
    if dropout and "head/kernel" in chosen:  # losses apply the head block by block, without a key
        raise UserError(f"lora.dropout={dropout}: does not reach lm_head, which lora.targets names; leave one of them out")
    scale = alpha / rank**0.5 if rslora else alpha / rank

    def leaf(path: str, w: Any) -> Any:
        if path not in chosen:
            return w
        *lead, fan_in, fan_out = w.shape
        bound = fan_in**-0.5
        a = jax.random.uniform(tree.fold_path(key, path), (*lead, fan_in, rank), jnp.float32, -bound, bound)
        return LowRank(w, a, jnp.zeros((*lead, rank, fan_out), jnp.float32), scale, dropout)

    return tree.map_leaves(leaf, params)


def merge(params: Any) -> Any:
    """Every LowRank as the one kernel it stands for, in its base's dtype."""
    return tree.map_leaves(lambda _, w: dense(w), params)


def match(params: Any, targets: str | Sequence[str]) -> set[str]:
    """Paths of the kernels that `targets` names."""
    modules = {path: module_name(path) for path in tree.flatten(params) if module_name(path)}
    if parts(targets) == ("all-linear",):
        return {path for path, name in modules.items() if name != "lm_head"}
    chosen: set[str] = set()
    for target in parts(targets):
        try:
            found = {path for path, name in modules.items() if re.search(rf"(^|\.)(?:{target})$", name)}
        except re.error as e:
            raise UserError(f"lora.targets: {target!r} is not a regular expression ({e})") from e
        if not found:
            known = sorted({name.rpartition(".")[2] for name in modules.values()})
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"lora.targets: nothing is named {target!r}; {hint}there are {', '.join(known)}")
        chosen |= found
    return chosen


def module_name(path: str) -> str:
    """`layers/attn/q/kernel` -> `layers.self_attn.q_proj`; "" for what is no linear kernel."""
    module, _, leaf = path.rpartition("/")
    lead, _, rest = module.partition("/")
    if leaf != "kernel":
        return ""
    return MODULES[module] if module in MODULES else f"{lead}.{MODULES[rest]}"
