"""Live: requests that come at any time go on together, each as it would alone; one thread drives them all."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from sftjax.config import UserError
from sftjax.generate.engine import Answer, Engine, Generated, chunk
from sftjax.generate.flight import Flight
from sftjax.generate.sampling import GREEDY, Sampling
from sftjax.generate.text import Writer

FEW = 4  # slots are a power of it where an empty one costs what a busy one does, on a CPU; each number is a program


@dataclass(eq=False)
class Request:
    """A prompt that wants an answer: the one that `Engine.generate` gives with these options to prompt `number`.

    The thread calls `tell` with tokens as they come, those that end the answer left out, then with the answer, or with what went
    wrong; of an answer that a stop string cuts, tokens may have come that are not in it.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    tell: Callable[[list[int] | Generated | Exception], object]
    number: int = 0
    seed: int = 0
    sampling: Sampling = GREEDY
    stop_strings: Sequence[str] = ()


class Live:
    """`slots` requests go on at a time; others wait for a place, in order."""

    def __init__(self, engine: Engine, tokenizer: Any, *, slots: int, draft_tokens: int = 0):
        if slots < 1:
            raise UserError(f"slots={slots}: needs at least 1")
        self.engine, self.tokenizer, self.slots, self.draft_tokens = engine, tokenizer, slots, draft_tokens
        self.flight: Flight = engine.flight(self._seats(1), None, draft_tokens)
        self.waiting: deque[Request] = deque()
        self.joining: list[Request] = []
        self.under_way: dict[int, tuple[Request, Answer]] = {}  # by slot
        self.dropped: set[Request] = set()
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def ask(self, requests: Sequence[Request]) -> None:
        """Answers them all, as places come free. Raises UserError for what no answer can be made to."""
        for request in requests:
            self.engine.check([request.prompt], request.max_new_tokens, request.seed)
        with self.changed:
            if self.closed:
                raise UserError("no more answers are made")
            self.waiting += requests
            self.changed.notify()

    def drop(self, requests: Sequence[Request]) -> None:
        """Nobody waits for these any more: what has not been answered is not, nor told."""
        with self.changed:
            self.dropped.update(requests)
            self.changed.notify()

    def end(self) -> None:
        """Whoever waits is told that there will be no answer, and no more are made. Returns at once."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def _run(self) -> None:
        n = 0
        while self._wait():
            try:
                n = self._next(n)
            except Exception as e:  # out of memory, say: those under way are told, who comes next may fare better
                self._tell_all(e)
                self._anew()
        with self.changed:
            self.joining += self.waiting
        self._tell_all(UserError("no more answers are made"))

    def _wait(self) -> bool:
        """Until there is something to do; False where there never will be."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.waiting or self.under_way)
            return not self.closed

    def _tell_all(self, e: Exception) -> None:
        for request in (*self.joining, *(request for request, _ in self.under_way.values())):
            request.tell(e)

    def _leave(self) -> None:
        """Lets go of those who no longer wait."""
        with self.changed:
            self.waiting = deque(request for request in self.waiting if request not in self.dropped)
            gone = [slot for slot, (request, _) in self.under_way.items() if request in self.dropped]
            self.dropped.clear()
        self.flight.end(gone)
        for slot in gone:
            del self.under_way[slot]
        if gone and not self.under_way:
            self._anew()

    def _anew(self) -> None:
        self.joining, self.under_way = [], {}
        self.flight = self.engine.flight(self._seats(1), None, self.draft_tokens)

    def _seats(self, busy: int) -> int:
        seats = 1 if jax.default_backend() == "cpu" else self.slots
        while seats < busy:
            seats *= FEW
        return min(seats, self.slots)

    def _next(self, n: int) -> int:
        """Lets in who waits and makes n passes: how many to make next."""
        self._leave()
        self._join()
        if not self.under_way:
            return 0
        began = time.perf_counter()
        new = self.flight.next(n, waiting=bool(self.waiting))
        took = time.perf_counter() - began
        for slot, tokens in new.items():
            request, answer = self.under_way[slot]
            if answer.add(tokens, self.engine.stop_ids):
                self.flight.end([slot])
            request.tell([token for token in tokens if token not in self.engine.stop_ids])
            if slot in self.flight.free:
                del self.under_way[slot]
                request.tell(answer.generated())
        if not self.under_way:
            self._anew()  # what a crowd needed is not held for the next one
        return chunk(n, took)

    def _join(self) -> None:
        with self.changed:
            self.joining = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.slots - len(self.under_way)))]
        seats, held = self._seats(len(self.under_way) + len(self.joining)), len(self.under_way) + len(self.flight.free)
        if seats != held:
            moved = self.flight.reseat(seats)
            self.under_way = {moved[slot]: under_way for slot, under_way in self.under_way.items()}
        rows = [self.engine.row(r.prompt, r.max_new_tokens, r.number, r.seed, r.sampling) for r in self.joining]
        for request, slot in zip(self.joining, self.flight.join(rows)):
            writer = Writer(self.tokenizer, request.stop_strings, request.prompt)
            self.under_way[slot] = request, Answer(request.number, writer)
        self.joining = []
