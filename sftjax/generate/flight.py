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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sftjax import hosts, sharding
from sftjax.generate import passes
from sftjax.generate.passes import CHUNK, State
from sftjax.generate.sampling import GREEDY, Mixed, Sampling, mixed
from sftjax.generate.shapes import power
from sftjax.models.decoder import Decoder

PREFILL = 2048  # prompt tokens at a time over all rows: bounds the scores [R, N, C, P]
AHEAD = 256  # positions that a new cache has for answers; CHUNK on a CPU where a layer's would take more than NEAR
NEAR = 2**20  # bytes in a core's own cache, beyond which what is empty costs more to read than the cache to grow


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
        self.state = None if state is None else passes.reseated(state, from_)
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
            self.state = passes.vacant(self.decoding[0], self.B, size, penalised, bool(self.draft_tokens))
        elif size > self.length:
            self.state = passes.resized(self.state, size)

        cache, last = passes.empty(self.model, R, P)
        for start in range(0, int(lengths.max()), C):
            cache, last = passes.prefill(self.model, self.params, cache, last, tokens[:, start : start + C], lengths, start)
        seen = _seen(tokens, lengths, config.vocab) if penalised else None
        self.state, first = passes.enter(
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
                self.state = passes.resized(self.state, max(needed, room))
            least = len(busy) - self.R + 1 if waiting else 1
            bounds = np.int32(n), np.int32(max(1, least))
            self.state, made = passes.decode(
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


def _seen(tokens: np.ndarray, lengths: np.ndarray, vocab: int) -> np.ndarray:
    seen = np.zeros((len(tokens), vocab), bool)
    for row, (ids, length) in enumerate(zip(tokens, lengths)):
        seen[row, ids[:length]] = True
    return seen


def batch_shards() -> int:
    mesh = sharding.mesh_in_use()
    return 1 if mesh is None else sharding.batch_shards(mesh)
