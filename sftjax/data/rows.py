"""Rows: the kept rows of one split, a view over the stores that hold them. And which split a row belongs to.

Split by content: rows are ranked by a seeded hash of what they say, and the ranking is cut at the shares asked for. Equal
rows have equal hashes, so duplicates are never on both sides; the shares are exact over distinct rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftjax.data.cache import Store
from sftjax.data.example import Example
from sftjax.data.pack import Plan, fill, permutation, plan


@dataclass(frozen=True)
class Rows:
    """Row i is row `index[i]` of `stores[store[i]]`, its first `lengths[i]` tokens, of which `trained[i]` are trained."""

    stores: Sequence[Store]
    store: np.ndarray
    index: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    shares: Sequence[float]  # how often an epoch holds each row of a store
    fill: bool = False  # pretraining: rows are documents, cut to fill every bin

    def __len__(self) -> int:
        return len(self.index)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], weights float32 [n]); memory-mapped, not to be written to."""
        ids, weights = self.stores[self.store[i]].row(self.index[i])
        return ids[: self.lengths[i]], weights[: self.lengths[i]]

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
