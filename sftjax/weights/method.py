"""A config's method as weights: which kinds stand where, and what of them trains.

method    kinds                                       trains
full      arrays                                      everything
freeze    arrays                                      the last n layers, and leaves by name (BitFit: bias; norms: norm)
lora      LowRank, Dora over arrays, Nf4 or Int8      their parts, and lora.modules_to_save
adapter   Adapter over the same                       its parts
tokens    Tokens                                      its rows; they stand beside any other method's kinds too
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from sftjax import tree
from sftjax.config import UserError
from sftjax.weights import select
from sftjax.weights.adapter import adapter
from sftjax.weights.lora import lora
from sftjax.weights.quantize import Quantised, quantisers
from sftjax.weights.targets import SCORE, match, module_name, saved
from sftjax.weights.tokens import tokens


def quantiser(shapes: Any, c: ConfigDict, modules: str | Sequence[str] = ()) -> dict[str, Callable[[jax.Array], Quantised]]:
    """{path of a kernel: how it is stored in fewer bits}, by `model.quantize`; what trains as a whole stays as it is.

    Raises UserError where nothing is left to be quantised.
    """
    if c.model.quantize is None:
        return {}
    found = quantisers(shapes, c.model.quantize, but=whole(shapes, c, modules))
    if not found:
        by = "freeze.train" if c.method == "freeze" else "lora.modules_to_save"
        raise UserError(f"model.quantize={c.model.quantize}: {by} trains every kernel of the layers as it is; leave it out")
    return found


def plan(shapes: Any, c: ConfigDict, modules: str | Sequence[str] = (), ids: Sequence[int] = ()) -> Any:
    """The mask that a run over `shapes` will have, worked out without making an array, so that a wrong name in the config is
    reported before anything is loaded.

    Raises UserError. Of an adapter (`model.adapter`), whose kinds are in its files, it says nothing.
    """
    small = quantiser(shapes, c, modules)

    def made(params: Any) -> Any:
        params = tree.map_leaves(lambda path, w: small[path](w) if path in small else w, params)
        return apply(params, c, modules, ids)

    return mask(jax.eval_shape(made, shapes), c, modules)


def apply(params: Any, c: ConfigDict, modules: str | Sequence[str] = (), ids: Sequence[int] = ()) -> Any:
    """`params` with the method's kinds in place; those of an adapter that was loaded (`model.adapter`) stand already.

    `modules` train as a whole beside the kinds; `ids` are the tokens whose rows train whatever the method. Raises UserError.
    """
    key, keep = jax.random.key(c.seed), whole(params, c, modules)
    match c.method:
        case "lora" if not c.model.adapter:
            o = c.lora
            if both := sorted(keep & match(params, o.targets)):
                name = module_name(both[0]).rpartition(".")[2]
                raise UserError(f"lora.modules_to_save: {name} trains as a whole, and lora.targets names it too; leave one out")
            params = lora(
                params, key, o.rank, o.alpha, o.dropout, o.targets, o.rslora, o.dora, o.init, o.rank_pattern, o.alpha_pattern
            )
        case "adapter" if not c.model.adapter:
            params = adapter(params, key, c.adapter.width, c.adapter.targets)
        case "freeze" if c.freeze.last_n_layers:
            params = select.cut(params, c.freeze.last_n_layers)
    return tokens(params, ids, but=keep) if ids and c.method != "full" else params


def mask(params: Any, c: ConfigDict, modules: str | Sequence[str] = ()) -> Any:
    """A bool for every array of what `apply` made: does it train?"""
    if c.method == "full":
        return select.everything(params)
    keep = whole(params, c, modules)
    if c.method == "freeze" and c.freeze.last_n_layers:
        keep |= {path for path in tree.flatten(params) if path.startswith("layers/")}
    return select.added(params, also=keep)


def whole(params: Any, c: ConfigDict, modules: str | Sequence[str]) -> set[str]:
    """Paths of the leaves that train as they are: LoRA's modules to save, what `freeze.train` names, and a score head."""
    chosen = select.named(params, c.freeze.train) if c.method == "freeze" else saved(params, modules)
    return chosen | ({SCORE} & {*tree.flatten(params)})
