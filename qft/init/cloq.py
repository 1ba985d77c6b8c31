"""CLoQ (Deng et al., 2025): codes by GPTQ, then the adapter that best corrects the output; or both in turns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..format import Format
from ..tensor import QuantTensor, quantize
from .factors import ORDERS, balanced_factors, idle_factors, lora_scaling, one_of, whole_number
from .gptq import Feedback, rounded
from .quantizers import QUANTIZERS
from .second_moment import full_matrix, output_error
from .svd import seeded
from .weighted import fitted_factors, weighted_low_rank


def cloq(
    w: Tensor,
    fmt: Format | str,
    rank: int,
    alpha: float | None = None,
    *,
    second_moment: Tensor | None = None,
    iters: int = 1,
    order: str = "quantize-first",
    damp: float = 0.01,
    act_order: bool = False,
    quantizer: str = "search",
    on_step: Callable[[int, float], None] | None = None,
    name: str = "weight",
) -> tuple[QuantTensor, Tensor, Tensor]:
    """Find Q by `gptq` and scaling · B · A as `qera_exact` does, keeping the best of `iters` turns.

    A turn rounds W − scaling · B · A and fits B · A to W − Q. The first starts from B · A = 0: its codes are those of
    `gptq`. CLoQ has one turn; more alternate as CALDERA does. Or the first starts from the best B · A for W itself
    ("svd-first", as LQ-LoRA's): what the adapter holds need not be rounded. The turn of least output error is returned,
    never worse than the first. CLoQ's preprocessing of the weight (MagR) is left out.

    Args:
        w: `[out, in]`, floating, finite.
        fmt: a Format or its spelling.
        rank: 0 to min(out, in); 0 is `gptq`.
        alpha: LoRA's alpha, positive; the rank where None, so that the scaling is 1.
        second_moment: S = E[x xᵀ], fp32 or float64 `[in, in]`.
        iters: turns, 0 or more; 0 is `gptq`.
        order: "quantize-first" (the paper's) or "svd-first".
        damp, act_order, quantizer: as in `gptq`.
        on_step: called as on_step(turn, error) for turns 0, `gptq` alone, to `iters`, where error is
            sqrt(E‖(W − Q − scaling · B · A) x‖² / E‖W x‖²), see `output_error`. Without it one turn measures nothing.
        name: what error messages call the weight.

    Returns:
        the QuantTensor; A fp32 `[rank, in]`; B fp32 `[out, rank]`.

    Raises:
        FormatError, TypeError, ValueError: as `qft.quantize` does; or an argument lies outside what is said above.
    """
    one_of(quantizer, QUANTIZERS, "quantizer")
    one_of(order, ORDERS, "order")
    iters = whole_number(iters, "iters")
    shape = quantize(w, fmt, name=name).shape  # which refuses what is no weight
    rank = whole_number(rank, "rank", min(shape))
    scaling, fmt = lora_scaling(rank, alpha), Format.parse(fmt)
    moment = full_matrix(second_moment, shape[1], "cloq")

    with torch.no_grad(), torch.autocast(w.device.type, enabled=False):
        dense, feedback = w.float().contiguous(), Feedback.of(moment, damp, act_order)
        turns = iters if rank else 0
        measured = on_step is not None or turns > 1

        def error_of(turn: int, q: QuantTensor, a: Tensor, b: Tensor) -> float:
            error = output_error(dense, q.dequantize(), a, b, scaling, moment) if measured else 0.0
            if on_step:
                on_step(turn, error)
            return error

        q = rounded(dense, fmt, feedback, quantizer, name)
        a, b = idle_factors(shape, rank, w.device, seeded(w.device))
        best = (q, a, b)
        if on_step or not turns:
            error_of(0, q, a, b)
        least = float("inf")
        if turns and order == "svd-first":
            a, b = balanced_factors(*weighted_low_rank(dense, moment, rank), scaling)
        for turn in range(1, turns + 1):
            if turn > 1 or order == "svd-first":
                q = rounded(torch.addmm(dense, b, a, alpha=-scaling), fmt, feedback, quantizer, name)
            a, b = fitted_factors(dense, q, moment, rank, scaling)
            error = error_of(turn, q, a, b)
            if error < least:
                least, best = error, (q, a, b)
        return best
