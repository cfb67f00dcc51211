"""Draft: guesses of what a row says next, which one forward pass then checks all at once.

Text repeats itself and its prompt: a table holds a token that lately followed each pair of tokens, and each token alone, over
prompts and answers of all rows. A row takes guesses as far as they are what the model chooses itself, so that its tokens are
those of one at a time, drawn ones too, but for rounding. Prompt lookup decoding, with a table in place of a search:
https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

BITS = 16  # 2^BITS places for pairs; those that share one forget each other


class Table(NamedTuple):
    pairs: Array  # [2^BITS, 3]: two tokens, and what followed them
    ones: Array  # [V]: what followed each token; itself at first


def empty(vocab: int) -> Table:
    return Table(jnp.full((2**BITS, 3), -1, jnp.int32), jnp.arange(vocab, dtype=jnp.int32))


def learn(table: Table, tokens: Array, known: Array) -> Table:
    """With rows of tokens [B, n], of which each holds its first `known` [B]."""
    a, b, c = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    there = jnp.arange(2, tokens.shape[1]) < known[:, None]
    # which of several stays is the compiler's choice: a guess may be another, an answer never
    pairs = table.pairs.at[jnp.where(there, _place(a, b), 2**BITS)].set(jnp.stack([a, b, c], -1), mode="drop")
    return Table(pairs, table.ones.at[jnp.where(there, b, table.ones.size)].set(c, mode="drop"))


def guess(table: Table, before: Array, token: Array, n: int) -> Array:
    """`token` and n guesses of what follows it, [B, 1 + n]; `before` and `token` are the newest two of each row, [B]."""
    tokens = [before, token]
    for _ in range(n):
        a, b = tokens[-2:]
        found = table.pairs[_place(a, b)]
        same = (found[:, 0] == a) & (found[:, 1] == b)
        tokens.append(jnp.where(same, found[:, 2], table.ones[b]))
    return jnp.stack(tokens[1:], 1)


def agreed(tokens: Array, chosen: Array) -> Array:
    """[B, T]: where a token chosen after tokens [B, T], the guesses among them, is one that the row would have come to."""
    right = tokens[:, 1:] == chosen[:, :-1]
    return jnp.cumprod(jnp.pad(right, ((0, 0), (1, 0)), constant_values=True), 1, dtype=jnp.int32) > 0


def _place(a: Array, b: Array) -> Array:
    mixed = a.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + b.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    return (mixed >> (32 - BITS)).astype(jnp.int32)
