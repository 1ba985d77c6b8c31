"""QuantStack: equally shaped weight matrices of one format, stored together: the experts of a mixture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Format
from .tensor import STORED, QuantTensor


@dataclass(frozen=True)
class QuantStack:
    """Codes, scales and format of weight matrices `[count, out, in]`.

    Attributes:
        format: how each is stored.
        shape: (count, out_features, in_features).
        weight, weight_scales, weight_zeros, weight_scales_absmax, weight_scales_offset: a QuantTensor's tensors with
            `count` as their first dimension. Double quantization is each matrix's own.
    """

    format: Format
    shape: tuple[int, int, int]
    weight: Tensor
    weight_scales: Tensor
    weight_zeros: Tensor | None = None
    weight_scales_absmax: Tensor | None = None
    weight_scales_offset: Tensor | None = None

    @staticmethod
    def of(matrices: Iterable[QuantTensor], count: int) -> QuantStack:
        """Stack `count` matrices as they come: one beside the stack is all that is held."""
        stacked: dict[str, Tensor] = {}
        for at, q in enumerate(matrices):
            for name, tensor in q.tensors().items():
                if not at:
                    stacked[name] = tensor.new_empty(count, *tensor.shape)
                stacked[name][at] = tensor
        return QuantStack(q.format, (count, *q.shape), **stacked)

    def matrices(self) -> list[QuantTensor]:
        """The matrices one by one, without a copy; gradients of their scales come back as one tensor."""
        count, out, in_features = self.shape
        stored = ((None,) * count if value is None else value.unbind() for value in map(self._stored, STORED))
        return [QuantTensor(self.format, (out, in_features), *parts) for parts in zip(*stored, strict=True)]  # type: ignore[arg-type]

    def _stored(self, name: str) -> Tensor | None:
        return getattr(self, name)  # type: ignore[no-any-return]

    @property
    def codes(self) -> Tensor:
        """Packed codes, uint8 `[count, out, row_bytes]`."""
        return self.weight

    @property
    def scales(self) -> Tensor:
        """Decoded scales, fp32 `[count, out, groups]`."""
        return torch.stack([q.scales for q in self.matrices()])

    @property
    def zeros(self) -> Tensor | None:
        """Zero points, fp32 `[count, out, groups]`, or None for symmetric formats."""
        return None if self.weight_zeros is None else self.weight_zeros.float()

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the names they have in a QuantTensor."""
        return {name: value for name in STORED if (value := self._stored(name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes really stored, row padding included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits really stored per weight, row padding included."""
        return 8 * self.nbytes / math.prod(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense weights `[count, out, in]`: fp32 level x scale, rounded once to `dtype` (fp32 where None)."""
        dense = torch.empty(self.shape, dtype=dtype or torch.float32, device=self.weight.device)
        for at, q in enumerate(self.matrices()):
            q.dequantize(out=dense[at])
        return dense

    def with_scales(self, scales: Tensor, scale: str = "f32") -> QuantStack:
        """The same codes under other scales `[count, out, groups]`, stored as `scale` (f32, f16, bf16 or dq).

        Raises:
            ValueError: the shape differs, or a scale overflows its dtype.
        """
        expected = (*self.shape[:2], self.format.groups(self.shape[2]))
        if tuple(scales.shape) != expected:
            raise ValueError(f"scales have shape {tuple(scales.shape)}, expected {expected} for {self.format}")
        pairs = zip(self.matrices(), scales, strict=True)
        made = QuantStack.of((q.with_scales(own, scale) for q, own in pairs), self.shape[0])
        return QuantStack(made.format, self.shape, self.weight, *map(made._stored, STORED[1:]))  # type: ignore[arg-type]
