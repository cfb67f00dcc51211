"""A tiny decoder, its parameters and batches of random rows: what the laws are tried on."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import tree
from sftjax.data.batch import Batch
from sftjax.models.config import DecoderConfig
from sftjax.models.decoder import forward, shapes
from sftjax.weights.kinds import matmul

CONFIG = DecoderConfig(vocab=64, width=24, mlp_width=40, layers=3, heads=4, kv_heads=2, head_dim=8)


def config(**changes) -> DecoderConfig:
    return replace(CONFIG, **changes)


def params(c: DecoderConfig, seed: int = 0):
    """Random parameters, norms and biases away from the ones and zeros they start at. numpy: nothing to compile."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        noise = 0.2 * rng.standard_normal(x.shape, np.float32)
        return jnp.asarray(1 + noise if path.endswith("scale") else noise)

    return tree.map_leaves(leaf, shapes(c))


def batch(rows: list[list[int]], T: int, vocab: int = CONFIG.vocab, seed: int = 0) -> Batch:
    """A row for each list of segment lengths, in order and padded; a length below 0 is that much padding before the next.

    Weights are 0, 0.5 or 1; what stands in the padding is random, and must not matter.
    """
    rng = np.random.default_rng(seed)
    shape = (len(rows), T)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = rng.choice(np.array([0, 0.5, 1], np.float32), shape)
    for b, lengths in enumerate(rows):
        start = 0
        for i, n in enumerate(lengths, 1):
            if n > 0:
                segments[b, start : start + n] = i
                positions[b, start : start + n] = np.arange(n)
            start += abs(n)
        assert start <= T
    weights[positions == 0] = 0  # a segment's first token is predicted from nothing
    tokens = rng.integers(0, vocab, shape, dtype=np.int32)
    return Batch(*map(jnp.asarray, (tokens, weights, segments, positions)))


def pieces(b: Batch) -> Iterator[tuple[int, slice]]:
    """(row, where) of every segment of a batch."""
    for row, segments in enumerate(np.asarray(b.segments)):
        for s in sorted(set(segments[segments > 0].tolist())):
            where = np.flatnonzero(segments == s)
            yield row, slice(where[0], where[-1] + 1)


def unpacked(b: Batch) -> Batch:
    """Every segment in a row of its own, right-padded."""
    found = list(pieces(b))
    out = [np.zeros((len(found), b.tokens.shape[1]), x.dtype) for x in b]
    for i, (row, where) in enumerate(found):
        n = where.stop - where.start
        for into, x in zip(out, b):
            into[i, :n] = np.asarray(x)[row, where]
        out[2][i, :n] = 1
    return Batch(*map(jnp.asarray, out))


def assert_trees_close(a, b, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Leaf by leaf, within `rtol` of the leaf's own size."""

    def check(path, x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol + rtol * np.abs(y).max(), err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, a, b)


@cache
def logits_of(model):
    """`logits_of(model)(params, batch)`: one program for all parameters and batches of the same shapes."""
    return jax.jit(lambda params, batch: matmul(*forward(model)(params, batch)[:2]))


def assert_greedy(model, params, prompts, answers, slack=1e-4):
    """Each token of each answer has the largest logit of one whole forward, within `slack`."""
    T = 128
    tokens, segments = np.zeros((2, len(prompts), T), np.int32)
    for row, (p, a) in enumerate(zip(prompts, answers)):
        ids = [*p, *a.ids]
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    positions = np.broadcast_to(np.arange(T), tokens.shape)
    logits = np.asarray(logits_of(model)(params, Batch(tokens, None, segments, positions)), np.float32)
    for row, (p, a) in enumerate(zip(prompts, answers)):
        at = logits[row, len(p) - 1 : len(p) - 1 + len(a.ids)]
        np.testing.assert_array_less(at.max(-1) - at[np.arange(len(a.ids)), a.ids], slack)
