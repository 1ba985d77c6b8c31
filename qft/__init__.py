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
    from .adapters.scales import load_scales as load_scales
    from .adapters.scales import round_scales as round_scales
    from .adapters.scales import save_scales as save_scales
    from .adapters.scales import scales_state as scales_state
    from .adapters.scales import train_only as train_only
    from .adapters.shared_input import share_inputs as share_inputs
    from .format import Format as Format
    from .format import FormatError as FormatError
    from .init.loftq import loftq as loftq
    from .io import load as load
    from .io import save as save
    from .kernels import compile as compile
    from .kernels import explain as explain
    from .model import Report as Report
    from .model import prepare_for_training as prepare_for_training
    from .model import quantize_model as quantize_model
    from .model import report as report
    from .nn import QuantLinear as QuantLinear
    from .tensor import QuantTensor as QuantTensor
    from .tensor import quantize as quantize

__version__ = "0.1.0"

_HOME = {
    "Format": "format",
    "FormatError": "format",
    "QuantLinear": "nn",
    "QuantTensor": "tensor",
    "Report": "model",
    "compile": "kernels",
    "explain": "kernels",
    "load": "io",
    "load_scales": "adapters.scales",
    "loftq": "init.loftq",
    "prepare_for_training": "model",
    "quantize": "tensor",
    "quantize_model": "model",
    "report": "model",
    "round_scales": "adapters.scales",
    "save": "io",
    "save_scales": "adapters.scales",
    "scales_state": "adapters.scales",
    "share_inputs": "adapters.shared_input",
    "train_only": "adapters.scales",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "init":  # qft.init.loftq and its kin
        return import_module(".init", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'qft' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
