"""ROUGE by rouge-score, BLEU and chrF by sacrebleu, each between 0 and 1; and the sums over rows that BLEU and chrF are made of.

    BLEU  min(1, exp(1 - r / c)) exp(mean_n log(matches_n / total_n)), n = 1..4; a row's sums are c, r, matches, totals
    chrF  F2 of character n-grams, n = 1..6; a row's sums are n-grams of the answer, of the reference, in both

ROUGE's tokens are lower-case runs of letters and digits, as rouge-score's own are of ASCII text, and single characters in
Chinese, which it would drop. BLEU's are sacrebleu's 13a, or its zh where there is Chinese among the references.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from sftjax.config import UserError
from sftjax.evaluate.script import HAN, chinese

TOKEN = re.compile(rf"{HAN}|(?:(?!{HAN})[^\W_])+")
SHOWN = {"rouge_score": "rouge-score", "sacrebleu": "sacrebleu"}

Figure = Callable[[np.ndarray], np.ndarray]


def library(name: str, metric: str) -> Any:
    """The imported library. Raises UserError where it is not installed."""
    hidden = "torch" in sys.modules and sys.modules["torch"] is None  # as the command line does; scipy trips over it
    if hidden:
        del sys.modules["torch"]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        told = SHOWN[name.partition(".")[0]]
        raise UserError(f"the metric {metric} needs {told}, which is not installed; run pip install 'sftjax[eval]'") from e
    finally:
        if hidden:
            sys.modules["torch"] = None  # type: ignore[assignment]


class Tokens:
    """What rouge-score takes for a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return TOKEN.findall(text.lower())


@cache
def scorer(kind: str) -> Any:
    return library("rouge_score.rouge_scorer", kind).RougeScorer([kind], tokenizer=Tokens())


def rouge(kind: str, answer: str, expected: str) -> float:
    """F-measure of rouge1, rouge2 or rougeL."""
    return scorer(kind).score(expected, answer)[kind].fmeasure


@cache
def bleu_of(tokenize: str, sentence: bool = False) -> Any:
    return library("sacrebleu.metrics", "bleu").BLEU(tokenize=tokenize, effective_order=sentence)


@cache
def chrf_of() -> Any:
    return library("sacrebleu.metrics", "chrf").CHRF()


def tokenizer_for(expected: Iterable[str]) -> str:
    return "zh" if chinese(expected) else "13a"


def sentence_bleu(answer: str, expected: str) -> float:
    return bleu_of(tokenizer_for([expected]), True).sentence_score(answer, [expected]).score / 100


def sentence_chrf(answer: str, expected: str) -> float:
    return chrf_of().sentence_score(answer, [expected]).score / 100


def bleu_sums(answers: Sequence[str], expected: Sequence[str]) -> tuple[np.ndarray, Figure]:
    """([n, 10]: answer's length, reference's, matches and totals by n; their figure)."""
    metric = bleu_of(tokenizer_for(expected))
    rows = metric._extract_corpus_statistics(list(answers), [list(expected)]) if answers else []
    return np.asarray(rows, float).reshape(len(answers), 2 + 2 * metric.max_ngram_order), bleu_figure


def bleu_figure(x: np.ndarray) -> np.ndarray:
    """BLEU of sums [..., 10], smoothed as sacrebleu does: the k-th n without a match counts 1 / 2^k of one."""
    n = (x.shape[-1] - 2) // 2
    sys, ref, hits, totals = x[..., 0], x[..., 1], x[..., 2 : 2 + n], x[..., 2 + n :]
    none = (hits == 0) & (totals > 0)
    smoothed = np.where(none, 0.5 ** np.cumsum(none, -1), hits)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(smoothed / totals).mean(-1))
        brevity = np.where(sys < ref, np.exp(1 - ref / sys), 1.0)
    whole = (hits.sum(-1) > 0) & (totals > 0).all(-1)  # without a match, or an answer of four words, there is nothing to smooth
    return np.where(whole, brevity * precision, 0.0)


def chrf_sums(answers: Sequence[str], expected: Sequence[str]) -> tuple[np.ndarray, Figure]:
    """([n, 18]: n-grams of the answer, of the reference and of both, for each n; their figure)."""
    metric = chrf_of()
    rows = metric._extract_corpus_statistics(list(answers), [list(expected)]) if answers else []
    return np.asarray(rows, float).reshape(len(answers), 3 * metric.order), chrf_figure


def chrf_figure(x: np.ndarray, beta: float = 2.0) -> np.ndarray:
    """chrF of sums [..., 18]: F of the mean precision and recall over the n for which both sides have n-grams."""
    ours, theirs, both = np.moveaxis(x.reshape(*x.shape[:-1], -1, 3), -1, 0)
    there = (ours > 0) & (theirs > 0)
    n = np.maximum(there.sum(-1), 1)
    p = np.divide(both, ours, out=np.zeros_like(both), where=there).sum(-1) / n
    r = np.divide(both, theirs, out=np.zeros_like(both), where=there).sum(-1) / n
    return np.divide((1 + beta**2) * p * r, beta**2 * p + r, out=np.zeros_like(p), where=p + r > 0)


def how(metrics: Iterable[str], expected: Sequence[str]) -> dict[str, str]:
    """What stands behind those of the metrics that could be made otherwise: for whoever compares them with others' figures."""
    counted = "words, and single characters in Chinese"
    known = {
        "token_f1": f"as SQuAD's, over {counted}",
        **dict.fromkeys(("rouge1", "rouge2", "rougeL"), f"rouge-score's F-measure over {counted}"),
        "bleu": f"sacrebleu's of the corpus, tokenizer {tokenizer_for(expected)}",
        "chrf": "sacrebleu's of the corpus, chrF2",
    }
    return {name: known[name] for name in metrics if name in known}
