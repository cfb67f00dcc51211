"""Parameter trees: nested dicts of leaves, each with a path such as `layers/attn/q/kernel`.

A leaf is an array or a whole kind of weight (`weights.kinds`), so that "the q kernel" has one name whatever stands
there. `split` and `join` are the partition into trainable and frozen: two trees of one shape, None where absent.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

Tree = Any  # nested dict of arrays and kinds of weight
Path = str


def flatten(tree: Tree, prefix: str = "") -> dict[Path, Any]:
    """`{path: leaf}` in the tree's own order; a kind of weight is one leaf."""
    out: dict[Path, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{name}/")
        else:
            out[prefix + name] = value
    return out


def unflatten(leaves: Mapping[Path, Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_leaves(fn: Callable[[Path, Any], Any], tree: Tree) -> Tree:
    """The tree with `fn(path, leaf)` in place of each leaf."""
    return unflatten({path: fn(path, leaf) for path, leaf in flatten(tree).items()})


def split(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """(where `mask` is true, where it is false): two trees of the tree's own shape with None in the holes.

    `mask` has a bool for every array of the tree, inside kinds of weight too.
    """
    chosen = jax.tree.map(lambda x, keep: x if keep else None, tree, mask)
    rest = jax.tree.map(lambda x, keep: None if keep else x, tree, mask)
    return chosen, rest


def join(a: Tree, b: Tree) -> Tree:
    """The inverse of `split`."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def fold_path(key: jax.Array, path: Path) -> jax.Array:
    """A key of this path's own. crc32, since Python's `hash` differs in every process."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def count(tree: Tree) -> int:
    """Elements over all arrays of the tree; None counts nothing."""
    return sum(x.size for x in jax.tree.leaves(tree))
