"""LoftQ's own uniform quantizer (its code, section 4): one grid for the whole weight, clipped at two deviations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import Format, FormatError
from ..tensor import QuantTensor, quantize

DEVIATIONS = 2


def uniform(w: Tensor, fmt: Format | str, name: str = "weight") -> QuantTensor:
    """Round to the nearest of 2^N evenly spaced values from the least to the largest weight, clipped at mean ± 2 std.

    Args:
        w: `[out, in]`, floating, finite.
        fmt: intN channel f32 zero: every row stores the one scale and the one zero point, which is no integer.
        name: what error messages call the weight.

    Raises:
        FormatError: `fmt` is another format. TypeError, ValueError: as `qft.quantize` does.
    """
    fmt = Format.parse(fmt)
    if not fmt.is_integer or fmt != (needed := Format(fmt.code, 0, "f32", True)):
        spelled = needed if fmt.is_integer else f"int{fmt.bits} channel f32 zero"
        raise FormatError(
            f"LoftQ's uniform quantizer has one scale and a real zero point; use '{spelled}', not '{fmt}'"
        )
    shape = quantize(w, fmt, name=name).shape  # which refuses what is no weight
    with torch.no_grad():
        dense = w.float()
        mean, reach = dense.double().mean().item(), DEVIATIONS * dense.double().std(correction=0).item()
        low, high = max(dense.min().item(), mean - reach), min(dense.max().item(), mean + reach)
        scale = (high - low) / (len(fmt.levels) - 1) or abs(low)  # of a constant: its size, one step from 0
        zero = -low / scale if scale else 0.0
        codes = (dense.clamp(low, high) - low).div(scale or 1).round().to(torch.uint8)
        rows = torch.ones(shape[0], 1, device=w.device)
        return QuantTensor.from_codes(codes, scale * rows, zero * rows, fmt)
