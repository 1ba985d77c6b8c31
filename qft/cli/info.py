"""qft info."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .models import described, layers_table
from .options import AsJson
from .output import print_result, quiet, values


@app.command()
def info(
    model: Annotated[Path | None, typer.Argument(help="A model, or a file of scales; left out, the machine.")] = None,
    as_json: AsJson = False,
) -> None:
    """Describe this machine, a model, or a task."""
    if model is None:
        machine = _machine()
        print_result(machine, as_json, values(machine))
    elif model.is_file():
        from ..adapters.scales import read_task

        layers = read_task(model)
        formats = sorted({str(layer.format) for layer in layers.values()})
        scales = sum(math.prod(layer.stored.shape) for layer in layers.values())
        task = {"layers": len(layers), "formats": formats, "scales": scales, "bytes": model.stat().st_size}
        print_result(task, as_json, values(task))
    else:
        from ..model import report
        from ..pretrained import describe, is_quantized, load_model

        quiet()
        made = describe(model) if is_quantized(model) else report(load_model(model))
        print_result(described(made), as_json, layers_table(made))


def _machine() -> dict[str, Any]:
    import platform

    import torch

    from .. import __version__, native
    from ..compiler.jit import cache_folder

    return {
        "qft": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.machine(),
        "threads": native.threads(),
        "instruction sets": list(native.instruction_sets()),
        "compiled codes": sorted({code for code, isa in native.tables() if isa != "cuda"}),
        "CUDA kernels for": sorted({name for names in native.cuda_targets().values() for name in names}),
        "GPUs": [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())],
        "cache": str(cache_folder()),
    }
