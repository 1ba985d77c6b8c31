"""Low-rank factors of a matrix: by the exact SVD, or by torch's randomized one from a seed of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

METHODS = ("randomized", "exact")

# The randomized SVD's only error is the part of the leading singular vectors its range misses, which is largest on flat
# spectra, such as quantization noise. With these the error of what remains is within 0.5 % of the optimum at every rank
# (tests/test_init.py: the spectra of noise, power laws, exponential decay).
POWER_STEPS = 4
LEAST_OVERSAMPLING = 16  # half the rank where that is more
EXACT_BELOW = 1024  # shorter side: below, the exact SVD takes less than a second
SEED = 0


class _DrawFrom(TorchFunctionMode):
    """Make torch.randn draw from `generator` on this thread.

    torch.svd_lowrank draws its test matrix from the global generator and takes no other; this leaves that one alone.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **kwargs, generator=self.generator) if func is torch.randn else func(*args, **kwargs)


def seeded(device: torch.device) -> torch.Generator:
    """A generator of its own at the fixed seed: same weight, same start."""
    return torch.Generator(device).manual_seed(SEED)


def low_rank(matrix: Tensor, rank: int, method: str = "randomized") -> tuple[Tensor, Tensor]:
    """The best B · A of rank `rank` for `matrix`, singular values split evenly (LoftQ, equation 9).

    Args:
        matrix: fp32 `[out, in]`, finite.
        rank: 1 to min(out, in).
        method: "randomized" (the error of what remains within 0.5 % of the optimum; Halko et al. 2009, algorithm 5.1) or
            "exact". Matrices with a side below 1024, and ranks from a third of the shorter side up, where the randomized
            SVD would save nothing, are exact either way.

    Returns:
        A = sqrt(S) Vt, fp32 `[rank, in]`, and B = U sqrt(S), fp32 `[out, rank]`.
    """
    width = rank + max(LEAST_OVERSAMPLING, rank // 2)
    shorter = min(matrix.shape)
    if method == "exact" or shorter < EXACT_BELOW or 2 * width > shorter:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with _DrawFrom(seeded(matrix.device)):
            u, s, v = torch.svd_lowrank(matrix, q=width, niter=POWER_STEPS)
        vt = v.mT
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root
