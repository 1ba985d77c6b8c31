"""Charts as numbers: places in percent of the plot, from its top left corner, and the words beside them.

A page stretches the plot to its own width and sets the words as text, so that they stay readable on a small screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """A word on an axis, `at` percent of its length."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """A rectangle that stands on the x axis; `kind` is what colours it, `title` what is said of it."""

    x: float
    width: float
    height: float
    kind: str
    title: str = ""

    @property
    def y(self) -> float:
        """Its top."""
        return 100 - self.height


@dataclass(frozen=True)
class Line:
    """A polyline; `points` as SVG writes them."""

    points: str
    kind: str


@dataclass(frozen=True)
class Chart:
    """A plot with its axes; `bands` are (x, width) of what is shaded behind it."""

    xs: tuple[Mark, ...]
    ys: tuple[Mark, ...]
    bars: tuple[Bar, ...] = ()
    lines: tuple[Line, ...] = ()
    bands: tuple[tuple[float, float], ...] = ()


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, some `about` of them; `low` itself where both are one."""
    if not (span := high - low):
        return [low]
    size = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size * about >= span * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def bar_chart(
    heights: Sequence[float], kinds: Sequence[str], titles: Sequence[str], blocks: Sequence[int | None]
) -> Chart:
    """A bar per layer in the model's order, with every second block shaded and some blocks' numbers below."""
    top = max(heights) * 1.06 or 1.0
    slot = 100 / len(heights)
    bars = tuple(
        Bar(i * slot + 0.09 * slot, 0.82 * slot, 100 * height / top, kind, title)
        for i, (height, kind, title) in enumerate(zip(heights, kinds, titles, strict=True))
    )
    ranges: dict[int, list[int]] = {}
    for i, block in enumerate(blocks):
        if block is not None:
            ranges.setdefault(block, [i, i])[1] = i
    every = max(1, math.ceil(len(ranges) / 8))
    shown = list(ranges)[::every]
    xs = tuple(Mark(slot * (first + last + 1) / 2, str(b)) for b in shown for first, last in [ranges[b]])
    bands = tuple((slot * first, slot * (last + 1 - first)) for first, last in list(ranges.values())[::2])
    return Chart(xs, _marks(0, top), bars=bars, bands=bands)


def histogram(first: float, width: float, counts: Sequence[int], kind: str, symmetric: bool) -> Chart:
    """Counts of equal bins as bars; `first` is the middle of the first bin."""
    top, slot = max(counts) * 1.06 or 1.0, 100 / len(counts)
    bars = tuple(
        Bar(i * slot, slot, 100 * n / top, kind, f"{first + i * width:+.3g}: {n:,}") for i, n in enumerate(counts)
    )
    low, high = first - width / 2, first + width * (len(counts) - 0.5)
    signed = "+g" if symmetric else "g"
    xs = tuple(Mark(100 * (x - low) / (high - low), f"{x:{signed}}" if x else "0") for x in ticks(low, high, 4))
    return Chart(xs, (), bars=bars)


def curve(points: Sequence[tuple[int, float]], smooth: Sequence[float]) -> Chart:
    """Values over steps: as they are, and smoothed; over many steps, the mean of neighbours."""
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin
    first, span = steps[0], (steps[-1] - steps[0]) or 1

    def line(ys: Sequence[float], kind: str) -> Line:
        every = math.ceil(len(ys) / 800)
        means = [
            (sum(steps[i : i + every]) / len(steps[i : i + every]), sum(ys[i : i + every]) / len(ys[i : i + every]))
            for i in range(0, len(ys), every)
        ]
        places = ((100 * (x - first) / span, 100 * (high - y) / (high - low)) for x, y in means)
        return Line(" ".join(f"{x:.2f},{y:.2f}" for x, y in places), kind)

    xs = tuple(Mark(100 * (x - first) / span, f"{x:,.0f}") for x in ticks(first, steps[-1], 5) if x == int(x))
    return Chart(xs, _marks(low, high), lines=(line(values, "raw"), line(smooth, "smooth")))


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential mean over about a fifteenth of the values, corrected for its start (Adam's correction)."""
    keep = 1 - 1 / max(1.0, len(values) / 15)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        means.append(mean / weight)
    return means


def _marks(low: float, high: float) -> tuple[Mark, ...]:
    """A y axis from `low` at the bottom to `high` at the top."""
    return tuple(Mark(100 * (high - y) / (high - low), f"{y:g}") for y in ticks(low, high))
