"""What of a model is quantized, in which formats and bytes, and what is dense and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..format import Format
from ..nn.experts import QuantExperts, layout_of, oriented
from ..nn.linear import QuantLinear
from ..nn.packed import Packed, weights_of
from .targets import is_linear, weight_of


@dataclass(frozen=True)
class LayerReport:
    """One weight of a model: quantized, or dense with the reason."""

    path: str  # of the layer; of the parameter where it is one of several, as the projections of experts are
    format: Format | None
    shape: tuple[int, ...]  # (out_features, in_features), (rows, columns) of an embedding, (experts, out, in)
    nbytes: int  # of the stored weight, scales and padding included; adapters and bias not
    dense_nbytes: int  # of the weight as it was, or in bf16 where that is not known
    rank: int = 0
    errors: tuple[float, ...] = ()  # relative Frobenius error after each step of the start; the least is what is kept
    reason: str = ""  # why a layer was left dense
    kind: str = "linear"  # or "embedding", "experts", or "parameter": one of three dimensions that qft does not know
    shares: str = ""  # path of the layer whose stored weight this one uses

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Report:
    """What of a model is quantized: linear layers, embeddings, experts, and what other parameters of three dimensions
    there are. The bytes, and the weights, count each once, wherever it is used."""

    layers: tuple[LayerReport, ...]
    nbytes: int  # of all parameters and buffers as stored
    other_nbytes: int = 0  # of them, what belongs to no layer's weight: norms, biases, adapters
    parameters: int = 0  # of the model, adapters included; a packed weight counts as the weights it stands for

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The quantized layers."""
        return tuple(layer for layer in self.layers if layer.format is not None)

    @property
    def dense(self) -> tuple[LayerReport, ...]:
        """The layers left dense."""
        return tuple(layer for layer in self.layers if layer.format is None)

    @property
    def quantized_nbytes(self) -> int:
        """Bytes of the quantized layers' weights as stored."""
        return sum(layer.nbytes for layer in self.quantized if not layer.shares)

    @property
    def quantized_parameters(self) -> int:
        """How many of the model's parameters are quantized."""
        return sum(layer.weights for layer in self.quantized if not layer.shares)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, over all quantized layers; 0 without any."""
        return 8 * self.quantized_nbytes / self.quantized_parameters if self.quantized_parameters else 0.0

    def __str__(self) -> str:
        lines = [
            f"{layer.path}: {layer.format or 'dense, ' + layer.reason}, {'x'.join(map(str, layer.shape))}, "
            + (f"shared with {layer.shares}" if layer.shares else f"{layer.nbytes} bytes")
            + (f", error {min(layer.errors):.4f}" if layer.errors else "")
            for layer in self.layers
        ]
        quantized = f"{len(self.quantized)} layers quantized at {self.bits_per_weight:.3f} bits per weight"
        parameters = f"{self.quantized_parameters} of {self.parameters} parameters"
        summary = f"{quantized}, {parameters}; {len(self.dense)} left dense; {self.nbytes} bytes in all"
        return "\n".join([*lines, summary])


def report(model: nn.Module) -> Report:
    """What of a model is quantized, in which formats and bytes, and what is dense and why."""
    layers: list[LayerReport] = []
    holder: dict[int, str] = {}  # the path that each stored weight was first met under
    counted: set[int] = set()
    for path, module in model.named_modules():
        for layer, tensors in _layers_of(path, module):
            first = holder.setdefault(id(tensors[0]), layer.path)
            layers.append(replace(layer, shares="" if first == layer.path else first))
            counted.update(map(id, tensors))
    stored = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = sum(tensor.nbytes for key, tensor in stored.items() if key not in counted)
    alone = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in counted)
    weights = sum(layer.weights for layer in layers if not layer.shares)
    return Report(tuple(layers), sum(tensor.nbytes for tensor in stored.values()), other, alone + weights)


def _layers_of(path: str, module: nn.Module) -> Iterator[tuple[LayerReport, list[Tensor]]]:
    """What a module itself holds, and the tensors it is stored as."""
    reason: str = getattr(module, "qft_reason", "not asked for")
    if isinstance(module, Packed):
        for packed in weights_of(path, module):
            q = packed.value
            share = math.prod(q.shape) / sum(math.prod(module.packed_shape(name)) for name in module.code_names)
            dense = round(module.dense_nbytes * share) or 2 * math.prod(q.shape)
            rank = module.lora_rank if isinstance(module, QuantLinear) else 0
            errors = (
                module.start_errors.get(packed.name, ()) if isinstance(module, QuantExperts) else module.init_errors
            )
            made = LayerReport(packed.path, q.format, q.shape, q.nbytes, dense, rank, errors, kind=kind_of(module))
            yield made, list(q.tensors().values())
        return
    if isinstance(module, (nn.Linear, nn.Embedding)) or is_linear(module):
        weight = cast(Tensor, module._parameters["weight"])
        yield _dense(path, weight, tuple(weight_of(module).shape), reason, kind_of(module)), [weight]
        return
    layout: Any = layout_of(module)
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.dim() != 3 or 1 in parameter.shape or isinstance(module, _ConvNd):
            continue
        here = f"{path}.{name}".lstrip(".")
        if layout and name in layout.projections:
            yield _dense(here, parameter, tuple(oriented(module, name).shape), reason, "experts"), [parameter]
        else:
            reason = f"a 3-D parameter of {type(module).__name__}, whose forward pass qft does not know"
            yield _dense(here, parameter, tuple(parameter.shape), reason, "parameter"), [parameter]


def _dense(path: str, weight: Tensor, shape: tuple[int, ...], reason: str, kind: str) -> LayerReport:
    return LayerReport(path, None, shape, weight.nbytes, weight.nbytes, reason=reason, kind=kind)


def kind_of(module: nn.Module) -> str:
    """What `LayerReport` and a saved model's description call a layer's kind."""
    return (
        "embedding" if isinstance(module, nn.Embedding) else "experts" if isinstance(module, QuantExperts) else "linear"
    )
