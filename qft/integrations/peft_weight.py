"""The packed weight as PEFT reads it, writes it and gets it back: dense for the length of a call, then packed again."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from ..nn.linear import QuantLinear
from ..notices import say_once
from ..tensor import quantize


@torch.no_grad()
def own_product(layer: QuantLinear) -> tuple[Tensor, Tensor] | None:
    """Factors B `[out, r]` and A `[r, in]`, fp32, of the layer's own LoRA, its scaling in B; None without one."""
    if layer.lora_A is None or layer.lora_B is None:
        return None
    a = layer.lora_A.float()
    if layer.lora_pooled:  # one number per group of the weight
        a = a.repeat_interleave(layer.format.group_size(layer.in_features), dim=1)[:, : layer.in_features]
    return layer.lora_B.float() * layer.lora_scaling, a


@torch.no_grad()
def counting_product(layer: QuantLinear) -> tuple[Tensor, Tensor] | None:
    """`own_product` where it is a part of what the layer computes; None where an adapter contains it instead."""
    return None if layer.lora_aside else own_product(layer)


@torch.no_grad()
def effective_weight(layer: QuantLinear) -> Tensor:
    """What the layer multiplies with, fp32 `[out, in]`: the dequantized weight and its own LoRA where that counts."""
    own = counting_product(layer)
    return layer.dequantize() if own is None else torch.addmm(layer.dequantize(), *own)


class DenseFace(nn.Linear):
    """What PEFT sees as the base layer while it reads or writes the weight; never part of a model.

    `weight` is what the layer computes with, fp32 `[out, in]`, a LoRA of qft's own included. It is made when it is
    first read and goes with this object. With `values=False` it is one NaN in that shape, for code that asks its shape.
    """

    def __init__(self, layer: QuantLinear, values: bool = True) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias  # type: ignore[assignment]
        self.values, self.behind = values, (layer,)  # a tuple, so that it is no submodule

    @cached_property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        (layer,) = self.behind
        if self.values:
            return nn.Parameter(effective_weight(layer), requires_grad=False)
        shape = (self.out_features, self.in_features)
        return nn.Parameter(torch.full((1, 1), torch.nan, device=layer.device).expand(shape), requires_grad=False)

    @property
    def read(self) -> bool:
        """Whether the weight was asked for."""
        return "weight" in self.__dict__


class Stored:
    """A layer's stored tensors at a time: the parameters themselves, since a merge puts others in their place."""

    def __init__(self, layer: QuantLinear) -> None:
        self.q, self.errors = layer.quant_tensor, layer.init_errors
        self.bias = None if layer.bias is None else layer.bias.detach().clone()  # PEFT writes into a bias

    def put_back(self, layer: QuantLinear) -> None:
        """Make the layer what it was, bit for bit, wherever it has moved since."""
        device, parameters = layer.device, self.q.tensors()
        layer.set_quantized(self.q)
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(device)
            layer.register_parameter(name, parameter)  # type: ignore[arg-type]  # the one that an optimizer may hold
        layer.weight_format = layer.weight_format.to(device)
        layer.init_errors = self.errors
        if layer.bias is not None and self.bias is not None:
            layer.bias.data = self.bias.to(layer.bias.device, layer.bias.dtype)


@torch.no_grad()
def store_merged(layer: QuantLinear, merged: Tensor) -> None:
    """Quantize fp32 `merged` `[out, in]` into the layer's own format; `layer.init_errors` tells what that cost.

    What the layer's own LoRA adds is taken out first, so that the layer computes with `merged`. Errors are those of
    `qft.quantize`; the layer is then as it was.
    """
    own = counting_product(layer)
    base = merged if own is None else torch.addmm(merged, *own, alpha=-1)
    layer.set_quantized(quantize(base, layer.format, name="the merged weight"))
    layer.init_errors = (((merged - effective_weight(layer)).norm() / merged.norm()).item(),)
    say_once(f"merging rounds weights to {layer.format} once more; qft.report(model) has each layer's relative error")
