"""Attention of long rows by square blocks, so that a head's scores are never more than [G, SIDE, SIDE].

Forward a block of queries goes over its blocks of keys with a running maximum and sum, backward the probabilities are made again
from the saved log-sum-exp: arXiv:2205.14135, algorithms 1 and 4. How many blocks a query sees is known as the loop runs, so the
triangle above the diagonal and what lies before a window cost nothing. Letters as in `models.attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

FAR = 2**30  # a window that sees everything
MASKED = -1e30  # finite, so that a fully masked row gives a uniform mean and never nan
SIDE = 1024


class How(NamedTuple):
    """What a program is made for."""

    windows: tuple[int | None, ...]
    scale: float
    softcap: float | None


def capped(scores: Array, softcap: float | None) -> Array:
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def masked(
    how: How, window: int | None, q: Array, k: Array, own: Array, theirs: Array, position: Array, key_position: Array
) -> Array:
    """Scores of queries [G, C, H] of segments `own` [C] against keys [S, H] of `theirs` [S], [G, C, S] float32."""
    scores = jnp.einsum("gth,sh->gts", q, k, preferred_element_type=jnp.float32)
    scores = capped(scores * how.scale, how.softcap)
    behind = position[:, None] - key_position
    seen = (behind >= 0) & (behind < (window or FAR)) & (own[:, None] == theirs[None])
    return jnp.where(seen, scores, MASKED)


def backward_scores(how: How, scores: Array, lse: Array, delta: Array, do: Array, v: Array) -> tuple[Array, Array]:
    """The probabilities and the gradient of the scores before scale and cap, [G, C, S] float32."""
    p = jnp.exp(scores - lse)
    ds = p * (jnp.einsum("gth,sh->gts", do, v, preferred_element_type=jnp.float32) - delta) * how.scale
    if how.softcap:  # clipped: what is masked is -1e30, and p is 0 there
        ds *= 1 - jnp.square(jnp.clip(scores / how.softcap, -1, 1))
    return p, ds


class Blocks(NamedTuple):
    """A long row cut into squares: query block i sees key blocks first(i) .. i. What it is filled up with is seen by no one."""

    how: How
    window: int | None
    segments: Array

    @property
    def number(self) -> int:
        return -(-self.segments.shape[0] // SIDE)

    def whole(self, x: Array) -> Array:
        """x [..., T, H] filled up to whole blocks."""
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, self.number * SIDE - x.shape[-2]), (0, 0)])

    def of(self, x: Array, i: Array) -> Array:
        """Block i of `whole`."""
        return jax.lax.dynamic_slice_in_dim(x, i * SIDE, SIDE, x.ndim - 2)

    def first(self, i: Array) -> Array:
        return jnp.maximum(0, i * SIDE - self.window + 1) // SIDE if self.window else jnp.zeros_like(i)

    def scores(self, q: Array, k: Array, i: Array, j: Array) -> Array:
        ids = jnp.pad(self.segments, (0, self.number * SIDE - self.segments.shape[0]), constant_values=-1)
        own, theirs = (jax.lax.dynamic_slice_in_dim(ids, at * SIDE, SIDE) for at in (i, j))
        place = jnp.arange(SIDE)
        return masked(self.how, self.window, q, k, own, theirs, i * SIDE + place, j * SIDE + place)


def forward(how, window, q, k, v, segments):
    """q [G, T, H], k and v [T, H], segments [T] -> (the output [G, T, H], the log-sum-exp of every query [G, T, 1])."""
    blocks, (G, T, H) = Blocks(how, window, segments), q.shape
    q, k, v = map(blocks.whole, (q, k, v))

    def queries(i):
        own = blocks.of(q, i)

        def keys(j, carry):
            top, total, out = carry
            scores = blocks.scores(own, blocks.of(k, j), i, j)
            higher = jnp.maximum(top, scores.max(-1, keepdims=True))
            e, shrink = jnp.exp(scores - higher), jnp.exp(top - higher)
            seen = jnp.einsum("gts,sh->gth", e.astype(v.dtype), blocks.of(v, j), preferred_element_type=jnp.float32)
            return higher, shrink * total + e.sum(-1, keepdims=True), shrink * out + seen

        # what a block without a key to see leaves here, the diagonal, where each sees itself, shrinks to nothing
        one = jnp.full((G, SIDE, 1), MASKED, jnp.float32)
        top, total, out = jax.lax.fori_loop(blocks.first(i), i + 1, keys, (one, 0 * one, jnp.zeros((G, SIDE, H), jnp.float32)))
        return (out / total).astype(q.dtype), top + jnp.log(total)

    o, lse = jax.lax.map(queries, jnp.arange(blocks.number))  # [n, G, SIDE, ...]
    return tuple(jnp.moveaxis(x, 0, 1).reshape(G, -1, x.shape[-1])[:, :T] for x in (o, lse))


def backward(how, window, q, k, v, segments, lse, delta, do):
    """dq, dk and dv, where `delta` [G, T, 1] is the sum of do * o."""
    blocks, (G, T, H) = Blocks(how, window, segments), q.shape
    q, k, v, lse, delta, do = map(blocks.whole, (q, k, v, lse, delta, do))

    def queries(sums, i):
        own, own_lse, own_delta, own_do = (blocks.of(x, i) for x in (q, lse, delta, do))

        def keys(j, carry):
            dq, dk, dv = carry
            theirs = blocks.of(k, j)
            scores = blocks.scores(own, theirs, i, j)
            p, ds = backward_scores(how, scores, own_lse, own_delta, own_do, blocks.of(v, j))
            ds = ds.astype(q.dtype)

            def add(sums, x, y):  # [SIDE, H] to block j
                more = jnp.einsum("gts,gth->sh", x, y, preferred_element_type=jnp.float32)
                return jax.lax.dynamic_update_slice_in_dim(sums, blocks.of(sums, j) + more, j * SIDE, 0)

            dq += jnp.einsum("gts,sh->gth", ds, theirs, preferred_element_type=jnp.float32)
            return dq, add(dk, ds, own), add(dv, p.astype(do.dtype), own_do)

        dq, *sums = jax.lax.fori_loop(blocks.first(i), i + 1, keys, (jnp.zeros((G, SIDE, H), jnp.float32), *sums))
        return tuple(sums), dq.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(queries, zeros, jnp.arange(blocks.number))
    return jnp.moveaxis(dq, 0, 1).reshape(G, -1, H)[:, :T], dk[:T].astype(k.dtype), dv[:T].astype(v.dtype)
