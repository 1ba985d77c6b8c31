"""A packed weight as integer codes with integer zero points, which is what the kernels of servers read.

qft's integers are such already: a symmetric format has the zero point 2^(bits-1) in every group, an asymmetric one
those that it stores. Only zero points between integers, which merging QA-LoRA leaves (Xu et al. 2023, section 3.3),
have no place on that grid. Such a layer goes to symmetric 8-bit codes: with a whole number k for each group,

    scale * (code - zero) = scale / k * (k * code - k * zero)

and k * zero lies within 1/2 of an integer, so that a weight moves by at most scale / (2 k), with k up to 16 for 4 bits,
36 for 3 and 84 for 2. 8-bit codes have no wider ones to go to: their zero points are rounded, by at most scale / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import Format, FormatError
from ..reference import per_weight
from ..tensor import QuantTensor

WIDE = 8  # bits of the codes where zero points lie between integers


@dataclass(frozen=True)
class IntegerGrid:
    """w = scale * (code - zero) with integers for code and zero.

    Attributes:
        bits: of a code and of a zero point; neither is negative.
        group: weights of one row that share a scale; 0 is the whole row.
        zeros: uint8 `[out, groups]`, or None: 2^(bits-1) everywhere.
        factor: k of each group, uint8 `[out, groups]`, where the codes were widened, else None.
        offset: k * zero, rounded, int16 `[out, groups]`, where they were.
        moved: whether a zero point was no integer, so that weights move.
    """

    bits: int
    group: int
    zeros: Tensor | None
    factor: Tensor | None = None
    offset: Tensor | None = None
    moved: bool = False

    @staticmethod
    def of(q: QuantTensor, path: str, target: str) -> IntegerGrid:
        """The grid that holds `q`, whose format is an integer one.

        Raises:
            FormatError: a zero point is not finite, or 8 bits do not reach it; `path` and `target` are named.
        """
        fmt = q.format
        if q.zeros is None:
            return IntegerGrid(fmt.bits, fmt.group, None)
        zeros = q.zeros.detach().double()
        if not zeros.isfinite().all():
            raise FormatError(f"{path} holds zero points that are not finite; load an earlier checkpoint")
        whole, top = zeros.round(), (1 << fmt.bits) - 1
        inside = bool(((whole >= 0) & (whole <= top)).all())
        if inside and (fmt.bits == WIDE or torch.equal(whole, zeros)):
            return IntegerGrid(fmt.bits, fmt.group, whole.to(torch.uint8), moved=not torch.equal(whole, zeros))
        return _widened(zeros, fmt.bits, fmt.group, path, target)

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 2^(bits-1)."""
        return self.zeros is None

    def scales(self, q: QuantTensor) -> Tensor:
        """fp32 `[out, groups]`."""
        scales = q.scales.detach()
        return scales if self.factor is None else scales / self.factor.float()

    def zero_points(self, q: QuantTensor) -> Tensor:
        """uint8 `[out, groups]`."""
        if self.zeros is not None:
            return self.zeros
        return torch.full(tuple(q.weight_scales.shape), 1 << (self.bits - 1), dtype=torch.uint8, device=q.weight.device)

    def codes(self, q: QuantTensor) -> Tensor:
        """uint8 `[out, in]`."""
        codes = _codes(q)
        if self.factor is None or self.offset is None:
            return codes
        factor, offset = (per_weight(values, q.format, q.shape[1]) for values in (self.factor, self.offset))
        return (codes.short() * factor - offset + (1 << (WIDE - 1))).to(torch.uint8)


def _codes(q: QuantTensor) -> Tensor:
    """What `q.unpack()` gives, by the kernels: under a scale of 1 a weight is its level, -2^(bits-1) for code 0."""
    ones = torch.ones(q.shape[0], 1, device=q.weight.device)
    levels = QuantTensor(Format(q.format.code, 0), q.shape, q.weight, ones).dequantize()
    return levels.add_(1 << (q.format.bits - 1)).to(torch.uint8)


def _widened(zeros: Tensor, bits: int, group: int, path: str, target: str) -> IntegerGrid:
    """For each group the factor under which its zero point is nearest to an integer."""
    top, middle = (1 << bits) - 1, 1 << (WIDE - 1)
    least, factor, offset = torch.full_like(zeros, torch.inf), torch.zeros_like(zeros), torch.zeros_like(zeros)
    for k in range((2 * middle - 1) // top, 0, -1):
        scaled = (k * zeros).round()
        error = (scaled / k - zeros).abs()
        better = (scaled <= middle) & (k * top - scaled < middle) & (error < least)
        least, factor = torch.where(better, error, least), torch.where(better, k, factor)
        offset = torch.where(better, scaled, offset)
    if not bool((factor > 0).all()):
        row, column = (factor == 0).nonzero()[0].tolist()
        raise FormatError(
            f"the zero point {zeros[row, column].item():g} of {path}, row {row}, group {column} is too far from the "
            f"codes 0..{top} for {target}; name the layer in dense to write it dequantized"
        )
    return IntegerGrid(WIDE, group, None, factor.to(torch.uint8), offset.to(torch.int16), moved=True)
