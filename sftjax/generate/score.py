"""Log-probs of given continuations: what perplexity and multiple choice are made from, in one forward pass a row.

    log p(continuation_i | prompt, continuation_<i)    at every i, and whether the model would have said the same

The head is applied only where a token of a continuation is predicted, a block of columns at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sftjax import hosts
from sftjax.data.batch import Batch
from sftjax.generate.sampling import greedy
from sftjax.generate.shapes import between, power
from sftjax.losses.tokens import blocks, joined
from sftjax.models.decoder import Decoder, forward
from sftjax.weights import kinds


@dataclass(frozen=True)
class Scored:
    """One continuation of n tokens."""

    logps: np.ndarray  # [n] float32
    greedy: np.ndarray  # [n] bool: the token is the likeliest, the first of equals as greedy decoding takes it
    top: np.ndarray  # [n, k]: the k likeliest tokens in each one's place, best first
    top_logps: np.ndarray  # [n, k] float32


def score_batch(
    model: Decoder, params: Any, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], shards: int, top: int
) -> list[Scored]:
    """Of rows that go through the model together. `shards`: what their number is padded to a multiple of."""
    B = power(len(prompts), least=shards)
    counts = [len(c) for c in continuations]
    T = between(max(len(p) + n for p, n in zip(prompts, counts)) - 1, least=32)  # the last token predicts nothing
    M = between(max(counts), least=8)
    tokens, segments = np.zeros((2, B, T), np.int32)
    at, targets = np.zeros((2, B, M), np.int32)
    for row, (prompt, continuation) in enumerate(zip(prompts, continuations)):
        ids = [*prompt, *continuation][:-1]
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        at[row, : len(continuation)] = np.arange(len(prompt) - 1, len(ids))
        targets[row, : len(continuation)] = continuation
    found = hosts.fetch(_score(model, params, tokens, segments, at, targets, top))
    return [Scored(*(x[row, :n] for x in found)) for row, n in enumerate(counts)]


@partial(jax.jit, static_argnames=("model", "top"))
def _score(model: Decoder, params: Any, tokens: Array, segments: Array, at: Array, targets: Array, top: int) -> tuple[Array, ...]:
    """What Scored holds, [B, M] and [B, M, top], of targets [B, M], which positions `at` [B, M] of tokens [B, T] predict."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, head, _ = forward(model)(params, Batch(tokens, None, segments, positions))
    hidden = jnp.take_along_axis(hidden, at[..., None], 1)

    def block(xs: tuple[Array, Array]) -> tuple[Array, ...]:
        h, t = xs
        logits = kinds.logits(h, head)
        normaliser = jax.nn.logsumexp(logits, -1)
        logps = jnp.take_along_axis(logits, t[..., None], -1)[..., 0] - normaliser
        best, tokens = jax.lax.top_k(logits, top)
        return logps, greedy(logits) == t, tokens, best - normaliser[..., None]

    out = jax.lax.map(block, blocks(head.shape[-1], hidden, targets))  # [n, B, t, ...]
    return tuple(joined(x, targets.shape[1]) for x in out)
