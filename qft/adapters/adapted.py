"""A QuantLinear whose adapter has a forward pass of its own."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from ..nn.linear import FloatFacingQuantLinear, QuantLinear
from .scales import quant_layers

T = TypeVar("T", bound="AdaptedLinear")


class AdaptedLinear(QuantLinear):
    """What GLoRALinear and MultiLoRALinear share: a layer becomes one in place, and turns back.

    Its path, its stored weight and whatever refers to it stay. The adapter's parameters are the layer's own, under
    names that begin with `prefix`, so that `prepare_for_training` lets them train as it does a LoRA. A LoRA that a
    starting point left in the layer keeps working beside it.
    """

    prefix = ""
    way_to_save = ""  # what to do instead of qft.save, which knows QuantLinear alone

    @classmethod
    def _take(cls: type[T], layer: QuantLinear) -> T:
        """Make `layer` one of this class.

        Raises:
            ValueError: it carries such an adapter already.
        """
        if type(layer) not in (QuantLinear, FloatFacingQuantLinear):
            raise ValueError(f"the layer is a {type(layer).__name__} already; merge or release its adapter first")
        layer.__class__ = cls
        return layer  # type: ignore[return-value]  # its class has just changed

    def release(self) -> None:
        """Drop the adapter and be a QuantLinear again; the base is as it was."""
        for name in [name for name in self._parameters if name.startswith(self.prefix)]:
            del self._parameters[name]
        faces = "dense_dtype" in self._buffers
        self.__class__ = FloatFacingQuantLinear if faces else QuantLinear  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the layer showed its parent before: its codes, or the empty tensor of a FloatFacingQuantLinear."""
        shown = self._buffers.get("dense_dtype", self._parameters["weight"])
        return shown  # type: ignore[return-value]  # both are there

    def _new(self, name: str, value: Tensor) -> None:
        """Register fp32 values as a trainable parameter: half-precision ones do not move at usual learning rates."""
        self.register_parameter(self.prefix + name, nn.Parameter(value.float().to(self.device)))


def bare_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The QuantLinear layers of a model by path, none of which may be an AdaptedLinear yet.

    Raises:
        ValueError: there are none, or one is; it is named.
    """
    layers = quant_layers(model)
    for path, layer in layers.items():
        if isinstance(layer, AdaptedLinear):
            raise ValueError(f"{path} is a {type(layer).__name__} already; merge or release its adapter first")
    return layers


def adapted_layers(model: nn.Module, kind: type[T], way_in: str) -> dict[str, T]:
    """The layers of one adapter class by path.

    Raises:
        ValueError: there are none; `way_in` says how they come about.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, kind)}
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no {kind.__name__}; call {way_in} first")
    return layers
