"""qft info."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app
from .models import described, layers_table
from .options import AsJson
from .output import print_result, quiet, values

if TYPE_CHECKING:
    from ..machine import Machine


@app.command()
def info(
    model: Annotated[Path | None, typer.Argument(help="A model, or a file of scales; left out, the machine.")] = None,
    as_json: AsJson = False,
) -> None:
    """Describe this machine, a model, or a task."""
    if model is None:
        from ..machine import look

        machine = look()
        if not as_json:
            print(machine.line)  # in one piece, whatever the terminal's width
        print_result(_facts(machine, as_json), as_json, values(_facts(machine, as_json)))
        if not as_json:
            print("\n".join(machine.troubles))
    elif model.is_file():
        from ..adapters.scales import read_task

        layers = read_task(model)
        formats = sorted({str(layer.format) for layer in layers.values()})
        scales = sum(math.prod(layer.stored.shape) for layer in layers.values())
        task = {"layers": len(layers), "formats": formats, "scales": scales, "bytes": model.stat().st_size}
        print_result(task, as_json, values(task))
    else:
        from ..disk.directory import is_quantized
        from ..disk.pretrained import describe, load_model
        from ..model.layer_report import report

        quiet()
        made = describe(model) if is_quantized(model) else report(load_model(model))
        print_result(described(made), as_json, layers_table(made))


def _facts(machine: Machine, all_of_it: bool) -> dict[str, Any]:
    """What was found, by name; `all_of_it`: with what the line says too."""
    said = {"diagnosis": machine.line, "troubles": machine.troubles, **machine.versions, "processor": machine.processor}
    return {
        **(said if all_of_it else {}),
        "cores": machine.cores,
        "threads": machine.threads,
        "instruction sets": list(machine.instruction_sets),
        "compiled codes": list(machine.compiled),
        "C++ compiler": machine.compiler or None,
        "nvcc": machine.nvcc or None,
        "CUDA of torch": machine.torch_cuda or None,
        "CUDA kernels for": list(machine.cuda_targets),
        "GPUs": [gpu.name for gpu in machine.gpus],
        "cache": str(machine.cache),
    }
