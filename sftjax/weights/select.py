"""Which leaves train: a tree of bools over every array, and the table that says so.

Freezing all but the last n layers cuts the stack in two, `lower` and `layers`, so that the backward pass ends where
training does:  {"layers": X [L, ...]}  ->  {"lower": X [L - n, ...], "layers": X [n, ...]}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sftjax import tree
from sftjax.config import UserError, parts
from sftjax.weights.kinds import cast, count, trained


def everything(params: Any) -> Any:
    return jax.tree.map(lambda _: True, params)


def added(params: Any, also: Collection[str] = ()) -> Any:
    """What the kinds of weight say trains of them, and the whole leaves at the paths of `also`."""

    def leaf(path: str, w: Any) -> Any:
        return jax.tree.map(lambda _: True, w) if path in also else trained(w)

    return tree.map_leaves(leaf, params)


def named(params: Any, patterns: str | Sequence[str]) -> set[str]:
    """Paths (`head/kernel`, `layers/attn/q/bias`) that a regex finds, a cut stack's by the names they had before.

    Raises UserError where one finds none.
    """
    paths, chosen = {path: re.sub("^lower/", "layers/", path) for path in tree.flatten(params)}, set[str]()
    for pattern in parts(patterns):
        try:
            found = {path for path, name in paths.items() if re.search(pattern, name)}
        except re.error as e:
            raise UserError(f"freeze.train: {pattern!r} is not a regular expression ({e})") from e
        if not found:
            raise UserError(
                f"freeze.train: nothing matches {pattern!r}; the leaves are {', '.join(dict.fromkeys(paths.values()))}"
            )
        chosen |= found
    return chosen


def cut(params: Any, last_n_layers: int) -> Any:
    """The stack in two, `lower` and the last n `layers`."""
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    if not 0 < last_n_layers <= depth:
        raise UserError(f"freeze.last_n_layers={last_n_layers}: the model has {depth} layers")
    if last_n_layers == depth:
        return params
    lower = jax.tree.map(lambda x: x[: depth - last_n_layers], params["layers"])
    return params | {"lower": lower, "layers": jax.tree.map(lambda x: x[depth - last_n_layers :], params["layers"])}


def uncut(params: Any, dtype: Any = None) -> Any:
    """The inverse of `cut`; params that were never cut come back as they are.

    What does not train is often narrower than what does, and the one stack takes the wider dtype of the two; with `dtype`, that
    of their products, its kernels take this one.
    """
    if "lower" not in params:
        return params

    lower = tree.flatten(params["lower"])

    def whole(path: str, upper: Any) -> Any:
        parts = lower[path], upper
        if dtype and path.endswith("kernel"):
            parts = cast(parts, dtype)
        return jax.tree.map(lambda *both: jnp.concatenate(both), *parts)

    rest = {k: v for k, v in params.items() if k != "lower"}
    return rest | {"layers": tree.map_leaves(whole, params["layers"])}


def table(params: Any, mask: Any) -> list[tuple[str, str, int, int]]:
    """(path, shape, parameters, of them trained) for every leaf."""
    chosen = tree.flatten(tree.split(params, mask)[0])
    return [(path, str(list(w.shape)), count(w), tree.count(chosen[path])) for path, w in tree.flatten(params).items()]
