"""QuantLinear: a drop-in nn.Linear over packed weights, with the one LoRA it fuses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels, ops
from ..format import INTEGERS, Format, FormatError
from ..tensor import STORED, QuantTensor, quantize
from . import fused_lora
from .casts import in_stored_dtypes
from .packed import Packed, empty, under_autocast

_INTEGERS = f"quantize to {', '.join(INTEGERS)}"
_ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class QuantLinear(Packed, nn.Linear):
    """y = x Wt + bias + scaling * (dropout(x) At) Bt, with W packed.

    Parameters, named as in a file: `weight` uint8 `[out, row_bytes]` (frozen codes), `weight_scales` `[out, groups]`,
    `weight_zeros` `[out, groups]` for asymmetric formats, `weight_scales_absmax` and `weight_scales_offset` under dq,
    `bias` `[out]`, and after `add_lora` `lora_A` `[rank, in]` (`[rank, groups]` if pooled) and `lora_B` `[out, rank]`.
    The buffer `weight_format` holds the format's spelling as uint8 text, so that a state_dict says what its bytes mean.

    Takes floating input of any dtype and returns that dtype; under autocast it behaves as nn.Linear does. `.to(dtype)`,
    `.half()` and `.bfloat16()` change bias and LoRA alone: stored codes and scales keep their format.

    Args:
        in_features, out_features: shape of W.
        fmt: a Format or its spelling.
        bias: whether to hold a bias.
        device, dtype: of bias; codes and scales have the format's dtypes.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]  # nn.Linear's stub leaves None out
    lora_A: nn.Parameter | None  # noqa: N815  PEFT's names
    lora_B: nn.Parameter | None  # noqa: N815
    lora_aside: bool = False  # whether forward leaves the LoRA out: PEFT's adapter began from it (integrations.peft)
    lora_pooled: bool = False  # whether lora_A is [rank, groups] and multiplies sums over groups (adapters.pooled)
    dense_kind = "nn.Linear"
    shared_input: Any = None  # the adapters.shared_input.SharedInput that multiplies lora_A for several layers at once

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: Format | str,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.in_features, self.out_features = in_features, out_features
        self.lora_alpha = self.lora_scaling = 0.0
        self.lora_dropout: nn.Module = nn.Identity()
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.register_parameter("bias", None)
        self.set_packed({"weight": empty(Format.parse(fmt), (out_features, in_features), device)})
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    @classmethod
    def from_linear(cls, linear: nn.Linear, fmt: Format | str, *, name: str = "weight") -> QuantLinear:
        """Quantize an nn.Linear, keeping its bias. Errors are those of `qft.quantize`; they call the weight `name`."""
        return cls.from_quantized(quantize(linear.weight, fmt, name=name), linear.bias).train(linear.training)

    @classmethod
    def from_quantized(cls, q: QuantTensor, bias: nn.Parameter | None = None) -> QuantLinear:
        """A layer around an already quantized weight."""
        layer = cls(q.shape[1], q.shape[0], q.format, bias=False, device="meta")
        layer.set_quantized(q)
        layer.bias = bias
        return layer

    # -------------------------------------------------------------------------------------------------- storage

    @property
    def quant_tensor(self) -> QuantTensor:
        """The stored tensors, as they are: no copy."""
        stored: Any = [self._parameters[name] for name in STORED]
        return in_stored_dtypes(QuantTensor(self.format, (self.out_features, self.in_features), *stored))

    def packed_shape(self, name: str) -> tuple[int, ...]:
        """(out_features, in_features), of the one weight there is."""
        return self.out_features, self.in_features

    def set_quantized(self, q: QuantTensor) -> None:
        """Replace the stored weight, its format included; what trained before does not train any more."""
        self.set_packed({"weight": q})

    def dequantize(self, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        """Dense weight `[out, in]`, without LoRA, as `QuantTensor.dequantize` gives it."""
        return self.quant_tensor.dequantize(dtype, out=out)

    # -------------------------------------------------------------------------------------------------- LoRA

    @property
    def lora_rank(self) -> int:
        """Rank of the attached LoRA; 0 without one."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    def add_lora(
        self,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        A: Tensor | None = None,  # noqa: N803  the factors' names in the literature
        B: Tensor | None = None,  # noqa: N803
        pooled: bool = False,
    ) -> None:
        """Attach trainable factors (LoRA, Hu et al. 2021, section 4).

        Args:
            rank: r, columns of B and rows of A, 1 <= r <= min(in, out), or min(groups, out) with `pooled`.
            alpha: the product is scaled by alpha / r, or alpha / sqrt(r) with `rslora`; None is r, a scaling of 1.
            dropout: of the factors' input, in [0, 1).
            A, B: starting values `[r, in]`, `[out, r]`; without them A is Kaiming-uniform and B zero, the identity.
            pooled: QA-LoRA (Xu et al. 2023, section 3.3): A is `[r, groups]` and multiplies x summed over each group of
                the weight, so that scaling * B A is one number per scale and `qft.merge_pooled` can put it into the
                zero points. A starts as large as LoRA's, whose entries it repeats.

        Raises:
            ValueError: a LoRA is attached already, or an argument is out of its range.
            FormatError: `pooled` under a codebook, which has no zero points to merge into.
        """
        if self.lora_A is not None:
            raise ValueError(f"a LoRA of rank {self.lora_rank} is attached already; call remove_lora() first")
        if pooled and not self.format.is_integer:
            raise FormatError(f"{self.format} has no zero points for a pooled LoRA to merge into; {_INTEGERS}")
        width = self.format.groups(self.in_features) if pooled else self.in_features
        largest = min(width, self.out_features)
        if not (isinstance(rank, int) and 1 <= rank <= largest):
            raise ValueError(f"rank={rank} is no whole number in 1..{largest}, what this layer can hold")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is outside [0, 1)")
        alpha = float(rank if alpha is None else alpha)
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha={alpha} must be a positive number")
        device = self.device
        dtype = torch.float32  # whatever the layer's own: half-precision factors do not move at usual learning rates
        shapes = {"A": (rank, width), "B": (self.out_features, rank)}
        for factor, value in (("A", A), ("B", B)):
            if value is not None and tuple(value.shape) != shapes[factor]:
                raise ValueError(f"{factor} has shape {tuple(value.shape)}, rank {rank} needs {shapes[factor]}")
        if A is None:
            A = torch.empty(shapes["A"], device=device)  # noqa: N806
            bound = self.in_features**-0.5  # Kaiming's for a = sqrt(5)
            nn.init.uniform_(A, -bound, bound)
        if B is None:
            B = torch.zeros(shapes["B"], device=device)  # noqa: N806
        row_major = torch.contiguous_format  # as a file gives them back: products round differently on another layout
        A, B = (x.detach().to(device, dtype, copy=True, memory_format=row_major) for x in (A, B))  # noqa: N806
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)  # copies: the caller's factors must not train along
        self.lora_pooled = pooled
        self.lora_alpha = alpha
        self.lora_scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.lora_dropout = (nn.Dropout(dropout) if dropout else nn.Identity()).train(self.training)

    def remove_lora(self) -> None:
        """Detach the LoRA, leaving the base as it is."""
        self.lora_A = self.lora_B = None
        self.lora_aside = self.lora_pooled = False
        self.lora_alpha = self.lora_scaling = 0.0
        self.lora_dropout = nn.Identity()

    # -------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]` in x's dtype (autocast's under autocast).

        Raises:
            TypeError: x is not fp32, bf16, fp16 or fp64.
            ValueError: x's last dimension is not in_features, or x and the weight are on different devices.
        """
        given, x = x, self._activations(x)
        if (a := self.lora_A) is None or (b := self.lora_B) is None or self.lora_aside:
            return self._base(x)
        if self._is_plain_lora() and fused_lora.serves(x, q := self.quant_tensor, bias := self.bias, a, b):
            return fused_lora.product(x, q, bias, a, b, self.lora_scaling)
        if x.dim() == 2:
            return self._add_lora(self._base(x), x, a, b, given)
        flat = x.reshape(-1, self.in_features)
        y = self._add_lora(self._base(flat), flat, a, b, given)
        shape = (*x.shape[:-1], self.out_features)
        # no view, as nn.Linear's output is none: FSDP2 cannot see what is done in place to one, and warns
        return y.view(shape) if self._keeps_output() else torch.ops.aten._unsafe_view(y, shape)

    def _is_plain_lora(self) -> bool:
        """Whether nothing stands between x and lora_A."""
        dropout = self._modules["lora_dropout"]
        return self.shared_input is None and not self.lora_pooled and type(dropout) is nn.Identity

    def _base(self, x: Tensor) -> Tensor:
        """x Wt + bias."""
        y, bias = ops.matmul(x, self.quant_tensor), self.bias
        return y if bias is None else y + bias.to(y.dtype)

    def _add_lora(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, given: Tensor) -> Tensor:
        """y + scaling * (dropout(x) At) Bt: summed by the product itself, without a pass over y of its own."""
        dtype = kernels.product_dtype(x.dtype, x.device.type)
        x = self.lora_dropout(x).to(dtype)
        low = None if self.shared_input is None else self.shared_input.low(self, given, x)
        if self.lora_pooled:
            x = self._pool(x)
        if low is None:
            low = nn.functional.linear(x, a.to(dtype))
        if dtype != y.dtype:
            return y + (nn.functional.linear(low, b.to(dtype)) * self.lora_scaling).to(y.dtype)
        b, scaling = b.to(dtype).T, self.lora_scaling
        return torch.addmm(y, low, b, alpha=scaling) if self._keeps_output() else y.addmm_(low, b, alpha=scaling)

    def _keeps_output(self) -> bool:
        """Whether the product's output is kept for the backward pass, so that nothing may be added to it in place."""
        scales = self._parameters["weight_scales"]
        return self.bias is None and self.format.group == 0 and scales is not None and scales.requires_grad

    def _pool(self, x: Tensor) -> Tensor:
        """x `[rows, in]` summed over each group of the weight: `[rows, groups]`."""
        size, groups = self.format.group_size(self.in_features), self.format.groups(self.in_features)
        return nn.functional.pad(x, (0, groups * size - self.in_features)).unflatten(1, (groups, size)).sum(2)

    def _activations(self, x: Tensor) -> Tensor:
        """x, checked, in the dtype that the product takes it in: autocast's under autocast."""
        if x.dtype not in _ACTIVATIONS:
            raise TypeError(f"QuantLinear got {x.dtype} input; convert it with .float() or .bfloat16()")
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            wanted = f"its last dimension must be in_features={self.in_features}"
            raise ValueError(f"input has shape {tuple(x.shape)}; {wanted}")
        if x.device != self.device:
            raise ValueError(f"input is on {x.device}, the weight on {self.device}; move one of them")
        return under_autocast(x)

    def extra_repr(self) -> str:
        pooled = ", pooled" if self.lora_pooled else ""
        lora = f", lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha:g}{pooled}" if self.lora_rank else ""
        return f"{self.in_features}, {self.out_features}, {self.format}, bias={self.bias is not None}{lora}"


class FloatFacingQuantLinear(QuantLinear):
    """QuantLinear for a parent that casts activations to `layer.weight.dtype` (T5's `wo`, Mamba's `lm_head`).

    Its attribute `weight` is an empty floating tensor of the dtype the dense weight had; the codes are where every
    QuantLinear keeps them, in `_parameters` and the state_dict.
    """

    @staticmethod
    def adopt(layer: QuantLinear, dtype: torch.dtype) -> None:
        """Make `layer` one, facing its parent with `dtype`."""
        face = torch.empty(0, dtype=dtype, device=layer.device)
        layer.register_buffer("dense_dtype", face, persistent=False)
        layer.__class__ = FloatFacingQuantLinear

    dense_dtype: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dense_dtype

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and value is self.dense_dtype:
            return  # PEFT, when it takes an adapter off, writes the weight that it has just read
        super().__setattr__(name, value)
