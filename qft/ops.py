"""The verbs as torch operators: `define` + `impl`, a fake for tracing, a formula for autograd.

An operator takes the stored tensors of a weight, in the order of `STORED`, then the format's spelling and in_features.
Autograd keeps packed data, x where scales or zeros train, and y (before bias and adapters) for per-channel scales;
never a dense weight.

torch's dispatcher takes longer over an operator than a small product lasts. Where nobody can be listening (`is_direct`)
the same functions are called without it, under the same formula.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from . import double_quant, kernels, reference
from .format import Format
from .tensor import QuantTensor

_PACKED = "Tensor weight, Tensor scales, Tensor? zeros, Tensor? absmax, Tensor? offset, str fmt, int in_features"

_PLAIN = (Tensor, nn.Parameter)

_library = torch.library.Library("qft", "DEF")


def _define(name: str, schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    _library.define(f"{name}({schema}) -> Tensor")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qft::{name}", fake, lib=_library)


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether an operator on these tensors is nothing but its kernel and autograd.

    It is more while something traces, transforms or watches operators (torch.compile, torch.export, torch.jit.trace,
    torch.func, forward-mode derivatives, dispatch and function modes), and for what is no plain tensor of a CPU or CUDA
    device: fake and meta tensors, DTensor and other subclasses.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state()
        or has_torch_function(tensors)
    ):
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or not (tensor.is_cpu or tensor.is_cuda)):
            return False
    return True


def _rebuild(weight: Tensor, *companions: Any) -> QuantTensor:
    *stored, fmt, in_features = companions
    return QuantTensor(Format.parse(fmt), (weight.shape[0], in_features), weight, *stored)


def _matmul(x: Tensor, *packed: Any) -> Tensor:
    return _product(x, _rebuild(*packed))


def _product(x: Tensor, q: QuantTensor) -> Tensor:
    if x.dim() == 2:
        return kernels.matmul(x, q)
    return shaped(kernels.matmul(x.reshape(-1, q.shape[1]), q), x.shape)


def _matmul_t(dy: Tensor, *packed: Any) -> Tensor:
    return _product_t(dy, _rebuild(*packed))


def _product_t(dy: Tensor, q: QuantTensor) -> Tensor:
    if dy.dim() == 2:
        return kernels.matmul_t(dy, q)
    return shaped(kernels.matmul_t(dy.reshape(-1, q.shape[0]), q), dy.shape)


def shaped(rows: Tensor, like: torch.Size) -> Tensor:
    """A fresh `[rows, width]` as `[..., width]` with the leading dimensions of `like`. Not by a view: autograd refuses
    `y.relu_()` on an operator's output that is one."""
    return rows if len(like) == 2 else rows.resize_(*like[:-1], rows.shape[1])


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


def _keep(ctx: Any, x: Tensor, y: Tensor, q: QuantTensor, scales_train: bool, zeros_train: bool) -> None:
    ctx.fmt, ctx.in_features = q.format, q.shape[1]
    per_channel = scales_train and q.format.group == 0
    ctx.save_for_backward(x if scales_train or zeros_train else None, y if per_channel else None, *q.stored)


# The verbs of a backward pass by their operators' names, for calls without the dispatcher.
_verbs = SimpleNamespace(matmul_t=_matmul_t, scale_grad=_scale_grad, zero_grad=_zero_grad)


def _gradients(ctx: Any, dy: Tensor, dx_needed: bool, ds_needed: bool, dz_needed: bool) -> tuple[Tensor | None, ...]:
    """Of x, scales and zero points."""
    x, y, *stored = ctx.saved_tensors
    direct = not torch.is_grad_enabled() and is_direct(dy, x, y, *stored)
    verbs, fmt = (_verbs, ctx.fmt) if direct else (torch.ops.qft, str(ctx.fmt))
    packed = (*stored, fmt, ctx.in_features)
    dx = verbs.matmul_t(dy, *packed) if dx_needed else None
    ds = verbs.scale_grad(dy, x, y, *packed) if ds_needed else None
    dz = verbs.zero_grad(dy, x, *packed) if dz_needed else None
    return dx, ds, dz


class _Matmul(torch.autograd.Function):
    """The operator `qft::matmul` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, zeros: Tensor | None, q: QuantTensor) -> Tensor:
        y = _product(x, q)
        _keep(ctx, x, y, q, *ctx.needs_input_grad[1:3])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, *ctx.needs_input_grad[:3]), None


def _keep_operator(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *packed = inputs
    _keep(ctx, x, output, _rebuild(*packed), *ctx.needs_input_grad[2:4])


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    dx, ds, dz = _gradients(ctx, dy, needed[0], needed[2], needed[3])
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
torch.library.register_autograd("qft::matmul", _matmul_backward, setup_context=_keep_operator, lib=_library)


def matmul(x: Tensor, q: QuantTensor) -> Tensor:
    """y = x Wt: `[..., out]` in x's dtype for x `[..., in]`; differentiable in x, the scales and the zero points."""
    if not is_direct(x, *q.stored):
        return torch.ops.qft.matmul(x, *q.stored, str(q.format), q.shape[1])  # type: ignore[no-any-return]
    scales, zeros = q.weight_scales, q.weight_zeros
    trains = x.requires_grad or scales.requires_grad or (zeros is not None and zeros.requires_grad)
    if trains and torch.is_grad_enabled():
        return _Matmul.apply(x, scales, zeros, q)  # type: ignore[no-any-return]
    return _product(x, q)


def matmul_t(dy: Tensor, q: QuantTensor) -> Tensor:
    """dx = dy W: `[..., in]` in dy's dtype for dy `[..., out]`; part of a backward pass, not differentiable itself."""
    if torch.is_grad_enabled() or not is_direct(dy, *q.stored):
        return torch.ops.qft.matmul_t(dy, *q.stored, str(q.format), q.shape[1])  # type: ignore[no-any-return]
    return _product_t(dy, q)


def decode_scales(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """fp32 scales of double-quantized codes, uint8, under an absmax each, fp32 of the same shape."""
    return torch.ops.qft.decode_scales(codes, absmax, offset)


def dequantize(q: QuantTensor, dtype: torch.dtype) -> Tensor:
    """Dense weight `[out, in]`: level x scale, rounded once to `dtype`; differentiable in scales and zero points."""
    return torch.ops.qft.dequantize(*q.stored, str(q.format), q.shape[1], dtype)
