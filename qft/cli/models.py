"""A model as a command opens it, and as it is described."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .output import new_table

if TYPE_CHECKING:
    from ..model.layer_report import LayerReport, Report


def open_model(model: Path, task: Path | None, dtype: str) -> Any:
    from ..adapters.peft_format import load_adapter
    from ..adapters.scales import load_scales
    from ..disk.pretrained import device, load_model

    network = load_model(model, dtype)
    if task:
        (load_adapter if task.is_dir() else load_scales)(network, task)
    return network.to(device())


def described(made: Report) -> dict[str, Any]:
    layers = [
        {
            "path": layer.path,
            "format": str(layer.format) if layer.format else None,
            "shape": list(layer.shape),
            "bytes": layer.nbytes,
            "bits per weight": layer.bits_per_weight,
            "kind": layer.kind,
            "rank": layer.rank,
            "errors": list(layer.errors),
            **({"reason": layer.reason} if layer.reason else {}),
        }
        for layer in made.layers
    ]
    return {
        "layers": layers,
        "bytes": made.nbytes,
        "bits per quantized weight": made.bits_per_weight,
        "parameters": made.parameters,
        "quantized parameters": made.quantized_parameters,
    }


def layers_table(made: Report) -> Table:
    """Layers of the same kind in one line: a large model has hundreds."""
    kinds: dict[tuple[str, ...], list[LayerReport]] = {}
    for layer in made.layers:
        shape = "x".join(map(str, layer.shape))
        kinds.setdefault((layer.path.rpartition(".")[2], str(layer.format or "dense"), shape), []).append(layer)
    table = new_table("layer", "format", "weight", "layers", "MB", "bits", "rank", "error")
    for (name, format, shape), layers in kinds.items():
        errors = [layer.errors[-1] for layer in layers if layer.errors]
        table.add_row(
            name,
            format,
            shape,
            str(len(layers)),
            f"{sum(layer.nbytes for layer in layers if not layer.shares) / 1e6:.2f}",
            f"{layers[0].bits_per_weight:.3f}",
            str(layers[0].rank or ""),
            f"{sum(errors) / len(errors):.4f}" if errors else "",
        )
    table.add_row("all else", "", "", "", f"{made.other_nbytes / 1e6:.2f}", end_section=True)
    table.add_row(
        "quantized",
        "",
        "",
        str(len(made.quantized)),
        f"{made.quantized_nbytes / 1e6:.2f}",
        f"{made.bits_per_weight:.3f}",
    )
    table.add_row("the model", "", "", "", f"{made.nbytes / 1e6:.2f}")
    reasons = {f"{layer.path.rpartition('.')[2]} is dense: {layer.reason}" for layer in made.dense if made.quantized}
    table.caption = "\n".join(sorted(reasons)) or None
    return table
