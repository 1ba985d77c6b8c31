"""Results compared with float64 before anything is timed: a wrong result has no speed."""

from __future__ import annotations

import torch
from torch import Tensor

# On |made - truth| / |truth|: bf16 rounds x, weight and y at 2^-9 each, fp16 at 2^-12; some peers hold scales in bf16.
TOLERANCE = {"bf16": 5e-3, "f16": 1e-3, "f32": 1e-5}
SAMPLE = (17, 585)  # rows and columns of a product that are compared, at least


def relative_error(made: Tensor, truth: Tensor) -> float:
    """|made - truth| / |truth|, in float64."""
    return float((made.detach().double() - truth.double()).norm() / truth.double().norm())


def product_error(made: Tensor, a: Tensor, b: Tensor) -> float:
    """Of a sample of made = a b, against float64."""
    rows, columns = (every(size, least) for size, least in zip(made.shape, SAMPLE, strict=True))
    return relative_error(made[rows, columns], a[rows].detach().double() @ b[:, columns].double())


def every(size: int, least: int) -> slice:
    """At least `least` of `size`, an odd number apart: every lane of a vector and every place in a tile is met."""
    return slice(None, None, max(1, (size // least - 1) | 1))


def require(error: float, dtype: str, what: str) -> float:
    """The error, where it is small enough for `dtype`, a key of `TOLERANCE`.

    Raises:
        ValueError: it is not, or is no number: the time of a wrong result would mean nothing.
    """
    if not error <= TOLERANCE[dtype]:
        raise ValueError(
            f"{what}: the relative error {error:.2g} exceeds {TOLERANCE[dtype]:g}; "
            "a wrong result is not timed, mend the kernel first"
        )
    return error


def weight_like(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A weight as training leaves it: normal, standard deviation 0.02, always the same."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def operand(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """x or dy: normal, `[rows, width]`, always the same for a seed."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
