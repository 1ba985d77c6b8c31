"""What transformers' model class is told of packed layers, whoever packed them.

`save_pretrained` asks a model's `hf_quantizer`, which `from_pretrained` leaves there, what config.json must say. A
model that `qft.quantize_model` or a hand packed after it was read has none; it gets one for the length of the call, so
that `from_pretrained` opens what was written.

`dtype` is the dtype of the first floating parameter. Stored scales are none that says how a model computes.

`import qft` has this module imported once transformers' models are, which installs it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from ..nn.packed import Packed
from .transformers import QftQuantizer
from .transformers_config import QftConfig


def install() -> None:
    """Put a `save_pretrained` and a `dtype` that know packed layers on the class. Calling it again changes nothing."""
    model_class: Any = PreTrainedModel
    original, dtype = model_class.save_pretrained, model_class.dtype
    if hasattr(original, "knows_packed_layers"):
        return

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = getattr(self, "hf_quantizer", None) is not None or getattr(self, "_hf_peft_config_loaded", False)
        if known or not any(isinstance(module, Packed) for module in self.modules()):
            return original(self, *args, **kwargs)
        self.hf_quantizer = QftQuantizer(QftConfig())
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.hf_quantizer
            self.config.__dict__.pop("quantization_config", None)

    def dtype_of_what_is_dense(self: Any) -> torch.dtype:
        for module in self.modules():
            if not isinstance(module, Packed):
                for parameter in module._parameters.values():
                    if parameter is not None and parameter.is_floating_point():
                        return parameter.dtype
        return dtype.fget(self)  # type: ignore[no-any-return]

    save_pretrained.knows_packed_layers = True  # type: ignore[attr-defined]
    model_class.save_pretrained = save_pretrained
    model_class.dtype = property(dtype_of_what_is_dense, doc=dtype.__doc__)


install()
