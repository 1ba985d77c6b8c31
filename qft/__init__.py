"""qft: a quantization compiler for fine-tuning.

    fmt   = qft.Format.parse("nf4 g64 f32")
    layer = qft.QuantLinear.from_linear(linear, fmt)
    layer.add_lora(rank=16, alpha=32)

Importing is free: names load their module, and torch with it, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .format import Format as Format
    from .format import FormatError as FormatError
    from .kernels import compile as compile
    from .kernels import explain as explain
    from .tensor import QuantTensor as QuantTensor
    from .tensor import quantize as quantize

__version__ = "0.1.0"

_HOME = {
    "Format": "format",
    "FormatError": "format",
    "QuantTensor": "tensor",
    "compile": "kernels",
    "explain": "kernels",
    "quantize": "tensor",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qft' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
