"""qft adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import AsJson
from .output import print_result, quiet, values


@app.command()
def adapter(
    model: Annotated[Path, typer.Argument(help="A quantized model with a LoRA, as qft finetune writes it.")],
    out: Annotated[Path, typer.Argument(help="A new directory for the LoRA alone, in PEFT's adapter format.")],
    as_json: AsJson = False,
) -> None:
    """Take a tuned model's LoRA out, for a library to compose or for PEFT."""
    quiet()
    from ..adapters.peft_format import describe_adapter, save_adapter
    from ..disk import checkpoint
    from ..disk.directory import load

    checkpoint.refuse_to_overwrite(out)
    save_adapter(load(model), out)
    layers = describe_adapter(out)
    ranks = sorted({layer.rank for layer in layers.values()})
    size = sum(path.stat().st_size for path in out.iterdir())
    result = {"out": str(out), "layers": len(layers), "ranks": ranks, "bytes": size}
    print_result(result, as_json, values(result))
