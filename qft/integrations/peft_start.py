"""PEFT's LoRA over layers that have one of their own: a start with low-rank factors (LoftQ, Li et al. 2023; CLoQ).

An adapter of the same rank, with `init_lora_weights=True`, begins from the layer's own LoRA: A as it is, and B times
the layer's scaling over PEFT's, so that the product is the same whatever PEFT's alpha. The layer's own factors stay
where they are, frozen, and count only while no adapter that began from them does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ..nn.linear import QuantLinear
from ..notices import say_once
from .peft_weight import own_product

_BEGUN = (
    "PEFT's adapter begins from the LoRA that these layers have of their own, and contains it from then on; theirs is "
    "frozen and counts where no such adapter is active"
)
_BESIDE = (
    "PEFT freezes the LoRA that these layers have of their own (add_lora); its files do not hold it. A LoraConfig of "
    "the same rank with init_lora_weights=True begins from it instead"
)
_OTHER_RANK = (
    "the combined adapter contains the LoRA that these layers have of their own, at another rank: load its file on a "
    "base without that LoRA (QuantLinear.remove_lora), where nothing counts twice"
)


class AroundOwnLora:
    """What a tuner layer does about the QuantLinear's own LoRA; a part of `OnPacked`."""

    merged_adapters: list[str]
    active_adapters: list[str]
    disable_adapters: bool
    _began: frozenset[str] = frozenset()  # adapters that began from the layer's own LoRA, and so contain it

    def _packed(self) -> QuantLinear:
        return super().get_base_layer()  # type: ignore[misc]

    def reset_lora_parameters(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's start of LoRA, or the layer's own where its rank is the same and PEFT's argument is True."""
        super().reset_lora_parameters(adapter_name, *args, **kwargs)  # type: ignore[misc]
        self._began -= {adapter_name}
        asked = any(value is True for value in (*args, *kwargs.values()))  # AdaLoRA passes none
        if asked and _begin(self, adapter_name, self._packed()):
            self._began |= {adapter_name}

    def _leave_out_own(self, names: list[str] | None = None) -> None:
        """Let the own LoRA count unless one of `names` contains it: of the merged adapters, or of the active ones."""
        if names is None:
            names = [] if self.disable_adapters else self.merged_adapters or self.active_adapters
        self._packed().lora_aside = not self._began.isdisjoint(names)

    def _freeze_own(self, adapter_name: str) -> None:
        """PEFT trains its adapters alone; before 0.21 it lets all train that is called lora_."""
        layer = self._packed()
        if layer.lora_A is not None and layer.lora_B is not None:
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)
            say_once(_BEGUN if adapter_name in self._began else _BESIDE)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)  # type: ignore[misc]
        self._leave_out_own()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)  # type: ignore[misc]
        self._leave_out_own()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self._began -= {adapter_name}
        self._leave_out_own()

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        self._leave_out_own(adapter_names)
        left_out = self._packed().lora_aside
        try:
            y: Tensor = super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)  # type: ignore[misc]
        finally:
            self._leave_out_own()
        others = [row for row, name in enumerate(adapter_names) if name not in self._began]
        return _add_own(y, x, others, self._packed()) if left_out and others else y

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in this layer's place: the QuantLinear, whose own LoRA goes if a merged adapter held it."""
        this: Any = self
        layer = self._packed()
        if merge:
            this.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not self._began.isdisjoint(self.merged_adapters):
            layer.remove_lora()
        layer.lora_aside = False
        return layer

    def note_combined(self, adapter_name: str, parts: list[str]) -> None:
        """PEFT made an adapter of others: it contains the own LoRA if one of them does."""
        this: Any = self
        if adapter_name not in this.lora_A:
            return
        self._began -= {adapter_name}
        if not self._began.isdisjoint(parts):
            self._began |= {adapter_name}
            if this.r[adapter_name] != self._packed().lora_rank:
                say_once(_OTHER_RANK)
        self._leave_out_own()


def noting_combinations(combine: Callable[..., Any]) -> Callable[..., Any]:
    """`LoraModel.add_weighted_adapter`, after which the layers know what the new adapter contains."""

    @functools.wraps(combine)
    def add_weighted_adapter(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(combine).bind(tuner, *args, **kwargs).arguments
        known = given["adapter_name"] in tuner.peft_config  # then PEFT does nothing
        done = combine(tuner, *args, **kwargs)
        for layer in () if known else tuner.model.modules():
            if isinstance(layer, AroundOwnLora):
                layer.note_combined(given["adapter_name"], given["adapters"])
        return done

    return add_weighted_adapter


@torch.no_grad()
def _begin(tuner: Any, adapter: str, layer: QuantLinear) -> bool:
    """Put the layer's own factors into a new adapter of PEFT's LoRA or DoRA, where they fit; whether they did.

    A pooled A `[r, groups]` does not. Onto the meta device nothing is copied: a file is about to fill what lies there.
    """
    if layer.lora_A is None or layer.lora_B is None or not tuner.scaling[adapter]:
        return False
    variant = tuner.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, DoraLinearVariant):  # others mean something else by A and B
        return False
    a, b = tuner.lora_A[adapter].weight, tuner.lora_B[adapter].weight
    if a.shape != layer.lora_A.shape:
        return False
    if not layer.lora_A.is_meta:
        a.copy_(layer.lora_A)
        b.copy_(layer.lora_B * (layer.lora_scaling / tuner.scaling[adapter]))
    return True


@torch.no_grad()
def _add_own(y: Tensor, x: Tensor, rows: list[int], layer: QuantLinear) -> Tensor:
    """y `[batch, ..., out]` with what the layer's own LoRA makes of x `[batch, ..., in]` added in these rows."""
    own = own_product(layer)
    if own is not None:
        b, a = own
        y[rows] += nn.functional.linear(nn.functional.linear(x[rows].to(a.dtype), a), b).to(y.dtype)
    return y
