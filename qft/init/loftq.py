"""LoftQ (Li et al., ICLR 2024): quantize a weight and fit the adapter to what quantization loses, in turns."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..format import Format
from ..tensor import QuantTensor
from .factors import ORDERS, idle_factors, lora_scaling, one_of, whole_number
from .quantizers import LOFTQ_QUANTIZERS, quantized
from .svd import METHODS, LowRank, seeded


def loftq(
    w: Tensor,
    fmt: Format | str,
    rank: int,
    iters: int = 5,
    alpha: float | None = None,
    *,
    svd: str = "randomized",
    order: str = "quantize-first",
    quantizer: str = "absmax",
    rslora: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    name: str = "weight",
) -> tuple[QuantTensor, Tensor, Tensor]:
    """Find Q, A and B with W ≈ Q + scaling · B · A (LoftQ, algorithm 1), keeping the best iterate.

    A step quantizes W − scaling · B · A and fits B · A to W − Q by a truncated SVD. The first starts from B · A = 0,
    so its codes are those of `qft.quantize`. Step 0 is quantization alone, and the step of least error is returned:
    never worse than plain. The scaling is folded into A and B, so that the error does not depend on alpha. Arithmetic
    is fp32 but for most of a randomized SVD's products, where the processor has bf16's; beside `w` two dense fp32
    matrices are held and one in bf16, and one more in fp32 where `w` is not (the exact SVD takes more).

    Args:
        w: `[out, in]`, floating, finite.
        fmt: a Format or its spelling.
        rank: 0 to min(out, in); 0 is plain quantization.
        iters: steps T, 0 or more; 0 is plain quantization.
        alpha: LoRA's alpha, positive; the rank where None, so that the scaling is 1.
        svd: "randomized" or "exact", see `LowRank`.
        order: "quantize-first" (the paper's), or "svd-first" (LQ-LoRA's: a step fits, then quantizes).
        quantizer: "absmax"; "search", with the scale of least error for each group; or "uniform", LoftQ's own for
            its table 2: one grid for the weight, clipped at mean ± 2 std, for formats intN channel f32 zero.
        rslora: the scaling is alpha / sqrt(rank) instead of alpha / rank.
        on_step: called as on_step(step, error) for steps 0 to T (0 alone at rank 0), where error is
            ‖W − Q − scaling · B · A‖ / ‖W‖, Frobenius.
        name: what error messages call the weight.

    Returns:
        the QuantTensor; A fp32 `[rank, in]`; B fp32 `[out, rank]`. Where no step beats plain, B is 0 and A random.

    Raises:
        FormatError, TypeError, ValueError: as `qft.quantize` does; or an argument lies outside what is said above.
    """
    one_of(order, ORDERS, "order")
    one_of(svd, METHODS, "svd")
    one_of(quantizer, LOFTQ_QUANTIZERS, "quantizer")
    iters = whole_number(iters, "iters")
    q = quantized(w, fmt, quantizer, name=name)
    rank = whole_number(rank, "rank", min(q.shape))
    scaling = lora_scaling(rank, alpha, rslora)

    with torch.no_grad(), torch.autocast(w.device.type, enabled=False):
        return _alternate(w, q, rank, iters, scaling, quantizer, svd, order == "svd-first", on_step)


def _alternate(
    w: Tensor,
    q: QuantTensor,
    rank: int,
    iters: int,
    scaling: float,
    quantizer: str,
    svd: str,
    svd_first: bool,
    on_step: Callable[[int, float], None] | None,
) -> tuple[QuantTensor, Tensor, Tensor]:
    """The steps, from the plain quantization `q` of `w`; returns the best."""
    dense = w.float().contiguous()
    unit = _unit(dense)
    residual, fitted = dense / unit, torch.empty_like(dense)
    norm = _norm(residual)

    def report(step: int, remaining: Tensor) -> float:
        error = _norm(remaining) / norm if norm else 0.0
        if on_step:
            on_step(step, error)
        return error

    least = report(0, _residual(dense, q, unit, out=fitted))
    best = (q, *idle_factors(q.shape, rank, w.device, seeded(w.device)))
    low_rank = LowRank(rank, svd)
    for step in range(1, iters + 1 if rank else 1):
        if step > 1 and not svd_first:
            q = quantized(fitted, q.format, quantizer)
        if step > 1 or not svd_first:  # svd-first begins with W itself
            _residual(dense, q, unit, out=residual)
        a, b = low_rank(residual)
        torch.addmm(dense, b, a, alpha=-unit, out=fitted)
        if svd_first:
            q = quantized(fitted, q.format, quantizer)
        error = report(step, _residual(fitted, q, unit, out=residual))
        if error < least:
            fold = math.sqrt(unit / scaling)
            least, best = error, (q, a * fold, b * fold)
    return best


def _residual(dense: Tensor, q: QuantTensor, unit: float, *, out: Tensor) -> Tensor:
    """(dense − Q) / unit, fp32 `[out, in]`, into memory written before: of fresh memory the pages alone take 12 ms at
    4096x4096, ten times as long as the values."""
    q.dequantize(out=out)
    return torch.sub(dense, out, out=out).div_(unit)


def _norm(matrix: Tensor) -> float:
    """Frobenius norm: fp32 within a row, float64 across rows."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1).double()).item()


def _unit(dense: Tensor) -> float:
    """The power of two at the largest weight: in this unit no square overflows or vanishes, and division is exact."""
    return 2.0 ** (math.frexp(max(abs(end.item()) for end in torch.aminmax(dense)))[1] - 1)
