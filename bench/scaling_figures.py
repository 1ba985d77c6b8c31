"""The figures of docs/scaling.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's colours, told apart by every kind of colour vision
COLORS = {"nf4": "#0072B2", "nf2": "#D55E00", "dense": "#555555"}
AXES = {"size": "size", "rows": "rows", "rank": "rank", "threads": "threads"}  # section -> key of its points
Point = dict[str, Any]
Section = dict[str, Any]


def draw_layers(report: dict[str, Any], digest: str, path: Path) -> None:
    """Time along the four axes; whole lines are forward or a LoRA's step, broken ones forward and dx."""
    figure = Figure(figsize=(10, 7.2), dpi=100, layout="constrained")
    titles = {
        "size": "size of a square layer: ms at M=1, broken: M=256 with dx",
        "rows": "rows of x, 4096x4096: ms of forward, broken: with dx",
        "rank": "rank of a LoRA, 4096x4096, M=512: ms of forward and backward",
        "threads": "threads: ms of 4096x14336 M=1, broken: 4096x4096 M=512 with dx",
    }
    for panel, name in zip(figure.subplots(2, 2).flat, AXES, strict=True):
        points = report["sections"].get(name, {"points": []})["points"]
        places = sorted({point[AXES[name]] for point in points})
        for kind in dict.fromkeys(point["kind"] for point in points):
            for what in dict.fromkeys(point["what"] for point in points):
                of = [point for point in points if (point["kind"], point["what"]) == (kind, what)]
                broken = what == "forward and dx"
                panel.plot(
                    [places.index(point[AXES[name]]) for point in of],
                    [1e3 * point["median_s"] for point in of],
                    "o--" if broken else "o-",
                    markersize=4,
                    color=COLORS[kind.split()[0]],
                    label=None if broken else kind,
                )
        panel.set_xticks(range(len(places)), [str(place) for place in places])
        if name == "rank":
            panel.set_ylim(bottom=0)
        else:
            _log(panel.yaxis, panel.set_yscale)
        _finish(panel, titles[name])
    _save(figure, digest, path)


def draw_models(section: Section, digest: str, path: Path) -> None:
    """A step, a token and the peak over parameters: dots measured, rings and fitted lines extrapolated."""
    figure = Figure(figsize=(12, 3.8), dpi=100, layout="constrained")
    panels = (
        ("step_s", 1.0, f"a training step on {section['tokens']} tokens: s"),
        ("token_s", 1.0, "a forward of one token: s"),
        ("peak_bytes", 1e9, "peak memory of a step: GB"),
    )
    for panel, (what, scale, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for kind, lines in section["fits"].items():
            color = COLORS[kind.split()[0]]
            measured, beyond = (
                [(point["parameters"] / 1e9, point[what] / scale) for point in points if point["kind"] == kind]
                for points in (section["points"], section["larger"])
            )
            panel.plot(*zip(*measured, strict=True), "o", markersize=5, color=color, label=kind)
            panel.plot(*zip(*beyond, strict=True), "o", markersize=5, color=color, markerfacecolor="white")
            first, last = measured[0][0], beyond[-1][0]
            grid = [first * (last / first) ** (step / 40) for step in range(41)]
            line = [(lines[what]["a"] + lines[what]["b"] * 1e9 * n) / scale for n in grid]
            panel.plot(grid, line, "--", linewidth=0.8, color=color)
        for axis, scaled in ((panel.xaxis, panel.set_xscale), (panel.yaxis, panel.set_yscale)):
            _log(axis, scaled)
        _finish(panel, f"{title}, over billions of parameters\n(dots measured, rings and lines extrapolated)")
    _save(figure, digest, path)


def _log(axis: Axis, set_scale: Callable[[str], None]) -> None:
    """A logarithmic axis whose ticks read as plain numbers."""
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _finish(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.grid(color="#EEEEEE")
    panel.tick_params(labelsize=8)
    if panel.has_data():
        panel.legend(fontsize=8)


def _save(figure: Figure, digest: str, path: Path) -> None:
    """As PNG; it names the results that it shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Source": digest})
