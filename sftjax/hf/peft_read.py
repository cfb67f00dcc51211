"""An adapter's files -> kinds of weight in place; `hf.peft` draws the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import tree
from sftjax.config import UserError
from sftjax.hf.load import grow, read_json
from sftjax.hf.modules import EMBED, HEAD, node_of
from sftjax.hf.modules import SCORE as HEAD_OF_SCORES
from sftjax.hf.peft_file import LABELS, Module, read_config, read_modules
from sftjax.models.config import DecoderConfig
from sftjax.models.families.common import labels
from sftjax.models.heads import scored
from sftjax.weights.kinds import Adapter, Dora, LowRank, Tokens, dense, norms
from sftjax.weights.targets import ENDS, SCORE, module_name

Layers = dict[int | None, Module]  # the modules of one node of the tree; None where it has no layers


def load_adapter(params: Any, directory: str | Path) -> Any:
    """`params` with the adapter's kinds in place, and room for its tokens. Raises UserError on what it cannot mean exactly.

    The layers' kernels may be quantised.
    """
    directory = Path(directory)
    modules = read_modules(directory, read_config(directory))
    params = grow(params, _vocab(modules))
    leaves = tree.flatten(params)
    if "head/kernel" not in leaves and SCORE not in leaves:
        modules = _tied(directory, modules)
    found: dict[str, Layers] = {}
    nodes = {path.rpartition("/")[0] for path in leaves}
    for name, module in modules.items():
        node, layer = node_of(name, nodes)
        found.setdefault(node, {})[layer] = module
    for node, layers in found.items():
        paths = [path for path in leaves if path.rpartition("/")[0] == node]
        name = next(iter(layers.values())).name
        if not paths and ".experts" in name:
            raise UserError(
                f"{directory}: adapts {name}, and PEFT's adapters of experts are not supported; merge it into the model with PEFT"
            )
        if not paths:
            raise UserError(f"{directory}: adapts {name}, which the model does not have")
        depth = leaves[paths[0]].shape[0]
        if beyond := [layer for layer in layers if layer is not None and layer >= depth]:
            raise UserError(f"{directory}: has a layer {max(beyond)}, the model only {depth}")
        for path in paths:
            part = "bias" if path.endswith("/bias") else "weight"
            leaves[path] = _replaced(leaves[path], path, part, layers)
            if part == "weight":
                leaves[path] = _around(leaves[path], path, layers)
    return tree.unflatten(leaves)


def saved_modules(directory: str | Path) -> tuple[str, ...]:
    """Modules that an adapter replaces as a whole, by the names of `weights.targets`: they go on training so."""
    directory = Path(directory)
    modules = read_modules(directory, read_config(directory))
    saved = {name: module for name, module in modules.items() if module.saved and {"weight", "bias"} & set(module.parts)}
    ends = [saved[name].parts["weight"].view() for name in (EMBED, HEAD) if name in saved]
    if len(ends) == 2 and np.array_equal(ends[0], ends[1]):
        del saved[HEAD]  # one matrix in a tied model
    return tuple(dict.fromkeys(module_name(f"{node_of(name)[0]}/kernel") for name in saved))


def base_of(adapter: Path) -> str:
    """What an adapter says it was trained over. Raises UserError."""
    name = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise UserError(
            f"{adapter}/adapter_config.json: names no base_model_name_or_path to put the adapter over; write it there"
        )
    return str(name)


def adapter_labels(directory: str | Path) -> tuple[str, ...]:
    """What the numbers of the score head mean that an adapter brings; () where it brings none."""
    directory = Path(directory)
    score = read_modules(directory, read_config(directory)).get(HEAD_OF_SCORES)
    if score is None:
        return ()
    file, count = directory / LABELS, score.parts["weight"].shape[0]
    return labels(({"id2label": read_json(file)} if file.is_file() else {}) | {"num_labels": count})


def with_head(params: Any, config: DecoderConfig, directory: str | Path) -> tuple[Any, DecoderConfig]:
    """The base that an adapter goes over: with room for the score head it brings, where the base has none, and its labels."""
    found = adapter_labels(directory)
    if len(found) == len(config.labels):
        return params, replace(config, labels=found)
    return scored(params, config, found) if found and not config.labels else (params, config)


def held(directory: str | Path) -> set[str]:
    """What an adapter holds that goes on training: of lora, adapter (bottlenecks), tokens and modules_to_save."""
    directory = Path(directory)
    found = {part for module in read_modules(directory, read_config(directory)).values() for part in module.parts}
    names = {name for part, name in (("lora_A", "lora"), ("down", "adapter"), ("rows", "tokens")) if part in found}
    return names | ({"modules_to_save"} if saved_modules(directory) else set())


def _vocab(modules: dict[str, Module]) -> int:
    """Tokens that the adapter knows of."""
    sizes = [0]
    for name, axis, part in ((EMBED, 1, "lora_A"), (HEAD, 0, "lora_B"), (EMBED, 0, "weight"), (HEAD, 0, "weight")):
        if name in modules:
            module = modules[name]
            sizes += [module.parts[part].shape[axis]] if part in module.parts else []
            sizes += [i + 1 for i in module.ids]
    return max(sizes)


def _tied(directory: Path, modules: dict[str, Module]) -> dict[str, Module]:
    """The modules without the head, whose matrix is the embedding's. Raises UserError where the adapter makes two of it."""
    none = Module(directory, {}, "", {})
    embed, head = modules.get(EMBED, none), modules.get(HEAD, none)
    parts = {*embed.parts, *head.parts}

    def same(ours: str, theirs: str, flip: bool = False) -> bool:
        if ours not in embed.parts or theirs not in head.parts:
            return False
        x, y = embed.parts[ours].view(), head.parts[theirs].view()
        return np.array_equal(x, y.T if flip else y)

    saved = embed.saved or head.saved or ("weight" in embed.parts and "weight" in head.parts)
    one = {
        "use_dora": "lora_magnitude_vector" not in parts,
        "target_modules": "lora_A" not in parts
        or (same("lora_A", "lora_B", True) and same("lora_B", "lora_A", True) and embed.scale == head.scale),
        "modules_to_save": not saved or same("weight", "weight"),
        # PEFT ties the rows by itself, and as a rule files the embedding's alone
        "trainable_token_indices": "rows" not in head.parts or (head.ids in ((), embed.ids) and same("rows", "rows")),
    }
    if two := [key for key, fine in one.items() if not fine]:
        raise UserError(
            f"{directory}: {two[0]} makes two matrices of embed_tokens and lm_head, which are one in this model; "
            "merge the adapter into the model with PEFT and load that"
        )
    rest = {name: module for name, module in modules.items() if name not in (EMBED, HEAD)}
    return rest | ({EMBED: replace(embed, name=EMBED, parts=head.parts | embed.parts)} if parts else {})


def _having(part: str, layers: Layers) -> Layers:
    return {layer: module for layer, module in layers.items() if part in module.parts}


def _replaced(leaf: Any, path: str, part: str, layers: Layers) -> Any:
    """The leaf with what replaces it as a whole, in every layer that has it."""
    if not (found := _having(part, layers)):
        return leaf
    flip, shape = path.endswith("/kernel"), leaf.shape if None in found else leaf.shape[1:]
    arrays = {layer: module.view(part, *(shape[::-1] if flip else shape)) for layer, module in found.items()}
    dtype = jnp.promote_types(leaf.dtype, next(iter(arrays.values())).dtype)
    whole = np.empty(leaf.shape, dtype) if len(found) == (1 if None in found else leaf.shape[0]) else np.array(dense(leaf, dtype))
    for layer, x in arrays.items():
        whole[... if layer is None else layer] = x.T if flip else x
    return jnp.asarray(whole)


def _around(base: Any, path: str, layers: Layers) -> Any:
    """`base` in the kinds that the modules ask for."""
    if low := _having("lora_A", layers):
        base = _low_rank(base, path, low)
    for module in _having("rows", layers).values():
        axis = int(path.endswith("/kernel"))
        rows = module.view("rows", len(module.ids), base.shape[1 - axis])
        base = Tokens(base, jnp.asarray(rows, jnp.float32), module.ids, axis)
    return _bottleneck(base, down) if (down := _having("down", layers)) else base


def _low_rank(base: Any, path: str, layers: Layers) -> LowRank | Dora:
    *lead, fan_in, fan_out = base.shape
    depth, rank = (lead or [1])[0], max(module.rank for module in layers.values())
    scale = max(module.scale for module in layers.values())
    a, b = np.zeros((depth, fan_in, rank), np.float32), np.zeros((depth, rank, fan_out), np.float32)
    for layer, module in layers.items():
        i, r = layer or 0, module.rank
        a[i, :, :r] = module.view("lora_A", r, fan_in).T
        b[i, :r] = module.view("lora_B", fan_out, r).T
        if module.scale != scale:
            b[i] *= module.scale / scale
    # of the ends none: losses apply the head block by block and the embedding is a lookup, both without a key
    dropout = 0.0 if path in ENDS else float(next(iter(layers.values())).config.get("lora_dropout") or 0.0)
    low = LowRank(base, jnp.asarray(a if lead else a[0]), jnp.asarray(b if lead else b[0]), scale, dropout)
    if not (found := _having("lora_magnitude_vector", layers)):
        return low
    magnitude = np.empty((depth, fan_out), np.float32)
    for i in range(depth):  # a layer that has none keeps the norms it has
        own = found.get(i if lead else None)
        magnitude[i] = own.view("lora_magnitude_vector", fan_out) if own else norms(jax.tree.map(lambda x, i=i: x[i], low))
    return Dora(low, jnp.asarray(magnitude if lead else magnitude[0]))


def _bottleneck(base: Any, layers: Layers) -> Adapter:
    module, (depth, *experts, _, out) = next(iter(layers.values())), base.shape
    if len(layers) != depth:
        raise UserError(f"{module.directory}: has bottleneck adapters in {len(layers)} of {depth} layers, and needs one in each")
    r = module.config["width"]
    shapes = {"down": (r, out), "down_bias": (r,), "up": (out, r), "up_bias": (out,)}
    stacks = {part: np.stack([layers[i].view(part, *experts, *shape) for i in range(depth)]) for part, shape in shapes.items()}
    turned = {part: x.swapaxes(-1, -2) if part in ("down", "up") else x for part, x in stacks.items()}
    return Adapter(base, **{part: jnp.asarray(x, jnp.float32) for part, x in turned.items()})
