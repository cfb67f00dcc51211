"""What `sftjax eval` prints, and the words that the report shares with it. Scores and shares are told in hundredths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sftjax.evaluate.figures import verdict

NAMES = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "macro_f1": "macro-F1",
    "ece": "calibration error",
    "preference_accuracy": "preference accuracy",
    "logps_chosen": "log-prob, chosen",
    "logps_rejected": "log-prob, rejected",
    "json_valid": "valid JSON",
    "stop_rate": "stop rate",
    "overlong": "over-length",
    "mean_length": "mean tokens",
}
# digits of figures that are told as they are; the others are shares, in hundredths
DIGITS = {"loss": 3, "margin": 3, "perplexity": 2, "mean_length": 1, "logps_chosen": 1, "logps_rejected": 1}
LOOKS = {"better": "green", "worse": "red"}
SHOWN = 3  # changed rows each way


def name_of(figure: str) -> str:
    return NAMES.get(figure, figure)


def number(figure: str, value: float, *, sign: bool = False) -> str:
    """1.235 of a loss, 3.44 of a perplexity, 12.3 of a length, 41.7 of a share of 0.417."""
    digits, scale = (DIGITS[figure], 1) if figure in DIGITS else (1, 100)
    text = f"{scale * value:,.{digits}f}"
    if figure == "perplexity" and abs(value) >= 1000:
        text = f"{value:.1e}" if abs(value) >= 1e5 else f"{value:,.0f}"
    text = text.removeprefix("-") if float(text.replace(",", "")) == 0 else text
    return f"+{text}" if sign and not text.startswith("-") else text


def told(figure: str, of: Mapping[str, float] | None, *, sign: bool = False) -> str:
    """41.7 [33.3, 50.0]"""
    if of is None:
        return "-"
    value, low, high = (number(figure, of[key], sign=sign) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def around(figure: str, of: Mapping[str, float] | None) -> str:
    """41.7 ±8.3, half the interval: for a terminal, where both its ends would not fit."""
    return "-" if of is None else f"{number(figure, of['value'])} ±{number(figure, (of['high'] - of['low']) / 2)}"


def show(found: Mapping[str, Any], console: Console) -> None:
    """Prints what eval.json holds."""
    models = found["models"]
    whole, *tagged = found["figures"]
    console.print(figures_table(whole["figures"], models))
    if tagged:
        console.print(tags_table([whole, *tagged], found["metrics"], models))
    for name, how in found["how"].items():
        console.print(f"{name_of(name)}: {how}", style="dim", highlight=False)
    for way, word in (("better", "gained"), ("worse", "lost")):
        rows = found.get("changed", {}).get(way, [])
        if rows:
            console.print(f"[bold]rows that {word} most[/]")
        for row in rows[:SHOWN]:
            change = f"{100 * row['change']:+.1f}"
            console.print(f"  [{LOOKS[way]}]{change}[/]  {escape(line(row['where'], None))}", soft_wrap=True, highlight=False)
            for part in ("prompt", "expected", "base", "tuned"):
                console.print(f"      {part:8}  {escape(line(row[part]))}", soft_wrap=True, highlight=False)


def figures_table(figures: Mapping[str, Any], models: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in (*models, *(["difference", ""] if len(models) == 2 else [])):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, of in figures.items():
        cells = [around(name, of[model]) if len(models) == 2 else told(name, of[model]) for model in models]
        if len(models) == 2:
            cells += [told(name, of["difference"], sign=True), marked(verdict(name, of["difference"]))]
        table.add_row(name_of(name), *cells)
    return table


def tags_table(tables: Sequence[Mapping[str, Any]], metrics: Sequence[str], models: Sequence[str]) -> Table:
    """A row a tag: its first metric, or its loss where nothing was answered."""
    name = metrics[0] if metrics else "loss"
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{name_of(name)} by tag", overflow="fold")
    for column in ("rows", *models, *(["difference", ""] if len(models) == 2 else [])):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for one in tables:
        if of := one["figures"].get(name):
            cells = [f"{of['rows']:,}", *(around(name, of[m]) if len(models) == 2 else told(name, of[m]) for m in models)]
            if len(models) == 2:
                cells += [told(name, of["difference"], sign=True), marked(verdict(name, of["difference"]))]
            table.add_row("all" if one["tag"] is None else escape(line(one["tag"])), *cells)
    return table


def marked(word: str) -> str:
    return f"[{LOOKS[word]}]{word}[/]" if word in LOOKS else word


def line(text: str, most: int | None = 160) -> str:
    """A text in one line of `most` characters that a terminal can be given: an answer, or a row, may hold anything."""
    flat = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return flat if most is None or len(flat) <= most else f"{flat[: most - 4]} ..."
