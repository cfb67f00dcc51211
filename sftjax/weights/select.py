"""Which leaves train: a tree of bools for each method, and the table that says so.

Freezing all but the last n layers cuts the stack in two, `lower` and `layers`, so that the backward pass ends where
training does:  {"layers": X [L, ...]}  ->  {"lower": X [L - n, ...], "layers": X [n, ...]}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from sftjax import tree
from sftjax.config import UserError, parts
from sftjax.weights.kinds import LowRank


def everything(params: Any) -> Any:
    return jax.tree.map(lambda _: True, params)


def low_rank(params: Any, also: Sequence[str] = ()) -> Any:
    """a and b of every LowRank, and the whole leaves at the paths of `also`."""

    def leaf(path: str, w: Any) -> Any:
        mask = jax.tree.map(lambda _: path in also, w)
        return replace(mask, a=True, b=True) if isinstance(w, LowRank) else mask

    return tree.map_leaves(leaf, params)


def named(params: Any, patterns: str | Sequence[str], last_n_layers: int) -> Any:
    """Leaves whose path (`head/kernel`, `layers/attn/q/bias`) a regex finds, and the last n layers where they were cut off."""
    paths, patterns = tree.flatten(params), parts(patterns)
    for pattern in patterns:
        try:
            found = any(re.search(pattern, path) for path in paths)
        except re.error as e:
            raise UserError(f"freeze.train: {pattern!r} is not a regular expression ({e})") from e
        if not found:
            raise UserError(f"freeze.train: nothing matches {pattern!r}; the leaves are {', '.join(paths)}")

    def leaf(path: str, w: Any) -> bool:
        return any(re.search(p, path) for p in patterns) or (last_n_layers > 0 and path.startswith("layers/"))

    return tree.map_leaves(leaf, params)


def cut(params: Any, last_n_layers: int) -> Any:
    """The stack in two, `lower` and the last n `layers`."""
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    if not 0 < last_n_layers <= depth:
        raise UserError(f"freeze.last_n_layers={last_n_layers}: the model has {depth} layers")
    if last_n_layers == depth:
        return params
    lower = jax.tree.map(lambda x: x[: depth - last_n_layers], params["layers"])
    return params | {"lower": lower, "layers": jax.tree.map(lambda x: x[depth - last_n_layers :], params["layers"])}


def uncut(params: Any) -> Any:
    """The inverse of `cut`; params that were never cut come back as they are."""
    if "lower" not in params:
        return params
    rest = {k: v for k, v in params.items() if k != "lower"}
    return rest | {"layers": jax.tree.map(lambda a, b: jnp.concatenate([a, b]), params["lower"], params["layers"])}


def table(params: Any, mask: Any) -> list[tuple[str, str, int, int]]:
    """(path, shape, parameters, of them trained) for every leaf."""
    chosen, _ = tree.split(params, mask)
    trained = tree.flatten(jax.tree.map(lambda x: x, chosen))
    return [(path, str(list(w.shape)), tree.count(w), tree.count(trained[path])) for path, w in tree.flatten(params).items()]
