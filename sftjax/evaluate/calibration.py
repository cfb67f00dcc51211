"""Is a reward model right as often as it is sure? Of a pair it is sure of one answer by sigmoid(|r_1 - r_2|), 0.5 to 1.

ECE = sum over bins of confidence of  pairs / all * |share that is right - mean confidence|        arXiv:1706.04599, eq. 3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sftjax.evaluate.metrics import Sums

BINS = 10  # of confidence, from 0.5 to 1
EDGES = np.linspace(0.5, 1, BINS + 1)


def calibration(ahead: np.ndarray) -> dict[str, Any]:
    """{"ece", "pairs", "bins": [{"from", "to", "pairs", "confidence", "accuracy"}]} of rewards of the better less the worse [P].

    {} without pairs.
    """
    if not len(ahead):
        return {}
    confidence, right, which = binned(ahead)
    bins, off = [], 0.0
    for b in range(BINS):
        here = which == b
        if n := int(here.sum()):
            sure, so = float(confidence[here].mean()), float(right[here].mean())
            bins.append({"from": EDGES[b], "to": EDGES[b + 1], "pairs": n, "confidence": sure, "accuracy": so})
            off += n * abs(sure - so)
    return {"ece": off / len(ahead), "pairs": len(ahead), "bins": bins}


def binned(ahead: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(confidence, 1 where it is right and 0.5 where undecided, bin) of each pair, all [P]."""
    confidence = 1 / (1 + np.exp(-np.abs(ahead.astype(np.float64))))
    return confidence, (1 + np.sign(ahead)) / 2, np.clip(np.digitize(confidence, EDGES) - 1, 0, BINS - 1)


def calibration_sums(ahead: Sequence[Sequence[float]]) -> Sums:
    """The error of pairs, some in each row, from each bin's [right - confidence] and the pairs of all."""
    rows = np.zeros((len(ahead), BINS + 1))
    for row, gaps in zip(rows, ahead):
        confidence, right, which = binned(np.asarray(gaps))
        np.add.at(row, which, right - confidence)
        row[-1] = len(gaps)

    def figure(x: np.ndarray) -> np.ndarray:
        off = np.abs(x[..., :-1]).sum(-1)
        return np.divide(off, x[..., -1], out=np.full(off.shape, np.nan), where=x[..., -1] > 0)

    return Sums(rows, figure)
