"""QuantTensor: a weight matrix as its format stores it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import double_quant, kernels, reference
from .format import ZERO_DTYPE, Format, FormatError

# The tensors a weight is stored as, by their names in a layer and a file; the operators take them in this order.
STORED = ("weight", "weight_scales", "weight_zeros", "weight_scales_absmax", "weight_scales_offset")


@dataclass(frozen=True)
class QuantTensor:
    """Codes, scales and format of one weight matrix `[out, in]`.

    Attributes:
        format: how it is stored.
        shape: (out_features, in_features).
        weight: packed codes, uint8 `[out, row_bytes]`.
        weight_scales: `[out, groups]` in the format's scale dtype; uint8 codes under dq.
        weight_zeros: `[out, groups]` for asymmetric formats, else None.
        weight_scales_absmax: fp32 `[ceil(out * groups / 256)]` under dq, else None.
        weight_scales_offset: fp32 `[1]` under dq, else None.
    """

    format: Format
    shape: tuple[int, int]
    weight: Tensor
    weight_scales: Tensor
    weight_zeros: Tensor | None = None
    weight_scales_absmax: Tensor | None = None
    weight_scales_offset: Tensor | None = None

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The stored tensors in the order of `STORED`."""
        return (
            self.weight,
            self.weight_scales,
            self.weight_zeros,
            self.weight_scales_absmax,
            self.weight_scales_offset,
        )

    @property
    def codes(self) -> Tensor:
        """Packed codes, uint8 `[out, row_bytes]`."""
        return self.weight

    @property
    def scales(self) -> Tensor:
        """Decoded scales, fp32 `[out, groups]`."""
        if self.weight_scales_absmax is not None and self.weight_scales_offset is not None:
            return double_quant.decode(self.weight_scales, self.weight_scales_absmax, self.weight_scales_offset)
        return self.weight_scales.float()

    @property
    def zeros(self) -> Tensor | None:
        """Zero points, fp32 `[out, groups]`, or None for symmetric formats."""
        return None if self.weight_zeros is None else self.weight_zeros.float()

    @staticmethod
    def from_codes(codes: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format | str) -> QuantTensor:
        """A weight from codes, scales and zero points found elsewhere, stored as `fmt` says.

        Args:
            codes: uint8 `[out, in]`, the index of each weight's level.
            scales: `[out, groups]`, rounded to the format's scale dtype; double-quantized under dq.
            zeros: `[out, groups]` for asymmetric formats, else None.
            fmt: a Format or its spelling.

        Raises:
            FormatError: `fmt` spells no format, or a scale is not finite in its dtype.
            TypeError: codes are not uint8.
            ValueError: a shape differs, a code has no level, or zeros are missing or too many.
        """
        fmt = Format.parse(fmt)
        if codes.dtype != torch.uint8:
            raise TypeError(f"codes are {codes.dtype}, expected torch.uint8; convert them with .to(torch.uint8)")
        if codes.dim() != 2 or not codes.numel():
            raise ValueError(f"codes have shape {tuple(codes.shape)}, expected a matrix [out, in] that is not empty")
        if (highest := int(codes.max())) >= len(fmt.levels):
            raise ValueError(f"code {highest} has no level in {fmt}, whose codes end at {len(fmt.levels) - 1}")
        if (zeros is not None) != fmt.zero:
            rule = "needs zero points; pass zeros" if fmt.zero else "has no zero points; pass zeros=None"
            raise ValueError(f"{fmt} {rule}")
        expected = (codes.shape[0], fmt.groups(codes.shape[1]))
        for name, values in (("scales", scales), ("zeros", zeros)):
            if values is not None and tuple(values.shape) != expected:
                raise ValueError(f"{name} have shape {tuple(values.shape)}, expected {expected} for {fmt}")
        stored = scales.detach().to(reference.TORCH_DTYPE["f32" if fmt.scale == "dq" else fmt.scale])
        _refuse_overflow(stored, fmt, "codes")
        zeros = None if zeros is None else zeros.detach().to(reference.TORCH_DTYPE[ZERO_DTYPE[fmt.scale]])
        return _stored(fmt, (codes.shape[0], codes.shape[1]), reference.pack(codes, fmt), stored, zeros)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the names they have in a layer and a file."""
        return {name: value for name in STORED if (value := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes really stored, row padding included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits really stored per weight, row padding included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def unpack(self) -> Tensor:
        """Level index of each weight, uint8 `[out, in]`."""
        return reference.unpack(self.weight, self.format, self.shape[1])

    def dequantize(self, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        """Dense weight `[out, in]`: fp32 level x scale, rounded once.

        Args:
            dtype: of the result; None is that of `out`, and fp32 without one.
            out: contiguous `[out, in]`, on the weight's device, to be written and returned: memory that was written
                before costs less than fresh memory.

        Raises:
            TypeError: `out` has another dtype than `dtype`.
            ValueError: `out` has another shape, is elsewhere, or is not contiguous.
        """
        return kernels.dequantize(self, dtype or (torch.float32 if out is None else out.dtype), out=out)

    def with_scales(self, scales: Tensor, scale: str = "f32") -> QuantTensor:
        """The same codes under other scales `[out, groups]`, stored as `scale` (f32, f16, bf16 or dq).

        Raises:
            ValueError: the shape differs, or a scale overflows fp16.
        """
        expected = (self.shape[0], self.format.groups(self.shape[1]))
        if tuple(scales.shape) != expected:
            raise ValueError(f"scales have shape {tuple(scales.shape)}, expected {expected} for {self.format}")
        fmt = Format(self.format.code, self.format.group, scale, self.format.zero)
        stored = scales.detach().to(reference.TORCH_DTYPE["f32" if scale == "dq" else scale])
        _refuse_overflow(stored, fmt, "scales")
        zeros = None if self.weight_zeros is None else self.weight_zeros.to(reference.TORCH_DTYPE[ZERO_DTYPE[scale]])
        return _stored(fmt, self.shape, self.weight, stored, zeros)


def quantize(
    weight: Tensor,
    fmt: Format | str,
    *,
    search: bool = False,
    importance: Tensor | None = None,
    kernel: str | None = None,
    name: str = "weight",
) -> QuantTensor:
    """Quantize a dense matrix.

    Args:
        weight: `[out, in]`, floating, finite; any layout. float64 is rounded to fp32 first.
        fmt: a Format or its spelling.
        search: take, for each group, the scale of least squared error among 33 factors from 0.3 to 1.1 on the absmax
            scale (`reference.search_factors`), which is one of them; otherwise the absmax scale.
        importance: `[in]`, floating, finite, at least 0: weights of the columns in that error, such as the mean square
            of each input feature. Rounded to fp32.
        kernel: a row of `kernels.TABLE` to use instead of the fastest.
        name: what error messages call the weight.

    Raises:
        FormatError: `fmt` spells no format, or a scale overflows its dtype.
        TypeError: the weight, or the importance, is not a floating tensor.
        ValueError: it is not a matrix, is empty, is on the meta device, or holds NaN or Inf; or the importance comes
            without a search, is of another shape, or holds what is negative or not finite.
    """
    fmt = Format.parse(fmt)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name} is {kind}; quantize takes a floating tensor, convert it with .float()")
    if weight.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; quantize takes a matrix [out, in], reshape it first")
    if not weight.numel():
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, which holds no weights; quantize needs at least one")
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device, which holds no values; load it before quantizing")
    out, in_features = weight.shape
    dense = weight.detach()
    if dense.dtype not in reference.TORCH_DTYPE.values():
        dense = dense.float()
    if importance is not None:
        importance = _checked_importance(importance, dense, search)
    codes, scales, zeros, bad = kernels.quantize(dense, fmt, kernel, search=search, importance=importance)
    if bad >= 0:
        row, column = divmod(bad, in_features)
        raise ValueError(
            f"{name}[{row}, {column}] is {dense[row, column].item()}; only finite weights quantize, repair it first"
        )
    _refuse_overflow(scales, fmt, name)
    return _stored(fmt, (out, in_features), codes, scales, zeros)


def _stored(fmt: Format, shape: tuple[int, int], packed: Tensor, scales: Tensor, zeros: Tensor | None) -> QuantTensor:
    """Of scales in their stored dtype, but fp32 under dq."""
    if fmt.scale != "dq":
        return QuantTensor(fmt, shape, packed, scales, zeros)
    scale_codes, absmax, offset = double_quant.encode(scales)
    return QuantTensor(fmt, shape, packed, scale_codes, zeros, absmax, offset)


def _checked_importance(importance: Tensor, weight: Tensor, search: bool) -> Tensor:
    """fp32 `[in]` on the weight's device."""
    if not search:
        raise ValueError("importance weights the error of a scale search; pass search=True with it")
    if not isinstance(importance, Tensor) or not importance.is_floating_point():
        kind = importance.dtype if isinstance(importance, Tensor) else type(importance).__name__
        raise TypeError(f"importance is {kind}; the search takes a floating tensor, convert it with .float()")
    if tuple(importance.shape) != (weight.shape[1],):
        raise ValueError(
            f"importance has shape {tuple(importance.shape)}, expected ({weight.shape[1]},): a number per input feature"
        )
    checked = importance.detach().to(weight.device, torch.float32).contiguous()
    bad = ~(checked.isfinite() & (checked >= 0))
    if bad.any():
        at = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"importance[{at}] is {importance[at].item()}; it must be finite and at least 0, repair it first"
        )
    return checked


def _refuse_overflow(scales: Tensor, fmt: Format, name: str) -> None:
    if scales.isfinite().all():
        return
    row, group = (~scales.isfinite()).nonzero()[0].tolist()
    wider = Format(fmt.code, fmt.group, "f32", fmt.zero)
    rule, way_out = {
        "f16": ("fp16's 65504", f"use bf16 or f32, such as '{wider}'"),
        "bf16": ("bf16's 3.39e38", f"use f32, such as '{wider}'"),
    }.get(fmt.scale, ("fp32's 3.4e38", "make the weight smaller, or the format's largest level nearer 1"))
    raise FormatError(f"the scale of {name}, row {row}, group {group} exceeds {rule}; {way_out}")
