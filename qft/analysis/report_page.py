"""A model on one page: bits, errors, size and the last run's losses as a self-contained HTML file.

The page loads nothing, runs no script, and follows the reader's light or dark colours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from torch import Tensor, nn

from .. import __version__
from ..model.layer_report import LayerReport, Report, report
from ..nn.packed import packed_weights
from .charts import Chart, bar_chart, curve, histogram, smoothed
from .weight_errors import WeightErrors, start_errors, weight_errors

TEMPLATE = "report_page.html.j2"
PARTS = {
    "codes": "weights, as packed codes",
    "scales": "scales and zero points",
    "adapters": "adapters",
    "embeddings": "embeddings",
    "rest": "norms, biases, layers left dense",
}


@dataclass(frozen=True)
class Part:
    """A share of a model's bytes: as stored, and of the dense model."""

    kind: str
    label: str
    stored: int
    dense: int


@dataclass(frozen=True)
class Group:
    """Layers of one kind: of the same last name, format and shape."""

    name: str
    format: str
    shape: str
    count: int
    nbytes: int
    bits: float
    error: float | None  # mean over the layers


def report_page(
    model: nn.Module, name: str, dense: nn.Module | None = None, losses: Sequence[tuple[int, float]] = ()
) -> str:
    """The page of a model, as HTML.

    Args:
        model: quantized, on any device.
        name: what the page calls it.
        dense: the dense model it was made from: errors are then measured, and drawn weight by weight; without it they
            are those that the model's start left behind.
        losses: of the run that made it: optimizer step and nats per token.

    Raises:
        ValueError: nothing is quantized, or `dense` is another model.
    """
    from jinja2 import Environment, StrictUndefined

    made = report(model)
    if not made.quantized:
        raise ValueError(f"{name} holds no quantized layer; give a model that qft quantized")
    measured = weight_errors(model, dense) if dense is not None else None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(**_content(model, name, made, measured, losses))


def _content(
    model: nn.Module, name: str, made: Report, measured: WeightErrors | None, losses: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    kept = {layer.path: min(layer.errors) for layer in made.quantized if layer.errors}
    errors = measured.relative if measured else kept
    known = [layer for layer in made.quantized if layer.path in errors]
    parts = parts_of(model, made)
    smooth = smoothed([loss for _, loss in losses])
    return {
        "version": __version__,
        "name": name,
        "architecture": type(model).__name__,
        "formats": Counter(str(layer.format) for layer in made.quantized).most_common(),
        "widths": sorted({layer.format.bits for layer in made.quantized if layer.format}),
        "made": made,
        "parts": parts,
        "stored": sum(part.stored for part in parts),
        "dense": sum(part.dense for part in parts),
        "reasons": sorted({(layer.path.rpartition(".")[2], layer.reason) for layer in made.dense}),
        "bits": _per_layer(made.quantized, [layer.bits_per_weight for layer in made.quantized], errors),
        "measured": measured is not None,
        "errors": errors,
        "mean_error": sum(errors.values()) / len(errors) if errors else None,
        "worst": sorted(errors.items(), key=lambda item: -item[1])[:3],
        "error": _per_layer(known, [errors[layer.path] for layer in known], errors),
        "histograms": _histograms(made, errors, measured),
        "groups": _groups(made.quantized, errors),
        "losses": losses,
        "smooth": smooth,
        "curve": curve(losses, smooth) if losses else None,
    }


# ------------------------------------------------------------------------------------------------ charts


def _per_layer(layers: Sequence[LayerReport], heights: Sequence[float], errors: Mapping[str, float]) -> Chart | None:
    if not layers:
        return None
    titles = [_title(layer, errors.get(layer.path)) for layer in layers]
    return bar_chart(heights, list(map(_kind, layers)), titles, [block_of(layer.path) for layer in layers])


def _kind(layer: LayerReport) -> str:
    return f"bits{layer.format.bits}" if layer.format else "dense"


def _title(layer: LayerReport, error: float | None) -> str:
    said = f"{layer.path}\n{layer.format}, {_shape(layer)}\n{layer.bits_per_weight:.3f} bits per weight"
    return said if error is None else f"{said}\nerror {error:.4f}"


def _shape(layer: LayerReport) -> str:
    return "x".join(map(str, layer.shape))


def block_of(path: str) -> int | None:
    """The block a layer is in: the first number in its path."""
    return next((int(word) for word in path.split(".") if word.isdecimal()), None)


def _histograms(
    made: Report, errors: Mapping[str, float], measured: WeightErrors | None
) -> list[tuple[str, int, Chart]]:
    """A histogram per format: its spelling, how many weights (or layers) are in it, and the chart."""
    kinds = {str(layer.format): _kind(layer) for layer in made.quantized}
    of_format: dict[str, list[float]] = {}
    for layer in made.quantized:
        if layer.path in errors:
            of_format.setdefault(str(layer.format), []).append(errors[layer.path])
    drawn = measured.histograms if measured else {fmt: start_errors(found) for fmt, found in of_format.items()}
    return [
        (fmt, h.total, histogram(h.first, h.width, h.counts, kinds[fmt], symmetric=measured is not None))
        for fmt, h in sorted(drawn.items())
    ]


# ------------------------------------------------------------------------------------------------ numbers


def parts_of(model: nn.Module, made: Report) -> list[Part]:
    """What a model's bytes are: each tensor once, by what it serves, beside the dense model's."""
    stored, dense = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    was = {layer.path: layer.dense_nbytes for layer in made.quantized}
    seen: set[int] = set()
    for path, weight in packed_weights(model).items():
        tensors = {id(tensor): tensor for tensor in weight.value.tensors().values()}
        if not seen & set(tensors):  # else shared, as a tied head's is
            stored["codes"] += weight.value.weight.nbytes
            stored["scales"] += weight.value.nbytes - weight.value.weight.nbytes
            dense["codes"] += was[path]
        seen |= set(tensors)
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    others: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in others:
        if id(tensor) not in seen:
            kind = "adapters" if "lora_" in name else "embeddings" if id(tensor) in embeddings else "rest"
            stored[kind] += tensor.nbytes
            if kind != "adapters" and not name.endswith("weight_format"):
                dense[kind] += tensor.nbytes
        seen.add(id(tensor))
    return [Part(kind, label, stored[kind], dense[kind]) for kind, label in PARTS.items()]


def _groups(layers: Sequence[LayerReport], errors: Mapping[str, float]) -> list[Group]:
    kinds: dict[tuple[str, str, str], list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault((layer.path.rpartition(".")[2], str(layer.format), _shape(layer)), []).append(layer)
    groups = []
    for (name, fmt, shape), same in kinds.items():
        known = [errors[layer.path] for layer in same if layer.path in errors]
        mean = sum(known) / len(known) if known else None
        nbytes = sum(layer.nbytes for layer in same)
        groups.append(Group(name, fmt, shape, len(same), nbytes, same[0].bits_per_weight, mean))
    return groups
