"""LoRA's first product, computed once for layers that read the same activations: q, k and v; gate and up.

Each layer's x At is a skinny product that reads all of x for a few columns. Layers that are given the same tensor can
take those columns from one product with their factors side by side: x is read once instead of three times, forward and
backward. Which layers those are is learned from one forward pass, so it works for any architecture.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.linear import QuantLinear
from ..notices import say_once


class SharedInput:
    """The layers of one group, and what their joint product gave for the input at hand."""

    def __init__(self, layers: list[QuantLinear]) -> None:
        self.layers = layers
        self._input: weakref.ref[Tensor] | None = None
        self._version = -1
        self._waiting: dict[int, Tensor] = {}  # x At by the place of a layer that has not asked yet

    def low(self, layer: QuantLinear, given: Tensor, x: Tensor) -> Tensor | None:
        """x At `[rows, rank]` of `layer`, or None where it has to multiply for itself.

        Args:
            layer: a member of the group.
            given: the tensor its forward pass was called with; members share while they are given the same one.
            x: that tensor as `[rows, in]`, in the dtype of the product.
        """
        if torch.compiler.is_compiling() or not all(_can_share(member) for member in self.layers):
            return None
        place = next(at for at, member in enumerate(self.layers) if member is layer)
        if self._input is None or self._input() is not given or self._version != given._version:
            if self._waiting and self._input is not None and self._input() is not None:
                self._dissolve()
                return None
            factors = [member.lora_A.to(x.dtype) for member in self.layers]  # type: ignore[union-attr]
            parts = nn.functional.linear(x, torch.cat(factors)).split([len(a) for a in factors], dim=1)
            self._input, self._version = weakref.ref(given), given._version
            self._waiting = dict(enumerate(parts))
        part = self._waiting.pop(place, None)
        if not self._waiting:
            self._input = None
        return part

    def _dissolve(self) -> None:
        """Members were given different inputs after all: each multiplies for itself from now on."""
        for member in self.layers:
            member.shared_input = None
        self._input, self._waiting = None, {}
        say_once("layers that shared their LoRA's input were given different ones; they share no longer")

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the group, without what a forward pass left waiting."""
        return {"layers": self.layers, "_input": None, "_version": -1, "_waiting": {}}


def _can_share(layer: QuantLinear) -> bool:
    counts = layer.lora_A is not None and not layer.lora_aside
    return counts and not layer.lora_pooled and isinstance(layer.lora_dropout, nn.Identity)


def share_inputs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Let LoRA layers that read the same tensor compute x At together; returns the number of groups.

    Args:
        model: holds QuantLinears with LoRA (without dropout: every layer would draw its own).
        args, kwargs: what to call the model with, once and without gradients, to see which layers read the same.

    Raises:
        ValueError: no layer of the model has a LoRA, or the call reached none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear) and layer.lora_A is not None]
    if not layers:
        raise ValueError("no layer of this model has a LoRA, so there is nothing to share; call add_lora first")
    readers: dict[int, list[QuantLinear]] = {}
    kept: list[Tensor] = []  # an address that was freed could come back as another tensor's

    def note(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        kept.extend(given)
        for tensor in given:
            readers.setdefault(id(tensor), []).append(layer)  # type: ignore[arg-type]

    for layer in layers:
        layer.shared_input = None
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    if not readers:
        raise ValueError("the call reached no layer with a LoRA; pass what the model takes in training")
    groups = [group for group in readers.values() if len(group) > 1 and len(set(map(id, group))) == len(group)]
    for group in groups:
        shared = SharedInput(group)
        for layer in group:
            layer.shared_input = shared
    return len(groups)
