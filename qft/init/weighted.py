"""The low-rank matrix nearest to a residual where its inputs have second moment S, without inverting or factoring S.

For y = D x the best D of rank r minimises tr((R − D) S (R − D)ᵀ). It is [R T]_r T⁻¹ for any T with T Tᵀ = S (QERA,
theorem 1; the same in EoRA and CLoQ), and that equals U Uᵀ R, U holding the leading eigenvectors of G = R S Rᵀ: nothing
breaks where S is singular. What remains is the sum of G's other eigenvalues.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensor import QuantTensor
from .factors import balanced_factors, idle_factors
from .second_moment import times_moment
from .svd import EXACT_BELOW, LEAST_OVERSAMPLING, POWER_STEPS, orthonormal, seeded


def weighted_low_rank(residual: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U and Uᵀ R, whose product is the best matrix of rank `rank` for R under S.

    Arithmetic is float64. Where the residual's shorter side is 1024 or more and the rank below a quarter of it, U comes
    from subspace iteration on G (Halko et al. 2009), which is never formed: what remains is within 0.5 % of the least.

    Args:
        residual: R, `[out, in]`, floating, finite.
        moment: S, `[in, in]`, or its diagonal `[in]`.
        rank: 1 to min(out, in).

    Returns:
        U float64 `[out, rank]`, orthonormal, by falling eigenvalue; Uᵀ R float64 `[rank, in]`.
    """
    wide = residual.double()
    width = rank + max(LEAST_OVERSAMPLING, rank)
    shorter = min(wide.shape)
    if shorter < EXACT_BELOW or 2 * width > shorter:
        u = _eigenvectors(wide, moment, rank)
    else:
        u = _leading_eigenvectors(wide, moment, rank, width)
    return u, u.T @ wide


def fitted_factors(w: Tensor, q: QuantTensor, moment: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A fp32 `[rank, in]` and B fp32 `[out, rank]`: scaling · B · A is the best of its rank for W − Q under S."""
    if not rank:
        return idle_factors(q.shape, 0, w.device)
    residual = q.dequantize()
    torch.sub(w.float(), residual, out=residual)
    return balanced_factors(*weighted_low_rank(residual, moment, rank), scaling)


def _eigenvectors(residual: Tensor, moment: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors of G, from all of it; of a tall residual within its columns' span."""
    out, in_features = residual.shape
    basis = None
    if out > in_features:
        basis, residual = torch.linalg.qr(residual)
    gram = residual @ times_moment(moment, residual.T)
    u = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors[:, -rank:].flip(1)
    return u if basis is None else basis @ u


def _leading_eigenvectors(residual: Tensor, moment: Tensor, rank: int, width: int) -> Tensor:
    """The same by subspace iteration over `width` columns and a last turn to the eigenvectors within their span."""

    def times_gram(columns: Tensor) -> Tensor:
        return residual @ times_moment(moment, residual.T @ columns)

    device = residual.device
    basis = torch.randn(len(residual), width, device=device, dtype=torch.float64, generator=seeded(device))
    for _ in range(POWER_STEPS + 1):
        basis = orthonormal(orthonormal(times_gram(basis).T)).T
    basis = orthonormal(basis.T).T
    within = basis.T @ times_gram(basis)
    turn = torch.linalg.eigh((within + within.T) / 2).eigenvectors[:, -rank:].flip(1)
    return basis @ turn
