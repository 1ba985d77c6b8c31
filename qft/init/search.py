"""Searched scales: plain quantization whose scales are chosen by the error they leave."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import Format
from ..tensor import QuantTensor, quantize
from .factors import idle_factors, whole_number
from .second_moment import diagonal_of


def search(
    w: Tensor,
    fmt: Format | str,
    rank: int = 0,
    alpha: float | None = None,
    *,
    second_moment: Tensor | None = None,
    generator: torch.Generator | None = None,
    name: str = "weight",
) -> tuple[QuantTensor, Tensor, Tensor]:
    """Quantize `w` with a searched scale for each group; A is random and B is 0.

    Args:
        w: `[out, in]`, floating, finite.
        fmt: a Format or its spelling.
        rank: rows of A, 0 or more; 0 gives factors without elements.
        alpha: changes nothing while B is 0; taken so that every start is called alike.
        second_moment: E[x xᵀ] `[in, in]` or its diagonal `[in]`: the columns' weights in the error; alike where None.
        generator: draws A; torch's global one where None.
        name: what error messages call the weight.

    Returns:
        the QuantTensor; A fp32 `[rank, in]` and B fp32 `[out, rank]` of `idle_factors`.

    Raises:
        FormatError, TypeError, ValueError: as `qft.quantize` does; or an argument lies outside what is said above.
    """
    rank = whole_number(rank, "rank")
    shape = quantize(w, fmt, name=name).shape  # which refuses what is no weight
    importance = None if second_moment is None else diagonal_of(second_moment, shape[1], "search")
    q = quantize(w, fmt, search=True, importance=importance, name=name)
    return q, *idle_factors(shape, rank, w.device, generator)
