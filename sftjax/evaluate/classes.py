"""What a confusion matrix says: counts [C, C] of texts of label i (rows) that were taken for label j (columns).

Where a model may say what is no label, a last column counts those texts: [C, C+1].

precision  of those taken for a label, the share that is of it        recall  of those of a label, the share found
F1         2 tp / (2 tp + fp + fn)        macro-F1  the mean of F1 over the labels that occur
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def scores(counts: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """{"accuracy", "macro_f1", "majority", "per_class": {label: {"precision", "recall", "f1", "count"}}, "confusion"}.

    `majority` is the accuracy of always saying the commonest label. Plain values, as JSON holds them; {} where nothing counts.
    A share of nothing is 0.
    """
    total = int(counts.sum())
    if not total:
        return {}
    right, true, said = np.diag(counts), counts.sum(1), counts.sum(0)[: len(labels)]
    f1 = share(2 * right, true + said)
    per_class = {
        label: {"precision": p, "recall": r, "f1": f, "count": n}
        for label, p, r, f, n in zip(
            labels, share(right, said).tolist(), share(right, true).tolist(), f1.tolist(), true.tolist(), strict=True
        )
    }
    return {
        "accuracy": float(right.sum() / total),
        "macro_f1": float(macro_f1(right, true, said)),
        "majority": float(true.max() / total),
        "per_class": per_class,
        "confusion": counts.tolist(),
    }


def macro_f1(right: np.ndarray, true: np.ndarray, said: np.ndarray) -> np.ndarray:
    """[..., C] texts of each label that were found, that there are, that were taken for it -> [...]; nan where there are none."""
    there = true > 0
    f1, n = np.where(there, share(2 * right, true + said), 0.0), there.sum(-1)
    return np.divide(f1.sum(-1), n, out=np.full(n.shape, np.nan), where=n > 0)


def counted(expected: Sequence[str], said: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """[C, C+1] counts of texts by what each is expected to be, one of `labels`, and what was said of it."""
    at = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), np.int64)
    for wanted, answer in zip(expected, said, strict=True):
        counts[at[wanted], at.get(answer.strip(), len(labels))] += 1
    return counts


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)
