"""What came of a comparison: figures, costs and differences of every model with every prompt, and the rows they differ on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftjax.evaluate.answered import Row
from sftjax.evaluate.contenders import Contender
from sftjax.evaluate.endpoint import Reply
from sftjax.evaluate.metrics import METRICS, all_sums, row_scores
from sftjax.evaluate.prompts import Ask, Variant
from sftjax.evaluate.verdict import Cell, figures, rivals, verdict


@dataclass(frozen=True)
class Asked:
    """One model with one prompt, over all rows."""

    contender: Contender
    variant: Variant
    asks: Sequence[Ask]
    replies: Sequence[Reply]

    @property
    def answers(self) -> list[str]:
        return [reply.text for reply in self.replies]

    @property
    def expected(self) -> list[str]:
        return [ask.expected for ask in self.asks]


def judge(
    asked: Sequence[Asked], rows: Sequence[Row], metrics: Sequence[str], prices: Mapping[str, tuple[float, float]]
) -> tuple[dict[str, Any], list[dict[str, list[float]]]]:
    """compare.json's figures, and every cell's scores by row."""
    deciding = metrics[0]
    by_row = [name for name in metrics if name in METRICS] or ["exact_match"]
    of_all = figures([all_sums(metrics, a.answers, a.expected) for a in asked])
    cells = [Cell(a.contender.name, a.variant.name, of) for a, of in zip(asked, of_all)]
    scores = [row_scores(by_row, a.answers, a.expected) for a in asked]
    pair = rivals(cells, deciding)
    at = [cells.index(cell) for cell in pair] if pair else []
    differ = disagreements([of[by_row[0]] for of in scores], at)
    result: dict[str, Any] = {
        "rows": len(rows),
        "metrics": list(metrics),
        "cells": [
            {"model": cell.model, "prompt": cell.prompt, "metrics": {name: f.plain() for name, f in cell.figures.items()}}
            | costs(a.replies, prices.get(cell.model))
            for cell, a in zip(cells, asked)
        ],
        "differences": [
            {
                "better": [a.model, a.prompt],
                "than": [b.model, b.prompt],
                **((a.figures[deciding] - b.figures[deciding]).plain() or {}),
            }
            for a, b in ordered(cells, deciding)
        ],
        "verdict": verdict(cells, deciding, len(rows)),
        "disagreements": {"by": by_row[0], "rivals": at, "rows": differ},
    }
    return result, scores


def ordered(cells: Sequence[Cell], metric: str) -> Iterator[tuple[Cell, Cell]]:
    """Every two cells, the better one first."""
    ranked = sorted(cells, key=lambda cell: -cell.figures[metric].value)
    for i, a in enumerate(ranked):
        for b in ranked[i + 1 :]:
            yield a, b


def costs(replies: Sequence[Reply], price: tuple[float, float] | None) -> dict[str, Any]:
    """Of one cell: tokens and seconds, dollars where there is a price; None where a server does not say."""
    n = len(replies)
    answered = [r for r in replies if r.refused is None]

    def sized(values: list[Any]) -> dict[str, float] | None:
        if any(v is None for v in values) or not values:
            return None
        return {"mean": sum(values) / len(values), "total": sum(values)}

    prompt, answer = sized([r.prompt_tokens for r in answered]), sized([r.answer_tokens for r in answered])
    paid = None if price is None or prompt is None or answer is None else prompt["total"] * price[0] + answer["total"] * price[1]
    return {
        "stop_rate": sum(r.stopped for r in replies) / n,
        "empty": sum(not r.text.strip() for r in replies) / n,
        "unanswered": n - len(answered),
        "why": next((r.refused for r in replies if r.refused), None),
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "seconds": sized([r.seconds for r in answered]),
        "dollars": None if paid is None else paid / 1e6,
    }


def disagreements(scores: Sequence[Sequence[float]], rivals: Sequence[int]) -> list[int]:
    """The rows on which the cells' scores differ, those first on which the two rivals differ most."""

    def apart(i: int) -> tuple[float, float]:
        of = [cell[i] for cell in scores]
        return (abs(of[rivals[0]] - of[rivals[1]]) if rivals else 0.0, max(of) - min(of))

    differing = [i for i in range(len(scores[0])) if apart(i)[1] > 0]
    return sorted(differing, key=lambda i: [-d for d in apart(i)])
