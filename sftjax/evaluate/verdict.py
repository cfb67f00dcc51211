"""What a comparison says, in sentences: who beats whom by how much, and what these rows cannot tell.

Everything is asked of the same rows, so a difference has draws of its own (evaluate/bootstrap.py): a row drawn twice is drawn
twice for every model and prompt. A difference is told where its 95% interval leaves out zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sftjax.evaluate.bootstrap import Figure, resampled
from sftjax.evaluate.metrics import Sums, total
from sftjax.evaluate.table import told

WORD_FOR_WORD = ("exact_match", "accuracy")
ROUGH = 30  # rows, of which fewer give intervals that are too narrow


@dataclass(frozen=True)
class Cell:
    """One model with one prompt."""

    model: str
    prompt: str
    figures: Mapping[str, Figure]

    def __str__(self) -> str:
        return f"{self.model} with {self.prompt}"


def figures(sums: Sequence[Mapping[str, Sums]]) -> list[dict[str, Figure]]:
    """The figures of every cell. `sums` are over the same rows in the same order, and are resampled alike."""
    draws = iter(resampled([of for cell in sums for of in cell.values()]))
    return [{name: Figure(total(of), next(draws)) for name, of in cell.items()} for cell in sums]


def said_of(figure: Figure) -> str:
    """In points: hundredths of a metric."""
    return told("", figure.plain())


def best(cells: Sequence[Cell], metric: str) -> Cell:
    """By the metric that decides; of equals by the others, in their order."""
    return max(cells, key=lambda cell: [cell.figures[metric].value, *(figure.value for figure in cell.figures.values())])


def rivals(cells: Sequence[Cell], metric: str) -> tuple[Cell, Cell] | None:
    """The two that the question is about: the best of the first model and of the others; with one model, its best two."""
    first = [cell for cell in cells if cell.model == cells[0].model]
    others = [cell for cell in cells if cell.model != cells[0].model]
    top = best(first, metric)
    others = others or [cell for cell in first if cell is not top]
    return (top, best(others, metric)) if others else None


def verdict(cells: Sequence[Cell], metric: str, n: int) -> list[str]:
    """The sentences. The first model is what the others are held against."""
    if all(cell.figures[metric].value == 0 for cell in cells):
        hint = " Where they are right but say more, contains or token_f1 fit better." if metric in WORD_FOR_WORD else ""
        return [f"No answer scores above 0 by {metric}: read some of them before trying other prompts.{hint}"]
    models = list(dict.fromkeys(cell.model for cell in cells))
    tops = [best([cell for cell in cells if cell.model == model], metric) for model in models]
    said = [sentence for model in models if (sentence := of_prompts([c for c in cells if c.model == model], metric, n))]
    if len(models) == 1:
        figure = tops[0].figures[metric]
        if not said:
            said = [f"{tops[0]} scores {said_of(figure)} points of {metric} on {n:,} rows."]
        if figure.value < 1:
            said.append(
                f"Whether tuning gains some of the {100 * (1 - figure.value):.1f} points that are left: add a tuned model, "
                "--model=DIR@ADAPTER."
            )
    else:
        said += [of_models(top, tops[0], metric, n) for top in tops[1:]]
        said.append(conclusion(tops, metric))
    if n < ROUGH:
        said.append(f"{n} rows are few: the intervals are rough, and likely too narrow.")
    return said


def of_prompts(cells: Sequence[Cell], metric: str, n: int) -> str:
    """One model's best prompt against its others; nothing where it has but one."""
    top = best(cells, metric)
    edges = {cell.prompt: top.figures[metric] - cell.figures[metric] for cell in cells if cell is not top}
    beaten = [f"{name} by {said_of(edge)}" for name, edge in edges.items() if edge.told]
    near = [f"{name} ({said_of(edge)})" for name, edge in edges.items() if not edge.told]
    if not edges:
        return ""
    if all(cell.figures[metric].value == 0 for cell in cells):
        return f"With {top.model}, no answer scores above 0 by {metric}, whatever the prompt."
    what = [f"beats {listed(beaten)}"] if beaten else []
    what += [f"cannot be told from {listed(near)} by these {n:,} rows"] if near else []
    score = f"{said_of(top.figures[metric])} points of {metric}"
    return f"With {top.model}, the best prompt is {top.prompt}, {score}: it {', and '.join(what)}."


def of_models(a: Cell, b: Cell, metric: str, n: int) -> str:
    """A model's best against the first model's best."""
    edge = a.figures[metric] - b.figures[metric]
    if edge.told:
        verb = "beats" if edge.value > 0 else "falls behind"
        size = edge if edge.value > 0 else Figure(-edge.value, -edge.draws)
        return f"{a} {verb} {b}, the best of {b.model}, by {said_of(size)} points."
    if not edge.draws.any():
        return f"{a} scores as {b} does, row by row."
    return f"These {n:,} rows cannot tell {a} from {b} ({said_of(edge)} points){enough(edge, n)}."


def enough(edge: Figure, n: int) -> str:
    """How many rows would tell a difference of this size: the interval narrows as 1 / sqrt(n)."""
    half = (edge.high - edge.low) / 2
    if not edge.value or (rows := n * (half / abs(edge.value)) ** 2) > 100 * n:
        return ""
    return f"; some {int(float(f'{max(rows, n + 1):.1e}')):,} would tell a difference of this size"


def conclusion(tops: Sequence[Cell], metric: str) -> str:
    """Whether prompting the first model is enough."""
    base = tops[0]
    edges = {cell.model: cell.figures[metric] - base.figures[metric] for cell in tops[1:]}
    ahead = [model for model, edge in edges.items() if edge.low > 0]
    if ahead:
        winner = max(ahead, key=lambda model: edges[model].value)
        edge = edges[winner]
        return (
            f"So no prompt tried here makes {base.model} as good as {winner}, which is worth {100 * edge.value:.1f} points, "
            f"and {100 * edge.low:.1f} at least."
        )
    most = max(edge.high for edge in edges.values())
    if most > 0:
        rest = f"and none is likely to be more than {100 * most:.1f} points better"
    else:
        rest = "and all are worse" if most < 0 else "and none is better on these rows"
    return f"So {base} is good enough as far as these rows can tell: no other model beats it, {rest}."


def listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
