"""Charts as numbers: ticks, SVG paths and bars in a square of 1000 x 1000 that the page stretches to any shape.

Labels are no part of the SVG: the page sets them in HTML at percentages, so they keep their size at every width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sftjax.train.progress import compact

SIZE = 1000
MAX_POINTS = 500  # a path of more is finer than a screen

Points = Sequence[tuple[float, float | None]]  # (x, y); y None leaves a gap


@dataclass(frozen=True)
class Series:
    """A named curve. `look` is a class of the style sheet; `dots` marks each point."""

    name: str
    points: Points
    look: str
    dots: bool = False


@dataclass(frozen=True)
class Tick:
    at: float  # per cent from the left, or from the bottom
    text: str


@dataclass(frozen=True)
class Chart:
    title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[dict[str, str]] = field(default_factory=list)  # name, look, d (the line), dots (the points)
    bars: list[dict[str, str | float]] = field(default_factory=list)  # look, x, y, w, h, title
    mark: Tick | None = None  # a vertical line
    hover: dict[str, object] = field(default_factory=dict)  # what the page's script needs to read values off


def lines(title: str, series: list[Series], *, zero: bool = False, mark: tuple[float, str] | None = None) -> Chart | None:
    """Curves over steps; None where there is no point. `zero` starts the y axis at 0."""
    series = [Series(s.name, thin(s.points), s.look, s.dots) for s in series if any(y is not None for _, y in s.points)]
    if not series:
        return None
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points if y is not None]
    x0, x1 = min(xs), max(xs)
    x1 = x1 if x1 > x0 else x0 + 1
    y_values = ticks(min(0.0, *ys) if zero else min(ys), max(ys))
    y0, y1 = y_values[0], y_values[-1]

    def x(value: float) -> float:
        return (value - x0) / (x1 - x0)

    def y(value: float) -> float:
        return (value - y0) / (y1 - y0)

    curves = []
    for s in series:
        placed = [(x(a) * SIZE, None if b is None else (1 - y(b)) * SIZE) for a, b in s.points]
        curves.append({"name": s.name, "look": s.look, "d": path(placed), "dots": dots(placed) if s.dots else ""})
    rounded = [{"name": s.name, "look": s.look, "points": [[a, b and float(f"{b:.5g}")] for a, b in s.points]} for s in series]
    return Chart(
        title,
        [Tick(100 * x(v), compact(v)) for v in ticks(x0, x1) if x0 <= v <= x1],
        [Tick(100 * y(v), compact(v)) for v in y_values],
        curves,
        mark=Tick(100 * x(mark[0]), mark[1]) if mark and x0 <= mark[0] <= x1 else None,
        hover={"x": [x0, x1], "y": [y0, y1], "series": rounded},
    )


def histogram(title: str, edges: Sequence[float], groups: list[tuple[str, str, Sequence[int]]], unit: str) -> Chart | None:
    """Bars over `edges` for each (name, look, counts), the groups side by side in a bin; None where every count is 0."""
    top = max((c for _, _, counts in groups for c in counts), default=0)
    if not top:
        return None
    y_values = ticks(0, top, whole=True)
    x0, x1 = edges[0], edges[-1]
    bars: list[dict[str, str | float]] = []
    for g, (name, look, counts) in enumerate(groups):
        for left, right, count in zip(edges, edges[1:], counts):
            slot = (right - left) / (x1 - x0) * SIZE
            width, height = slot * 0.86 / len(groups), count / y_values[-1] * SIZE
            at = (left - x0) / (x1 - x0) * SIZE + slot * 0.07 + g * width
            words = f"{left}-{right - 1} tokens: {count} {unit}, {name}"
            bars.append({"look": look, "x": at, "y": SIZE - height, "w": width, "h": height, "title": words})
    x_ticks = [Tick(100 * (v - x0) / (x1 - x0), compact(v)) for v in ticks(x0, x1) if x0 <= v <= x1]
    legend = [{"name": name, "look": look, "d": "", "dots": ""} for name, look, _ in groups] if len(groups) > 1 else []
    return Chart(title, x_ticks, [Tick(100 * v / y_values[-1], compact(v)) for v in y_values], legend, bars)


def ticks(low: float, high: float, about: int = 4, whole: bool = False) -> list[float]:
    """Round values (1, 2, 5 times a power of ten) from at most `low` to at least `high`."""
    if high - low <= 1e-9 * abs(low):  # a mean of equal numbers may differ from them in its last digit
        high = low + (abs(low) or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def path(points: Sequence[tuple[float, float | None]]) -> str:
    out, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        out.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(out)


def dots(points: Sequence[tuple[float, float | None]]) -> str:
    """A line of no length a point: with round ends it is drawn as a circle, whatever the stretch."""
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points if y is not None)


def thin(points: Points) -> Points:
    """At most MAX_POINTS of them, both extremes of every stretch among them, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    width = -(-len(points) // (MAX_POINTS // 3))
    kept: list[tuple[float, float | None]] = []
    for i in range(0, len(points), width):
        stretch = points[i : i + width]
        real = [p for p in stretch if p[1] is not None]
        gap = [p for p in stretch if p[1] is None][:1]
        ends = [min(real, key=_y), max(real, key=_y)] if real else []
        kept += sorted({*ends, *gap}, key=lambda p: p[0])
    return kept


def _y(point: tuple[float, float | None]) -> float:
    return point[1] or 0.0


def smooth(points: Points, share: float = 0.06) -> Points:
    """Means over windows of about `share` of the points, centred on each so that the curve does not lag behind a fall."""
    real = [(x, y) for x, y in points if y is not None]
    sums = list(itertools.accumulate((y for _, y in real), initial=0.0))
    out: list[tuple[float, float | None]] = []
    for i, (x, _) in enumerate(real):
        half = min(i, len(real) - 1 - i, round(share * len(real) / 2))  # narrower at the ends, to stay centred
        out.append((x, (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)))
    return out
