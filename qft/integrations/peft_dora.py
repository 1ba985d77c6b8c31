"""DoRA's norm without the dense weight (Liu et al. 2024, section 4).

DoRA divides by the norm of each row of W + s B A at every forward pass. PEFT builds that matrix for it; on packed
weights that is a dequantization per layer and step, and with dropout a dense weight kept for the backward pass. Yet

    |w_i + s b_i A|^2 = |w_i|^2 + 2 s b_i (A w_i) + s^2 b_i (A At) b_i

where A w_i is `rank` rows through the packed product, and |w_i|^2 changes only when the stored tensors do. Under
torch.compile the latter is taken anew at every step, from a dense weight that lives as long as that takes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from .. import ops
from ..nn.linear import QuantLinear
from .peft_weight import counting_product, effective_weight


class PackedDora(DoraLinearLayer):
    """PEFT's magnitude vector `[out]` over a QuantLinear; training, merging and files are PEFT's."""

    weight: nn.Parameter
    _squares: tuple[Any, Tensor] | None = None  # of the rows of W, and of what they were taken

    @staticmethod
    def adopt(tuner: Any, adapter: str, layer: QuantLinear) -> None:
        """Make the adapter's magnitude vector one, where it has one; it starts as exactly the norm it is divided by."""
        vectors = getattr(tuner, "lora_magnitude_vector", {})
        if adapter not in vectors or type(vectors[adapter]) is not DoraLinearLayer:
            return
        dora = vectors[adapter]
        dora.__class__ = PackedDora
        a, b = tuner.lora_A[adapter].weight, tuner.lora_B[adapter].weight
        if not (a.is_meta or dora.weight.is_meta):  # about to be loaded
            dora.weight.data = dora.norm(layer, a, b, tuner.scaling[adapter]).to(dora.weight)

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,  # noqa: N803  PEFT's names
        lora_B: nn.Module,  # noqa: N803
        scaling: float,
        base_layer: QuantLinear,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What DoRA adds to the base layer's output; `base_result` is missing where dropout changed x."""
        norm = self.norm(base_layer, lora_A.weight, lora_B.weight, scaling)
        ratio = self.weight / norm  # the norm gets no gradient: section 4.3
        if base_result is None:
            base_result = base_layer(x)
        if base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (ratio - 1) * base_result + ratio * scaling * lora_B(lora_A(x))

    @torch.no_grad()
    def norm(self, layer: QuantLinear, a: Any, b: Any, scaling: float) -> Tensor:
        """Norm of each row of W + scaling B A, fp32 `[out]`."""
        with torch.autocast(a.device.type, enabled=False):
            a, b = a.float(), b.float()
            low = ops.matmul(a, layer.quant_tensor)  # A Wt
            if (own := counting_product(layer)) is not None:
                low = low + a @ own[1].T @ own[0].T
            squares = self._row_squares(layer) + 2 * scaling * (b * low.T).sum(1)
            squares += scaling**2 * (b @ (a @ a.T) * b).sum(1)
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def _row_squares(self, layer: QuantLinear) -> Tensor:
        if torch.compiler.is_compiling():  # a graph has no memory of what it was taken of
            dense, own = ops.dequantize(layer.quant_tensor, torch.float32), counting_product(layer)
            return (dense if own is None else torch.addmm(dense, *own)).square().sum(1)
        held = [p for name, p in layer._parameters.items() if p is not None and name != "bias"]
        state: list[Any] = [layer.lora_aside]
        state += [(p.data_ptr(), p.device, None if p.is_inference() else p._version) for p in held]
        if self._squares is None or self._squares[0] != state:
            self._squares = state, effective_weight(layer).square().sum(1)
        return self._squares[1]
