"""Is a reward model right as often as it is sure? Of a pair it is sure of one answer by sigmoid(|r_1 - r_2|), 0.5 to 1.

ECE = sum over bins of confidence of  pairs / all * |share that is right - mean confidence|        arXiv:1706.04599, eq. 3
"""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 10  # of confidence, from 0.5 to 1


def calibration(ahead: np.ndarray) -> dict[str, Any]:
    """{"ece", "pairs", "bins": [{"from", "to", "pairs", "confidence", "accuracy"}]} of rewards of the better less the worse [P].

    {} without pairs.
    """
    if not len(ahead):
        return {}
    confidence = 1 / (1 + np.exp(-np.abs(ahead.astype(np.float64))))
    right = (1 + np.sign(ahead)) / 2
    edges = np.linspace(0.5, 1, BINS + 1)
    which = np.clip(np.digitize(confidence, edges) - 1, 0, BINS - 1)
    bins, off = [], 0.0
    for b in range(BINS):
        here = which == b
        if n := int(here.sum()):
            sure, so = float(confidence[here].mean()), float(right[here].mean())
            bins.append({"from": edges[b], "to": edges[b + 1], "pairs": n, "confidence": sure, "accuracy": so})
            off += n * abs(sure - so)
    return {"ece": off / len(ahead), "pairs": len(ahead), "bins": bins}
