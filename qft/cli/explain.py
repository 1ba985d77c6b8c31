"""qft explain."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app
from .options import AsJson
from .output import new_table, print_result


@app.command()
def explain(
    format: Annotated[str, typer.Argument(help="A weight format, for example 'nf4 g64 f32'.")],
    out_features: Annotated[int, typer.Argument(help="Rows of the weight.")] = 4096,
    in_features: Annotated[int, typer.Argument(help="Columns of the weight.")] = 4096,
    rows: Annotated[int, typer.Option(help="Rows of the activations.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the activations: float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[
        str | None, typer.Option(help="Of the weight: cpu or cuda; without it, cuda where there is.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which kernel each verb takes on this machine, and why the others were passed over."""
    import torch

    from .. import kernels
    from ..disk.pretrained import CHOICES

    if dtype not in CHOICES[1:]:
        raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(CHOICES[1:])}")
    if min(out_features, in_features, rows) < 1:
        raise ValueError(f"{rows} rows times a {out_features} x {in_features} weight is empty; use 1 or more of each")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is unknown; use cpu or cuda")
    chosen = kernels.explain(format, out_features, in_features, rows, getattr(torch, dtype), device)
    table = new_table("verb", "kernel", "passed over", justify="left")
    for verb, choice in chosen.items():
        taken = f"{choice.kernel.name}: {choice.kernel.about}"
        table.add_row(verb, taken, "\n".join(f"{name}: {why}" for name, why in choice.passed_over))
    result = {
        verb: {"kernel": c.kernel.name, "about": c.kernel.about, "passed over": dict(c.passed_over)}
        for verb, c in chosen.items()
    }
    print_result(result, as_json, table)
