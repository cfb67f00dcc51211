"""What an evaluation found: every figure by tag with its interval, the tuned model beside its base, and the rows that changed.

    {"tag": "reasoning", "figures": {"loss": {"rows": 120, "base": {"value": 1.2, "low": 1.1, "high": 1.3},
                                              "tuned": {...}, "difference": {...}}}}

A row tagged "reasoning/sums" counts for "reasoning" too. The difference is tuned less base, on the same draws of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftjax.evaluate.bootstrap import Figure, resampled
from sftjax.evaluate.heldout import Answer, Question
from sftjax.evaluate.metrics import METRICS, Sums, row_scores, total

# +1 where more is better, -1 where less is, 0 where neither
BETTER = {"loss": -1, "perplexity": -1, "empty": -1, "repeated": -1, "overlong": -1, "mean_length": 0, "logps_rejected": 0}


@dataclass(frozen=True)
class Part:
    """Some rows: their tags, and of every figure the Sums of each model."""

    tags: Sequence[Sequence[str]]
    figures: Mapping[str, Sequence[Sums]]


def kinds(tags: Iterable[str]) -> set[str]:
    """{"a", "a/b"} of ("a/b",)."""
    return {"/".join(parts[: n + 1]) for tag in tags for parts in [tag.split("/")] for n in range(len(parts))}


def by_tag(parts: Sequence[Part], models: Sequence[str], *, seed: int = 0) -> list[dict[str, Any]]:
    """Of all rows (tag None), then of each kind of row that there is, in order of their names."""
    found = [[kinds(tags) for tags in part.tags] for part in parts]
    out = []
    for tag in [None, *sorted(set().union(*(row for rows in found for row in rows)))]:
        figures: dict[str, Any] = {}
        for part, rows in zip(parts, found):
            mine = np.array([i for i, row in enumerate(rows) if tag is None or tag in row], int)
            if len(mine):
                figures |= measured(part.figures, mine, models, seed)
        out.append({"tag": tag, "figures": figures})
    return out


def measured(
    figures: Mapping[str, Sequence[Sums]], rows: np.ndarray, models: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """Each figure of `rows`: each model's, and the difference where there are two."""
    taken = {name: [Sums(of.rows[rows], of.figure) for of in each] for name, each in figures.items()}
    draws: Iterator[np.ndarray] = iter(resampled([of for each in taken.values() for of in each], seed=seed))
    out = {}
    for name, each in taken.items():
        found = [Figure(total(of), next(draws)) for of in each]
        out[name] = {"rows": len(rows)} | {model: figure.plain() for model, figure in zip(models, found)}
        if len(models) == 2:
            out[name]["difference"] = (found[1] - found[0]).plain()
    return out


def verdict(name: str, difference: Mapping[str, float] | None) -> str:
    """better or worse where the interval says so, "" for a figure that is neither, else "not clear"."""
    sign = BETTER.get(name, 1)
    if difference is None or not sign:
        return ""
    if difference["low"] <= 0 <= difference["high"]:
        return "same" if difference["low"] == difference["high"] else "not clear"
    return "better" if sign * difference["value"] > 0 else "worse"


def changed(
    questions: Sequence[Question], base: Sequence[Answer], tuned: Sequence[Answer], metrics: Sequence[str], *, most: int = 10
) -> dict[str, list[dict[str, Any]]]:
    """{"better", "worse"}: the rows whose mean score moved most, and by how much; equal moves in their order."""
    names = [name for name in metrics if name in METRICS] or ["exact_match"]
    expected = [a.expected for a in tuned]
    before, after = (row_scores(names, [a.text for a in answers], expected) for answers in (base, tuned))
    moved = np.mean([np.subtract(after[name], before[name]) for name in names], axis=0)
    order = np.argsort(-moved, kind="stable").tolist(), np.argsort(moved, kind="stable").tolist()

    def row(i: int) -> dict[str, Any]:
        texts = {"prompt": questions[i].prompt, "expected": expected[i], "base": base[i].text, "tuned": tuned[i].text}
        return {"where": questions[i].where, "change": float(moved[i]), **texts}

    better = [row(i) for i in order[0][:most] if moved[i] > 0]
    return {"better": better, "worse": [row(i) for i in order[1][:most] if moved[i] < 0]}
