"""QERA-exact (Zhang et al., ICLR 2025): the adapter is the best correction of the layer's output there is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import Format
from ..tensor import QuantTensor, quantize
from .factors import lora_scaling, one_of, whole_number
from .quantizers import QUANTIZERS, quantized
from .second_moment import full_matrix
from .weighted import fitted_factors


def qera_exact(
    w: Tensor,
    fmt: Format | str,
    rank: int,
    alpha: float | None = None,
    *,
    second_moment: Tensor | None = None,
    quantizer: str = "search",
    name: str = "weight",
) -> tuple[QuantTensor, Tensor, Tensor]:
    """Quantize `w` and fit scaling · B · A to what the output loses, E‖(W − Q − scaling · B · A) x‖².

    With R = W − Q and S = E[x xᵀ] the product is U Uᵀ R, U holding the leading eigenvectors of R S Rᵀ: theorem 1's
    [R S^½]_r S^-½ without root and inverse. A singular S breaks nothing, and no damping is needed. EoRA's is the same.

    Args:
        w: `[out, in]`, floating, finite.
        fmt: a Format or its spelling.
        rank: 0 to min(out, in).
        alpha: LoRA's alpha, positive; the rank where None, so that the scaling is 1.
        second_moment: S = E[x xᵀ], fp32 or float64 `[in, in]`.
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
    moment = full_matrix(second_moment, shape[1], "qera_exact")
    with torch.no_grad(), torch.autocast(w.device.type, enabled=False):
        q = quantized(w, fmt, quantizer, moment.diagonal(), name)
        return q, *fitted_factors(w, q, moment, rank, scaling)
