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
    from .disk.directory import load as load
    from .disk.io import save as save
    from .disk.streaming import quantize_checkpoint as quantize_checkpoint
    from .format import Format as Format
    from .format import FormatError as FormatError
    from .init.loftq import loftq as loftq
    from .integrations.fsdp import fully_shard as fully_shard
    from .integrations.gather import gather_model as gather_model
    from .integrations.sharded_checkpoint import load_sharded as load_sharded
    from .integrations.sharded_checkpoint import save_sharded as save_sharded
    from .integrations.transformers_config import QftConfig as QftConfig
    from .kernels import compile as compile
    from .kernels import explain as explain
    from .measure.calibration import Calibration as Calibration
    from .measure.calibration import calibrate as calibrate
    from .measure.measured_plan import plan_bits as plan_bits
    from .measure.measured_plan import plan_first_layers as plan_first_layers
    from .measure.plan import Plan as Plan
    from .model.layer_report import Report as Report
    from .model.layer_report import report as report
    from .model.prepare import prepare_for_training as prepare_for_training
    from .model.surgery import quantize_model as quantize_model
    from .nn.embedding import QuantEmbedding as QuantEmbedding
    from .nn.experts import QuantExperts as QuantExperts
    from .nn.linear import QuantLinear as QuantLinear
    from .tensor import QuantTensor as QuantTensor
    from .tensor import quantize as quantize

__version__ = "0.1.0"

_HOME = {
    "Calibration": "measure.calibration",
    "Format": "format",
    "FormatError": "format",
    "Plan": "measure.plan",
    "QftConfig": "integrations.transformers_config",
    "QuantEmbedding": "nn.embedding",
    "QuantExperts": "nn.experts",
    "QuantLinear": "nn.linear",
    "QuantTensor": "tensor",
    "Report": "model.layer_report",
    "calibrate": "measure.calibration",
    "add_glora": "adapters.glora",
    "add_multilora": "adapters.multilora",
    "add_pooled_lora": "adapters.pooled",
    "compile": "kernels",
    "explain": "kernels",
    "fully_shard": "integrations.fsdp",
    "gather_model": "integrations.gather",
    "load": "disk.directory",
    "load_adapter": "adapters.peft_format",
    "load_glora": "adapters.glora_file",
    "load_scales": "adapters.scales",
    "load_sharded": "integrations.sharded_checkpoint",
    "loftq": "init.loftq",
    "merge_glora": "adapters.glora",
    "merge_multilora": "adapters.multilora",
    "merge_pooled": "adapters.pooled",
    "plan_bits": "measure.measured_plan",
    "plan_first_layers": "measure.measured_plan",
    "prepare_for_training": "model.prepare",
    "quantize": "tensor",
    "quantize_model": "model.surgery",
    "quantize_checkpoint": "disk.streaming",
    "report": "model.layer_report",
    "round_scales": "adapters.scales",
    "save": "disk.io",
    "save_adapter": "adapters.peft_format",
    "sample_glora": "adapters.glora",
    "save_glora": "adapters.glora_file",
    "save_scales": "adapters.scales",
    "save_sharded": "integrations.sharded_checkpoint",
    "scales_state": "adapters.scales",
    "search_glora": "adapters.glora_search",
    "share_inputs": "adapters.shared_input",
    "train_only": "adapters.scales",
}

__all__ = sorted(_HOME)

# these install themselves
when_imported("peft", lambda: import_module(".integrations.peft", __name__))
when_imported("transformers.quantizers.auto", lambda: import_module(".integrations.transformers", __name__))
when_imported("transformers.modeling_utils", lambda: import_module(".integrations.transformers_model", __name__))


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
