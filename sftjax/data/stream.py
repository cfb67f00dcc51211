"""Stream: batch(step), a pure function of the step number. The whole state of the data is that number.

The bins of epoch 0, 1, 2, ... stand in one line; step s takes bins s*B to (s+1)*B of it. So an epoch's last batch is
completed from the next epoch and no row is left out; only the run's very last batch may have empty rows.

All batches have one shape, the least multiple of 128 that holds the fullest bin, at most max_length.
"""

from __future__ import annotations

import math
import queue
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax.config import UserError
from sftjax.data.batch import Batch, Referred
from sftjax.data.formats import counted
from sftjax.data.pack import Piece, Plan, assemble
from sftjax.data.rows import Rows

WHOLE = 128  # rows' lengths are its multiples


FEW = 50  # steps, in which a model learns little


class Stream:
    """The training batches of `rows` under config.data, config.train and config.seed.

    steps_total  steps of the run: config.train.steps, else what config.train.epochs needs
    length       T of every batch
    bins         rows of T that the first epoch makes (every epoch, unless a source has a fractional weight)
    fullness     the share of their positions that hold a token

    With several hosts each gives its own rows of the global batch, `mine` by number; None is all.
    """

    def __init__(self, rows: Rows, config: ConfigDict, *, mine: Sequence[int] | None = None):
        self.rows, self.seed = rows, config.seed
        self.max_length, self.packing = config.data.max_length, config.data.packing
        self.batch_size = config.train.batch_size
        self.mine = range(self.batch_size) if mine is None else mine
        self.plans: OrderedDict[int, Plan] = OrderedDict()
        self.lock = threading.RLock()  # prefetch plans in its thread while the loop asks for the epoch
        self.begins = [0]  # the first bin of epoch 0, 1, ... as far as known
        first = self.plan(0)
        self.bins = len(first)
        self.length = static_length(rows, first, self.max_length, self.packing)
        self.fullness = float(first.sizes().sum() / max(self.bins * self.length, 1))
        self.end = None if config.train.steps else self.begin_of(config.train.epochs)
        self.steps_total = config.train.steps or math.ceil(self.end / self.batch_size)  # type: ignore[operator]
        if not self.steps_total:
            raise UserError(
                f"train.epochs={config.train.epochs} of {counted(len(rows))} makes no step; use more epochs or set train.steps"
            )

    @property
    def few(self) -> str | None:
        """What to say where packing leaves few steps, of which somebody used to a row an example may have expected many."""
        examples = len(self.rows) / self.bins
        if self.end is None or self.steps_total >= FEW or examples < 2:
            return None
        return (
            f"only {self.steps_total} steps: {examples:,.0f} examples share a row of {self.length:,} tokens, and a step has "
            f"{self.batch_size} rows; --config.train.batch_size=1 or more --config.train.epochs makes more of them"
        )

    def epoch(self, step: int) -> float:
        """How many epochs `step` steps have seen."""
        epoch, i = self.locate(step * self.batch_size)
        return epoch + i / self.count(epoch)

    def batch(self, step: int) -> Batch:
        """Batch number `step` (from 0): numpy, [rows of `mine`, length]."""
        return made(self.rows, [self.pieces(step * self.batch_size + b) for b in self.mine], self.length)

    def pieces(self, bin: int) -> list[Piece]:
        """What bin number `bin` of the line holds; nothing after the end of the run."""
        if self.end is not None and bin >= self.end:
            return []
        epoch, i = self.locate(bin)
        return self.plan(epoch)[i]

    def plan(self, epoch: int) -> Plan:
        """The bins of an epoch. The last two are kept: a batch spans two epochs at most, unless they are tiny."""
        with self.lock:
            if epoch not in self.plans:
                self.plans[epoch] = self.rows.plan(seed=self.seed, epoch=epoch, max_length=self.max_length, packing=self.packing)
                while len(self.plans) > 2:
                    self.plans.popitem(last=False)
            self.plans.move_to_end(epoch)
            return self.plans[epoch]

    def count(self, epoch: int) -> int:
        return self.bins if self.rows.steady() else len(self.plan(epoch))

    def locate(self, bin: int) -> tuple[int, int]:
        """(epoch, bin within it) of bin number `bin` of the line."""
        if self.rows.steady():
            return divmod(bin, self.bins)
        with self.lock:
            while self.begins[-1] <= bin:
                self.begins.append(self.begins[-1] + len(self.plan(len(self.begins) - 1)))
        epoch = bisect_right(self.begins, bin) - 1
        return epoch, bin - self.begins[epoch]

    def begin_of(self, epochs: float) -> int:
        """The first bin after `epochs` epochs; a part of an epoch is rounded up to whole bins."""
        whole = int(epochs)
        counts = [self.count(e) for e in range(whole + (epochs > whole))]
        rest = math.ceil((epochs - whole) * counts[-1] - 1e-9) if epochs > whole else 0
        return sum(counts[:whole]) + rest


def static_length(rows: Rows, first: Plan, max_length: int, packing: bool) -> int:
    """T: the least multiple of 128 that holds the fullest bin of any epoch, at most max_length."""
    if rows.steady():
        fullest = int(first.sizes().max(initial=1))  # other epochs have bins of the same sizes
    else:
        fullest = max_length if packing else int(rows.lengths.max())
    return min(max_length, -(-fullest // WHOLE) * WHOLE)


def made(rows: Rows, bins: list[list[Piece]], length: int) -> Any:
    """A Batch of a row for each bin; a Referred where the rows have a reference."""
    batch = assemble([cut(rows, pieces) for pieces in bins], length)
    if rows.reference is None:
        return batch
    reference = np.zeros(batch.tokens.shape, np.float32)
    for row, pieces in zip(reference, bins):
        for at, (i, _, _) in zip(np.cumsum([0, *(rows.lengths[i] for i, _, _ in pieces)]), pieces):
            row[at : at + rows.lengths[i]] = rows.referred(i)
    return Referred(*batch, reference)


def cut(rows: Rows, pieces: list[Piece]) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """The segments of a bin: (ids, weights, number)."""
    out = []
    for n, (row, start, stop) in enumerate(pieces):
        for ids, weights, slot in rows.parts(row):
            out.append((ids[start:stop], weights[start:stop], n * rows.slots + slot))
    return out


def eval_batches(rows: Rows, batch_size: int, max_length: int, mine: Sequence[int] | None = None) -> Iterator[Batch]:
    """Every row exactly once, packed, in batches of one shape; the last one padded with empty rows. `mine` as in Stream."""
    mine = range(batch_size) if mine is None else mine
    bins = rows.plan(seed=0, epoch=0, max_length=max_length, packing=True)
    length = static_length(rows, bins, max_length, packing=True)
    for at in range(0, len(bins), batch_size):
        yield made(rows, [bins[at + i] if at + i < len(bins) else [] for i in mine], length)


def prefetch(batch: Callable[[int], Any], start: int, stop: int, depth: int = 2) -> Iterator[tuple[int, Any]]:
    """(step, batch(step)) for steps start..stop-1, assembled in a thread that stays `depth` ahead."""
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(item) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in range(start, stop):
                if closed.is_set():
                    return
                put((step, batch(step)))
            put(None)
        except Exception as e:  # handed to whoever is waiting for the batch
            put(e)

    threading.Thread(target=work, daemon=True, name="prefetch").start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        closed.set()
