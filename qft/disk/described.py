"""A quantized layer and what a file says of it: from one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapted import AdaptedLinear
from ..adapters.scales import remember_scale, remembered_scale
from ..format import FormatError
from ..model.layer_report import kind_of
from ..model.targets import is_linear, weight_of
from ..nn import embedding, experts
from ..nn.embedding import QuantEmbedding
from ..nn.experts import QuantExperts
from ..nn.linear import FloatFacingQuantLinear, QuantLinear
from ..nn.packed import Packed
from .manifest import Layer, Lora, Projection
from .tensor_file import DTYPE_NAMES, DTYPES


def describe(model: nn.Module) -> dict[str, Layer]:
    """What `save` writes of each quantized layer, by path. Raises TypeError for a layer that `save` refuses."""
    return {
        path: describe_layer(module, path)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Packed)
    }


def describe_layer(layer: Packed, path: str) -> Layer:
    """What `qft.save` writes of one layer. Raises TypeError for a layer that it refuses."""
    if type(layer) not in (QuantLinear, FloatFacingQuantLinear, QuantEmbedding, QuantExperts):
        way_out = layer.way_to_save if isinstance(layer, AdaptedLinear) else "convert the layer first"
        raise TypeError(f"{path} is a {type(layer).__name__}; qft.save knows QuantLinear itself, {way_out}")
    lora = None
    if isinstance(layer, QuantLinear) and layer.lora_rank:
        dropout = float(getattr(layer.lora_dropout, "p", 0.0))
        lora = Lora(layer.lora_rank, float(layer.lora_alpha), float(layer.lora_scaling), dropout, layer.lora_pooled)
    face: Any = getattr(layer, "dense_dtype", None)
    projections = {}
    if isinstance(layer, QuantExperts):
        errors = layer.start_errors
        projections = {name: Projection(layer.packed_shape(name), errors.get(name, ())) for name in layer.code_names}
    return Layer(
        format=layer.format,
        shape=layer.packed_shape(layer.code_names[0]),
        bias=isinstance(layer, QuantLinear) and layer.bias is not None,
        lora=lora,
        faces=None if face is None else DTYPE_NAMES[face.dtype],
        stored_scale=remembered_scale(layer),
        errors=tuple(map(float, layer.init_errors)),
        dense_nbytes=layer.dense_nbytes or None,
        kind=kind_of(layer),
        projections=projections,
    )


def without_values(
    source: str | Path,
    described: Mapping[str, Layer],
    model: nn.Module,
    way_out: str = "give the skeleton it was saved from",
) -> dict[str, Packed]:
    """The layers that a source describes, on the meta device, for their paths in a model; the model is only looked at.

    Raises:
        FormatError: the model has no such layer, or one of another shape.
    """
    layers: dict[str, Packed] = {}
    for path, entry in described.items():
        try:
            old = model.get_submodule(path)
        except AttributeError:
            raise FormatError(f"{source} quantizes {path}, which the model does not have; {way_out}") from None
        shapes = _shapes_of(old, entry.kind)
        if shapes != {name: weight.shape for name, weight in entry.weights.items()}:
            theirs = " ".join(("is", type(old).__name__, *(str(list(shape)) for shape in shapes.values())))
            raise FormatError(f"{source} quantizes {path} {list(entry.shape)}, which {theirs} in the model; {way_out}")
        layers[path] = _without_values(entry, old)
    return layers


def _shapes_of(module: nn.Module, kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that a layer of this kind packs in the module's place, by name; none if it cannot."""
    if isinstance(module, Packed):
        return {name: module.packed_shape(name) for name in module.code_names} if kind_of(module) == kind else {}
    if kind == "experts":
        layout = None if experts.reason_against(module) else experts.layout_of(module)
        return {name: tuple(experts.oriented(module, name).shape) for name in layout.projections} if layout else {}
    if kind == "embedding":
        fits = isinstance(module, nn.Embedding) and not embedding.reason_against(module)
    else:
        fits = isinstance(module, nn.Linear) or is_linear(module)
    return {"weight": tuple(weight_of(module).shape)} if fits else {}


def put_face(layer: Packed, faces: str | None) -> None:
    """Give a layer the dtype that it faces its parent with, or that an embedding returns: `Layer.faces`."""
    if faces is None:
        return
    if isinstance(layer, QuantEmbedding):
        layer.dense_dtype = torch.empty(0, dtype=DTYPES[faces], device=layer.device)
    elif isinstance(layer, QuantLinear):
        FloatFacingQuantLinear.adopt(layer, DTYPES[faces])


def _without_values(entry: Layer, like: nn.Module) -> Packed:
    layer: Packed
    if isinstance(like, nn.Embedding):
        layer = QuantEmbedding.without_values(like, entry.format)
    elif entry.kind == "experts":
        layer = QuantExperts(like, entry.format, "meta")
        layer.start_errors = {name: weight.errors for name, weight in entry.projections.items() if weight.errors}
    else:
        layer = _linear_without_values(entry)
    remember_scale(layer, entry.stored_scale)
    layer.init_errors, layer.dense_nbytes = entry.errors, entry.dense_nbytes or 0
    return layer


def _linear_without_values(entry: Layer) -> QuantLinear:
    out, in_features = entry.shape
    layer = QuantLinear(in_features, out, entry.format, bias=entry.bias, device="meta")
    if lora := entry.lora:
        width = entry.format.groups(in_features) if lora.pooled else in_features
        a, b = torch.empty(lora.rank, width, device="meta"), torch.empty(out, lora.rank, device="meta")
        layer.add_lora(lora.rank, lora.alpha, lora.dropout, A=a, B=b, pooled=lora.pooled)
        layer.lora_scaling = lora.scaling
    return layer
