"""LoRA and its kin as transforms of the tree. arXiv:2106.09685.

    {"q": [L, D, D]}  ->  {"q": LowRank(base [L, D, D], a [L, D, r], b [L, r, D], scale alpha / r)}
    DoRA                  {"q": Dora(LowRank(...), magnitude [L, D])}                       arXiv:2402.09353
    PiSSA, OLoRA          {"q": LowRank(LowRank(W, a0, b0, -scale), a0, b0, scale)}         arXiv:2404.02948, arXiv:2406.01775

The model starts unchanged: b is zero, or the a0 @ b0 that is added has been taken off before. `merge` is the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sftjax import tree
from sftjax.config import UserError
from sftjax.weights.kinds import Dora, Kind, LowRank, dense, norms
from sftjax.weights.targets import ENDS, match, module_name, pattern


def lora(
    params: Any,
    key: Array | int,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    rslora: bool = False,
    dora: bool = False,
    init: str = "zero",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Any:
    """Puts a LowRank in place of each target kernel. Raises UserError where a target matches nothing.

    key            of the random parts, or a whole number as its seed
    targets        as `weights.targets.match` reads them
    rslora         scale alpha / sqrt(rank) in place of alpha / rank, arXiv:2312.03732
    dora           trains the columns' magnitudes beside their directions
    init           zero: b = 0 and a ~ uniform(-1, 1) / sqrt(in), as PEFT draws it (of the embedding a = 0, b ~ normal);
                   pissa: the principal singular directions of the kernel; olora: the first columns of its QR decomposition
    *_pattern      {module name or regex: value} in place of `rank` and `alpha`

    The new parts are float32.
    """
    key = key if isinstance(key, Array) else jax.random.key(key)
    chosen = match(params, targets)
    if ends := [module_name(path) for path in ENDS if path in chosen]:
        if dropout:  # losses apply the head block by block and the embedding is a lookup, both without a key
            raise UserError(f"lora.dropout={dropout}: does not reach {ends[0]}, which lora.targets names; leave one of them out")
        if dora and "head" not in params:
            raise UserError(
                "lora.dora: this model's embedding is its head too, whose columns are other ones; leave embed_tokens out"
            )
    ranks = pattern(params, chosen, rank_pattern or {}, rank, "lora.rank_pattern")
    alphas = pattern(params, chosen, alpha_pattern or {}, alpha, "lora.alpha_pattern")

    def leaf(path: str, w: Any) -> Any:
        if path not in chosen:
            return w
        r = ranks[path]
        if r < 1:
            raise UserError(f"lora.rank={r}: {module_name(path)} needs a rank of at least 1")
        if init != "zero" and r > min(w.shape[-2:]):
            raise UserError(
                f"lora.rank={r}: {module_name(path)} is {w.shape[-2]} x {w.shape[-1]}, lora.init={init} finds no more there"
            )
        scale = alphas[path] / (r**0.5 if rslora else r)
        a, b = INITS[init](w, tree.fold_path(key, path), r, scale, path)
        # the base stays as it was, to the bit: what is added is taken off beside it. Copies, since training is given a and b away
        base = w if init == "zero" else LowRank(w, jnp.copy(a), jnp.copy(b), -scale)
        low = LowRank(base, a, b, scale, dropout)
        return Dora(low, _by_layer(norms, low)) if dora else low

    return tree.map_leaves(leaf, params)


def merge(params: Any) -> Any:
    """Every kind as the one kernel it stands for, in its base's dtype. Raises UserError where there is none."""
    return tree.map_leaves(lambda _, w: dense(w), params)


def still(params: Any) -> Any:
    """The same weights for a model that no longer changes: DoRA's norms are taken once."""

    def rest(w: Any) -> Any:
        return replace(w, magnitude=_by_layer(Dora.columns, w), divided=True) if isinstance(w, Dora) else w

    return jax.tree.map(rest, params, is_leaf=lambda w: isinstance(w, Dora))


def rates(trainable: Any, ratio: float) -> Any:
    """What multiplies the learning rate of each array: `ratio` for b, 1 for all else. LoRA+, arXiv:2402.12354.

    Of the embedding it is `a`: there a starts at zero and b does not.
    """
    of_embedding, a, b = jax.tree_util.DictKey("embedding"), *map(jax.tree_util.GetAttrKey, "ab")

    def rate(path: Any, _: Any) -> float:
        return ratio if path[-1] == (a if of_embedding in path else b) else 1.0

    return jax.tree_util.tree_map_with_path(rate, trainable)


def over_base(w: LowRank) -> LowRank:
    """`w` as one LowRank over the base itself: PiSSA's two pairs side by side are a plain LoRA of twice the rank."""
    if not isinstance(w.base, LowRank):
        return w
    inner = over_base(w.base)
    a, b = jnp.concatenate([w.a, inner.a], -1), jnp.concatenate([w.b, inner.b * (inner.scale / w.scale)], -2)
    return replace(w, base=inner.base, a=a, b=b)


def without(params: Any) -> Any:
    """The model before its adapter, which shares every frozen array with it: the reference of DPO and KTO.

        {"q": LowRank(LowRank(W, a0, b0, -s), a, b, s), "up": Dora(LowRank(Nf4, ...), m)}  ->  {"q": W, "up": Nf4}

    What trains as a whole beside an adapter (lora.modules_to_save) has no base to go back to and stays. Raises UserError
    where there is no adapter at all.
    """

    def base(path: str, w: Any) -> Any:
        while isinstance(w, Kind):
            w = w.base
        return w

    if not any(isinstance(w, Kind) for w in tree.flatten(params).values()):
        raise UserError("these weights have no adapter, so there is no model before it; give the reference as weights of its own")
    return tree.map_leaves(base, params)


def combine(weighted: Sequence[tuple[Any, float]]) -> Any:
    """The weighted sum of LoRA adapters over one base, exactly: their ranks side by side.

    `weighted` holds (params, weight) pairs; a kernel that one of them leaves alone counts as an update of nothing there.
    Raises UserError on what is no update to be added: DoRA, a bottleneck adapter, rows or a module that train as a whole.
    """
    trees = [(tree.flatten(params), weight) for params, weight in weighted]

    def leaf(path: str) -> Any:
        leaves = [(leaves[path], weight) for leaves, weight in trees]
        found = [(over_base(w), weight) for w, weight in leaves if isinstance(w, LowRank)]
        base = found[0][0].base if found else leaves[0][0]
        if isinstance(base, Kind) or not all(isinstance(w, LowRank) or same(w, base) for w, _ in leaves):
            raise UserError(
                f"{module_name(path)} is more than a LoRA over the one base in an adapter (DoRA, trained tokens, or a module "
                "that trained as a whole), and cannot be added to another's; merge that adapter into its base first"
            )
        if not found:
            return base
        a = jnp.concatenate([w.a for w, _ in found], -1)
        b = jnp.concatenate([w.b * (w.scale * weight) for w, weight in found], -2)
        return LowRank(base, a, b, 1.0)

    def same(w: Any, base: Any) -> bool:
        ours, theirs = jax.tree.leaves(w), jax.tree.leaves(base)
        return len(ours) == len(theirs) and all(x is y or bool(jnp.array_equal(x, y)) for x, y in zip(ours, theirs))

    return tree.unflatten({path: leaf(path) for path in trees[0][0]})


def _zero(w: Any, key: Array, rank: int, scale: float, path: str) -> tuple[Array, Array]:
    *lead, fan_in, fan_out = w.shape
    if path == "embed/embedding":  # rows of a are looked up: they start at nothing, and every token's moves at once
        return jnp.zeros((fan_in, rank)), jax.random.normal(key, (rank, fan_out))
    bound = fan_in**-0.5
    return jax.random.uniform(key, (*lead, fan_in, rank), jnp.float32, -bound, bound), jnp.zeros((*lead, rank, fan_out))


def _pissa(w: Any, key: Array, rank: int, scale: float, path: str) -> tuple[Array, Array]:
    """scale * a @ b = the `rank` largest singular directions, a and b sharing the singular values."""
    with EXACT():
        return _by_layer(_principal_pair, w, key, scale, rank=rank)


def _principal_pair(w: Any, key: Array, scale: Array, rank: int) -> tuple[Array, Array]:
    u, s, v = principal(dense(w, jnp.float32), rank, key)
    root = jnp.sqrt(s / scale)
    return u * root, root[:, None] * v


def _olora(w: Any, key: Array, rank: int, scale: float, path: str) -> tuple[Array, Array]:
    """With W^T = Q R [out, in]: b = the first columns of Q, a = the first rows of R, the update not divided by its scale."""
    with EXACT():
        return _by_layer(_orthonormal_pair, w, rank=rank)


def _orthonormal_pair(w: Any, rank: int) -> tuple[Array, Array]:
    kernel = dense(w, jnp.float32)
    q, _ = jnp.linalg.qr(kernel[:rank].T)  # the first columns of Q are those of the first columns' own decomposition
    return kernel @ q, q.T


# what they make is made again wherever a run resumes or is exported, and has to be the same: accelerators multiply in bfloat16
EXACT = partial(jax.default_matmul_precision, "highest")
INITS: dict[str, Callable[..., tuple[Array, Array]]] = {"zero": _zero, "pissa": _pissa, "olora": _olora}


def principal(w: Array, rank: int, key: Array, passes: int = 16) -> tuple[Array, Array, Array]:
    """(u [in, r], s [r], v [r, out]) of the largest singular values: subspace iteration, arXiv:0909.4061, algorithm 4.4.

    A full decomposition costs in * out * min(in, out); this takes products with a few columns.
    """
    width = min(rank + 8, *w.shape)
    start = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], width)))[0]

    def closer(_: int, q: Array) -> Array:
        return jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]

    q = jax.lax.fori_loop(0, passes, closer, start)
    u, s, v = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], v[:rank]


@partial(jax.jit, static_argnames=("fn", "rank"))
def _by_layer(fn: Callable[..., Any], w: Any, *rest: Any, **rank: int) -> Any:
    """fn(w, *rest, **rank) of each matrix of layers and experts in turn, so that what it forms is never larger than one.

    One program serves all kernels of a shape: `fn` is a function of a module, never one made for the call.
    """

    def each(w: Any) -> Any:
        return jax.lax.map(each, w) if len(w.shape) > 2 else fn(w, *rest, **rank)

    return each(w)
