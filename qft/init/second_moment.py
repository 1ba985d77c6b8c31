"""S = E[x xᵀ] of a layer's inputs: checked, multiplied by, and the error of the layer's output that it measures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS = 1024  # of a matrix that are widened at a time: what is held beside it stays small


def diagonal_of(moment: Tensor | None, in_features: int, method: str) -> Tensor:
    """E[x_j²], `[in]`, of a second moment `[in, in]` or of its diagonal `[in]`.

    Raises:
        TypeError, ValueError: as `checked` does.
    """
    found = checked(moment, in_features, method)
    return found if found.dim() == 1 else found.diagonal()


def full_matrix(moment: Tensor | None, in_features: int, method: str) -> Tensor:
    """The second moment `[in, in]`.

    Raises:
        TypeError, ValueError: as `checked` does; or it is the diagonal alone.
    """
    found = checked(moment, in_features, method)
    if found.dim() == 1:
        raise ValueError(
            f"second_moment is a diagonal [{in_features}] and {method} needs all of E[x xᵀ]; give "
            f"[{in_features}, {in_features}], or take a start that needs the diagonal alone, such as qera_diag"
        )
    return found


def checked(moment: Tensor | None, in_features: int, method: str) -> Tensor:
    """A second moment `[in, in]` or its diagonal `[in]`, fp32 or float64.

    Raises:
        TypeError: it is no floating tensor.
        ValueError: it is missing, has another shape, is not finite, or has a negative diagonal.
    """
    if moment is None:
        raise ValueError(
            f"{method} needs second_moment, E[x xᵀ] of the layer's inputs; measure it with qft.calibrate, "
            "or take a start without it, such as loftq"
        )
    if not isinstance(moment, Tensor) or not moment.is_floating_point():
        kind = moment.dtype if isinstance(moment, Tensor) else type(moment).__name__
        raise TypeError(f"second_moment is {kind}; give a floating tensor [{in_features}, {in_features}]")
    if tuple(moment.shape) not in ((in_features,), (in_features, in_features)):
        raise ValueError(
            f"second_moment has shape {tuple(moment.shape)} and the weight reads {in_features} inputs; give "
            f"[{in_features}, {in_features}], or the diagonal [{in_features}]"
        )
    found = moment.detach()
    if found.dtype not in (torch.float32, torch.float64):
        found = found.float()
    if not math.isfinite(torch.linalg.vector_norm(found, math.inf).item()):
        raise ValueError("second_moment holds NaN or Inf; leave out the rows of x that do, and measure it again")
    diagonal = found if found.dim() == 1 else found.diagonal()
    if diagonal.lt(0).any():
        least = int(diagonal.argmin())
        raise ValueError(f"second_moment of input {least} is {diagonal[least].item()}; a mean of squares is 0 or more")
    return found


def times_moment(moment: Tensor, columns: Tensor) -> Tensor:
    """S · X for X float64 `[in, n]`: float64, S `[in, in]` or its diagonal `[in]` widened a few rows at a time."""
    if moment.dim() == 1:
        return moment.double()[:, None] * columns
    return torch.cat([rows.double() @ columns for rows in moment.split(ROWS)])


@torch.no_grad()
def output_error(
    w: Tensor,
    quantized: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
    second_moment: Tensor | None = None,
) -> float:
    """Relative error of a layer's output, sqrt(E‖(W − Q − scaling · B · A) x‖² / E‖W x‖²).

    Args:
        w: `[out, in]`, floating.
        quantized: Q, `[out, in]`.
        a: `[rank, in]`, and b `[out, rank]`; None is no adapter.
        scaling: what the layer multiplies B · A by.
        second_moment: E[x xᵀ] `[in, in]` or its diagonal `[in]`; the identity where None: then it is the relative
            Frobenius error of the weight. Where it is float64 all is computed in float64, else in fp32 summed in
            float64.

    Returns:
        the error; 0 where W x is 0.
    """
    dtype = torch.float64 if second_moment is not None and second_moment.dtype == torch.float64 else torch.float32
    lost = whole = 0.0
    with torch.autocast(w.device.type, enabled=False):
        for start in range(0, len(w), ROWS):
            rows = slice(start, start + ROWS)
            dense = w[rows].to(dtype)
            residual = dense - quantized[rows].to(dtype)
            if a is not None and b is not None:
                residual = residual - scaling * (b[rows].to(dtype) @ a.to(dtype))
            lost += weighted_square(residual, second_moment)
            whole += weighted_square(dense, second_moment)
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0


def weighted_square(matrix: Tensor, moment: Tensor | None) -> float:
    """tr(M S Mᵀ)."""
    if moment is None:
        weighted = matrix
    elif moment.dim() == 1:
        weighted = matrix * moment.to(matrix.dtype)
    else:
        weighted = matrix @ moment.to(matrix.dtype)
    return torch.einsum("ij,ij->i", weighted, matrix).double().sum().item()
