"""From logits [B, V] to the next token: each filter is logits -> logits, in the order Hugging Face applies them.

    repetition_penalty -> temperature -> top_k -> top_p -> min_p -> sample

What a filter removes becomes -inf. `Sampling` holds a request's choices; None leaves a filter out of the program. `Mixed` is
one program for rows of any choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sftjax.config import UserError


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "min_p", "repetition_penalty"],
    meta_fields=["top_k"],
)
@dataclass(frozen=True)
class Sampling:
    """Numbers are traced, so that another temperature needs no other program; top_k is a shape and does."""

    temperature: float | None = None  # None: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


GREEDY = Sampling()


class Mixed(NamedTuple):
    """The choices of rows that have each their own, [B]; a row's unused filter has the number that changes nothing."""

    temperature: Array  # 0: greedy
    top_k: Array  # V: all
    top_p: Array
    min_p: Array
    repetition_penalty: Array


def mixed(choices: Sequence[Sampling], vocab: int) -> Mixed:
    """One row for each of `choices`."""
    none = {"temperature": 0.0, "top_k": vocab, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    rows = {name: [none[name] if (x := getattr(one, name)) is None else x for one in choices] for name in none}
    arrays: dict[str, Any] = {name: np.asarray(x, np.int32 if name == "top_k" else np.float32) for name, x in rows.items()}
    return Mixed(**arrays)


def choose(
    *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0
) -> Sampling:
    """What the user's numbers ask for; those that change nothing are left out. Raises UserError outside their ranges."""
    if temperature < 0:
        raise UserError(f"temperature={temperature}: needs 0 (greedy) or more")
    if top_k < 0:
        raise UserError(f"top_k={top_k}: needs 0 (off) or more")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not 0 <= value <= 1:
            raise UserError(f"{name}={value}: needs a number from 0 to 1")
    if repetition_penalty <= 0:
        raise UserError(f"repetition_penalty={repetition_penalty}: needs a number above 0; 1 is off")
    penalty = None if repetition_penalty == 1 else float(repetition_penalty)
    if temperature == 0:  # the filters never remove the largest
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        float(temperature),
        int(top_k) or None,
        None if top_p == 1 else float(top_p),
        None if min_p == 0 else float(min_p),
        penalty,
    )


def apply_repetition_penalty(logits: Array, seen: Array, penalty: float | Array) -> Array:
    """Makes tokens that the row has seen [B, V], in its prompt or answer, less likely. arXiv:1909.05858."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def apply_temperature(logits: Array, temperature: float | Array) -> Array:
    return logits / temperature


def apply_top_k(logits: Array, k: int | Array) -> Array:
    """Keeps the k largest, and what equals the least of them. k may be [B, 1], from 1 to V."""
    V = logits.shape[-1]
    if isinstance(k, int):
        least = jax.lax.top_k(logits, min(k, V))[0][:, -1:]
    else:
        least = jnp.take_along_axis(jnp.sort(logits, -1), V - jnp.clip(k, 1, V), -1)
    return jnp.where(logits < least, -jnp.inf, logits)


def apply_top_p(logits: Array, p: float | Array) -> Array:
    """Keeps the fewest of the largest whose probabilities reach p. arXiv:1904.09751."""
    ascending = jnp.sort(logits, -1)
    below = jnp.cumsum(jax.nn.softmax(ascending, -1), -1) <= 1 - p
    removed = jnp.minimum(below.sum(-1, keepdims=True), logits.shape[-1] - 1)
    return jnp.where(logits < jnp.take_along_axis(ascending, removed, -1), -jnp.inf, logits)


def apply_min_p(logits: Array, p: float | Array) -> Array:
    """Keeps what is at least p times as likely as the likeliest. arXiv:2407.01082."""
    probs = jax.nn.softmax(logits, -1)
    return jnp.where(probs < p * probs.max(-1, keepdims=True), -jnp.inf, logits)


def greedy(logits: Array) -> Array:
    """The first of the largest, [B]. Two plain reductions: argmax carries an index along and is not vectorised on CPUs."""
    top = logits.max(-1, keepdims=True)
    return jnp.where(logits == top, jnp.arange(logits.shape[-1]), logits.shape[-1] - 1).min(-1).astype(jnp.int32)


def sample(logits: Array, keys: Array) -> Array:
    """One token a row [B], each drawn with its own key of `keys` [B]."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    return greedy(logits + noise)


def next_token(logits: Array, sampling: Sampling | Mixed, keys: Array, seen: Array | None) -> Array:
    """[B, V] -> [B]. `seen` [B, V] is needed where there is a repetition penalty, and by Mixed."""
    if isinstance(sampling, Mixed):
        assert seen is not None
        return _mixed_tokens(logits, sampling, keys, seen)
    if sampling.repetition_penalty is not None:
        assert seen is not None
        logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
    if sampling.temperature is None:
        return greedy(logits)
    logits = apply_temperature(logits, sampling.temperature)
    if sampling.top_k is not None:
        logits = apply_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = apply_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = apply_min_p(logits, sampling.min_p)
    return sample(logits, keys)


def _mixed_tokens(logits: Array, sampling: Mixed, keys: Array, seen: Array) -> Array:
    """What no row asks for is not computed."""
    temperature, k, p, least, penalty = (x[:, None] for x in sampling)
    filtering = (k < logits.shape[-1]) | (p < 1) | (least > 0)

    def filtered(x: Array) -> Array:
        return apply_min_p(apply_top_p(apply_top_k(x, k), p), least)

    def drawn() -> Array:
        x = apply_temperature(logits, jnp.where(temperature > 0, temperature, 1))
        x = jax.lax.cond((filtering & (temperature > 0)).any(), filtered, lambda x: x, x)
        return jnp.where(sampling.temperature > 0, sample(x, keys), greedy(logits))

    logits = jax.lax.cond((penalty != 1).any(), lambda: apply_repetition_penalty(logits, seen, penalty), lambda: logits)
    return jax.lax.cond((temperature > 0).any(), drawn, lambda: greedy(logits))
