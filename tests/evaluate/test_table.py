"""What is printed: numbers that people can read, in the 80 columns of a terminal."""

import io

import pytest
from rich.console import Console

from sftjax.evaluate.table import around, line, number, show, told


@pytest.mark.parametrize(
    "figure, value, text",
    [
        ("loss", 1.23456, "1.235"),
        ("perplexity", 3.4567, "3.46"),
        ("perplexity", 12345.6, "12,346"),
        ("perplexity", 12345678.9, "1.2e+07"),
        ("mean_length", 40.25, "40.2"),
        ("bleu", 0.4166, "41.7"),
        ("bleu", -0.0001, "0.0"),
    ],
)
def test_a_number_is_told_as_its_figure_is_read(figure, value, text):
    assert number(figure, value) == text
    assert number(figure, value, sign=True) == f"+{text}"


def test_intervals():
    of = {"value": -0.25, "low": -0.5, "high": 0.1}
    assert told("bleu", of, sign=True) == "-25.0 [-50.0, +10.0]" and around("bleu", of) == "-25.0 ±30.0"
    assert told("bleu", None) == around("bleu", None) == "-"


def test_a_line_has_nothing_that_a_terminal_obeys():
    assert line(" a\x1b]0;mine\x07\n b\u202e\ud800") == "a\ufffd]0;mine\ufffd b\ufffd\ufffd"
    assert line("x" * 30, 10) == "xxxxxx ..." and line("x" * 300, None) == "x" * 300


@pytest.mark.parametrize("models", [("base", "tuned"), ("model",)])
def test_everything_fits_into_a_terminal(models):
    def figure(value):
        of = {"value": value, "low": value * 0.9, "high": value * 1.1}
        return {"rows": 1319} | dict.fromkeys((*models, "difference"), of)

    names = ("exact_match", "json_valid", "macro_f1", "numeric")
    figures = {"loss": figure(12.3456), "perplexity": figure(8765.4)} | {name: figure(0.9) for name in names}
    row = {
        "where": "a\x1b.jsonl:3",
        "change": 1.0,
        "prompt": "[bold]p\nq",
        "expected": "\x1b[2Je",
        "base": "b\x9b",
        "tuned": "[/t]",
    }
    found = {
        "models": list(models),
        "metrics": ["exact_match"],
        "how": {"bleu": "as sacrebleu's"},
        "figures": [{"tag": None, "figures": figures}, {"tag": "a long tag/[red]of some\x1bkind", "figures": figures}],
        "changed": {"better": [row], "worse": []},
    }
    out = io.StringIO()
    show(found, Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    for part in ("loss", "valid JSON", "macro-F1", "1,319", "[bold]p q", "[/t]", "BLEU: as sacrebleu's", "exact match by tag"):
        assert part in text, part
