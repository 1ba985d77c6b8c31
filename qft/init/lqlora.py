"""LQ-LoRA (Guo et al., ICLR 2024): the adapter first, the codes from what it leaves, both weighted."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..format import Format
from ..tensor import QuantTensor, quantize
from .factors import balanced_factors, idle_factors, lora_scaling, one_of, whole_number
from .quantizers import QUANTIZERS, quantized
from .second_moment import diagonal_of
from .svd import seeded
from .weighted import weighted_low_rank


def lqlora(
    w: Tensor,
    fmt: Format | str,
    rank: int,
    alpha: float | None = None,
    *,
    second_moment: Tensor | None = None,
    fisher: Tensor | None = None,
    iters: int = 5,
    quantizer: str = "search",
    on_step: Callable[[int, float], None] | None = None,
    name: str = "weight",
) -> tuple[QuantTensor, Tensor, Tensor]:
    """Minimise ‖√F ∘ (W − Q − scaling · B · A)‖ by turns, keeping the best (LQ-LoRA, section 3.3).

    A step fits B · A to W − Q (to W at first) and quantizes W − scaling · B · A; the steps end where the error rises.
    The fit takes F for D_row² · D_col², D_row = √(F's row means), D_col = √(its column means). Step 0 is quantization
    alone, and the step of least error is returned.

    Args:
        w: `[out, in]`, floating, finite.
        fmt: a Format or its spelling.
        rank: 0 to min(out, in); 0 is quantization alone.
        alpha: LoRA's alpha, positive; the rank where None, so that the scaling is 1.
        second_moment: E[x_j²] `[in]`, or E[x xᵀ] `[in, in]`, whose diagonal is taken: every row of F where `fisher` is
            None.
        fisher: F `[out, in]`, the mean of the squared gradients, at least 0; `second_moment` is then not used.
        iters: most steps, 0 or more; 0 is quantization alone. The paper's limit is 100.
        quantizer: how scales are found: "search", columns weighted by D_col², or "absmax".
        on_step: called as on_step(step, error) for step 0 and every one taken, where error is relative to ‖√F ∘ W‖.
        name: what error messages call the weight.

    Returns:
        the QuantTensor; A fp32 `[rank, in]`; B fp32 `[out, rank]`. Where no step beats quantization alone, B is 0 and A
        random.

    Raises:
        FormatError, TypeError, ValueError: as `qft.quantize` does; or an argument lies outside what is said above.
    """
    one_of(quantizer, QUANTIZERS, "quantizer")
    iters = whole_number(iters, "iters")
    shape = quantize(w, fmt, name=name).shape  # which refuses what is no weight
    rank = whole_number(rank, "rank", min(shape))
    scaling = lora_scaling(rank, alpha)
    if fisher is None:
        columns = diagonal_of(second_moment, shape[1], "lqlora").float()
        weights, rows = columns, torch.ones(shape[0], device=w.device)
    else:
        weights = _checked_fisher(fisher, shape)
        rows, columns = weights.mean(1), weights.mean(0)

    with torch.no_grad(), torch.autocast(w.device.type, enabled=False):
        dense = w.float().contiguous()
        norm = _weighted_norm(dense, weights)

        def error_of(step: int, remaining: Tensor) -> float:
            error = _weighted_norm(remaining, weights) / norm if norm else 0.0
            if on_step:
                on_step(step, error)
            return error

        q = quantized(dense, fmt, quantizer, columns, name)
        least = error_of(0, dense - q.dequantize())
        best = (q, *idle_factors(shape, rank, w.device, seeded(w.device)))
        residual, previous = dense, math.inf
        row_root = rows.double().sqrt()[:, None]
        undo = torch.where(row_root > 0, 1 / row_root, 0)  # a row without weight is left to the codes
        for step in range(1, iters + 1 if rank else 1):
            left, right = weighted_low_rank(row_root * residual, columns, rank)
            a, b = balanced_factors(undo * left, right, scaling)
            q = quantized(torch.addmm(dense, b, a, alpha=-scaling), fmt, quantizer, columns, name)
            residual = dense - q.dequantize()
            error = error_of(step, torch.addmm(residual, b, a, alpha=-scaling))
            if error < least:
                least, best = error, (q, a, b)
            if error >= previous:
                break
            previous = error
        return best


def _weighted_norm(matrix: Tensor, weights: Tensor) -> float:
    """‖√F ∘ M‖, F `[out, in]` or its one row `[in]`."""
    return math.sqrt((matrix.square() * weights).sum(1).double().sum().item())


def _checked_fisher(fisher: Tensor, shape: tuple[int, int]) -> Tensor:
    if not isinstance(fisher, Tensor) or not fisher.is_floating_point():
        kind = fisher.dtype if isinstance(fisher, Tensor) else type(fisher).__name__
        raise TypeError(f"fisher is {kind}; give a floating tensor {list(shape)}")
    if tuple(fisher.shape) != shape:
        raise ValueError(f"fisher has shape {tuple(fisher.shape)}, expected {shape}: the mean squared gradients of it")
    if not (fisher.isfinite() & (fisher >= 0)).all():
        raise ValueError("fisher holds what is negative, NaN or Inf; a mean of squared gradients is 0 or more")
    return fisher.detach().float()
