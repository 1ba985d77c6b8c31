"""qft: a quantization compiler for fine-tuning.

    fmt   = qft.Format.parse("nf4 g64 f32")
    layer = qft.QuantLinear.from_linear(linear, fmt)
    layer.add_lora(rank=16, alpha=32)

Importing is free: names load their module, and torch with it, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .import_hook import when_imported

if TYPE_CHECKING:
    from .adapters.glora import add_glora as add_glora
    from .adapters.glora import merge_glora as merge_glora
    from .adapters.glora import sample_glora as sample_glora
    from .adapters.glora_file import load_glora as load_glora
    from .adapters.glora_file import save_glora as save_glora
    from .adapters.glora_search import search_glora as search_glora
    from .adapters.multilora import add_multilora as add_multilora
    from .adapters.multilora import merge_multilora as merge_multilora
    from .adapters.peft_format import load_adapter as load_adapter
    from .adapters.peft_format import save_adapter as save_adapter
    from .adapters.pooled import add_pooled_lora as add_pooled_lora
    from .adapters.pooled import merge_pooled as merge_pooled
    from .adapters.scales import load_scales as load_scales
    from .adapters.scales import round_scales as round_scales
    from .adapters.scales import save_scales as save_scales
    from .adapters.scales import scales_state as scales_state
    from .adapters.scales import train_only as train_only
    from .adapters.shared_input import share_inputs as share_inputs
    from .calibration import Calibration as Calibration
    from .calibration import calibrate as calibrate
    from .format import Format as Format
    from .format import FormatError as FormatError
    from .init.loftq import loftq as loftq
    from .io import load as load
    from .io import save as save
    from .kernels import compile as compile
    from .kernels import explain as explain
    from .measured_plan import plan_bits as plan_bits
    from .measured_plan import plan_first_layers as plan_first_layers
    from .model import Report as Report
    from .model import prepare_for_training as prepare_for_training
    from .model import quantize_model as quantize_model
    from .model import report as report
    from .nn import QuantLinear as QuantLinear
    from .plan import Plan as Plan
    from .tensor import QuantTensor as QuantTensor
    from .tensor import quantize as quantize

__version__ = "0.1.0"

_HOME = {
    "Calibration": "calibration",
    "Format": "format",
    "FormatError": "format",
    "Plan": "plan",
    "QuantLinear": "nn",
    "QuantTensor": "tensor",
    "Report": "model",
    "calibrate": "calibration",
    "add_glora": "adapters.glora",
    "add_multilora": "adapters.multilora",
    "add_pooled_lora": "adapters.pooled",
    "compile": "kernels",
    "explain": "kernels",
    "load": "io",
    "load_adapter": "adapters.peft_format",
    "load_glora": "adapters.glora_file",
    "load_scales": "adapters.scales",
    "loftq": "init.loftq",
    "merge_glora": "adapters.glora",
    "merge_multilora": "adapters.multilora",
    "merge_pooled": "adapters.pooled",
    "plan_bits": "measured_plan",
    "plan_first_layers": "measured_plan",
    "prepare_for_training": "model",
    "quantize": "tensor",
    "quantize_model": "model",
    "report": "model",
    "round_scales": "adapters.scales",
    "save": "io",
    "save_adapter": "adapters.peft_format",
    "sample_glora": "adapters.glora",
    "save_glora": "adapters.glora_file",
    "save_scales": "adapters.scales",
    "scales_state": "adapters.scales",
    "search_glora": "adapters.glora_search",
    "share_inputs": "adapters.shared_input",
    "train_only": "adapters.scales",
}

__all__ = sorted(_HOME)

when_imported("peft", lambda: import_module(".integrations.peft", __name__))  # installs itself


def __getattr__(name: str) -> Any:
    if name in ("analysis", "compose", "init", "recipes"):  # qft.init.loftq and its kin
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'qft' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
