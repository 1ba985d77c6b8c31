"""QA-LoRA (Xu et al. 2023, section 3.3): a LoRA over the sums of the weight's groups, which merges into zero points.

Such a LoRA adds delta = scaling * (B A)[row, group] to every weight of a group. Integer formats store a weight as
scale * (code - zero), so zero - delta / scale holds the sum: the merged weight is packed, its codes are the base's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..format import INTEGERS, ZERO_DTYPE, FormatError
from ..nn.linear import QuantLinear
from ..notices import say_once
from ..reference import TORCH_DTYPE
from ..tensor import QuantTensor
from .scales import quant_layers, remember_scale


def add_pooled_lora(
    model: nn.Module, rank: int, alpha: float | None = None, dropout: float = 0.0, rslora: bool = False
) -> nn.Module:
    """Attach a pooled LoRA to every QuantLinear of a model, in place; it starts as the identity.

    Args:
        rank: r; a layer with fewer groups or outputs than that takes what it can hold.
        alpha, dropout, rslora: as in `QuantLinear.add_lora`.

    Returns:
        The model itself.

    Raises:
        ValueError: the model holds no QuantLinear, a layer has a LoRA already, or an argument is out of its range.
        FormatError: a layer has a codebook, which has no zero points; then nothing is attached.
    """
    layers = quant_layers(model)
    for path, layer in layers.items():
        if not layer.format.is_integer:
            raise FormatError(
                f"{path} stores {layer.format}, which has no zero points for a pooled LoRA to merge into; quantize to "
                f"{', '.join(INTEGERS)}"
            )
        if layer.lora_rank:
            raise ValueError(f"{path} has a LoRA already; call remove_lora() first, or quantize with rank=0")
    for path, layer in layers.items():
        held = min(rank, layer.out_features, layer.format.groups(layer.in_features))
        if held < rank:
            say_once(f"{path} has {held} groups or outputs: its pooled adapter takes rank {held}, not {rank}")
        layer.add_lora(held, alpha, dropout, rslora, pooled=True)
    return model


def merge_pooled(model: nn.Module, scale: str | None = None) -> dict[str, float]:
    """Merge every pooled LoRA of a model into zero points, in place: same codes, no adapter, nothing dense.

    Symmetric formats become `zero` formats. Zero points stop being integers and are rounded to the scales' type: in
    fp32 by nothing that shows; in f16 a zero point between 8 and 16 by up to 2^-8 of a step between levels, in bf16 by
    up to 2^-5. Scales stored as dq are held in fp32; `qft.round_scales` stores them as before.

    Args:
        scale: type of the merged scales and zero points, f32, f16 or bf16; None keeps each layer's own.

    Returns:
        By path, ||merged - (base + scaling * B A)|| / ||base + scaling * B A|| of the weights.

    Raises:
        ValueError: no layer has a pooled LoRA, or `scale` is another word.
        FormatError: a scale or zero point does not fit its type; the layer is named, and nothing is merged.
    """
    layers = {path: layer for path, layer in quant_layers(model).items() if layer.lora_pooled}
    if not layers:
        raise ValueError(f"no QuantLinear of {type(model).__name__} has a pooled LoRA; call qft.add_pooled_lora first")
    if scale not in (None, "f32", "f16", "bf16"):
        raise ValueError(f"scale={scale!r} is none of f32, f16, bf16")
    merged = {path: _merged(layer, path, scale) for path, layer in layers.items()}
    errors = {path: _error(layer, merged[path]) for path, layer in layers.items()}
    widened = [path for path, layer in layers.items() if layer.format.scale == "dq" and scale is None]
    if widened:
        before = sum(layers[path].quant_tensor.nbytes for path in widened)
        after = sum(merged[path].nbytes for path in widened)
        weights = sum(layers[path].in_features * layers[path].out_features for path in widened)
        say_once(
            "scales stored as dq are held in fp32 to merge into zero points: "
            f"{8 * before / weights:.3f} -> {8 * after / weights:.3f} bits per weight; "
            "qft.round_scales stores them as before"
        )
    for path, layer in layers.items():
        layer.set_quantized(merged[path])
        layer.remove_lora()
        if path in widened:
            remember_scale(layer, "dq")
    return errors


@torch.no_grad()
def _merged(layer: QuantLinear, path: str, scale: str | None) -> QuantTensor:
    q, fmt = layer.quant_tensor, layer.format
    own = "f32" if fmt.scale == "dq" else fmt.scale
    merged = replace(fmt, scale=scale or own, zero=True)
    scales, delta = q.scales, _delta(layer)
    zeros = torch.full_like(scales, 1 << (fmt.bits - 1)) if q.zeros is None else q.zeros
    shifted = zeros - delta / torch.where(scales == 0, 1, scales)
    # a group of scale 0 is delta everywhere: of one code, as groups of zeros are, its scale can become delta itself
    empty = scales == 0
    if empty.any():
        low, high = _code_range(q)
        one_code = empty & (low == high)
        scales, shifted = torch.where(one_code, delta, scales), torch.where(one_code, low - 1, shifted)
    # where fp32 could not tell base + delta from delta: a zero point so far off that code - zero rounds to -zero
    far = 2.0 ** (fmt.bits + 24)
    drowned = delta.abs() > scales.abs() * far
    scales, shifted = torch.where(drowned, delta / far, scales), torch.where(drowned, -far, shifted)
    stored = scales.to(TORCH_DTYPE[merged.scale]), shifted.to(TORCH_DTYPE[ZERO_DTYPE[merged.scale]])
    for what, values in zip(("scale", "zero point"), stored, strict=True):
        if not values.isfinite().all():
            row, group = (~values.isfinite()).nonzero()[0].tolist()
            raise FormatError(
                f"the merged {what} of {path}, row {row}, group {group} does not fit {merged.scale}; "
                "merge with scale='f32'"
            )
    return QuantTensor(merged, q.shape, q.weight, *stored)


def _delta(layer: QuantLinear) -> Tensor:
    """scaling * B A, fp32 `[out, groups]`."""
    a, b = layer.lora_A, layer.lora_B
    return layer.lora_scaling * (b.float() @ a.float())  # type: ignore[union-attr]


def _code_range(q: QuantTensor) -> tuple[Tensor, Tensor]:
    """Least and largest code of each group, fp32 `[out, groups]`."""
    codes = q.unpack().float()
    groups = codes.split(q.format.group_size(q.shape[1]), dim=1)
    return torch.stack([g.amin(1) for g in groups], 1), torch.stack([g.amax(1) for g in groups], 1)


@torch.no_grad()
def _error(layer: QuantLinear, merged: QuantTensor) -> float:
    size = layer.format.group_size(layer.in_features)
    exact = layer.dequantize() + _delta(layer).repeat_interleave(size, 1)[:, : layer.in_features]
    norm = exact.norm().item()
    return (merged.dequantize() - exact).norm().item() / norm if norm else 0.0
