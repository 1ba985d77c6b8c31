"""Low-rank factors of a matrix: by the exact SVD, or by a randomized one that draws from a seed of its own."""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("randomized", "exact")

# What a randomized SVD loses is largest where the spectrum falls slowly, as that of quantization noise does. With
# these, what remains of 1024x1024 noise is within 0.2 % of the optimum at every rank, and of the worst spectrum found
# (falling by a fifth over four times the rank, then 0) within 0.4 %. Two power steps would lose 1.3 % on noise at rank
# 64.
POWER_STEPS = 5
LEAST_OVERSAMPLING = 16  # columns beyond the rank: as many as the rank, and at least these
EXACT_BELOW = 1024  # shorter side
SEED = 0


def low_rank(matrix: Tensor, rank: int, method: str = "randomized") -> tuple[Tensor, Tensor]:
    """The best B · A of rank `rank` for `matrix`, singular values split evenly (LoftQ, equation 9).

    Args:
        matrix: fp32 `[out, in]`, finite.
        rank: 1 to min(out, in).
        method: "exact", or "randomized" (Halko et al. 2009, algorithms 4.4 and 5.1): what remains is within 0.5 % of
            the exact one. A side below 1024, or a rank above a quarter of the shorter side, where a randomized SVD
            saves nothing, is exact either way.

    Returns:
        A = sqrt(S) Vt, fp32 `[rank, in]`, and B = U sqrt(S), fp32 `[out, rank]`.
    """
    width = rank + max(LEAST_OVERSAMPLING, rank)
    shorter = min(matrix.shape)
    if method == "exact" or shorter < EXACT_BELOW or 2 * width > shorter:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = _leading_range(matrix, width)
        u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def seeded(device: torch.device) -> torch.Generator:
    """A generator of its own at the fixed seed: same weight, same start, and the global generator is left alone."""
    return torch.Generator(device).manual_seed(SEED)


def _leading_range(matrix: Tensor, width: int) -> Tensor:
    """Orthonormal `[out, width]` whose span nearly holds the leading left singular vectors, by subspace iteration.

    torch.svd_lowrank does the same, but draws from the global generator alone, and its Householder factorizations
    wait for every thread at every column: beside one busy process they took a hundred times the products' time.
    """
    device = matrix.device
    right = torch.randn(matrix.shape[1], width, device=device, dtype=matrix.dtype, generator=seeded(device))
    coarse = matrix.to(_power_dtype(device))
    for step in range(POWER_STEPS):
        back = matrix if step == POWER_STEPS - 1 else coarse
        left = orthonormal((coarse @ right.to(coarse.dtype)).to(matrix.dtype))
        right = orthonormal((back.T @ left.to(back.dtype)).to(matrix.dtype))
    del coarse
    return orthonormal(orthonormal(matrix @ right))


def _power_dtype(device: torch.device) -> torch.dtype:
    """Of the products of the power steps but the very last, which mends what they round away: a processor with bf16
    products has them five times as fast as fp32's."""
    fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def orthonormal(columns: Tensor) -> Tensor:
    """A basis of the span of `columns` `[n, width]`, by Cholesky QR in float64.

    Orthonormal to fp32 precision where the condition number is below 1e4, and after a second call up to 1e7, beyond
    which fp32 columns hold nothing but rounding: those directions the shift keeps from failing.
    """
    wide = columns.double()
    gram = wide.T @ wide
    gram.diagonal().add_(1e-14 * gram.trace() + torch.finfo(torch.float64).tiny)
    upper = torch.linalg.cholesky(gram, upper=True)
    return torch.linalg.solve_triangular(upper, wide, upper=True, left=False).to(columns.dtype)
