"""The demo's table as a picture: perplexity before and after tuning, on the new domain and on the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .demo import Row

# Okabe and Ito's colours, told apart by every kind of colour vision
COLORS = {"dense": "#555555", "plain": "#D55E00", "loftq": "#0072B2", "peqa": "#009E73"}
LABELS = {"dense": "LoRA", "plain": "plain + LoRA", "loftq": "LoftQ + LoRA", "peqa": "PEQA"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the figure of the demo's rows, dense first, to `path` as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.9), dpi=160, layout="constrained")
    new, own = figure.subplots(1, 2, sharey=True)
    places = _places(rows)
    for axis, title, before, after in (
        (new, "New domain: the language reference", "before", "after"),
        (own, "Own domain: held-out library sources", "own_before", "own_after"),
    ):
        for row, place in zip(rows, places, strict=True):
            _dumbbell(axis, place, getattr(row, before), getattr(row, after), COLORS[row.method])
        axis.axvline(getattr(rows[0], after), color=COLORS["dense"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
        _perplexity_axis(axis, [value for row in rows for value in (getattr(row, before), getattr(row, after))])
    new.set_yticks(places, [f"{LABELS[row.method]}   {row.bytes / 1e6:.1f} MB" for row in rows], fontsize=9)
    for row, tick in zip(rows, new.get_yticklabels(), strict=True):
        tick.set_color(COLORS[row.method])
    new.set_ylim(max(places) + 0.7, min(places) - 0.9)
    for bits in dict.fromkeys(row.bits for row in rows):
        first = min(place for row, place in zip(rows, places, strict=True) if row.bits == bits)
        name = "dense, bf16" if bits == 16 else f"{bits} bits"
        for axis in (new, own):
            axis.axhline(first - 0.75, color="#DDDDDD", linewidth=0.8, zorder=0)
        own.text(1.01, first - 0.4, name, transform=own.get_yaxis_transform(), fontsize=10, fontweight="bold", va="top")
    legend = "perplexity (log scale, lower is better):  ○ before tuning   ● after;  dashed: dense + LoRA, after"
    figure.supxlabel(legend, fontsize=9)
    figure.savefig(path, facecolor="white")


def _places(rows: Sequence[Row]) -> list[float]:
    """A line each, with a gap where the bits change."""
    places, place = [], 0.0
    for index, row in enumerate(rows):
        place += 1.0 if index and rows[index - 1].bits == row.bits else 1.6
        places.append(place)
    return places


def _dumbbell(axis: Any, place: float, before: float, after: float, color: str) -> None:
    axis.plot([before, after], [place, place], color=color, linewidth=2.2, alpha=0.35, solid_capstyle="round")
    axis.scatter([before], [place], s=38, facecolors="white", edgecolors=color, linewidths=1.5, zorder=3)
    axis.scatter([after], [place], s=42, color=color, zorder=4)
    left = after <= before
    axis.annotate(f"{after:.1f}", (after, place), xytext=(-7 if left else 7, 0), textcoords="offset points", fontsize=8,
                  ha="right" if left else "left", va="center", color=color)  # fmt: skip


def _perplexity_axis(axis: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min(values) / 1.18, max(values) * 1.12
    marks = [
        mark for power in range(5) for mark in (m * 10**power for m in (1, 1.5, 2, 3, 4, 5, 6, 8)) if low < mark < high
    ]
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(FixedLocator(marks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#EEEEEE", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
