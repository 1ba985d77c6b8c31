"""A packed weight's product and its LoRA's as one node of autograd's graph.

The same arithmetic from torch's own operators is about ten nodes, which take longer than the products of a small layer,
and a pass over x's gradient to add two parts of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels, ops
from ..tensor import QuantTensor


def serves(x: Tensor, q: QuantTensor, bias: Tensor | None, a: Tensor, b: Tensor) -> bool:
    """Whether `product` serves: of the tensors only x and the factors train, nothing traces or watches operators, and
    products are taken in x's dtype."""
    return not (
        q.weight_scales.requires_grad
        or (q.weight_zeros is not None and q.weight_zeros.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (x.is_cpu and kernels.product_dtype(x.dtype) is not x.dtype)
    ) and ops.is_direct(x, a, b, bias, *q.stored)


def product(x: Tensor, q: QuantTensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x Wt + bias + scaling * (x At) Bt: `[..., out]` in x's dtype, for x `[..., in]`, A `[r, in]`, B `[out, r]`.

    Differentiable once, in x, A and B (LoRA, Hu et al. 2021, section 4).
    """
    if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
        return _Product.apply(x, a, b, bias, scaling, q)  # type: ignore[no-any-return]
    return _forward(_rows(x), q, bias, a, b, scaling, x.shape)[0]


def _forward(
    x: Tensor, q: QuantTensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """y with the leading dimensions of `shape`, and x At `[rows, r]`, for x `[rows, in]`."""
    y = kernels.matmul(x, q)
    if bias is not None:
        y += _as(bias, x.dtype)
    low = x @ _as(a, x.dtype).T
    y.addmm_(low, _as(b, x.dtype).T, alpha=scaling)
    return ops.shaped(y, shape), low


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scaling: float, q: QuantTensor
    ) -> Tensor:
        rows, shape = _rows(x), x.shape
        y, low = _forward(rows, q, bias, a, b, scaling, shape)
        ctx.scaling, ctx.shape, ctx.weight = scaling, shape, (q.format, q.shape)
        ctx.save_for_backward(rows, low, a, b, *q.stored)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b, *stored = ctx.saved_tensors
        dx_needed, da_needed, db_needed, *_ = ctx.needs_input_grad
        dy, narrow, scaling = _rows(dy), _as(b, dy.dtype), ctx.scaling
        dx = da = db = None
        # beta=0: what the products are added to gives them a shape and nothing else
        if db_needed:
            db = _as(torch.addmm(narrow, dy.T, low, beta=0, alpha=scaling), b.dtype)
        dlow = _as(torch.addmm(low, dy, narrow, beta=0, alpha=scaling), dy.dtype)  # autocast may be on here
        if da_needed:
            da = _as(dlow.T @ x, a.dtype)
        if dx_needed:
            dx = ops.matmul_t(dy, QuantTensor(*ctx.weight, *stored))
            dx = ops.shaped(dx.addmm_(dlow, _as(a, dy.dtype)), ctx.shape)
        return dx, da, db, None, None, None


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
