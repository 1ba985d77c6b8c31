"""How a start that fits an adapter rounds the weight."""

from __future__ import annotations

from torch import Tensor

from ..format import Format
from ..tensor import QuantTensor, quantize
from .uniform import uniform

QUANTIZERS = ("search", "absmax")
LOFTQ_QUANTIZERS = ("absmax", "search", "uniform")


def quantized(
    w: Tensor, fmt: Format | str, quantizer: str, importance: Tensor | None = None, name: str = "weight"
) -> QuantTensor:
    """Codes and scales of `w` `[out, in]` by a name of `LOFTQ_QUANTIZERS`.

    "absmax" and "search" are those of `qft.quantize`, the search weighted by `importance` `[in]` where given; "uniform"
    is LoftQ's own.

    Raises:
        FormatError, TypeError, ValueError: as `qft.quantize` does; or "uniform" cannot be stored as `fmt`.
    """
    if quantizer == "uniform":
        return uniform(w, fmt, name)
    search = quantizer == "search"
    return quantize(w, fmt, search=search, importance=importance if search else None, name=name)
