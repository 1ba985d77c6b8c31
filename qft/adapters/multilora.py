"""MultiLoRA (Wang et al. 2023, section 3): n parallel LoRAs per layer, y = W x + sum_i diag(scale_i) B_i A_i x.

The scales start at 0, so the layer starts as the identity though B starts random: no module begins in another's
shadow, and the update's singular values come out more even than one LoRA's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import kernels
from ..nn.linear import QuantLinear
from ..notices import say_once
from .adapted import AdaptedLinear, adapted_layers, bare_layers


class MultiLoRALinear(AdaptedLinear):
    """A QuantLinear with n parallel LoRAs of rank r.

    Parameters, fp32: `multilora_A` `[n * r, in]` and `multilora_B` `[out, n * r]` hold A_1 .. A_n and B_1 .. B_n side
    by side, Kaiming-uniform; `multilora_scales` `[n, out]` starts at 0.
    """

    prefix = "multilora_"
    way_to_save = "merge it with qft.merge_multilora first"
    multilora_A: nn.Parameter  # noqa: N815
    multilora_B: nn.Parameter  # noqa: N815
    multilora_scales: nn.Parameter
    multilora_alpha: float  # what the sum is multiplied by, times r
    multilora_dropout: float

    @classmethod
    def adopt(
        cls, layer: QuantLinear, modules: int, rank: int, alpha: float | None = None, dropout: float = 0.0
    ) -> MultiLoRALinear:
        """Turn a layer into one, in place.

        Args:
            modules: n, at least 1.
            rank: r of each, at least 1; merged, they must fit: n * r <= min(in, out), less the rank of a LoRA that the
                layer has.
            alpha: the sum is scaled by alpha / r; None is r, a scaling of 1.
            dropout: of the modules' input, in [0, 1); one draw for all of them.

        Raises:
            ValueError: an argument is out of its range, or the layer has such an adapter, or a pooled LoRA.
        """
        largest = min(layer.in_features, layer.out_features) - layer.lora_rank
        if layer.lora_pooled:
            raise ValueError("the layer has a pooled LoRA, which cannot merge with others; call qft.merge_pooled first")
        if not (isinstance(modules, int) and isinstance(rank, int) and modules >= 1 and 1 <= rank * modules <= largest):
            raise ValueError(
                f"{modules} modules of rank {rank} do not fit: their ranks add up to at most {largest} in this layer"
            )
        alpha = float(rank if alpha is None else alpha)
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha={alpha} must be a positive number")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is outside [0, 1)")
        taken = cls._take(layer)
        device, out = taken.device, taken.out_features
        for name, shape, inputs in (
            ("A", (modules * rank, taken.in_features), taken.in_features),
            ("B", (out, modules * rank), rank),
        ):
            bound = inputs**-0.5  # Kaiming's for a = sqrt(5), of each module by itself
            taken._new(name, torch.empty(shape, device=device).uniform_(-bound, bound))
        taken._new("scales", torch.zeros(modules, out, device=device))
        taken.multilora_alpha, taken.multilora_dropout = alpha, dropout
        return taken

    @property
    def multilora_rank(self) -> int:
        """r, the rank of each module."""
        return self.multilora_A.shape[0] // self.multilora_scales.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `[n * r, in]` and B `[out, n * r]` of the one LoRA these are: scales and alpha / r are folded into B."""
        scaling = self.multilora_alpha / self.multilora_rank
        spread = self.multilora_scales.repeat_interleave(self.multilora_rank, 0)
        return self.multilora_A, self.multilora_B * spread.T * scaling

    def forward(self, x: Tensor) -> Tensor:
        """As `QuantLinear.forward`."""
        y = super().forward(x)
        a, b = self.factors()
        x = nn.functional.dropout(self._activations(x), self.multilora_dropout, self.training)
        dtype = kernels.product_dtype(x.dtype, x.device.type)
        low = nn.functional.linear(x.to(dtype), a.to(dtype))
        return y + nn.functional.linear(low, b.to(dtype)).to(y.dtype)

    def merge(self) -> None:
        """Become a QuantLinear with one LoRA of rank n * r, and that of a LoRA it had, which `qft.save` can write."""
        a, b = self.factors()
        if self.lora_A is not None and self.lora_B is not None:
            a, b = torch.cat([self.lora_A, a]), torch.cat([self.lora_B * self.lora_scaling, b], 1)
            self.remove_lora()
        dropout = self.multilora_dropout
        self.release()
        self.add_lora(len(a), dropout=dropout, A=a, B=b)

    def extra_repr(self) -> str:
        modules = f"{len(self.multilora_scales)} modules of rank {self.multilora_rank}"
        return f"{super().extra_repr()}, {modules}, alpha={self.multilora_alpha:g}"


def add_multilora(
    model: nn.Module, modules: int, rank: int, alpha: float | None = None, dropout: float = 0.0
) -> nn.Module:
    """Give every QuantLinear of a model n parallel LoRAs, in place; the model computes what it did.

    Args:
        modules: n.
        rank: r of each; a layer that cannot hold n * r takes what it can.
        alpha, dropout: as in `MultiLoRALinear.adopt`.

    Returns:
        The model itself.

    Raises:
        ValueError: the model holds no QuantLinear, a layer has such an adapter already or cannot hold n ranks, or an
            argument is out of its range.
    """
    for path, layer in bare_layers(model).items():
        held = min(rank, (min(layer.in_features, layer.out_features) - layer.lora_rank) // max(modules, 1))
        if held < rank:
            say_once(f"{path} holds {modules} modules of rank {held} at most, not {rank}")
        MultiLoRALinear.adopt(layer, modules, held, alpha, dropout)
    return model


def merge_multilora(model: nn.Module) -> nn.Module:
    """Turn each layer's parallel LoRAs into its one LoRA, in place: the same function, saved as any other.

    Raises:
        ValueError: the model holds no MultiLoRALinear.
    """
    for layer in adapted_layers(model, MultiLoRALinear, "qft.add_multilora(model, modules, rank)").values():
        layer.merge()
    return model
