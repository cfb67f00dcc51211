"""Score heads: numbers about a whole sequence, from the hidden state of its last token. A classifier has one a label, a
reward model has one.

    score(x_1 .. x_T) = h_T @ W        W [D, C], no bias: the `score` of Hugging Face's ...ForSequenceClassification

A sequence is a segment: its last token is found by position, never by what token it is, so that a packed row scores each of
its sequences as they would be scored alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sftjax.models.config import DecoderConfig
from sftjax.models.decoder import Output
from sftjax.weights import kinds


def scored(params: Any, config: DecoderConfig, labels: Sequence[str]) -> tuple[Any, DecoderConfig]:
    """The model with a new score head in place of the head over the vocabulary.

        {"embed", "layers", "final_norm", "head": [D, V]}  ->  {"embed", "layers", "final_norm", "score": [D, C]}

    It starts at zero: every label is as likely as the others, every reward is 0.
    """
    config = replace(config, labels=tuple(labels), tied=False)
    body = {name: value for name, value in params.items() if name != "head"}
    return body | {"score": {"kernel": jnp.zeros((config.width, len(labels)))}}, config


def token_scores(output: Output) -> Array:
    """[B, T, C] float32: what a sequence would score that ended at each token. C is small: these are made whole."""
    return kinds.matmul(output.hidden.astype(jnp.float32), output.head)


def last(segments: Array) -> Array:
    """[B, T] bool: is this the last token of its segment?"""
    after = jnp.roll(segments, -1, axis=1).at[:, -1].set(0)
    return (segments > 0) & (segments != after)


def segment_scores(output: Output, segments: Array, count: int) -> tuple[Array, Array]:
    """(scores [B, S, C] float32, real [B, S] bool) of the segments 1 .. S = `count` of each row; one that is absent scores 0."""
    ends = last(segments)
    total = jax.vmap(partial(jax.ops.segment_sum, num_segments=count + 1))
    scores = total(jnp.where(ends[..., None], token_scores(output), 0), segments)
    return scores[:, 1:], total(ends.astype(jnp.int32), segments)[:, 1:] > 0
