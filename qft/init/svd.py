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
# Of the SVDs after LoftQ's first, which begin where the last one ended: over ten spectra and four formats at 1024x1024,
# two steps leave at most 0.04 % more than five do, where one leaves 0.12 % more.
LATER_POWER_STEPS = 2
LEAST_OVERSAMPLING = 16  # rows beyond the rank: as many as the rank, and at least these
EXACT_BELOW = 1024  # shorter side
SEED = 0


class LowRank:
    """The best B · A of one rank for each of several matrices, singular values split evenly (LoftQ, equation 9).

    The matrices have one shape and device, and each is near the one before, as in LoftQ: a randomized SVD begins where
    the last one ended. Where the last matrix had nothing to do with this one, that costs up to another 0.6 %.

    Args:
        rank: 1 to min(out, in).
        method: "exact", or "randomized" (Halko et al. 2009, algorithms 4.4 and 5.1): what remains is within 0.5 % of
            the exact one. A side below 1024, or a rank above a quarter of the shorter side, where a randomized SVD
            saves nothing, is exact either way.
    """

    def __init__(self, rank: int, method: str = "randomized") -> None:
        self.rank, self.method = rank, method
        self._width = rank + max(LEAST_OVERSAMPLING, rank)
        self._found: Tensor | None = None  # fp32 [width, in], the leading right singular vectors of the last matrix
        self._coarse: Tensor | None = None  # kept: at 4096x4096 a copy takes 7 ms to fresh memory, 1 to this

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Of a matrix fp32 `[out, in]`, finite.

        Returns:
            A = sqrt(S) Vt, fp32 `[rank, in]`, and B = U sqrt(S), fp32 `[out, rank]`.
        """
        shorter = min(matrix.shape)
        if self.method == "exact" or shorter < EXACT_BELOW or 2 * self._width > shorter:
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        else:
            basis = self._leading_range(matrix)
            u, s, vt = _svd_of_rows(basis @ matrix)
            self._found = vt if s[-1] > 1e-6 * s[0] else None  # a matrix of lower rank has too few directions
            u = basis.T @ u
        root = s[: self.rank].sqrt()
        return root[:, None] * vt[: self.rank], u[:, : self.rank] * root

    def _leading_range(self, matrix: Tensor) -> Tensor:
        """Orthonormal `[width, out]` whose span nearly holds the leading left singular vectors, by subspace iteration.

        Bases are held as rows: an fp32 product of 128 of them with 4096x4096 takes 17 ms by MKL, and of columns 24 ms.
        torch.svd_lowrank does the same, but draws from the global generator alone, and its Householder factorizations
        wait for every thread at every column: beside one busy process they took a hundred times the products' time.
        """
        right, steps = self._found, LATER_POWER_STEPS
        if right is None:
            shape, generator = (self._width, matrix.shape[1]), seeded(matrix.device)
            right, steps = torch.randn(shape, device=matrix.device, generator=generator), POWER_STEPS
        coarse = self._rounded(matrix)
        for step in range(steps):
            back = matrix if step == steps - 1 else coarse
            left = orthonormal(right.to(coarse.dtype) @ coarse.T, back.dtype)
            right = orthonormal(left @ back)
        return orthonormal(orthonormal(right @ matrix.T))

    def _rounded(self, matrix: Tensor) -> Tensor:
        """`matrix` as the products of the power steps take it, all but the very last, which mends what is rounded away:
        a processor with bf16 products has them four times as fast as fp32's."""
        if not (matrix.device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)):
            return matrix
        if self._coarse is None:
            self._coarse = torch.empty_like(matrix, dtype=torch.bfloat16)
        return self._coarse.copy_(matrix)


def seeded(device: torch.device) -> torch.Generator:
    """A generator of its own at the fixed seed: same weight, same start, and the global generator is left alone."""
    return torch.Generator(device).manual_seed(SEED)


def orthonormal(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A basis of the span of `rows` `[width, n]`, by Cholesky QR in float64, as `dtype` or the rows' own.

    Orthonormal to fp32 precision where the condition number is below 1e4, and after a second call up to 1e7, beyond
    which fp32 rows hold nothing but rounding: those directions the shift keeps from failing.
    """
    wide = rows.double()
    gram = wide @ wide.T
    gram.diagonal().add_(1e-14 * gram.trace() + torch.finfo(torch.float64).tiny)
    lower = torch.linalg.cholesky(gram)
    return torch.linalg.solve_triangular(lower, wide, upper=False).to(dtype or rows.dtype)


def _svd_of_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[width, width]`, S and Vt `[width, n]` of fp32 `[width, n]`, by its Gram matrix's eigenvectors in float64.

    Singular values below 1e-8 of the largest, a tenth of fp32's rounding, are lost. For 128 rows of 4096 this takes 3
    ms, torch.linalg.svd 14.
    """
    wide = rows.double()
    u = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)
    scaled = u.T @ wide
    s = torch.linalg.vector_norm(scaled, dim=1)
    vt = scaled / s.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return u.to(rows.dtype), s.to(rows.dtype), vt.to(rows.dtype)
