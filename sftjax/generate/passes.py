"""What is compiled of a flight (flight.py): prompts into the cache, rows into their slots, passes until some of them end.

State is donated from one program to the next, so that the cache stays in place.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sftjax import sharding
from sftjax.generate import apart, draft
from sftjax.generate.sampling import Mixed, Sampling, next_token
from sftjax.models.decoder import Cache, Decoder, head, init_cache
from sftjax.weights import kinds

CHUNK = 32  # passes between two looks of the host


class State(NamedTuple):
    """The slots, all [B] but the cache and the table."""

    cache: list[Cache]  # of some layers each, as `apart` has them
    table: draft.Table | None  # what rows said before, where guesses are made
    before: Array  # the token before the newest
    token: Array  # the newest, not yet in the cache
    position: Array  # that it will have
    left: Array  # how many more the row may make; 0 = ended
    keys: Array  # [B, 2]
    seen: Array | None  # [B, V]: tokens of prompt and answer, where repetition is penalised


def _forward(
    model: Decoder, params: Any, tokens: Array, segments: Array, positions: Array, cache: Cache, lengths: Array
) -> tuple[Array, Cache]:
    arrays = tokens, segments, positions, cache
    hidden, cache, _ = model.apply({"params": params}, *arrays, lengths=lengths)  # type: ignore[assignment, misc]
    return hidden, cache


def _placed(cache: Cache) -> Cache:
    """On a mesh each device has its own rows, and its heads where they divide."""
    mesh = sharding.mesh_in_use()
    heads = sharding.HEADS if mesh is not None and cache.k.shape[2] % mesh.shape[sharding.HEADS] == 0 else None
    return Cache(*(sharding.constrain(x, None, sharding.BATCH, heads) for x in cache))


@partial(jax.jit, static_argnames=("model", "B", "S"))
def empty(model: Decoder, B: int, S: int) -> tuple[Cache, Array]:
    return _placed(init_cache(model.config, B, S, model.dtype)), jnp.zeros((B, model.config.width), model.dtype)


@partial(jax.jit, static_argnames=("model", "B", "S", "penalised", "guessed"))
def vacant(model: Decoder, B: int, S: int, penalised: bool, guessed: bool) -> State:
    before, token, position, left = jnp.zeros((4, B), jnp.int32)
    seen = jnp.zeros((B, model.config.vocab), bool) if penalised else None
    whole = _placed(init_cache(model.config, B, S, model.dtype))
    cache = apart.split(whole, 1 if model.scan else model.config.layers)
    table = draft.empty(model.config.vocab) if guessed else None
    return State(cache, table, before, token, position, left, jnp.zeros((B, 2), jnp.uint32), seen)


@partial(jax.jit, static_argnames="model", donate_argnames=("cache", "last"))
def prefill(
    model: Decoder, params: Any, cache: Cache, last: Array, tokens: Array, lengths: Array, start: Array
) -> tuple[Cache, Array]:
    """Columns [R, C] of the prompts into the cache from position `start`; `last` [R, D] keeps the hidden of each last token."""
    R, C = tokens.shape
    positions = jnp.broadcast_to(start + jnp.arange(C), (R, C))
    real = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, cache = _forward(model, params, tokens, real, positions, cache, lengths[:, None])
    cache = _placed(cache)
    at = lengths - 1 - start
    mine = jnp.take_along_axis(hidden, jnp.clip(at, 0, C - 1)[:, None, None], 1)[:, 0]
    return cache, jnp.where(((at >= 0) & (at < C))[:, None], mine, last)


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def enter(
    model: Decoder,
    params: Any,
    state: State,
    cache: Cache,
    last: Array,
    tokens: Array,
    slots: Array,
    lengths: Array,
    left: Array,
    numbers: Array,
    seeds: Array,
    seen: Array | None,
    sampling: Sampling | Mixed,
    stops: Array,
) -> tuple[State, Array]:
    """R prefilled rows of tokens [R, P] into `slots` [R], and the first token of each; a slot of B is none."""
    keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)
    newest = jnp.take_along_axis(tokens, lengths[:, None] - 1, 1)
    none = jnp.zeros_like(lengths)
    joining = State([cache], None, none, newest[:, 0], lengths - 1, left, jax.random.key_data(keys), seen)
    joining, first = _take(model, params, joining, last[:, None], newest, sampling, stops)
    P = cache.v.shape[3]
    entered = [
        _placed(Cache(k.at[:, slots, :, :, :P].set(new.k, mode="drop"), v.at[:, slots, :, :P].set(new.v, mode="drop")))
        for (k, v), new in zip(state.cache, apart.split(cache, len(state.cache)))
    ]
    table = state.table
    if table is not None:
        whole = jnp.pad(tokens, ((0, 0), (0, 1))).at[jnp.arange(len(tokens)), lengths].set(first[:, 0])
        table = draft.learn(table, whole, jnp.where(left > 0, lengths + 1, 0))
    rest = jax.tree.map(lambda x, y: x.at[slots].set(y, mode="drop"), state[2:], joining[2:])
    return State(entered, table, *rest), first[:, 0]


def _take(
    model: Decoder, params: Any, state: State, hidden: Array, tokens: Array, sampling: Sampling | Mixed, stops: Array
) -> tuple[State, Array]:
    """The next tokens of the rows under way, [B, T] and -1 where there is none, from hidden [B, T, D] of tokens [B, T]: the
    newest and guesses of what follows it, which are right as far as they are what is chosen.
    """
    B, T = tokens.shape
    logits = kinds.logits(hidden.reshape(B * T, -1), head(params, model.config))
    positions = state.position[:, None] + jnp.arange(T)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(jax.random.wrap_key_data(state.keys), positions)
    seen, V = state.seen, logits.shape[-1]
    by_then = None  # [B * T, V]: with the guesses that are taken for granted
    if seen is not None:
        guessed = jnp.cumsum(tokens[..., None] == jnp.arange(V), 1) > 0
        by_then = (seen[:, None] | guessed).reshape(B * T, V)
    if isinstance(sampling, Mixed):
        sampling = Mixed(*(jnp.repeat(jnp.asarray(x), T) for x in sampling))
    chosen = next_token(logits, sampling, keys.reshape(B * T), by_then).reshape(B, T)
    ends = jnp.isin(chosen, stops)
    going = (jnp.cumsum(ends, 1) - ends == 0) & (jnp.arange(T) < state.left[:, None])
    new = jnp.where(going & draft.agreed(tokens, chosen), chosen, -1)
    n = (new >= 0).sum(1)
    path = jnp.concatenate([state.before[:, None], tokens[:, :1], chosen], 1)
    before, token = jnp.take_along_axis(path, n[:, None] + jnp.arange(2), 1).T
    left = jnp.where((ends & (new >= 0)).any(1), 0, state.left - n)
    if seen is not None:
        seen = seen.at[jnp.arange(B)[:, None], jnp.where(new >= 0, new, V)].set(True, mode="drop")
    return State(state.cache, state.table, before, token, state.position + n, left, state.keys, seen), new


@partial(jax.jit, static_argnames=("model", "draft_tokens"), donate_argnames="state")
def decode(
    model: Decoder,
    params: Any,
    state: State,
    sampling: Sampling | Mixed,
    stops: Array,
    n: Array,
    least: Array,
    *,
    draft_tokens: int,
) -> tuple[State, Array]:
    """Up to n passes: the tokens that each row takes, [B, CHUNK * T] and -1 beyond them. It ends where fewer than `least` rows
    go on, and before a pass that the cache has no room for.
    """
    B, T = state.token.size, 1 + draft_tokens
    S = state.cache[0].v.shape[3]
    ones = jnp.ones((B, T), jnp.int32)

    def more(carry: tuple[Array, State, Array, Array]) -> Array:
        i, state, _, _ = carry
        room = jnp.where(state.left > 0, state.position + jnp.minimum(state.left, T), 0).max() <= S
        return (i < n) & ((state.left > 0).sum() >= least) & room

    def step(carry: tuple[Array, State, Array, Array]) -> tuple[Array, State, Array, Array]:
        i, state, made, out = carry
        tokens = state.token[:, None]
        if state.table is not None:
            tokens = draft.guess(state.table, state.before, state.token, draft_tokens)
        positions = state.position[:, None] + jnp.arange(T)
        arrays = tokens, ones, positions, apart.join(state.cache)
        hidden, cache = _forward(model, apart.put_together(params), *arrays, positions + 1)
        state = state._replace(cache=apart.split(_placed(cache), len(state.cache)))
        after, new = _take(model, params, state, hidden, tokens, sampling, stops)
        taken = after.position - state.position
        if state.table is not None:
            said = jnp.concatenate([state.before[:, None], state.token[:, None], new], 1)
            after = after._replace(table=draft.learn(state.table, said, jnp.where(taken > 0, taken + 2, 0)))
        out = out.at[jnp.arange(B)[:, None], made[:, None] + jnp.arange(T)].set(new)
        return i + 1, after, made + taken, out

    made, out = jnp.zeros(B, jnp.int32), jnp.full((B, CHUNK * T), -1, jnp.int32)
    _, state, _, out = jax.lax.while_loop(more, step, (jnp.int32(0), state, made, out))
    return state, out


@partial(jax.jit, static_argnames="length")
def resized(state: State, length: int) -> State:
    def resized(x: Array, axis: int) -> Array:
        more = length - x.shape[axis]
        if more <= 0:
            return jax.lax.slice_in_dim(x, 0, length, axis=axis)
        room = jnp.zeros((*x.shape[:axis], more, *x.shape[axis + 1 :]), x.dtype)
        # or the compiler makes it a padding, which a CPU does element by element
        return jnp.concatenate([x, jax.lax.optimization_barrier(room)], axis)

    return state._replace(cache=[_placed(Cache(resized(k, 4), resized(v, 3))) for k, v in state.cache])


@jax.jit
def reseated(state: State, slots: Array) -> State:
    """Row i is that of slots[i], or empty where there is no such slot."""

    def taken(x: Array, axis: int = 0) -> Array:
        return jnp.take(x, slots, axis, mode="fill", fill_value=0)

    cache = [_placed(Cache(taken(k, 1), taken(v, 1))) for k, v in state.cache]
    return State(cache, state.table, *jax.tree.map(taken, state[2:]))
