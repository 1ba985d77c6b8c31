"""Getting a quantized model ready to train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.linear import QuantLinear
from ..nn.packed import Packed, packed_weights
from ..notices import say_once
from .targets import examples


def prepare_for_training(model: nn.Module, gradient_checkpointing: bool = True) -> nn.Module:
    """Make a quantized model ready to train its adapters or scales; nothing is cast to fp32.

    Parameters that are neither a QuantLinear's adapter nor already-trainable scales or zeros are frozen. Gradient
    checkpointing is switched on (non-reentrant) where the model offers it, and inputs are made to require gradients.
    The first training forward checks that a gradient can flow; after the first backward, parameters that none reached
    are named once. Under torch.compile of the whole model nothing is checked.

    Raises:
        ValueError: the model holds no quantized layer; later, from its first training forward: nothing trains, or the
            output needs no gradient.
    """
    ours = {id(p) for weight in packed_weights(model).values() for p in _trainable_of(weight.module)}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad_(False)
    offered: Any = model
    if gradient_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):  # transformers' newer name
            offered.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        elif hasattr(model, "gradient_checkpointing_enable"):
            offered.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            say_once(f"{type(model).__name__} offers no gradient checkpointing; activations are kept")
    if hasattr(model, "enable_input_require_grads"):
        offered.enable_input_require_grads()
    _GradientCheck(model)
    return model


def _trainable_of(module: Packed) -> Iterator[nn.Parameter]:
    """What may train: scales, zero points, and a linear layer's adapter; biases and the rest not."""
    for name, parameter in module._parameters.items():
        adapter = isinstance(module, QuantLinear) and name != "bias"
        if parameter is not None and (adapter or name in module.stored):
            yield parameter


class _GradientCheck:
    """Watches the first training step for gradients, then takes its hooks away."""

    def __init__(self, model: nn.Module) -> None:
        self.reached: set[int] = set()
        self.seen_forward = False
        self.hooks = [model.register_forward_hook(self._after_forward, with_kwargs=True)]

    def _after_forward(self, model: nn.Module, inputs: Any, given: Mapping[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return  # in a graph there is nothing to watch: it is compiled before any gradient flows
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable and any(given.get(name) is not None for name in ("inputs_embeds", "past_key_values")):
            return  # a prompt or prefix of PEFT's, which trains outside the model
        if not trainable:
            raise ValueError(
                f"nothing in {type(model).__name__} trains; attach a LoRA or call qft.train_only(model, 'scales')"
            )
        if not self.seen_forward:
            if not any(tensor.requires_grad for tensor in _tensors(output)):
                raise ValueError(
                    f"the output of {type(model).__name__} needs no gradient though {len(trainable)} parameters train; "
                    "use non-reentrant checkpointing or model.enable_input_require_grads()"
                )
            self.seen_forward = True
            for parameter in trainable.values():
                self.hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: self.reached.add(id(p))))
            return
        if not self.reached:  # no backward yet: two forwards may share one
            return
        for hook in self.hooks:
            hook.remove()
        missed = [name for name, p in trainable.items() if id(p) not in self.reached]
        if missed:
            say_once(f"no gradient reached {len(missed)} of {len(trainable)} trainable parameters: {examples(missed)}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
