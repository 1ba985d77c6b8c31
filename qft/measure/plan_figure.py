"""A plan as a picture: one bar per weight in the model's order, as high as its stored bits, coloured by its codes'."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..format import Format
from .plan import Plan

# Okabe and Ito's colours, told apart by every kind of colour vision
COLORS = {1: "#CC79A7", 2: "#D55E00", 3: "#E69F00", 4: "#0072B2", 8: "#555555"}
NAMED = 80  # weights whose names still fit side by side


def draw_plan(plan: Plan, path: str | Path) -> None:
    """Write the figure of a plan to `path` as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10.5, 4.4), dpi=160, layout="constrained")
    axis = figure.subplots()
    widths = [Format.parse(weight.format).bits for weight in plan.weights]
    places = range(len(plan.weights))
    axis.bar(places, [weight.bits_per_weight for weight in plan.weights], 0.82, color=[COLORS[bits] for bits in widths])
    marks = [(plan.bits_per_weight, "stored", "#000000")]
    if plan.budget is not None and plan.budget - plan.bits_per_weight > 0.02:  # else the two lines are one
        marks.append((plan.budget, "budget", "#888888"))
    for bits, name, color in marks:
        axis.axhline(bits, color=color, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.text(1.005, bits, f"{name}\n{bits:.3f}", transform=axis.get_yaxis_transform(), fontsize=8, va="center")
    if len(plan.weights) <= NAMED:
        axis.set_xticks(places, [weight.paths[0] for weight in plan.weights], rotation=90, fontsize=4.5)
    else:
        axis.set_xlabel(f"{len(plan.weights)} weights in the model's order", fontsize=9)
    used = sorted({(bits, weight.format) for bits, weight in zip(widths, plan.weights, strict=True)})
    counts = Counter(weight.format for weight in plan.weights)
    legend = []
    for bits in dict.fromkeys(bits for bits, _ in used):
        formats = ",  ".join(f"{fmt} ({counts[fmt]})" for width, fmt in used if width == bits)
        legend.append(Patch(color=COLORS[bits], label=f"{bits} bits:  {formats}"))
    figure.legend(handles=legend, loc="outside lower left", frameon=False, fontsize=8, ncols=len(legend))
    axis.set_title(
        f"Stored bits of each weight: {plan.bits_per_weight:.3f} on average", loc="left", fontsize=11, fontweight="bold"
    )
    axis.set_xlim(-0.8, len(plan.weights) - 0.2)
    axis.tick_params(axis="x", length=0)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, facecolor="white", format="png")
