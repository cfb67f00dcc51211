"""Engine: prompts in, answers out, whatever their number and lengths; and how likely given answers are.

generate, each, stream    slots that decode together, refilled as answers end   flight.py
score                     one forward pass over given answers                   score.py
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from sftjax import tree
from sftjax.config import UserError
from sftjax.generate.apart import take_apart
from sftjax.generate.flight import CHUNK, Flight, Row, batch_shards
from sftjax.generate.sampling import GREEDY, Sampling, choose
from sftjax.generate.score import Scored, score_batch
from sftjax.generate.text import Writer
from sftjax.models.decoder import Decoder
from sftjax.weights import kinds
from sftjax.weights.lora import still

WINDOW = 16  # batches of prompts that are sorted by length together
LOOK = 0.02  # seconds between two tokens' coming that a reader of a stream does not see


@dataclass(frozen=True)
class Generated:
    """One answer: its tokens without the one that ended it; `stopped` is False where max_new_tokens cut it off.

    `stop_id` is the token that ended it, None where none did.

    `text` is set where a tokenizer was given; a stop string is in neither.
    """

    ids: list[int]
    stopped: bool
    text: str = ""
    stop_id: int | None = None


class Engine:
    """Generates with one model. Engines of equal `model` share compiled programs, whatever their parameters' values.

    What a kernel's kind costs at every token, and what is held besides `params`, which are shared where they need no cast:

        LowRank, Dora over an array    float32: merged into one kernel, which is a copy; else applied beside it, as an update
                                       would be lost in a bfloat16 kernel's rounding; Dora's norms are taken once
        LowRank, Dora over Nf4, Int8   applied; the kernel stays in few bits
        Adapter                        applied: it is no matrix

    With `share` nothing is merged in float32 either: for short generation between training steps.
    On a CPU decoding has its own copy of the layers (apart.py), made with the first answer.
    """

    def __init__(self, model: Decoder, params: Any, *, stop_ids: Sequence[int] = (), share: bool = False):
        self.model = model.clone(remat="none")
        self.params = _in_compute_dtype(params, model.dtype, merge=not share)
        self.stop_ids = frozenset(int(i) for i in stop_ids)
        self.limit = model.config.reach

    @cached_property
    def decoding(self) -> tuple[Decoder, Any]:
        """The model and its parameters, as decoding takes them."""
        return take_apart(self.model, self.params)

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
        draft_tokens: int = 0,
        done: Container[int] = (),
        **sampling: Any,
    ) -> Iterator[tuple[int, Generated]]:
        """(row, answer) as answers are done, but for rows that are `done` already. `sampling` is what `sampling.choose` takes;
        greedy by default.

        `batch_size` rows go on together; the next prompt takes the place of an answer that ends. Prompts of like length
        start together, within WINDOW batches that follow each other in order. `draft_tokens` are guessed and checked in one
        pass with a row's newest: the same answers but for rounding, in fewer passes where text repeats itself. Raises
        UserError, when it is called, for a prompt that is empty or leaves no room within the model's positions, for a
        `seed` outside 0..2**32-1 and `draft_tokens` outside 0..CHUNK.
        """
        if stop_strings and tokenizer is None:
            raise UserError("stop strings need a tokenizer to be found with")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: needs at least 1")
        self.check(prompts, max_new_tokens, seed)
        flight = self.flight(min(batch_size, len(prompts)), choose(**sampling), draft_tokens)
        waiting: deque[int] = deque()
        for start in range(0, len(prompts), WINDOW * batch_size):
            window = range(start, min(start + WINDOW * batch_size, len(prompts)))
            waiting += sorted((i for i in window if i not in done), key=lambda i: len(prompts[i]))

        def writer(row: int) -> Writer | None:
            return Writer(tokenizer, stop_strings, prompts[row]) if tokenizer else None

        def row(i: int) -> Row:
            return self.row(prompts[i], max_new_tokens, i, seed)

        return self._answers(flight, waiting, row, writer)

    def _answers(
        self, flight: Flight, waiting: deque[int], row_of: Callable[[int], Row], writer: Callable[[int], Writer | None]
    ) -> Iterator[tuple[int, Generated]]:
        under_way: dict[int, Answer] = {}  # by slot
        while waiting or under_way:
            rows = [waiting.popleft() for _ in range(min(len(waiting), len(flight.free)))]
            for slot, row in zip(flight.join([row_of(i) for i in rows]), rows):
                under_way[slot] = Answer(row, writer(row))
            for slot, tokens in flight.next(CHUNK, waiting=bool(waiting)).items():
                answer = under_way[slot]
                if answer.add(tokens, self.stop_ids):
                    flight.end([slot])
                if slot in flight.free:
                    yield answer.row, under_way.pop(slot).generated()

    def stream(
        self, prompt: Sequence[int], *, max_new_tokens: int, seed: int = 0, draft_tokens: int = 0, **sampling: Any
    ) -> Iterator[int]:
        """The answer's tokens as they come, without the one that ends it. As row 0 of `generate`."""
        self.check([prompt], max_new_tokens, seed)
        flight = self.flight(1, choose(**sampling), draft_tokens)
        flight.join([self.row(prompt, max_new_tokens, 0, seed)])
        n = 0  # prefill makes the first
        while not flight.free:
            began = time.perf_counter()
            for token in flight.next(n)[0]:
                if token in self.stop_ids:
                    return
                yield token
            n = chunk(n, time.perf_counter() - began)

    def row(self, prompt: Sequence[int], max_new_tokens: int, number: int, seed: int, sampling: Sampling = GREEDY) -> Row:
        """A prompt as a flight of this engine's takes it."""
        return Row([*prompt], min(len(prompt) + max_new_tokens, self.limit), number, seed, sampling)

    def flight(self, slots: int, sampling: Sampling | None, draft_tokens: int) -> Flight:
        """As Flight; raises UserError for `draft_tokens` outside 0..CHUNK."""
        if not 0 <= draft_tokens <= CHUNK:
            raise UserError(f"draft_tokens={draft_tokens}: needs a whole number from 0 (none) to {CHUNK}")
        return Flight(
            self.model,
            self.params,
            self.decoding,
            slots=slots,
            stops=self.stop_ids,
            sampling=sampling,
            draft_tokens=draft_tokens,
        )

    def score(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, batch_size: int = 32, top: int = 0
    ) -> list[Scored]:
        """How likely the model finds each token of each continuation of its prompt, and the `top` likeliest in its place, in
        order. One forward pass a row.

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
            out |= zip(rows, score_batch(self.model, self.params, *these, shards=batch_shards(), top=top))
        return [out[i] for i in range(len(prompts))]

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt leaves room for at least one token."""
        return 0 < len(prompt) < self.limit

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> None:
        """Raises UserError for what no answer can be made to."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}: needs at least 1")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed}: needs a whole number from 0 to {2**32 - 1}")
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


class Answer:
    """One row's answer as it comes."""

    def __init__(self, row: int, writer: Writer | None):
        self.row, self.writer = row, writer
        self.ids: list[int] = []
        self.stopped = False
        self.stop_id: int | None = None

    def add(self, new: list[int], stop_ids: frozenset[int]) -> bool:
        """Takes further tokens; True where they end it at a stop token or a stop string."""
        if new and new[-1] in stop_ids:
            self.stopped, self.stop_id = True, new[-1]
            new = new[:-1]
        self.ids += new
        if self.writer and new and self.writer.stop_strings:
            self.writer.add(new)
            if self.writer.stopped:
                self.stopped, self.ids, self.stop_id = True, self.writer.ids, None
        return self.stopped

    def generated(self) -> Generated:
        if self.writer and not self.writer.stop_strings:
            self.writer.add(self.ids)
        return Generated(self.ids, self.stopped, self.writer.text if self.writer else "", self.stop_id)


def chunk(n: int, took: float) -> int:
    """How many passes to make before the next look, after n that took so many seconds."""
    return min(max(1, 2 * n), CHUNK) if took < LOOK else max(1, n // 2)


def _in_compute_dtype(params: Any, dtype: Any, merge: bool = True) -> Any:
    """What decoding reads at every token, cast once; DoRA's norms are taken once. What needs no cast is shared, not copied.

    In float32 what merges is merged: exact, and some products fewer. What is quantised stays so, with what is around it.
    """
    leaves = tree.flatten(still(params))
    if merge and dtype == jnp.float32:
        leaves |= _merged({path: w for path, w in leaves.items() if isinstance(w, kinds.Kind) and kinds.merges(w)})
    ready = tree.unflatten(leaves)
    # a program copies what it only hands through: it gets just the arrays that it changes
    changes = jax.tree.map(lambda x, y: x.dtype != y.dtype, ready, jax.eval_shape(partial(kinds.cast, dtype=dtype), ready))
    chosen, rest = tree.split(ready, changes)
    return tree.join(_cast(chosen, dtype=dtype), rest)


_cast = jax.jit(kinds.cast, static_argnames="dtype")
_merged = jax.jit(partial(jax.tree.map, partial(kinds.dense, dtype=jnp.float32), is_leaf=lambda w: isinstance(w, kinds.Kind)))
