"""Products of rows with the matrix of the group they belong to: what a mixture of experts is made of.

    y_r = x_r @ w[expert(r)]        x [R, in], w [E, in, out]

Rows stand sorted by expert, and each expert's begin at a whole block of m rows, filled up with zeros. So a block has one
expert, every shape is fixed, no row is dropped, and what is added is less than a block an expert.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

MOST = 128  # rows of a block


class Groups(NamedTuple):
    """Where rows stand. `n` choices are made, n = M tokens times the experts of each."""

    expert: Array  # [R / m]: whose each block is
    sizes: Array  # [E]: rows of each expert, whole blocks
    source: Array  # [R]: the choice that stands in a row, n where none does
    place: Array  # [n]: the row of each choice

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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread(active: int, x: Array, groups: Groups) -> Array:
    """Tokens [M, D] to their rows [R, D], each to `active` of them; rows of no one are zero."""
    return x.at[groups.source // active].get(mode="fill", fill_value=0)


def _spread_bwd(active, groups, dy):
    return dy[groups.place].reshape(-1, active, dy.shape[-1]).sum(1), None


# either one's gradient is the other's gather: a scatter would go row by row
spread.defvjp(lambda active, x, groups: (spread(active, x, groups), groups), _spread_bwd)


@jax.custom_vjp
def collect(y: Array, groups: Groups) -> Array:
    """Rows [R, D] to the choices they were made for, [n, D]."""
    return y[groups.place]


def _collect_bwd(groups, dz):
    return dz.at[groups.source].get(mode="fill", fill_value=0), None


collect.defvjp(lambda y, groups: (collect(y, groups), groups), _collect_bwd)


@jax.custom_vjp
def product(x: Array, w: Array, groups: Groups) -> Array:
    """x [R, in], w [E, in, out] -> [R, out]."""
    if jax.default_backend() != "cpu":
        return jax.lax.ragged_dot(x, w, groups.sizes)

    def block(xs: tuple[Array, Array]) -> Array:
        rows, expert = xs
        return rows @ w[expert]

    # there XLA has ragged_dot multiply every row with every expert
    return jax.lax.map(block, (_blocks(x, groups), groups.expert)).reshape(x.shape[0], -1)


def _product_fwd(x, w, groups):
    return product(x, w, groups), (x, w, groups)


def _product_bwd(residuals, dy):
    x, w, groups = residuals
    dx = product(dy, jnp.swapaxes(w, -1, -2), groups)
    if jax.default_backend() != "cpu":
        _, pull = jax.vjp(lambda w: jax.lax.ragged_dot(x, w, groups.sizes), w)
        return dx, *pull(dy), None

    def block(dw: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        rows, cotangents, expert = xs
        return dw.at[expert].add((rows.T @ cotangents).astype(dw.dtype)), None

    return dx, jax.lax.scan(block, jnp.zeros_like(w), (_blocks(x, groups), _blocks(dy, groups), groups.expert))[0], None


def _blocks(x: Array, groups: Groups) -> Array:
    return x.reshape(groups.expert.shape[0], -1, x.shape[-1])


product.defvjp(_product_fwd, _product_bwd)
