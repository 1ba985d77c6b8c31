"""One 4-bit weight as bitsandbytes stores it (QuantState.as_dict in its functional.py, 0.50).

    X                    two codes per byte, the first in the high nibble, row-major over [out, in]; of any dtype
    X.absmax             one scale per `blocksize` weights, row-major; uint8 codes where it is nested
    X.quant_map          fp32 [16], the levels
    X.nested_absmax      fp32 [ceil(scales / nested_blocksize)]
    X.nested_quant_map   fp32 [256]
    X.quant_state.bitsandbytes__nf4 (or __fp4)    uint8, the UTF-8 text of a JSON object: `State`

A weight is level * scale in fp32, rounded once to `dtype`; a nested scale is nested_quant_map[code] * nested_absmax,
rounded to `nested_dtype`, plus nested_offset. QuantTensor decodes by the same operations: nothing changes on the way.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..double_quant import dynamic_map
from ..format import CODEBOOKS, DQ_BLOCK, GROUPS, Format, FormatError
from ..tensor import QuantTensor, quantize
from .checkpoint_files import CheckpointFiles

TYPES = ("nf4", "fp4")
BLOCKSIZES = GROUPS  # bitsandbytes' 32 to 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE = "quant_state.bitsandbytes__"
_LONGEST = 4096  # bytes of JSON; what bitsandbytes writes takes about 200
_FLOATS = ("F32", "BF16", "F16")
_AGAIN = "copy the file again"


@dataclass(frozen=True)
class State:
    """What the JSON object says.

    Attributes:
        quant_type: nf4 or fp4.
        blocksize: weights per scale, counted over the flattened weight.
        dtype: that bitsandbytes dequantizes to.
        shape: (out_features, in_features).
        nested_blocksize: scales per nested absmax, or 0 where scales are stored as they are.
        nested_dtype: that the nested scales are decoded in.
        nested_offset: their mean.
    """

    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, int]
    nested_blocksize: int = 0
    nested_dtype: torch.dtype = torch.float32
    nested_offset: float = 0.0

    @property
    def straddles(self) -> bool:
        """Whether a block holds weights of two rows, so that no group of a row has its scale."""
        return self.shape[1] % self.blocksize != 0


def read_state(files: CheckpointFiles, name: str, quant_type: str) -> State:
    """The state of the weight `name`.

    Raises:
        FormatError: it is damaged, or breaks a rule of the layout.
    """
    key = f"{name}.{STATE}{quant_type}"
    kind, shape = files.kind(key)
    if kind != "U8" or math.prod(shape) > _LONGEST:
        raise FormatError(f"{files.where(key)} is {kind} {list(shape)}, no JSON text in uint8; {_AGAIN}")
    try:
        said = json.loads(bytes(files.read(key).flatten().tolist()))
        out, in_features = (_positive(size) for size in said["shape"])
        nested: dict[str, Any] = {}
        if "nested_blocksize" in said:
            offset = torch.tensor(float(said["nested_offset"]), dtype=torch.float32)
            if type(said["nested_offset"]) not in (int, float) or not offset.isfinite():
                raise ValueError(said["nested_offset"])
            nested = {
                "nested_blocksize": _positive(said["nested_blocksize"]),
                "nested_dtype": DTYPES[said["nested_dtype"]],
                "nested_offset": float(offset),
            }
        state = State(said["quant_type"], said["blocksize"], DTYPES[said["dtype"]], (out, in_features), **nested)
        if state.quant_type != quant_type or type(state.blocksize) is not int or state.blocksize not in BLOCKSIZES:
            raise ValueError(state)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise FormatError(f"{files.where(key)} describes no {quant_type} weight; {_AGAIN}") from None
    return state


def _positive(size: Any) -> int:
    if type(size) is not int or not 0 < size < 1 << 40:
        raise ValueError(size)
    return size


def read(
    files: CheckpointFiles, name: str, state: State, requantize: Format | None, again: bool = False
) -> tuple[QuantTensor, float, float]:
    """The weight as it is stored, or where its blocks straddle rows, or `again`, quantized to `requantize`.

    Returns:
        The weight; ||stored - its value|| / ||stored||, 0 where it is as stored; and ||stored||, 0 likewise.

    Raises:
        FormatError: `requantize` is None where it is needed, or as `read_quantized`.
    """
    if not state.straddles and (not again or requantize is None):
        return read_quantized(files, name, state), 0.0, 0.0
    if requantize is None:
        raise FormatError(
            f"{files.where(name)} has blocks of {state.blocksize} weights, which straddle rows of {state.shape[1]}; "
            "pass requantize='nf4 g64 f32' (qft quantize --requantize) to quantize such layers again, and read the "
            "error in the report"
        )
    weight = read_dense(files, name, state)
    q, norm = quantize(weight, requantize, name=name), weight.norm().item()
    return q, (weight - q.dequantize()).norm().item() / norm if norm else 0.0, norm


def read_quantized(files: CheckpointFiles, name: str, state: State) -> QuantTensor:
    """The weight with the codes, scales and levels it is stored with; its blocks must lie within rows.

    Nested scales stay 8-bit where they are what qft's dq stores: 256 to a block, on the dynamic map, decoded in fp32.
    Others become fp32 scales of the same values.

    Raises:
        FormatError: a tensor is missing, damaged or not what the state says.
    """
    out, in_features = state.shape
    packed, scales = _read_packed(files, name, state), (out, in_features // state.blocksize)
    codes = ((packed << 4) | (packed >> 4)).view(out, in_features // 2)  # first code in the low nibble
    absmax = _read_scales(files, name, state)
    if isinstance(absmax, Tensor):
        spelling = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[absmax.dtype]
        return QuantTensor(Format(state.quant_type, state.blocksize, spelling), state.shape, codes, absmax.view(scales))
    if state.nested_blocksize == DQ_BLOCK and state.nested_dtype == torch.float32 and absmax.on_dynamic_map:
        fmt, offset = Format(state.quant_type, state.blocksize, "dq"), torch.tensor([state.nested_offset])
        return QuantTensor(fmt, state.shape, codes, absmax.codes.view(scales), None, absmax.absmax, offset)
    fmt = Format(state.quant_type, state.blocksize)
    return QuantTensor(fmt, state.shape, codes, absmax.decode(state).view(scales))


def read_dense(files: CheckpointFiles, name: str, state: State) -> Tensor:
    """The weight fp32 `[out, in]`, not rounded to the state's dtype, wherever its blocks begin and end.

    Raises:
        FormatError: as `read_quantized`.
    """
    weights = math.prod(state.shape)
    packed = _read_packed(files, name, state)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:weights]
    absmax = _read_scales(files, name, state)
    scales = absmax.float() if isinstance(absmax, Tensor) else absmax.decode(state)
    spread = scales.repeat_interleave(state.blocksize)[:weights]
    return (torch.tensor(CODEBOOKS[state.quant_type])[codes.long()] * spread).view(state.shape)


@dataclass(frozen=True)
class _Nested:
    """Double-quantized scales: codes uint8 `[scales]`, absmax fp32 `[blocks]`, levels fp32 `[256]`."""

    codes: Tensor
    absmax: Tensor
    levels: Tensor

    @property
    def on_dynamic_map(self) -> bool:
        return torch.equal(self.levels, dynamic_map())

    def decode(self, state: State) -> Tensor:
        """fp32 `[scales]`."""
        spread = self.absmax.repeat_interleave(state.nested_blocksize)[: self.codes.numel()]
        scales = (self.levels[self.codes.long()] * spread).to(state.nested_dtype)
        return (scales + torch.tensor(state.nested_offset)).float()  # a 0-dim tensor does not widen the sum


def _read_packed(files: CheckpointFiles, name: str, state: State) -> Tensor:
    """Pairs of codes, uint8 `[ceil(out * in / 2)]`."""
    _need(files, name)
    packed = files.read(name).flatten().view(torch.uint8)
    wanted = (math.prod(state.shape) + 1) // 2
    if packed.numel() != wanted:
        raise FormatError(
            f"{files.where(name)} takes {packed.numel()} bytes, {list(state.shape)} weights take {wanted}; {_AGAIN}"
        )
    return packed


def _read_scales(files: CheckpointFiles, name: str, state: State) -> Tensor | _Nested:
    """Scales `[ceil(out * in / blocksize)]` in the dtype they are stored in, or double-quantized; all are finite."""
    levels = _read(files, f"{name}.quant_map", _FLOATS, len(CODEBOOKS[state.quant_type]))
    if not torch.equal(levels, torch.tensor(CODEBOOKS[state.quant_type]).to(levels.dtype)):
        raise FormatError(f"{files.where(f'{name}.quant_map')} are not the levels of {state.quant_type}; {_AGAIN}")
    blocks = math.ceil(math.prod(state.shape) / state.blocksize)
    nested = f"{name}.nested_absmax" in files
    if nested != bool(state.nested_blocksize):
        raise FormatError(
            f"{files.where(f'{name}.nested_absmax')} is {'there' if nested else 'missing'}, and the weight's "
            f"quant_state says that its scales are {'not ' * nested}double-quantized; {_AGAIN}"
        )
    if not nested:
        scales = _read(files, f"{name}.absmax", _FLOATS, blocks)
        _refuse_not_finite(files, f"{name}.absmax", scales)
        return scales
    found = _Nested(
        _read(files, f"{name}.absmax", ("U8",), blocks),
        _read(files, f"{name}.nested_absmax", _FLOATS, math.ceil(blocks / state.nested_blocksize)).float(),
        _read(files, f"{name}.nested_quant_map", _FLOATS, 256).float(),
    )
    _refuse_not_finite(files, f"{name}.nested_absmax", found.decode(state))
    return found


def _refuse_not_finite(files: CheckpointFiles, name: str, scales: Tensor) -> None:
    if not scales.isfinite().all():
        raise FormatError(f"{files.where(name)} gives a scale that is not finite; {_AGAIN}")


def _need(files: CheckpointFiles, name: str) -> tuple[str, tuple[int, ...]]:
    if name not in files:
        raise FormatError(f"{files.where(name)} is missing; {_AGAIN}")
    return files.kind(name)


def _read(files: CheckpointFiles, name: str, kinds: tuple[str, ...], size: int) -> Tensor:
    """A vector of one of these dtypes and of this size."""
    kind, shape = _need(files, name)
    if kind not in kinds or shape != (size,):
        spoilt = ""
        if len(shape) == 2 and math.prod(shape) == size and name.endswith(".absmax"):
            spoilt = "; bitsandbytes transposes scales when it runs on a CPU in eval mode, save a model before it runs"
        wanted = f"{' or '.join(kinds)} [{size}]"
        raise FormatError(f"{files.where(name)} is {kind} {list(shape)} and must be {wanted}{spoilt or '; ' + _AGAIN}")
    return files.read(name)


# ----------------------------------------------------------------------------------------------------------- write


def blocksize_of(q: QuantTensor) -> int:
    """bitsandbytes' blocksize for a group of the weight: the group, or a whole row where that is one; else 0."""
    size = q.format.group_size(q.shape[1])
    return size if size in BLOCKSIZES and q.shape[1] % size == 0 else 0


def type_of(fmt: Format) -> str | None:
    """nf4 or fp4, by the levels; None for others."""
    return next((name for name in TYPES if fmt.levels == CODEBOOKS[name]), None)


def stored(q: QuantTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an nf4 or fp4 weight whose groups are blocks, by what their names add to the weight's.

    Args:
        q: dq stays double-quantized; fp16 and bf16 scales become fp32 of the same value.
        dtype: that bitsandbytes is to dequantize to.
    """
    out, in_features = q.shape
    quant_type = type_of(q.format)
    packed = q.weight[:, : in_features // 2].flatten()
    said: dict[str, Any] = {
        "quant_type": quant_type,
        "blocksize": blocksize_of(q),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [out, in_features],
    }
    made: dict[str, Tensor] = {
        "": ((packed << 4) | (packed >> 4)).view(-1, 1),
        ".quant_map": torch.tensor(CODEBOOKS[str(quant_type)]),
    }
    if q.weight_scales_absmax is None or q.weight_scales_offset is None:
        made[".absmax"] = q.scales.flatten()
    else:
        made[".absmax"] = q.weight_scales.flatten()
        made[".nested_absmax"] = q.weight_scales_absmax
        made[".nested_quant_map"] = dynamic_map()
        offset = q.weight_scales_offset.item()
        said |= {"nested_blocksize": DQ_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(said).encode()
    made[f".{STATE}{quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
    return made
