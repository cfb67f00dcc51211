"""Scores of answers against what was expected, all between 0 and 1. White space around either never counts.

METRICS   (answer, expected) -> float: of one row
all_sums  every figure of all rows as a function of sums over them, which is what resampling needs:

exact_match   the same text                                  mean of rows
contains      the expected text is in the answer, in upper or lower case
numeric       the same number, GSM8K's way (`number`)
token_f1      SQuAD's F1 of bags of words; in Chinese of characters (arXiv:1606.05250, MLQA: arXiv:1910.07475)
rouge1 rouge2 rougeL   F-measure by rouge-score; in Chinese of characters
bleu chrf     by sacrebleu: of the corpus; a row's is the sentence's, with its effective order
accuracy      the expected label, exactly
macro_f1      the mean of the labels' F1: of the corpus alone
json_valid    the answer is a JSON object or list, whatever was expected
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import NamedTuple

import numpy as np

from sftjax.check import refuse_metrics
from sftjax.evaluate import rouge_bleu
from sftjax.evaluate.classes import macro_f1
from sftjax.evaluate.script import HAN

NUMBER = re.compile(r"((?<![\w)])[-−+])?[$€£¥￥]?(\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?<![\w.])(?=\.\d))(\.\d+)?")
ARTICLES = {"a", "an", "the"}


def exact_match(answer: str, expected: str) -> bool:
    return answer.strip() == expected.strip()


def contains(answer: str, expected: str) -> bool:
    """An expected text that is empty is only in an empty answer."""
    wanted = expected.strip().casefold()
    return wanted in answer.casefold() if wanted else not answer.strip()


def number(text: str) -> Decimal | None:
    """The first number after the last "####", GSM8K's mark of the final answer; without one the text's last number.

    "$1,234.50" is 1234.5, "10-5" ends with 5 and "= -5" with -5. None where there is none.
    """
    _, mark, final = text.rpartition("####")
    found = list(NUMBER.finditer(final)) if mark else []
    chosen = found[0] if found else next(reversed(list(NUMBER.finditer(text))), None)
    if chosen is None:
        return None
    sign, whole, part = chosen.groups()
    return Decimal(whole.replace(",", "") + (part or "")) * (-1 if sign in ("-", "−") else 1)


def numeric(answer: str, expected: str) -> bool:
    """False where either has no number."""
    wanted = number(expected)
    return wanted is not None and number(answer) == wanted


def words(text: str) -> list[str]:
    """SQuAD's words: lower case, without punctuation and articles. A Chinese character is one of its own."""
    text = "".join(c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return [word for word in re.sub(HAN, r" \g<0> ", text).split() if word not in ARTICLES]


def token_f1(answer: str, expected: str) -> float:
    """2 common / (words of the answer + words expected); where either has none, whether both have."""
    a, e = words(answer), words(expected)
    if not a or not e:
        return float(a == e)
    return 2 * (Counter(a) & Counter(e)).total() / (len(a) + len(e))


def json_valid(answer: str, expected: str = "") -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN and Infinity, which Python reads and JSON has not

    try:
        return isinstance(json.loads(answer, parse_constant=refuse), (dict, list))
    except (ValueError, RecursionError):
        return False


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "numeric": numeric,
    "token_f1": token_f1,
    "rouge1": partial(rouge_bleu.rouge, "rouge1"),
    "rouge2": partial(rouge_bleu.rouge, "rouge2"),
    "rougeL": partial(rouge_bleu.rouge, "rougeL"),
    "bleu": rouge_bleu.sentence_bleu,
    "chrf": rouge_bleu.sentence_chrf,
    "accuracy": exact_match,
    "json_valid": json_valid,
}


class Sums(NamedTuple):
    """`figure(rows.sum(0))` is a figure of all rows, and of any of them by the sum over those."""

    rows: np.ndarray  # [n, k]
    figure: Callable[[np.ndarray], np.ndarray]  # [..., k] -> [...]


def mean(scores: Sequence[float] | np.ndarray) -> Sums:
    """The mean of rows' scores."""
    return ratio(scores, np.ones(len(scores)))


def ratio(values: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> Sums:
    """The sum of values over the sum of counts; nan where nothing counts."""

    def figure(x: np.ndarray) -> np.ndarray:
        return np.divide(x[..., 0], x[..., 1], out=np.full(x.shape[:-1], np.nan), where=x[..., 1] > 0)

    return Sums(np.stack([np.asarray(values, float), np.asarray(counts, float)], axis=1), figure)


def label_sums(answers: Sequence[str], expected: Sequence[str]) -> Sums:
    """Macro-F1: the mean over the expected labels of 2 tp / (2 tp + fp + fn), from [hit, expected, answered] of every label.

    An answer that is no label is a miss and no one's gain.
    """
    answers, expected = [a.strip() for a in answers], [e.strip() for e in expected]
    labels = {label: i for i, label in enumerate(sorted(set(expected)))}
    rows = np.zeros((len(answers), 3, len(labels)))
    for row, a, e in zip(rows, answers, expected):
        row[0, labels[e]] = a == e
        row[1, labels[e]] = 1
        if a in labels:
            row[2, labels[a]] = 1

    def figure(x: np.ndarray) -> np.ndarray:
        hits, wanted, given = np.moveaxis(x.reshape(*x.shape[:-1], 3, len(labels)), -2, 0)
        return macro_f1(hits, wanted, given)  # in a part of the rows a label may be missing

    return Sums(rows.reshape(len(answers), -1), figure)


CORPUS_SUMS: Mapping[str, Callable[[Sequence[str], Sequence[str]], Sums]] = {
    "bleu": lambda answers, expected: Sums(*rouge_bleu.bleu_sums(answers, expected)),
    "chrf": lambda answers, expected: Sums(*rouge_bleu.chrf_sums(answers, expected)),
    "macro_f1": label_sums,
}


def total(sums: Sums) -> float:
    """The figure of all rows; nan where there are none."""
    return float(sums.figure(sums.rows.sum(0))) if len(sums.rows) else float("nan")


def row_scores(names: Iterable[str], answers: Sequence[str], expected: Sequence[str]) -> dict[str, list[float]]:
    """{name: a score a row}; macro_f1, which a row has none of, is left out. Raises UserError for a name that is no metric,
    and where a library is missing."""
    refuse_metrics(names := tuple(names))
    rows = list(zip(answers, expected, strict=True))
    return {name: [float(METRICS[name](a, e)) for a, e in rows] for name in names if name in METRICS}


def all_sums(names: Iterable[str], answers: Sequence[str], expected: Sequence[str]) -> dict[str, Sums]:
    """{name: Sums}. Raises as `row_scores`."""
    refuse_metrics(names := tuple(names))
    scores = row_scores([name for name in names if name not in CORPUS_SUMS], answers, expected)
    return {name: mean(scores[name]) if name in scores else CORPUS_SUMS[name](answers, expected) for name in names}


def fitting(expected: Sequence[str], *, labels: bool = False) -> tuple[str, ...]:
    """The metrics that suit what is expected, none of which needs a further library."""
    if labels:
        return ("accuracy", "macro_f1")
    if expected and all(is_numeric(text) for text in expected):
        return ("numeric", "exact_match")
    if expected and all(map(json_valid, expected)):
        return ("exact_match", "json_valid", "token_f1")
    return ("exact_match", "token_f1")


def is_numeric(text: str) -> bool:
    """Whether the answer is a number: it is marked by "####", or there is nothing else."""
    return number(text) is not None and ("####" in text or NUMBER.fullmatch(text.strip()) is not None)
