"""QERA-approx (Zhang et al., ICLR 2025): the adapter corrects the output, as if inputs were uncorrelated."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import Format
from ..tensor import QuantTensor, quantize
from .factors import lora_scaling, one_of, whole_number
from .quantizers import QUANTIZERS, quantized
from .second_moment import diagonal_of
from .weighted import fitted_factors


def qera_diag(
    w: Tensor,
    fmt: Format | str,
    rank: int,
    alpha: float | None = None,
    *,
    second_moment: Tensor | None = None,
    quantizer: str = "search",
    name: str = "weight",
) -> tuple[QuantTensor, Tensor, Tensor]:
    """Quantize `w` and fit scaling · B · A to what is lost, columns weighted by T = diag(sqrt(E[x_j²])).

    The product is [(W − Q) T]_r T⁻¹ (theorem 2), found without the inverse: an input that is always 0 breaks nothing.

    Args:
        w: `[out, in]`, floating, finite.
        fmt: a Format or its spelling.
        rank: 0 to min(out, in).
        alpha: LoRA's alpha, positive; the rank where None, so that the scaling is 1.
        second_moment: E[x_j²] `[in]`, or E[x xᵀ] `[in, in]`, whose diagonal is taken; fp32 or float64.
        quantizer: how scales are found: "search", its error weighted by E[x_j²] too, or "absmax".
        name: what error messages call the weight.

    Returns:
        the QuantTensor; A fp32 `[rank, in]`; B fp32 `[out, rank]`.

    Raises:
        FormatError, TypeError, ValueError: as `qft.quantize` does; or an argument lies outside what is said above.
    """
    one_of(quantizer, QUANTIZERS, "quantizer")
    shape = quantize(w, fmt, name=name).shape  # which refuses what is no weight
    rank = whole_number(rank, "rank", min(shape))
    scaling = lora_scaling(rank, alpha)
    diagonal = diagonal_of(second_moment, shape[1], "qera_diag")
    with torch.no_grad(), torch.autocast(w.device.type, enabled=False):
        q = quantized(w, fmt, quantizer, diagonal, name)
        return q, *fitted_factors(w, q, diagonal, rank, scaling)
