"""Flight: slots that decode together; where an answer ends, the next prompt takes its slot and the others go on.

    join    right-padded prompts, R at a time, a block of columns at a time   [R, C] -> cache of P -> free rows of [B, S]
    next    one compiled while_loop of up to CHUNK passes; the host looks in between (stop strings, streaming, free slots)

A pass through the model takes the newest token of each row and `draft_tokens` guesses of what follows it, which draft.py makes.
B, R, C, P and S are powers of two and the cache doubles when it is full, so that few programs serve all requests. What a
slot held before needs no clearing: a cache holds position s at s, and a token sees no position beyond its own. A row's
random numbers come from (seed, number, position), whatever stands beside it. Where longrope turns the keys of a row that grows
beyond the trained length otherwise than before, the row joins its slot again there, with what it has made for its prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sftjax import hosts, sharding
from sftjax.generate import apart, draft
from sftjax.generate.sampling import GREEDY, Mixed, Sampling, mixed, next_token
from sftjax.generate.shapes import power
from sftjax.models.decoder import Cache, Decoder, head, init_cache
from sftjax.weights import kinds

CHUNK = 32  # passes between two looks of the host
PREFILL = 2048  # prompt tokens at a time over all rows: bounds the scores [R, N, C, P]
AHEAD = 256  # positions that a new cache has for answers; CHUNK on a CPU where a layer's would take more than NEAR
NEAR = 2**20  # bytes in a core's own cache, beyond which what is empty costs more to read than the cache to grow


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


class Row(NamedTuple):
    """A prompt, or a prompt with what it has made so far, and how it goes on."""

    ids: list[int]
    end: int  # position that no token of the row gets
    number: int = 0  # with the seed, what its random numbers come from
    seed: int = 0
    sampling: Sampling = GREEDY  # where rows have each their own


class Flight:
    """`slots` rows on their way at most, which choose their tokens by `sampling`, or each by its own where that is None."""

    def __init__(
        self,
        model: Decoder,
        params: Any,
        decoding: tuple[Decoder, Any],
        *,
        slots: int,
        stops: Iterable[int],
        sampling: Sampling | None,
        draft_tokens: int,
    ):
        self.model, self.params, self.sampling = model, params, sampling
        self.decoding, self.draft_tokens = decoding, draft_tokens
        self.stops = np.asarray(sorted(stops), np.int32)
        ropes = {model.config.rope, *model.config.ropes}
        self.turns = sorted({r.original_max_positions + 1 for r in ropes if r and r.kind == "longrope"})
        self.state: State | None = None
        self.rows: dict[int, Row] = {}  # by slot, as they joined it
        self.fresh: list[tuple[list[int], Array]] = []  # slots, and the first tokens that prefill made for them
        self.over: list[int] = []  # slots of rows that have come to a turn
        self._size(slots)

    def _size(self, slots: int) -> None:
        self.B = power(slots, least=batch_shards())
        self.R = max(batch_shards(), self.B // 8)
        self.free = list(range(slots))[::-1]
        self.position = np.zeros(self.B, int)  # of each slot's newest token
        self.end_position = np.zeros(self.B, int)  # no token of its row gets so far

    def join(self, rows: Sequence[Row]) -> list[int]:
        """The slots that these rows, no more than are free, take from now on."""
        slots = [self.free.pop() for _ in rows]
        self._join(slots, [row._replace(ids=[*row.ids]) for row in rows])
        return slots

    def reseat(self, slots: int) -> dict[int, int]:
        """Makes it so many slots, no fewer than are busy: {slot: where its row is now}."""
        busy, state = np.flatnonzero(self.end_position).tolist(), self.state
        moved = {slot: i for i, slot in enumerate(busy)}
        position, end_position = self.position[busy], self.end_position[busy]
        from_ = np.full(power(slots, least=batch_shards()), self.B)  # out of range where a slot is empty
        from_[: len(busy)] = busy
        self._size(slots)
        self.free = [slot for slot in self.free if slot >= len(busy)]
        self.position[: len(busy)], self.end_position[: len(busy)] = position, end_position
        self.rows = {moved[slot]: row for slot, row in self.rows.items()}
        self.over = [moved[slot] for slot in self.over]
        self.state = None if state is None else _reseated(state, from_)
        return moved

    def _join(self, slots: list[int], rows: Sequence[Row]) -> None:
        for i in range(0, len(slots), self.R):
            self._join_group(slots[i : i + self.R], rows[i : i + self.R])

    def _join_group(self, slots: list[int], rows: Sequence[Row]) -> None:
        n, R, config = len(slots), self.R, self.model.config
        lengths = np.ones(R, np.int32)
        lengths[:n] = [len(row.ids) for row in rows]
        ends = [next((t for t in self.turns if len(row.ids) < t < row.end), row.end) for row in rows]
        self.rows |= zip(slots, rows)
        left, numbers, into = np.zeros((3, R), np.int32)  # rows that only fill the group have ended before they start
        seeds = np.zeros(R, np.uint32)
        left[:n] = ends - lengths[:n]
        numbers[:n], seeds[:n] = [row.number for row in rows], [row.seed for row in rows]
        into[:n], into[n:] = slots, self.B  # and go nowhere
        self.position[slots], self.end_position[slots] = lengths[:n], ends

        P = power(int(lengths.max()), least=32)
        C = min(P, max(32, 1 << (PREFILL // R).bit_length() - 1))
        tokens = np.zeros((R, P), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row.ids)] = row.ids
        penalised = self.sampling is None or self.sampling.repetition_penalty is not None
        size = max(P, self._room(self._ahead()))
        if self.state is None:
            self.state = _vacant(self.decoding[0], self.B, size, penalised, bool(self.draft_tokens))
        elif size > self.length:
            self.state = _resized(self.state, size)

        cache, last = _empty(self.model, R, P)
        for start in range(0, int(lengths.max()), C):
            cache, last = _prefill(self.model, self.params, cache, last, tokens[:, start : start + C], lengths, start)
        seen = _seen(tokens, lengths, config.vocab) if penalised else None
        self.state, first = _enter(
            self.model,
            self.params,
            self.state,
            cache,
            last,
            tokens,
            into,
            lengths,
            left,
            numbers,
            seeds,
            seen,
            self._sampling([*slots, *[-1] * (R - n)]),
            self.stops,
        )
        self.fresh.append((slots, first))

    def _sampling(self, slots: Iterable[int]) -> Sampling | Mixed:
        if self.sampling is not None:
            return self.sampling
        rows = [self.rows.get(slot) for slot in slots]
        return mixed([row.sampling if row else GREEDY for row in rows], self.model.config.vocab)

    def _ahead(self) -> int:
        c = self.model.config
        layer = 2 * self.B * c.kv_heads * AHEAD * c.head_dim * jnp.dtype(self.model.dtype).itemsize
        return CHUNK if jax.default_backend() == "cpu" and layer > NEAR else AHEAD

    def _room(self, ahead: int) -> int:
        """Slots of a cache that holds so many positions more of every row under way."""
        return power(int(np.minimum(self.position + ahead, self.end_position).max()), least=64)

    @property
    def length(self) -> int:
        assert self.state is not None
        return self.state.cache[0].v.shape[3]

    def next(self, n: int = CHUNK, *, waiting: bool = False) -> dict[int, list[int]]:
        """The new tokens of each busy slot after up to n passes. A slot whose row has ended is returned once more and is then
        free.

        A row that has just joined brings the token that prefill made besides. `waiting`: come back as soon as R slots are free.
        """
        over, self.over = self.over, []
        self._join(over, [self.rows[slot] for slot in over])
        new: dict[int, list[int]] = {}
        fresh, self.fresh = self.fresh, []
        busy = np.flatnonzero(self.end_position)
        assert self.state is not None
        made = None
        if n:
            n = min(n, CHUNK)
            needed, room = self._room(1 + self.draft_tokens), self._room(self._ahead())
            if needed > self.length or 4 * room <= self.length:  # full; or a long row has gone, and nobody reads what it had
                self.state = _resized(self.state, max(needed, room))
            least = len(busy) - self.R + 1 if waiting else 1
            bounds = np.int32(n), np.int32(max(1, least))
            self.state, made = _decode(
                *self.decoding, self.state, self._sampling(range(self.B)), self.stops, *bounds, draft_tokens=self.draft_tokens
            )
        firsts, made, left = hosts.fetch(([f for _, f in fresh], made, self.state.left))
        for (slots, _), first in zip(fresh, firsts):
            new |= {slot: [int(token)] for slot, token in zip(slots, first)}
        for slot in busy.tolist():
            tokens = [] if made is None else made[slot][made[slot] >= 0].tolist()
            self.position[slot] += len(tokens)
            new.setdefault(slot, []).extend(tokens)
        for slot, tokens in new.items():
            self.rows[slot].ids.extend(tokens)
        ended = [slot for slot in new if not left[slot]]
        turning = [slot for slot in ended if self.end_position[slot] < self.rows[slot].end]
        self.over = [slot for slot in turning if self.rows[slot].ids[-1] not in self.stops]
        self._leave([slot for slot in ended if slot not in self.over])
        return new

    def end(self, slots: Sequence[int]) -> None:
        """Ends the rows of these slots here, where they have not ended."""
        going = [slot for slot in slots if slot not in self.free]
        if going:
            assert self.state is not None
            self.state = self.state._replace(left=self.state.left.at[np.asarray(going)].set(0))
            self._leave(going)

    def _leave(self, slots: Sequence[int]) -> None:
        self.free += slots
        self.position[slots] = self.end_position[slots] = 0
        for slot in slots:
            del self.rows[slot]
        self.over = [slot for slot in self.over if slot not in slots]


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
def _empty(model: Decoder, B: int, S: int) -> tuple[Cache, Array]:
    return _placed(init_cache(model.config, B, S, model.dtype)), jnp.zeros((B, model.config.width), model.dtype)


@partial(jax.jit, static_argnames=("model", "B", "S", "penalised", "guessed"))
def _vacant(model: Decoder, B: int, S: int, penalised: bool, guessed: bool) -> State:
    before, token, position, left = jnp.zeros((4, B), jnp.int32)
    seen = jnp.zeros((B, model.config.vocab), bool) if penalised else None
    whole = _placed(init_cache(model.config, B, S, model.dtype))
    cache = apart.split(whole, 1 if model.scan else model.config.layers)
    table = draft.empty(model.config.vocab) if guessed else None
    return State(cache, table, before, token, position, left, jnp.zeros((B, 2), jnp.uint32), seen)


@partial(jax.jit, static_argnames="model", donate_argnames=("cache", "last"))
def _prefill(
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
def _enter(
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
def _decode(
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
def _resized(state: State, length: int) -> State:
    def resized(x: Array, axis: int) -> Array:
        more = length - x.shape[axis]
        if more <= 0:
            return jax.lax.slice_in_dim(x, 0, length, axis=axis)
        room = jnp.zeros((*x.shape[:axis], more, *x.shape[axis + 1 :]), x.dtype)
        # or the compiler makes it a padding, which a CPU does element by element
        return jnp.concatenate([x, jax.lax.optimization_barrier(room)], axis)

    return state._replace(cache=[_placed(Cache(resized(k, 4), resized(v, 3))) for k, v in state.cache])


@jax.jit
def _reseated(state: State, slots: Array) -> State:
    """Row i is that of slots[i], or empty where there is no such slot."""

    def taken(x: Array, axis: int = 0) -> Array:
        return jnp.take(x, slots, axis, mode="fill", fill_value=0)

    cache = [_placed(Cache(taken(k, 1), taken(v, 1))) for k, v in state.cache]
    return State(cache, state.table, *jax.tree.map(taken, state[2:]))


def _seen(tokens: np.ndarray, lengths: np.ndarray, vocab: int) -> np.ndarray:
    seen = np.zeros((len(tokens), vocab), bool)
    for row, (ids, length) in enumerate(zip(tokens, lengths)):
        seen[row, ids[:length]] = True
    return seen


def batch_shards() -> int:
    mesh = sharding.mesh_in_use()
    return 1 if mesh is None else sharding.batch_shards(mesh)
