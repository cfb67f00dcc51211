"""Scores of answers against what was expected. White space around either never counts."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(answer: str, expected: str) -> bool:
    return answer.strip() == expected.strip()


def macro_f1(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The mean over the expected labels of 2 tp / (2 tp + fp + fn). An answer that is no label is a miss and no one's gain."""
    answers, expected = [a.strip() for a in answers], [e.strip() for e in expected]
    labels = set(expected)

    def f1(label: str) -> float:
        hits = sum(a == label == e for a, e in zip(answers, expected))
        return 2 * hits / (answers.count(label) + expected.count(label))

    return sum(map(f1, labels)) / len(labels)
