"""Plain start (QLoRA, section 3): quantize the weight, and let the adapter begin as nothing."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from ..format import Format
from ..tensor import QuantTensor, quantize


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


def idle_factors(
    shape: tuple[int, int], rank: int, device: torch.device, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Factors whose product is 0 and whose gradient is not, for a weight of shape (out, in).

    Returns:
        A fp32 `[rank, in]`, uniform within ±1/sqrt(in), as PEFT draws it; B fp32 `[out, rank]`, zeros.
    """
    out, in_features = shape
    bound = in_features**-0.5  # what kaiming_uniform(a=sqrt(5)) comes to
    a = torch.empty(rank, in_features, device=device, dtype=torch.float32)
    return a.uniform_(-bound, bound, generator=generator), torch.zeros(out, rank, device=device, dtype=torch.float32)


def whole_number(value: int, name: str, highest: int | None = None) -> int:
    """`value` as an int, where it is an integer of any type from 0 to `highest`.

    Raises:
        TypeError: it is not an integer.
        ValueError: it lies outside.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; give an integer, such as {name}=5") from None
    if number < 0:
        raise ValueError(f"{name}={number} is negative; use {name}=0 or more")
    if highest is not None and number > highest:
        raise ValueError(f"{name}={number} exceeds the weight's shorter side; use {name}={highest} or less")
    return number
