"""Engine: prompts in, answers out, through a static KV cache.

    prefill   right-padded prompts, a block of columns at a time      [B, C] -> cache of S slots
    decode    one compiled while_loop of up to CHUNK tokens; the host looks in between (stop strings, streaming)

B, C and S are powers of two and the cache doubles when it is full, so that few programs serve all requests. A row's
random numbers come from (seed, row, position), however rows are batched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sftjax import sharding, tree
from sftjax.config import UserError
from sftjax.generate.sampling import Sampling, choose, next_token
from sftjax.generate.score import Scored, score_batch
from sftjax.generate.shapes import power
from sftjax.generate.text import Writer
from sftjax.models.config import DecoderConfig
from sftjax.models.decoder import Cache, Decoder, head, init_cache
from sftjax.weights import kinds
from sftjax.weights.lora import still

CHUNK = 32  # tokens a row between two looks of the host
PREFILL = 2048  # prompt tokens at a time over all rows: bounds the scores [B, N, C, S]
WINDOW = 16  # batches of prompts that are sorted by length together
AHEAD = 256  # room for the answer that a new cache has


@dataclass(frozen=True)
class Generated:
    """One answer: its tokens without the one that ended it; `stopped` is False where max_new_tokens cut it off.

    `text` is set where a tokenizer was given; a stop string is in neither.
    """

    ids: list[int]
    stopped: bool
    text: str = ""


class State(NamedTuple):
    """A batch in flight, all [B] but the cache."""

    cache: Cache
    token: Array  # the newest, not yet in the cache
    position: Array  # that it will have
    left: Array  # how many more the row may make; 0 = ended
    keys: Array
    seen: Array | None  # [B, V]: tokens of prompt and answer, where repetition is penalised


class Engine:
    """Generates with one model. Engines of equal `model` share compiled programs, whatever their parameters."""

    def __init__(self, model: Decoder, params: Any, *, stop_ids: Sequence[int] = ()):
        self.model = model.clone(remat="none")
        self.params = _in_compute_dtype(params, model.dtype)
        self.stop_ids = frozenset(int(i) for i in stop_ids)
        self.limit = max_length(model.config)

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **options: Any) -> list[Generated]:
        """An answer for each prompt, in order; `options` as in `each`."""
        out = dict(self.each(prompts, max_new_tokens=max_new_tokens, **options))
        return [out[i] for i in range(len(prompts))]

    def each(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_strings: Sequence[str] = (),
        tokenizer: Any = None,
        seed: int = 0,
        batch_size: int = 32,
        **sampling: Any,
    ) -> Iterator[tuple[int, Generated]]:
        """(row, answer) as batches are done. `sampling` is what `sampling.choose` takes; greedy by default.

        Rows of like length go together, within WINDOW batches that follow each other in order. Raises UserError, before
        the first answer, for a prompt that is empty or leaves no room within the model's positions.
        """
        if stop_strings and tokenizer is None:
            raise UserError("stop strings need a tokenizer to be found with")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: needs at least 1")
        self.check(prompts, max_new_tokens)
        chosen = choose(**sampling)
        for start in range(0, len(prompts), WINDOW * batch_size):
            window = range(start, min(start + WINDOW * batch_size, len(prompts)))
            order = sorted(window, key=lambda i: len(prompts[i]))
            for batch in np.array_split(order, -(-len(order) // batch_size)):  # even sizes share a program
                rows = batch.tolist()
                flight = Flight(self, [prompts[i] for i in rows], rows, max_new_tokens, chosen, seed)
                writers = [Writer(tokenizer, stop_strings, prompts[i]) if tokenizer else None for i in rows]
                yield from zip(rows, self._answers(flight, writers))

    def _answers(self, flight: Flight, writers: list[Writer | None]) -> list[Generated]:
        ids: list[list[int]] = [[] for _ in writers]
        ended = [False] * len(writers)
        while (columns := flight.next(CHUNK)) is not None:
            cut = []
            for row, (tokens, writer) in enumerate(zip(columns, writers)):
                new = [int(t) for t in tokens if t >= 0 and not ended[row]]
                if new and new[-1] in self.stop_ids:
                    ended[row] = True
                    new.pop()
                ids[row] += new
                if writer and new and writer.stop_strings:
                    writer.add(new)
                    if writer.stopped:
                        ended[row], ids[row] = True, writer.ids
                        cut.append(row)
            flight.end(cut)
        for writer, made in zip(writers, ids):
            if writer and not writer.stop_strings:
                writer.add(made)
        return [Generated(i, e, w.text if w else "") for i, e, w in zip(ids, ended, writers)]

    def stream(self, prompt: Sequence[int], *, max_new_tokens: int, seed: int = 0, **sampling: Any) -> Iterator[int]:
        """The answer's tokens as they come, without the one that ends it. As row 0 of `generate`."""
        self.check([prompt], max_new_tokens)
        flight = Flight(self, [prompt], [0], max_new_tokens, choose(**sampling), seed)
        while (columns := flight.next(1)) is not None:
            for token in columns[0]:
                if token in self.stop_ids:
                    return
                yield int(token)

    def score(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, batch_size: int = 32
    ) -> list[Scored]:
        """How likely the model finds each token of each continuation of its prompt, in order. One forward pass a row.

        Raises UserError, before the first, for an empty prompt and where prompt and continuation are together longer than
        the model's positions, of which the continuation's last token needs none.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: needs at least 1")
        if len(prompts) != len(continuations):
            raise UserError(f"{len(prompts)} prompts and {len(continuations)} continuations: each needs its other")
        for i, (prompt, continuation) in enumerate(zip(prompts, continuations)):
            if not prompt:
                raise UserError(f"prompt {i} is empty; a model needs at least one token to go on from")
            if (n := len(prompt) + len(continuation)) > self.limit + 1:
                raise UserError(
                    f"prompt {i} and its continuation have {n} tokens; the model takes {self.limit} and predicts one more"
                )
            self.know(i, (*prompt, *continuation))
        lengths = [len(p) + len(c) for p, c in zip(prompts, continuations)]
        order = sorted(range(len(prompts)), key=lengths.__getitem__, reverse=True)
        out: dict[int, Scored] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            these = [prompts[i] for i in rows], [continuations[i] for i in rows]
            out |= zip(rows, score_batch(self.model, self.params, *these, shards=_batch_shards()))
        return [out[i] for i in range(len(prompts))]

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt leaves room for at least one token."""
        return 0 < len(prompt) < self.limit

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}: needs at least 1")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {i} is empty; a model needs at least one token to go on from")
            if not self.fits(prompt):
                raise UserError(f"prompt {i} has {len(prompt)} tokens and leaves no room: the model takes {self.limit} in all")
            self.know(i, prompt)

    def know(self, i: int, ids: Sequence[int]) -> None:
        """Raises UserError for a token of prompt i that the model does not have."""
        if not 0 <= min(ids) <= max(ids) < self.model.config.vocab:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise UserError(f"prompt {i} has token {wrong}, but the model knows only {self.model.config.vocab}")


class Flight:
    """One batch on its way: prefilled when made, then `next(n)` tokens at a time."""

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], rows: Sequence[int], max_new: int, sampling: Sampling, seed: int
    ):
        self.model, self.params, self.sampling = engine.model, engine.params, sampling
        self.stops = np.asarray(sorted(engine.stop_ids), np.int32)
        self.n = len(prompts)
        B = power(self.n, least=_batch_shards())
        lengths = np.ones(B, np.int32)
        lengths[: self.n] = [len(p) for p in prompts]
        left = np.zeros(B, np.int32)  # rows that only fill the batch have ended before they start
        left[: self.n] = np.minimum(max_new, engine.limit - lengths[: self.n])
        longest = int(lengths.max())
        self.end_position = int((lengths + left).max())  # no row gets further
        self.position = longest  # the furthest of any row so far
        config = self.model.config
        C = min(power(longest, least=32), max(32, PREFILL // B))
        if config.rope.kind in ("dynamic", "longrope"):  # its angles depend on the whole prompt's length
            C = power(longest, least=32)
        tokens = np.zeros((B, -(-longest // C) * C), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        self.length = power(min(longest + AHEAD, self.end_position), least=max(64, C))
        ids = np.zeros(B, np.int32)
        ids[: self.n] = rows

        cache, last = _empty(self.model, B, self.length)
        for start in range(0, tokens.shape[1], C):
            cache, last = _prefill(self.model, self.params, cache, last, tokens[:, start : start + C], lengths, start)
        seen = _seen(tokens, lengths, config.vocab) if sampling.repetition_penalty is not None else None
        self.state = _first(self.model, self.params, cache, last, lengths, left, seed, ids, seen, sampling, self.stops)
        self.fresh: np.ndarray | None = np.asarray(self.state.token)[: self.n, None]

    def next(self, n: int) -> np.ndarray | None:
        """The next tokens [rows, up to n], -1 for rows that have ended; None when all have."""
        if self.fresh is not None:  # prefill made each row's first
            first, self.fresh = self.fresh, None
            return first
        if not np.asarray(self.state.left).any():
            return None
        n = min(n, CHUNK)
        self.position = min(self.position + n, self.end_position)
        if self.position > self.length:
            self.length *= 2
            self.state = _grow(self.state, self.length)
        self.state, out = _decode(self.model, self.params, self.state, self.sampling, self.stops, n)
        return np.asarray(out)[: self.n, :n]

    def end(self, rows: Sequence[int]) -> None:
        """Ends these rows here."""
        if rows:
            self.state = self.state._replace(left=self.state.left.at[np.asarray(rows)].set(0))


def _forward(model: Decoder, params: Any, tokens: Array, segments: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
    hidden, cache, _ = model.apply({"params": params}, tokens, segments, positions, cache)  # type: ignore[assignment, misc]
    return hidden, cache


@partial(jax.jit, static_argnames=("model", "B", "S"))
def _empty(model: Decoder, B: int, S: int) -> tuple[Cache, Array]:
    return init_cache(model.config, B, S, model.dtype), jnp.zeros((B, model.config.width), model.dtype)


@partial(jax.jit, static_argnames="model", donate_argnames=("cache", "last"))
def _prefill(
    model: Decoder, params: Any, cache: Cache, last: Array, tokens: Array, lengths: Array, start: Array
) -> tuple[Cache, Array]:
    """Columns [B, C] of the prompts into the cache from position `start`; `last` [B, D] keeps the hidden of each last token."""
    B, C = tokens.shape
    positions = jnp.broadcast_to(start + jnp.arange(C), (B, C))
    real = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, cache = _forward(model, params, tokens, real, positions, cache)
    at = lengths - 1 - start
    mine = jnp.take_along_axis(hidden, jnp.clip(at, 0, C - 1)[:, None, None], 1)[:, 0]
    return cache, jnp.where(((at >= 0) & (at < C))[:, None], mine, last)


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _first(
    model: Decoder,
    params: Any,
    cache: Cache,
    last: Array,
    lengths: Array,
    left: Array,
    seed: Array,
    rows: Array,
    seen: Array | None,
    sampling: Sampling,
    stops: Array,
) -> State:
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(rows)
    state = State(cache, jnp.zeros_like(lengths), lengths - 1, left, keys, seen)
    return _take(model, params, state, last, sampling, stops)


def _take(model: Decoder, params: Any, state: State, hidden: Array, sampling: Sampling, stops: Array) -> State:
    """Chooses the next token of the rows under way from hidden [B, D]."""
    going = state.left > 0
    logits = kinds.matmul(hidden, head(params, model.config)).astype(jnp.float32)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.position)
    token = jnp.where(going, next_token(logits, sampling, keys, state.seen), -1)
    ended = jnp.isin(token, stops)
    seen = None if state.seen is None else state.seen | (jnp.arange(logits.shape[-1]) == token[:, None])
    left = jnp.where(ended, 0, jnp.maximum(state.left - 1, 0))
    return State(state.cache, token, state.position + going, left, state.keys, seen)


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def _decode(model: Decoder, params: Any, state: State, sampling: Sampling, stops: Array, n: Array) -> tuple[State, Array]:
    """Up to n further tokens of every row under way, [B, CHUNK]; -1 where there is none."""
    ones = jnp.ones_like(state.token)[:, None]

    def more(carry: tuple[Array, State, Array]) -> Array:
        i, state, _ = carry
        return (i < n) & (state.left > 0).any()

    def step(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        i, state, out = carry
        token = jnp.maximum(state.token, 0)[:, None]
        hidden, cache = _forward(model, params, token, ones, state.position[:, None], state.cache)
        state = _take(model, params, state._replace(cache=cache), hidden[:, 0], sampling, stops)
        return i + 1, state, jax.lax.dynamic_update_slice(out, state.token[:, None], (0, i))

    out = jnp.full((ones.shape[0], CHUNK), -1, jnp.int32)
    _, state, out = jax.lax.while_loop(more, step, (jnp.int32(0), state, out))
    return state, out


@partial(jax.jit, static_argnames="length")
def _grow(state: State, length: int) -> State:
    k, v = state.cache
    extra, same = (0, length - v.shape[3]), (0, 0)
    return state._replace(cache=Cache(jnp.pad(k, (same, same, same, same, extra)), jnp.pad(v, (same, same, same, extra, same))))


def max_length(c: DecoderConfig) -> int:
    """Tokens of prompt and answer that the model's positions reach, with what RoPE scaling adds."""
    if c.rope.kind == "default":
        return c.max_positions
    return max(c.max_positions, int((c.rope.original_max_positions or c.max_positions) * c.rope.factor))


def _in_compute_dtype(params: Any, dtype: Any) -> Any:
    """What decoding reads at every token, cast once; DoRA's norms are taken once. What needs no cast is shared, not copied.

    In float32 what merges is merged: exact, and some products fewer. What is quantised stays so, with what is around it.
    """
    leaves = tree.flatten(still(params))
    if dtype == jnp.float32:
        leaves |= _merged({path: w for path, w in leaves.items() if isinstance(w, kinds.Kind) and kinds.merges(w)})
    ready = tree.unflatten(leaves)
    # a program copies what it only hands through: it gets just the arrays that it changes
    changes = jax.tree.map(lambda x, y: x.dtype != y.dtype, ready, jax.eval_shape(partial(kinds.cast, dtype=dtype), ready))
    chosen, rest = tree.split(ready, changes)
    return tree.join(_cast(chosen, dtype=dtype), rest)


_cast = jax.jit(kinds.cast, static_argnames="dtype")
_merged = jax.jit(partial(jax.tree.map, partial(kinds.dense, dtype=jnp.float32), is_leaf=lambda w: isinstance(w, kinds.Kind)))


def _seen(tokens: np.ndarray, lengths: np.ndarray, vocab: int) -> np.ndarray:
    seen = np.zeros((len(tokens), vocab), bool)
    for row, (ids, length) in enumerate(zip(tokens, lengths)):
        seen[row, ids[:length]] = True
    return seen


def _batch_shards() -> int:
    mesh = sharding.mesh_in_use()
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
