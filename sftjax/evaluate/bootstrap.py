"""The bootstrap: how far a figure would wander if other rows had been drawn. Efron & Tibshirani (1993), chapter 13.

n rows are drawn with replacement from the n there are, DRAWS times; the middle 95 % of the figures is the interval. Two models
are compared on the same draws (paired), which is what makes a difference visible that their own intervals hide: Koehn (2004).

A figure is a function of sums over rows, so that all draws are one product:  [draws, n] counts @ [n, k] rows -> [draws, k]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sftjax.evaluate.metrics import Sums

DRAWS = 1000
SHARE = 95  # per cent of the draws that an interval holds
BLOCK = 2**22  # counts at a time


@dataclass(frozen=True)
class Figure:
    """A value, or a difference, with its interval; `draws` are its values over resampled rows."""

    value: float
    draws: np.ndarray = field(repr=False)

    @cached_property
    def ends(self) -> tuple[float, float]:
        return interval(self.draws) or (math.nan, math.nan)

    @property
    def low(self) -> float:
        return self.ends[0]

    @property
    def high(self) -> float:
        return self.ends[1]

    @property
    def told(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def __sub__(self, other: Figure) -> Figure:
        return Figure(self.value - other.value, self.draws - other.draws)

    def plain(self) -> dict[str, float] | None:
        """{"value", "low", "high"}; None where the figure is not one, nothing having counted."""
        if not math.isfinite(self.value) or math.isnan(self.low):
            return None
        return {"value": self.value, "low": self.low, "high": self.high}


def resampled(sums: Sequence[Sums], *, seed: int = 0, draws: int = DRAWS) -> list[np.ndarray]:
    """Each figure for each draw, [draws], all on the same draws. All have the same rows, of which there is one at least."""
    n = len(sums[0].rows)
    rows = np.concatenate([s.rows for s in sums], axis=1)
    rng = np.random.default_rng(seed)
    step = max(1, BLOCK // n)
    parts = [rng.multinomial(n, np.full(n, 1 / n), min(step, draws - at)) @ rows for at in range(0, draws, step)]
    ends = np.cumsum([s.rows.shape[1] for s in sums])[:-1]
    return [s.figure(x) for s, x in zip(sums, np.split(np.concatenate(parts), ends, axis=1))]


def interval(figures: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of a figure's draws; None where most are nan, having drawn nothing that counts."""
    real = figures[np.isfinite(figures)]
    if 2 * len(real) < len(figures):
        return None
    low, high = np.percentile(real, [(100 - SHARE) / 2, (100 + SHARE) / 2])
    return float(low), float(high)
