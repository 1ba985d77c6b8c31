"""The verbs as torch operators: `define` + `impl`, a fake for tracing, a formula for autograd.

An operator takes the stored tensors of a weight, in the order of `STORED`, then the format's spelling and in_features.
Autograd keeps packed data, x where scales or zeros train, and y (before bias and adapters) for per-channel scales;
never a dense weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import double_quant, kernels, reference
from .format import Format
from .tensor import STORED, QuantTensor

_PACKED = "Tensor weight, Tensor scales, Tensor? zeros, Tensor? absmax, Tensor? offset, str fmt, int in_features"

_library = torch.library.Library("qft", "DEF")


def _define(name: str, schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    _library.define(f"{name}({schema}) -> Tensor")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qft::{name}", fake, lib=_library)


def _rebuild(weight: Tensor, *companions: Any) -> QuantTensor:
    *stored, fmt, in_features = companions
    return QuantTensor(Format.parse(fmt), (weight.shape[0], in_features), weight, *stored)


def _matmul(x: Tensor, *packed: Any) -> Tensor:
    q = _rebuild(*packed)
    return _shaped(kernels.matmul(x.reshape(-1, q.shape[1]), q), *x.shape[:-1], q.shape[0])


def _matmul_t(dy: Tensor, *packed: Any) -> Tensor:
    q = _rebuild(*packed)
    return _shaped(kernels.matmul_t(dy.reshape(-1, q.shape[0]), q), *dy.shape[:-1], q.shape[1])


def _shaped(fresh: Tensor, *shape: int) -> Tensor:
    """`fresh` under another shape. Not by a view: autograd refuses `y.relu_()` on an operator's output that is one."""
    return fresh.resize_(*shape)


def _scale_grad(dy: Tensor, x: Tensor, y: Tensor | None, *packed: Any) -> Tensor:
    q = _rebuild(*packed)
    dy, x = dy.reshape(-1, q.shape[0]), x.reshape(-1, q.shape[1])
    ds = kernels.scale_grad(dy, x, q) if y is None else kernels.channel_scale_grad(dy, x, y.reshape(dy.shape), q)
    return ds.to(_grad_dtype(q.weight_scales))


def _grad_dtype(scales: Tensor) -> torch.dtype:
    """The scales' own, so that autograd takes the gradient; fp32 for the integer codes of double-quantized scales."""
    return scales.dtype if scales.is_floating_point() else torch.float32


def _zero_grad(dy: Tensor, x: Tensor, *packed: Any) -> Tensor:
    q = _rebuild(*packed)
    dz = reference.zero_grad(dy.reshape(-1, q.shape[0]), x.reshape(-1, q.shape[1]), q.scales, q.format)
    return dz.to(packed[2].dtype)


_define("matmul", f"Tensor x, {_PACKED}", _matmul, lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]))
_define("matmul_t", f"Tensor dy, {_PACKED}", _matmul_t, lambda dy, *packed: dy.new_empty(*dy.shape[:-1], packed[6]))
_define(
    "scale_grad",
    f"Tensor dy, Tensor x, Tensor? y, {_PACKED}",
    _scale_grad,
    lambda dy, x, y, weight, scales, *_: torch.empty_like(scales, dtype=_grad_dtype(scales)),
)
_define(
    "zero_grad",
    f"Tensor dy, Tensor x, {_PACKED}",
    _zero_grad,
    lambda dy, x, weight, scales, zeros, *_: torch.empty_like(zeros),
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *stored, fmt, in_features = inputs
    ctx.fmt, ctx.in_features = fmt, in_features
    scales_train, zeros_train = ctx.needs_input_grad[2:4]
    per_channel = scales_train and Format.parse(fmt).group == 0
    ctx.save_for_backward(x if scales_train or zeros_train else None, output if per_channel else None, *stored)


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *stored = ctx.saved_tensors
    packed = (*stored, ctx.fmt, ctx.in_features)
    dx_needed, _, ds_needed, dz_needed = ctx.needs_input_grad[:4]
    dx = torch.ops.qft.matmul_t(dy, *packed) if dx_needed else None
    ds = torch.ops.qft.scale_grad(dy, x, y, *packed) if ds_needed else None
    dz = torch.ops.qft.zero_grad(dy, x, *packed) if dz_needed else None
    return dx, None, ds, dz, None, None, None, None


def _dequantize(*arguments: Any) -> Tensor:
    *packed, dtype = arguments
    return kernels.dequantize(_rebuild(*packed), dtype)


def _level_grad(dw: Tensor, *packed: Any) -> Tensor:
    """Sum over each group of dW x (level - zero), in the scales' dtype."""
    q = _rebuild(*packed)
    ones = torch.ones(q.shape[0], q.format.groups(q.shape[1]), device=dw.device)
    unscaled = reference.dequantize(q.unpack(), ones, q.zeros, q.format)
    return reference.sum_groups(dw.float() * unscaled, q.format).to(_grad_dtype(q.weight_scales))


def _shift_grad(dw: Tensor, *packed: Any) -> Tensor:
    """Minus the scale times the sum of dW over each group, in the zero points' dtype."""
    q = _rebuild(*packed)
    return (-q.scales * reference.sum_groups(dw.float(), q.format)).to(packed[2].dtype)


_define(
    "dequantize",
    f"{_PACKED}, ScalarType dtype",
    _dequantize,
    lambda weight, *rest: weight.new_empty(weight.shape[0], rest[5], dtype=rest[6]),
)
_define(
    "level_grad",
    f"Tensor dw, {_PACKED}",
    _level_grad,
    lambda dw, weight, scales, *_: torch.empty_like(scales, dtype=_grad_dtype(scales)),
)
_define(
    "shift_grad",
    f"Tensor dw, {_PACKED}",
    _shift_grad,
    lambda dw, weight, scales, zeros, *_: torch.empty_like(zeros),
)


_define(
    "decode_scales",
    "Tensor codes, Tensor absmax, Tensor offset",
    double_quant.decode_each,
    lambda codes, *_: torch.empty_like(codes, dtype=torch.float32),
)


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *stored, fmt, in_features, _ = inputs
    ctx.fmt, ctx.in_features = fmt, in_features
    ctx.save_for_backward(*stored)


def _dequantize_backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    packed = (*ctx.saved_tensors, ctx.fmt, ctx.in_features)
    _, ds_needed, dz_needed = ctx.needs_input_grad[:3]
    ds = torch.ops.qft.level_grad(dw, *packed) if ds_needed else None
    dz = torch.ops.qft.shift_grad(dw, *packed) if dz_needed else None
    return None, ds, dz, None, None, None, None, None


torch.library.register_autograd("qft::dequantize", _dequantize_backward, setup_context=_keep_packed, lib=_library)
torch.library.register_autograd("qft::matmul", _matmul_backward, setup_context=_keep, lib=_library)


def matmul(x: Tensor, q: QuantTensor) -> Tensor:
    """y = x Wt: `[..., out]` in x's dtype for x `[..., in]`; differentiable in x, the scales and the zero points."""
    return torch.ops.qft.matmul(x, *(getattr(q, name) for name in STORED), str(q.format), q.shape[1])


def decode_scales(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """fp32 scales of double-quantized codes, uint8, under an absmax each, fp32 of the same shape."""
    return torch.ops.qft.decode_scales(codes, absmax, offset)


def dequantize(q: QuantTensor, dtype: torch.dtype) -> Tensor:
    """Dense weight `[out, in]`: level x scale, rounded once to `dtype`; differentiable in scales and zero points."""
    return torch.ops.qft.dequantize(*(getattr(q, name) for name in STORED), str(q.format), q.shape[1], dtype)
