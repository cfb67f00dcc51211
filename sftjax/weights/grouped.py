"""Products of rows with the matrix of the group they belong to: what a mixture of experts is made of.

    y_r = x_r @ w[expert(r)]        x [R, in], w [E, in, out]

Rows stand sorted by expert, and each expert's begin at a whole block of m rows, filled up with zeros. So a block has one
expert, every shape is fixed, no row is dropped, and what is added is less than a block an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

MOST = 128  # rows of a block
FEW = 64  # rows that are multiplied one by one where each is a block


class Groups(NamedTuple):
    """Where rows stand. `n` choices are made, n = M tokens times the experts of each."""

    expert: Array  # [R / m]: whose each block is
    sizes: Array  # [E]: rows of each expert, whole blocks
    source: Array  # [R]: the choice that stands in a row, n where none does
    place: Array  # [n]: the row of each choice, R where it has none

    @property
    def experts(self) -> Array:
        """[R]: whose each row is."""
        return jnp.repeat(self.expert, self.source.shape[0] // self.expert.shape[0])


def group(choices: Array, experts: int) -> Groups:
    """The places of choices [n], numbers of experts."""
    n = choices.shape[0]
    m = 1
    while m < MOST and 2 * m * experts <= n:
        m *= 2
    blocks = min(n, n // m + experts)
    counts = jnp.bincount(choices, length=experts)
    ends = jnp.cumsum(-(-counts // m))  # in blocks
    order = jnp.argsort(choices, stable=True)
    sorted_choices = choices[order]
    rank = jnp.arange(n) - (jnp.cumsum(counts) - counts)[sorted_choices]
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    place = jnp.zeros(n, jnp.int32).at[order].set(starts[sorted_choices] * m + rank)
    source = jnp.full(blocks * m, n, jnp.int32).at[place].set(jnp.arange(n, dtype=jnp.int32))
    expert = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks), side="right"), experts - 1)
    return Groups(expert, jnp.bincount(expert, length=experts) * m, source, place)


def ranked(choices: Array, first: Array, experts: int) -> tuple[Array, Array, Array]:
    """Of choices [n] those of the `experts` from `first` on: (their number, all choices in order with these first, by expert,
    and the place of each in that order)."""
    own = choices - first
    own = jnp.where((own >= 0) & (own < experts), own, experts)
    order = jnp.argsort(own, stable=True)
    return (own < experts).sum(), order, jnp.argsort(order, stable=True)


def group_turn(choices: Array, first: Array, experts: int, ranks: tuple[Array, Array, Array], turn: Array, rows: int) -> Groups:
    """As `group`, of no more than `rows` of the choices that `ranked` has put first: those of turn 0, 1, ... The others have
    no place."""
    number, order, rank = ranks
    n = order.shape[0]
    at = turn * rows + jnp.arange(rows)
    ids = jnp.where(at < number, order[jnp.minimum(at, n - 1)], n)  # [rows]
    of_none = experts - 1  # rows of no one stand last
    inner = group(jnp.where(ids < n, choices[jnp.minimum(ids, n - 1)] - first, of_none), experts)
    source = ids.at[inner.source].get(mode="fill", fill_value=n)
    here = rank - turn * rows
    taken = (here >= 0) & (here < rows) & (rank < number)
    place = jnp.where(taken, inner.place[jnp.clip(here, 0, rows - 1)], inner.source.shape[0])
    return Groups(inner.expert, inner.sizes, source, place)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread(active: int, x: Array, groups: Groups) -> Array:
    """Tokens [M, D] to their rows [R, D], each to `active` of them; rows of no one are zero."""
    return x.at[groups.source // active].get(mode="fill", fill_value=0)


def _spread_bwd(active, groups, dy):
    return collect(dy, groups).reshape(-1, active, dy.shape[-1]).sum(1), None


# either one's gradient is the other's gather: a scatter would go row by row
spread.defvjp(lambda active, x, groups: (spread(active, x, groups), groups), _spread_bwd)


@jax.custom_vjp
def collect(y: Array, groups: Groups) -> Array:
    """Rows [R, D] to the choices they were made for, [n, D]; a choice without a row has zeros."""
    return y.at[groups.place].get(mode="fill", fill_value=0)


def _collect_bwd(groups, dz):
    return dz.at[groups.source].get(mode="fill", fill_value=0), None


collect.defvjp(lambda y, groups: (collect(y, groups), groups), _collect_bwd)


@jax.custom_vjp
def product(x: Array, w: Array, groups: Groups) -> Array:
    """x [R, in], w [E, in, out] -> [R, out], in x's dtype."""
    if ragged(groups):
        return jax.lax.ragged_dot(x, w.astype(x.dtype), groups.sizes)
    return by_block(x, groups, lambda expert: w[expert].astype(x.dtype))


def _product_fwd(x, w, groups):
    return product(x, w, groups), (x, w, groups)


def _product_bwd(residuals, dy):
    x, w, groups = residuals
    if ragged(groups):
        _, pull = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w.astype(x.dtype), groups.sizes), x, w)
        return *pull(dy), None
    dx = by_block(dy, groups, lambda expert: w[expert].astype(dy.dtype).T)

    def add(dw: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        rows, cotangents, expert = xs
        return dw.at[expert].add(jnp.matmul(rows.T, cotangents, preferred_element_type=dw.dtype)), None

    zeros = jnp.zeros(w.shape, jnp.float32)  # float32: a sum over many blocks
    dw, _ = jax.lax.scan(add, zeros, (_blocks(x, groups), _blocks(dy, groups), groups.expert))
    return dx, dw.astype(w.dtype), None


product.defvjp(_product_fwd, _product_bwd)


def biased(y: Array, bias: Array, groups: Groups) -> Array:
    """y [R, out] + bias [E, out], of each row's expert. By blocks: by rows the gradient would be a scatter, row by row."""
    return (_blocks(y, groups) + bias[groups.expert][:, None].astype(y.dtype)).reshape(y.shape)


def ragged(groups: Groups) -> bool:
    """Is it left to `jax.lax.ragged_dot`? A TPU has a kernel for it.

    Elsewhere XLA multiplies every row with every expert, through an array [R, E * in]: on a CPU always, on an NVIDIA GPU up to
    jaxlib 0.10 at least (measured in marin-community/marin#7012; by cuDNN after openxla/xla#42313). JAX's own Triton lowering
    is behind jax_ragged_dot_use_gpu_pallas_triton_lowering, and is in no wheel (jax-ml/jax#40888).
    """
    return jax.default_backend() == "tpu" and not few(groups)


def few(groups: Groups) -> bool:
    """Is it decoding, where tokens have few experts between them and only theirs should be read?"""
    return len(groups.expert) == len(groups.source) <= FEW


def by_block(x: Array, groups: Groups, matrix: Callable[[Array], Array]) -> Array:
    """x [R, in] -> [R, out]: each block times matrix(its expert) [in, out]."""

    def one(xs: tuple[Array, Array]) -> Array:
        rows, expert = xs
        return rows @ matrix(expert)

    blocks = _blocks(x, groups)
    if few(groups):  # what a loop reads is a whole array: within the one over layers, a copy of all of a layer's experts
        return jnp.concatenate([one(xs) for xs in zip(blocks, groups.expert)])
    return jax.lax.map(one, (blocks, groups.expert)).reshape(x.shape[0], -1)


def _blocks(x: Array, groups: Groups) -> Array:
    return x.reshape(len(groups.expert), -1, x.shape[-1])
