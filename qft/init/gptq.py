"""GPTQ (Frantar et al., ICLR 2023): columns are rounded in turn, each told what rounding those before it lost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, reference
from ..format import Format
from ..tensor import QuantTensor, quantize
from .factors import idle_factors, one_of, whole_number
from .quantizers import QUANTIZERS
from .second_moment import full_matrix

LEAF = 32  # columns rounded one by one between two matrix products; no group is smaller


def gptq(
    w: Tensor,
    fmt: Format | str,
    rank: int = 0,
    alpha: float | None = None,
    *,
    second_moment: Tensor | None = None,
    damp: float = 0.01,
    act_order: bool = False,
    quantizer: str = "search",
    generator: torch.Generator | None = None,
    name: str = "weight",
) -> tuple[QuantTensor, Tensor, Tensor]:
    """Choose the codes by the error of the layer's output; A is random and B is 0.

    A group's scales are found when its first column's turn comes, from the weights as corrected until then. Under dq
    codes are chosen against the scales before their second quantization. Beside `w` are held two fp32 matrices of its
    shape and one of that of `second_moment`; while that is factored, two float64 ones.

    Args:
        w: `[out, in]`, floating, finite.
        fmt: a Format or its spelling.
        rank: rows of A, 0 or more; 0 gives factors without elements.
        alpha: changes nothing while B is 0; taken so that every start is called alike.
        second_moment: S = E[x xᵀ], fp32 or float64 `[in, in]`.
        damp: added to S's diagonal, in units of its mean; 0 or more. Much of it makes this plain rounding.
        act_order: take columns by falling S_jj, with scales found for the original groups before the first turn
            (GPTQ's static groups), so that storage stays in order.
        quantizer: how a group's scale is found: "search" weighs the columns by their share in the error of the output
            that is theirs alone; "absmax".
        generator: draws A; torch's global one where None.
        name: what error messages call the weight.

    Returns:
        the QuantTensor; A fp32 `[rank, in]` and B fp32 `[out, rank]` of `idle_factors`.

    Raises:
        FormatError, TypeError, ValueError: as `qft.quantize` does; or an argument lies outside what is said above.
    """
    one_of(quantizer, QUANTIZERS, "quantizer")
    rank = whole_number(rank, "rank")
    shape = quantize(w, fmt, name=name).shape
    moment = full_matrix(second_moment, shape[1], "gptq")
    with torch.no_grad(), torch.autocast(w.device.type, enabled=False):
        q = rounded(w.float().contiguous(), Format.parse(fmt), Feedback.of(moment, damp, act_order), quantizer, name)
    return q, *idle_factors(shape, rank, w.device, generator)


@dataclass(frozen=True)
class Feedback:
    """What of a column's rounding error is added to the columns after it.

    H = (U + I) D (U + I)ᵀ with U strictly upper triangular and D diagonal, H being S with its diagonal damped. With
    E = W − Q the error tr(E H Eᵀ) is that of E · (U + I) under D: column j is rounded to nearest after the sum of
    E_i · U_ij over the columns i before it is added. That is OPTQ without its inverse (QuIP, theorem 6).

    Attributes:
        weights: U, fp32 `[in, in]`.
        variances: D, fp32 `[in]`: E[x_j²] less what the inputs before it predict, damping included.
        order: `[in]`, which column has the turn; None where they come as they are.
    """

    weights: Tensor
    variances: Tensor
    order: Tensor | None = None

    @classmethod
    def of(cls, moment: Tensor, damp: float, act_order: bool = False) -> Feedback:
        """Factor a second moment `[in, in]`, in float64.

        Raises:
            ValueError: damp is negative, or too little for a second moment without full rank.
        """
        if not 0 <= damp < float("inf"):
            raise ValueError(f"damp={damp} is not a number from 0; GPTQ's is 0.01")
        diagonal = moment.diagonal()
        order = diagonal.argsort(descending=True, stable=True) if act_order else None
        turns = torch.arange(len(moment), device=moment.device) if order is None else order
        backwards = turns.flip(0)  # the lower factor of H backwards is the upper factor of H
        damped = moment[backwards][:, backwards].double()
        mean = damped.diagonal().mean()
        mean = torch.where(mean > 0, mean, 1)
        # an input that is always 0 has no part in the error: any positive number rounds its column as it is
        damped.diagonal().add_(damp * mean + torch.where(damped.diagonal() > 0, 0, mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            raise ValueError(
                f"second_moment with damp={damp} is not positive definite; raise damp, such as to 0.01, "
                "or measure it over more text"
            )
        del damped
        root = lower.diagonal().clone()
        weights = lower.div_(root).float().flip(0, 1).triu_(1)
        return cls(weights, root.square().flip(0).float(), order)


def rounded(w: Tensor, fmt: Format, feedback: Feedback, quantizer: str, name: str = "weight") -> QuantTensor:
    """Round the columns of `w` fp32 `[out, in]` in turn."""
    search = quantizer == "search"
    turns = _Turns(w, fmt, feedback, search, name)
    turns.take(0, turns.span)
    codes = turns.codes
    if feedback.order is not None:
        codes = torch.empty_like(codes).index_copy_(0, feedback.order, codes)
    return QuantTensor.from_codes(codes.T.contiguous(), turns.scales, turns.zeros, fmt)


class _Turns:
    """The state between two columns' turns. Columns lie in rows here, in the order of their turns."""

    def __init__(self, w: Tensor, fmt: Format, feedback: Feedback, search: bool, name: str) -> None:
        out, self.columns = w.shape
        self.fmt, self.feedback, self.search, self.name = fmt, feedback, search, name
        self.one_group = Format(fmt.code, 0, "f32", fmt.zero)
        self.codes = torch.empty(self.columns, out, dtype=torch.uint8, device=w.device)
        # a column of w until its turn, then what its rounding lost
        self.error = w.T.clone(memory_format=torch.contiguous_format)
        self.correction = torch.zeros_like(self.error)
        self.span = max(LEAF, 1 << (self.columns - 1).bit_length())
        self.group = min(fmt.group or self.span, self.span)
        groups = fmt.groups(self.columns)
        self.scales = torch.empty(out, groups, device=w.device)
        self.zeros = torch.empty(out, groups, device=w.device) if fmt.zero else None
        order = feedback.order
        self.group_of = (torch.arange(self.columns) if order is None else order.cpu()).div(
            self.group, rounding_mode="floor"
        )
        if order is not None:
            variances = torch.empty_like(feedback.variances).index_copy_(0, order, feedback.variances)
            self._find_scales(w, variances, slice(None))
            self.error = self.error[order]

    def take(self, start: int, size: int) -> None:
        """The turns of columns start .. start + size, a power of two: those of the first half, what their errors add to
        the second half, and those of the second half. A group's columns are complete when its first one's turn comes.
        """
        stop = min(start + size, self.columns)
        if size == self.group and self.feedback.order is None:
            within = self.feedback.weights[start:stop, start:stop].T
            # where every weight of the group would go if it were not rounded: then it loses what corrected it
            moved = torch.linalg.solve_triangular(within, self.correction[start:stop], upper=False, unitriangular=True)
            group = start // self.group
            corrected = (self.error[start:stop] + moved).T
            self._find_scales(corrected, self.feedback.variances[start:stop], slice(group, group + 1))
        if size == LEAF:
            return self._round(start, stop)
        middle = start + size // 2
        self.take(start, size // 2)
        if middle < stop:
            weights = self.feedback.weights[start:middle, middle:stop]
            self.correction[middle:stop].addmm_(weights.T, self.error[start:middle])
            self.take(middle, size // 2)
        return None

    def _find_scales(self, w: Tensor, importance: Tensor, groups: slice) -> None:
        weighed = importance if self.search else None
        _, scales, zeros, bad = kernels.quantize(w, self.fmt, search=self.search, importance=weighed)
        if bad >= 0:
            raise ValueError(f"the corrections to {self.name} overflow fp32; raise damp, or make the weight smaller")
        self.scales[:, groups] = scales.float()
        if self.zeros is not None and zeros is not None:
            self.zeros[:, groups] = zeros.float()

    def _round(self, start: int, stop: int) -> None:
        for column in range(start, stop):
            group = int(self.group_of[column])
            scales = self.scales[:, group : group + 1]
            zeros = None if self.zeros is None else self.zeros[:, group : group + 1]
            error = self.error[column]
            codes = reference.encode((error + self.correction[column])[:, None], scales, zeros, self.one_group)
            error -= reference.dequantize(codes, scales, zeros, self.one_group)[:, 0]
            self.codes[column] = codes[:, 0]
            self.correction[column + 1 : stop].addr_(self.feedback.weights[column, column + 1 : stop], error)
