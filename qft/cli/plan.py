"""qft plan."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .app import app
from .models import open_model
from .options import AsJson, Dtype, Model
from .output import new_table, print_result, quiet

if TYPE_CHECKING:
    from ..measure.plan import Plan


@app.command()
def plan(
    model: Model,
    bits: Annotated[float | None, typer.Option(help="Budget: stored bits per weight, scales included.")] = None,
    first: Annotated[int | None, typer.Option(help="Instead: this many blocks take the first of two formats.")] = None,
    format: Annotated[list[str] | None, typer.Option(help="To choose from; left out, lm2 to lm4 g128 to g32.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Of qft calibrate: measure the outputs' error.")] = None,
    search: Annotated[bool, typer.Option(help="Measure searched scales; else absmax ones, as init plain has.")] = True,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out layers of this name; can be repeated.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Take a layer left dense otherwise: lm_head.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the plan, for quantize --plan.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the plan, as PNG.")] = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Choose a format for each layer: the least error within a budget of bits."""
    quiet()
    from ..disk.directory import is_quantized
    from ..measure.calibration import Calibration
    from ..measure.measured_plan import LADDER, plan_bits, plan_first_layers
    from ..measure.plan_figure import draw_plan

    if is_quantized(model):
        raise ValueError(f"{model} is quantized already; name the dense model")
    if (bits is None) == (first is None):
        raise ValueError("a plan needs --bits or --first, and not both; write for example --bits 2.5")
    if first is not None and len(format or ()) != 2:
        raise ValueError(
            f"--first {first} needs two formats; write for example --format 'nf4 g64 f16' --format 'nf2 g64 f16'"
        )
    moments = Calibration.load(calibration) if calibration else None
    network = open_model(model, None, dtype)
    options = {"calibration": moments, "search": search, "skip": skip or (), "include": include or (), "progress": True}
    start = time.perf_counter()
    if bits is not None:
        made = plan_bits(network, bits, format or LADDER, **options)  # type: ignore[arg-type]
    else:
        made = plan_first_layers(network, first or 0, *(format or ()), **options)  # type: ignore[arg-type]
    if output:
        made.save(output)
    if figure:
        draw_plan(made, figure)
    result = {
        "formats": made.formats,
        "bits per weight": made.bits_per_weight,
        "bytes": made.nbytes,
        "error": made.error,
        "measure": made.measure,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print_result(result, as_json, _table(made))


def _table(made: Plan) -> Table:
    """How many layers of each kind take which format: a large model has hundreds."""
    formats = sorted(
        {weight.format for weight in made.weights},
        key=lambda fmt: min(weight.bits_per_weight for weight in made.weights if weight.format == fmt),
    )
    table = new_table("layer", *formats, "bits", "error")
    kinds: dict[str, list] = {}
    for weight in made.weights:
        kinds.setdefault(weight.paths[0].rpartition(".")[2], []).append(weight)
    kinds["all"] = [*made.weights]
    for name, weights in kinds.items():
        counts = Counter(weight.format for weight in weights)
        stored = 8 * sum(weight.nbytes for weight in weights)
        table.add_row(
            name,
            *(str(counts[fmt] or "") for fmt in formats),
            f"{stored / sum(weight.shape[0] * weight.shape[1] for weight in weights):.3f}",
            f"{sum(weight.error for weight in weights):.4f}",
        )
    table.caption = f"error: sum of the {made.measure}"
    return table
