"""Figures of docs/numbers.md: bandwidth by format, time over rows of x, error against stored bits.

A PNG names, in its metadata, the results that it shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cases import NF4, PEERS
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by every kind of colour vision
COLORS = dict(zip(("qft", *PEERS), ("#0072B2", "#D55E00", "#E69F00", "#555555", "#009E73"), strict=True))
PALE = {"avx512": "#56B4E9", "panel": "#CC79A7"}  # rows of qft's kernel table, named in the call
GRID = "#EEEEEE"


def draw_speed(speed: dict[str, Any], digest: str, path: Path) -> None:
    """Left: bytes per second of the largest layer at the fewest rows. Right: time over rows, nf4 and the peers."""
    products = [row for experiment in speed["experiments"] for row in experiment["rows"] if row["verb"] == "matmul"]
    figure = Figure(figsize=(10, 3.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    _bandwidth(left, products, speed["limits"]["read"])
    _crossover(right, products)
    _save(figure, digest, path)


def _bandwidth(axes: Any, products: list[dict[str, Any]], read: float) -> None:
    largest = max((row["shape"] for row in products), key=lambda shape: shape[0] * shape[1])
    fewest = min(row["rows"] for row in products)
    bars = {}
    for row in products:
        if (row["shape"], row["rows"], row["kernel_named"]) == (largest, fewest, None):
            bars.setdefault(row["name"], row)
    speeds = [row["weight_bytes"] / row["median_s"] / 1e9 for row in bars.values()]
    axes.barh([*bars], speeds, color=[COLORS[row["who"]] for row in bars.values()])
    axes.axvline(read / 1e9, color="#888888", linestyle="--")
    axes.invert_yaxis()
    work = next(iter(bars.values()))["work"]
    axes.set_title(f"{work}: GB/s of stored weight\n(dashed: measured read bandwidth)", fontsize=9)
    axes.tick_params(labelsize=8)


def _crossover(axes: Any, products: list[dict[str, Any]]) -> None:
    shapes = [row["shape"] for row in products]
    usual = max(shapes, key=lambda shape: len({row["rows"] for row in products if row["shape"] == shape}))
    lines: dict[str, dict[int, float]] = {}
    for row in products:
        if row["shape"] == usual and (row["who"] != "qft" or row["fmt"] == NF4):
            kernel = f", kernel {row['kernel_named']}" if row["kernel_named"] else ""
            lines.setdefault(row["who"] + kernel, {})[row["rows"]] = 1e3 * row["median_s"]
    for name, points in sorted(lines.items(), key=lambda item: item[0] != "qft"):
        color = COLORS.get(name) or PALE.get(name.rpartition(" ")[2], "#000000")
        thin = "kernel" in name
        style = {"linestyle": "--", "linewidth": 1} if thin else {"marker": "o", "markersize": 4}
        axes.loglog(*zip(*sorted(points.items()), strict=True), color=color, label=name, base=2, **style)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(f"matmul {usual[0]}x{usual[1]} bf16, 4-bit weights: ms over rows of x", fontsize=9)
    axes.legend(fontsize=7)
    axes.grid(color=GRID)


FAMILIES = {"nf": "#0072B2", "lm": "#009E73", "int": "#D55E00", "int zero": "#CC79A7", "fp": "#E69F00"}
WIDEST = 5  # stored bits that are drawn: 8-bit codes lie far below


def draw_errors(report: dict[str, Any], digest: str, path: Path) -> None:
    """A line for each family of codes with absmax scales, and a dashed one with searched scales."""
    figure = Figure(figsize=(7.5, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    families: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if row["bits"] <= WIDEST:
            families.setdefault(_family(row["format"]), []).append(row)
    for name, rows in families.items():
        bits, color = [row["bits"] for row in rows], FAMILIES.get(name, "#555555")
        axes.semilogy(bits, [row["error"] for row in rows], "o-", color=color, label=name)
        axes.semilogy(bits, [row["searched"] for row in rows], "o--", color=color, markerfacecolor="white", linewidth=1)
    axes.set_yticks([0.1, 0.2, 0.3, 0.4, 0.6], labels=["0.1", "0.2", "0.3", "0.4", "0.6"])
    axes.minorticks_off()
    axes.set_xlabel("stored bits per weight")
    axes.set_title("relative error of a normal weight, g64 (dashed: with search=True)", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(color=GRID)
    _save(figure, digest, path)


def _family(fmt: str) -> str:
    """nf of "nf4 g64 f16", int zero of "int4 g64 f16 zero", and what has scales of its own by its spelling."""
    code, _, scale, *zero = fmt.split()
    return fmt if scale == "dq" else " ".join((code.rstrip("0123456789"), *zero))


def _save(figure: Figure, digest: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Source": digest})
