"""Parameters by the names users know: the modules of Hugging Face checkpoints and of PEFT's options.

layers/attn/q/kernel  ->  layers.self_attn.q_proj        embed/embedding  ->  embed_tokens        head/kernel  ->  lm_head
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sftjax import tree
from sftjax.config import UserError, parts

MODULES = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "attn/qkv": "self_attn.qkv_proj",
    "attn/sinks": "self_attn.sinks",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "mlp/gate_up": "mlp.gate_up_proj",
    "mlp/router": "mlp.gate",
    "mlp/experts/gate": "mlp.experts.gate_proj",
    "mlp/experts/up": "mlp.experts.up_proj",
    "mlp/experts/down": "mlp.experts.down_proj",
    "mlp/experts/gate_up": "mlp.experts.gate_up_proj",
    "mlp/shared/gate": "mlp.shared_expert.gate_proj",
    "mlp/shared/up": "mlp.shared_expert.up_proj",
    "mlp/shared/down": "mlp.shared_expert.down_proj",
    "mlp/shared_gate": "mlp.shared_expert_gate",
    "head": "lm_head",
    "score": "score",
    "embed": "embed_tokens",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn_post_norm": "post_attention_layernorm",  # in families that have norms after attention and MLP
    "mlp_pre_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "final_norm": "norm",
}
KERNELS = ("/kernel", "/embedding")
ENDS = ("head/kernel", "embed/embedding")  # not among "all-linear", as everywhere
SCORE = "score/kernel"  # trains as a whole, whatever the method
GATES = (
    "layers/mlp/router/kernel",
    "layers/mlp/shared_gate/kernel",
)  # nor a mixture's gates: they decide which expert sees a token


def match(params: Any, targets: str | Sequence[str], option: str = "lora.targets") -> set[str]:
    """Paths of the kernels that `targets` names. Raises UserError, in the name of the option, where one matches nothing.

    `targets` are "all-linear" (every kernel but the head's, the embedding and a mixture's gates), module names and regexes (a
    sequence, or text with commas between them) matched to the end of names such as `layers.self_attn.q_proj`.
    """
    kernels = {path for path in tree.flatten(params) if path.endswith(KERNELS)} - {SCORE}
    linear = kernels - {*ENDS, *GATES} if "all-linear" in parts(targets) else set()
    return linear | find(kernels, [target for target in parts(targets) if target != "all-linear"], option)


def saved(params: Any, modules: str | Sequence[str], option: str = "lora.modules_to_save") -> set[str]:
    """Paths of every leaf of the modules named, biases and norms too. Raises UserError where one matches nothing."""
    return find(set(tree.flatten(params)), modules, option)


def find(paths: set[str], targets: str | Sequence[str], option: str) -> set[str]:
    chosen: set[str] = set()
    for target in parts(targets):
        found = {path for path in paths if names(option, target, module_name(path))}
        if not found:
            known = sorted({module_name(path).rpartition(".")[2] for path in paths})
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{option}: nothing is named {target!r}; {hint}there are {', '.join(known)}")
        chosen |= found
    return chosen


def pattern(params: Any, chosen: set[str], patterns: Mapping[str, Any], default: Any, option: str) -> dict[str, Any]:
    """For each chosen path the value of the pattern that names it, else the default. Raises UserError where two disagree.

    A config keeps its keys sorted, so there is no first pattern as there is in PEFT.
    """
    kernels = {path for path in tree.flatten(params) if path.endswith(KERNELS)}
    for target in patterns:
        if not find(kernels, [target], option) & chosen:
            raise UserError(f"{option}: {target!r} names nothing that lora.targets does; leave it out, or add it to lora.targets")
    values = dict.fromkeys(chosen, default)
    for path in chosen:
        module = module_name(path)
        found = {target: value for target, value in patterns.items() if names(option, target, module)}
        if len({*found.values()}) > 1:
            raise UserError(
                f"{option}: {' and '.join(map(repr, found))} both name {module}, with different values; leave one out"
            )
        values[path] = next(iter(found.values()), default)
    return values


def names(option: str, target: str, module: str) -> bool:
    """Does the name or regex `target` mean `module`?"""
    try:
        return bool(re.search(rf"(^|\.)(?:{target})$", module))
    except re.error as e:
        raise UserError(f"{option}: {target!r} is not a regular expression ({e})") from e


def module_name(path: str) -> str:
    """`layers/attn/q/kernel` -> `layers.self_attn.q_proj`."""
    module = path.rpartition("/")[0]
    lead, _, rest = module.partition("/")
    return MODULES[module] if module in MODULES else f"{lead}.{MODULES[rest]}"
