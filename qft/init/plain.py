"""Plain start (QLoRA, section 3): quantize the weight, and let the adapter begin as nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import Format
from ..tensor import QuantTensor, quantize
from .factors import idle_factors, whole_number


def plain(
    w: Tensor,
    fmt: Format | str,
    rank: int = 0,
    alpha: float | None = None,
    *,
    generator: torch.Generator | None = None,
    name: str = "weight",
) -> tuple[QuantTensor, Tensor, Tensor]:
    """Quantize `w`; A is random and B is 0, so that the layer computes with the quantized weight alone.

    Args:
        w: `[out, in]`, floating, finite.
        fmt: a Format or its spelling.
        rank: rows of A, 0 or more; 0 gives factors without elements.
        alpha: changes nothing while B is 0; taken so that every start is called alike.
        generator: draws A; torch's global one where None.
        name: what error messages call the weight.

    Returns:
        the QuantTensor; A fp32 `[rank, in]` and B fp32 `[out, rank]` of `idle_factors`.

    Raises:
        FormatError, TypeError, ValueError: as `qft.quantize` does; or the rank is negative or not an integer.
    """
    rank = whole_number(rank, "rank")
    q = quantize(w, fmt, name=name)
    return q, *idle_factors(q.shape, rank, w.device, generator)
