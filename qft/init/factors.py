"""The two factors of an adapter: the scaling folded into them, and the pair that trains from nothing."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from .svd import seeded

ORDERS = ("quantize-first", "svd-first")  # of a turn that rounds and fits


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


def balanced_factors(left: Tensor, right: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B with scaling · B · A = left · right, the product's singular values split evenly (LoftQ, equation 9).

    Args:
        left: float64 `[out, rank]`.
        right: float64 `[rank, in]`.
        scaling: what the layer multiplies B · A by.

    Returns:
        A fp32 `[rank, in]` with orthogonal rows and B fp32 `[out, rank]` with orthogonal columns, of equal norms. Where
        the product has a lower rank, the rows of A left over are drawn as in `idle_factors` and meet a 0 in B: of two
        zeros neither would train.
    """
    left_basis, left_square = torch.linalg.qr(left)
    right_basis, right_square = torch.linalg.qr(right.T)
    u, s, vt = torch.linalg.svd(left_square @ right_square.T)
    used = s > torch.finfo(torch.float32).eps * s[0]
    root = torch.where(used, s / scaling, 0).sqrt()
    a = (root[:, None] * (vt @ right_basis.T)).float()
    idle, _ = idle_factors((len(left), right.shape[1]), len(s), left.device, seeded(left.device))
    return torch.where(used[:, None], a, idle), ((left_basis @ u) * root).float()


def lora_scaling(rank: int, alpha: float | None, rslora: bool = False) -> float:
    """What LoRA multiplies B · A by: alpha / rank, or alpha / sqrt(rank) (rsLoRA); alpha is the rank where None.

    Raises:
        ValueError: alpha is not a positive number.
    """
    if alpha is None:
        alpha = rank
    elif not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha={alpha} is not a positive number; leave it out for a scaling of 1")
    divisor = math.sqrt(rank) if rslora else rank
    return alpha / divisor if rank else 1.0


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


def one_of(value: str, allowed: tuple[str, ...], name: str) -> None:
    """Refuse a word that is not among those allowed.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; use {' or '.join(map(repr, allowed))}")
