"""Rows: the kept rows of one split, a view over the stores that hold them. And which split a row belongs to.

Split by content: rows are ranked by a seeded hash of what they say, and the ranking is cut at the shares asked for. Equal
rows have equal hashes, so duplicates are never on both sides; the shares are exact over distinct rows.

Preferences are split by their prompts: a held-out pair whose prompt was trained on, with one of its answers even, would
tell what was learnt by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from sftjax.config import UserError
from sftjax.data.cache import Store
from sftjax.data.example import Example
from sftjax.data.pack import Plan, fill, permutation, plan

OTHER = 3  # the slot of a prompt with another row's answer, which KTO's baseline is made of


class Part(NamedTuple):
    """An answer with its prompt, or a whole row: one segment of a batch, the `slot`-th of the row's."""

    ids: np.ndarray
    weights: np.ndarray
    slot: int


@dataclass(frozen=True)
class Rows:
    """Row i is row `index[i]` of `stores[store[i]]`, its first `lengths[i]` tokens, of which `trained[i]` are trained.

    With `other`, `lengths[i]` includes the borrowed answer that stands beside the row in a batch.
    """

    stores: Sequence[Store]
    store: np.ndarray
    index: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    shares: Sequence[float]  # how often an epoch holds each row of a store
    fill: bool = False  # pretraining: rows are documents, cut to fill every bin
    slots: int = 1  # segment numbers that a row takes in a batch
    other: np.ndarray | None = None  # the row whose answer each prompt is shown with too, in the slot OTHER
    labelled: bool = False  # a row ends with its label's number, and keeps it where the text before it is cut
    reference: np.ndarray | None = None  # float32 [sum of lengths]: a reference's log-probs of all rows' tokens, end to end

    def __len__(self) -> int:
        return len(self.index)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], weights float32 [n]), of all its answers end to end; memory-mapped, not to be written to."""
        ids, weights = self.stored(i)
        if self.labelled and self.lengths[i] < len(ids):
            kept = self.lengths[i] - 1
            return np.append(ids[:kept], ids[-1]), np.append(weights[:kept], weights[-1])
        return ids[: self.lengths[i]], weights[: self.lengths[i]]

    def stored(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.stores[self.store[i]].row(self.index[i])

    def parts(self, i: int) -> list[Part]:
        """The row's answers, each with its prompt and in the order of their slots; a row of one answer is its own part."""
        ids, weights = self.row(i)
        out, at = [], 0
        for length, slot, _ in self.part(i).tolist():
            out.append(Part(ids[at : at + length], weights[at : at + length], slot))
            at += length
        if self.other is not None and self.lengths[i] > at:
            mine, others = self.part(i)["answer"][0], self.part(self.other[i])["answer"][0]
            both = zip((ids, weights), self.stored(self.other[i]))
            ids, weights = (np.concatenate([x[:mine], y[others:]])[: self.lengths[i] - at] for x, y in both)
            out.append(Part(ids, weights, OTHER))
        return out

    def part(self, i: int) -> np.ndarray:
        """The parts of row i as they are stored, cache.PART."""
        return self.stores[self.store[i]].part(self.index[i])

    @cached_property
    def begins(self) -> np.ndarray:
        """Where each row's tokens begin, were all of them end to end."""
        return np.cumsum(self.lengths) - self.lengths

    def referred(self, i: int) -> np.ndarray:
        """The reference's log-probs of row i's tokens, of all its parts; of rows that have a reference."""
        assert self.reference is not None
        return self.reference[self.begins[i] : self.begins[i] + self.lengths[i]]

    def labels(self) -> np.ndarray:
        """The number of each row's label, int64 [n]; of labelled rows."""
        out = np.zeros(len(self), np.int64)
        for s, store in enumerate(self.stores):
            mine = self.store == s
            out[mine] = store.tokens[store.offsets[self.index[mine] + 1] - 1]
        return out

    def example(self, i: int) -> Example:
        """What the row was made from, whole."""
        return self.stores[self.store[i]].example(self.index[i])

    def where(self, i: int) -> str:
        """`file:line` of the row."""
        return self.stores[self.store[i]].where(self.index[i])

    def steady(self) -> bool:
        """Whether every epoch holds the same rows."""
        return all(float(share).is_integer() for share in self.shares)

    def chosen(self, seed: int, epoch: int) -> np.ndarray:
        """The rows of an epoch: those of a source with weight 2 twice; with 0.5 one half, the next epoch the other."""
        if all(share == 1 for share in self.shares):
            return np.arange(len(self))
        parts = []
        for s, share in enumerate(self.shares):
            mine = np.flatnonzero(self.store == s)
            parts += [mine] * int(share)
            part = (share % 1) * len(mine)
            window = np.arange(int(epoch * part), int((epoch + 1) * part))  # slides over a fixed shuffle
            parts.append(mine[permutation(len(mine), seed, s, 2)[window % max(len(mine), 1)]])
        return np.concatenate(parts)

    def plan(self, *, seed: int, epoch: int, max_length: int, packing: bool) -> Plan:
        """The bins of an epoch; its pieces name rows of this object."""
        chosen = self.chosen(seed, epoch)
        lengths = self.lengths[chosen]
        if self.fill:
            bins = fill(lengths, seed=seed, epoch=epoch, max_length=max_length)
        else:
            bins = plan(lengths, seed=seed, epoch=epoch, max_length=max_length, packing=packing)
        return Plan(chosen[bins.row], bins.start, bins.stop, bins.bounds)


def with_others(rows: Rows, prompts: np.ndarray, max_length: int) -> Rows:
    """`rows` of one answer each, and with every prompt the answer of a row with another prompt (KTO, arXiv:2402.01306).

    The two stand in one row of a batch; where they do not fit into it, the other answer's end is cut. Where all rows have one
    prompt there is no other. `prompts` are hashes.
    """
    n = len(rows)
    mixed = mix(prompts, 0)
    order = np.argsort(mixed, kind="stable")  # rows of one prompt lie side by side, next to a prompt by chance
    _, starts, run, counts = np.unique(mixed[order], return_index=True, return_inverse=True, return_counts=True)
    start, count = starts[run], counts[run]
    ahead = (np.arange(n) - start) % np.maximum(n - count, 1)  # a prompt of more than half the rows meets the others in turn
    other = np.empty(n, np.int64)
    other[order] = np.where(count < n, order[(start + count + ahead) % max(n, 1)], order)
    begins = np.array([rows.part(i)["answer"][0] for i in range(n)], np.int64)
    lengths = begins + (rows.lengths - begins)[other]
    lengths = np.minimum(lengths, max_length - rows.lengths)
    lengths[(lengths <= begins) | (other == np.arange(n))] = 0
    return replace(rows, lengths=rows.lengths + lengths, other=other)


def parted(
    prompts: np.ndarray, keys: np.ndarray, shares: Sequence[float], seed: int, say: Callable[[str], None] = print
) -> np.ndarray:
    """The part (0 = train, 1 = eval, 2 = test) of every row, by the hashes of encode.keys; `shares` as in data.split."""
    three = [*shares, 0, 0][:3]
    if min(three) < 0 or not three[0]:
        raise UserError(f"data.split={shares}: needs train : eval : test shares, train above 0, e.g. 8,1,1")
    by = split_keys(prompts, keys, three)
    if by is not prompts:
        say(
            "warning: one prompt has more rows than the held-out share, so rows are split one by one and the same prompt is in "
            "train, eval and test"
        )
    return split(by, three, seed)


def split_keys(prompts: np.ndarray, keys: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """What rows are split by: the hashes of their prompts, or of all they say where one prompt has more than a share's rows."""
    if np.array_equal(prompts, keys):
        return prompts
    distinct = np.unique(np.stack([prompts, keys]), axis=1)
    _, counts = np.unique(distinct[0], return_counts=True)
    least = min(share for share in shares if share) / sum(shares) * counts.sum()
    return keys if counts.max(initial=0) > max(least, 1) else prompts


def split(keys: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """The part (0 = train, 1 = eval, 2 = test) of each content hash in `keys`.

    A part with a share gets at least one distinct row as soon as there are enough rows for train to have one too.
    """
    distinct, inverse = np.unique(keys, return_inverse=True)
    n = len(distinct)
    counts = [round(n * share / sum(shares)) for share in shares]
    for part in (1, 2):
        counts[part] = min(max(counts[part], shares[part] > 0), max(n - 1 - sum(counts[1:part]), 0))
    order = np.argsort(mix(distinct, seed), kind="stable")
    part_of = np.zeros(n, np.int8)
    part_of[order[: counts[1]]] = 1
    part_of[order[counts[1] : counts[1] + counts[2]]] = 2
    return part_of[inverse]


def mix(keys: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64's finaliser: another order for each seed."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64(((seed + 1) * 0x9E3779B97F4A7C15) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
