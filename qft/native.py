"""The one doorway to compiled kernels: checks device, dtype, contiguity and shape, then passes raw pointers.

Nothing here chooses a kernel (`kernels.py` does) and nothing behind it knows torch.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .double_quant import dynamic_map
from .format import DQ_BLOCK, ZERO_DTYPE, Format
from .reference import TORCH_DTYPE

try:
    _native: Any = import_module("qft._native")
except ImportError as error:
    raise ImportError(
        f"qft's compiled module did not load ({error}); build it with `pip install .` in a checkout of qft"
    ) from error

if TYPE_CHECKING:
    from .tensor import QuantTensor

DTYPES = {torch.float32: _native.Dtype.f32, torch.float16: _native.Dtype.f16, torch.bfloat16: _native.Dtype.bf16}
SCALES = {name: getattr(_native.Scale, name) for name in ("f32", "f16", "bf16", "dq")}
ZEROS = {scale: getattr(_native.Dtype, dtype) for scale, dtype in ZERO_DTYPE.items()}
BLOCK: int = _native.BLOCK  # codes a kernel decodes at a time; column ranges start on a multiple of it

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True
    torch.set_num_threads(1)


# libgomp's threads do not survive fork, and neither do torch's: a child that used them would wait for ever. One thread
# is what torch's own data loader gives its workers.
os.register_at_fork(after_in_child=_note_fork)


def forked() -> bool:
    """Whether this process is a fork of one that had loaded qft: then kernels run on the calling thread alone."""
    return _forked


def threads() -> int:
    """Threads a kernel may use: torch's own budget."""
    return 1 if _forked else torch.get_num_threads()


@lru_cache(maxsize=1)
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets this machine runs and qft has kernels for, plainest first."""
    return tuple(_native.instruction_sets())


@lru_cache(maxsize=1)
def tables() -> dict[tuple[str, str], Any]:
    """Kernel tables by (code, instruction set); `load` adds to it."""
    return {(kernels.code, kernels.isa): kernels for kernels in _native.built_kernels()}


def load(path: str) -> None:
    """Add the kernels of a library made by `qft.compile`; OSError where the machine refuses it."""
    try:
        kernels = _native.load_kernels(path)
    except ImportError as error:
        raise OSError(f"{path} did not load: {error}") from error
    tables()[kernels.code, kernels.isa] = kernels


@lru_cache(maxsize=64)
def _levels(fmt: Format) -> Tensor:
    """Levels by code, fp32 `[2^bits]` (up to 16; 8-bit kernels read none)."""
    count = 1 << min(fmt.bits, 4)
    return torch.tensor((fmt.levels + (0.0,) * count)[:count], dtype=torch.float32)


@lru_cache(maxsize=1)
def _dynamic_map() -> Tensor:
    return dynamic_map().contiguous()


def check(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> int:
    """Address of a contiguous CPU tensor of this shape and dtype; ValueError or TypeError names what differs."""
    if tensor is None:
        raise ValueError(f"{name} is missing; this format needs it with shape {shape} and {dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, but this kernel runs on the CPU; move it with .cpu()")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}; convert it with .to({dtype})")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")
    return tensor.data_ptr()


def _weight(q: QuantTensor) -> Any:
    fmt, (out, in_features) = q.format, q.shape
    groups = fmt.groups(in_features)
    scale_dtype = torch.uint8 if fmt.scale == "dq" else TORCH_DTYPE[fmt.scale]
    zero_dtype = TORCH_DTYPE[ZERO_DTYPE[fmt.scale]]
    dq, blocks = fmt.scale == "dq", -(-out * groups // DQ_BLOCK)
    return _native.Weight(
        codes=check(q.weight, (out, fmt.row_bytes(in_features)), torch.uint8, "weight"),
        scales=check(q.weight_scales, (out, groups), scale_dtype, "weight_scales"),
        zeros=check(q.weight_zeros, (out, groups), zero_dtype, "weight_zeros") if fmt.zero else 0,
        absmax=check(q.weight_scales_absmax, (blocks,), torch.float32, "weight_scales_absmax") if dq else 0,
        offset=check(q.weight_scales_offset, (1,), torch.float32, "weight_scales_offset") if dq else 0,
        dynamic_map=_dynamic_map().data_ptr() if dq else 0,
        levels=_levels(fmt).data_ptr(),
        out=out,
        in_=in_features,
        row_bytes=q.weight.shape[1],
        group=fmt.group_size(in_features),
        groups=groups,
        scale_kind=SCALES[fmt.scale],
        zero_kind=ZEROS[fmt.scale],
    )


def quantize(weight: Tensor, fmt: Format, code: str, isa: str) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Packed codes uint8 `[out, row_bytes]`, scales and zeros `[out, groups]` as stored (fp32 scales under dq), and the
    flat index of the first weight that is not finite, or -1."""
    out, in_features = weight.shape
    groups = fmt.groups(in_features)
    scale_dtype = torch.float32 if fmt.scale == "dq" else TORCH_DTYPE[fmt.scale]
    codes = torch.empty(out, fmt.row_bytes(in_features), dtype=torch.uint8)
    scales = torch.empty(out, groups, dtype=scale_dtype)
    zeros = torch.empty(out, groups, dtype=TORCH_DTYPE[ZERO_DTYPE[fmt.scale]]) if fmt.zero else None
    bad = tables()[code, isa].quantize(
        weight=check(weight, (out, in_features), weight.dtype, "weight"),
        out=out,
        in_=in_features,
        row_bytes=codes.shape[1],
        group=fmt.group_size(in_features),
        groups=groups,
        dtype=DTYPES[weight.dtype],
        zero=fmt.zero,
        scale_kind=SCALES[fmt.scale],
        zero_kind=ZEROS[fmt.scale],
        levels=_levels(fmt).data_ptr(),
        count=min(len(fmt.levels), 16),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        zeros=0 if zeros is None else zeros.data_ptr(),
        threads=threads(),
    )
    return codes, scales, zeros, bad


def dequantize(
    q: QuantTensor, out: Tensor, rows: tuple[int, int], columns: tuple[int, int], code: str, isa: str
) -> None:
    """Write the rectangle `rows` x `columns` of W into `out`; columns start on a multiple of `BLOCK`."""
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    tables()[code, isa].dequantize(
        weight=_weight(q),
        row0=rows[0],
        row1=rows[1],
        col0=columns[0],
        col1=columns[1],
        out=check(out, shape, out.dtype, "out"),
        stride=shape[1],
        dtype=DTYPES[out.dtype],
        threads=threads(),
    )


def matmul(x: Tensor, q: QuantTensor, code: str, isa: str) -> Tensor:
    """y = x Wt, `[rows, out]` in x's dtype, for x `[rows, in]`."""
    out, in_features = q.shape
    rows = x.shape[0]
    y = torch.empty(rows, out, dtype=x.dtype)
    if not rows:
        return y
    workspace = torch.empty(rows, -(-in_features // BLOCK) * BLOCK)
    tables()[code, isa].matmul(
        weight=_weight(q),
        x=check(x, (rows, in_features), x.dtype, "x"),
        y=y.data_ptr(),
        rows=rows,
        dtype=DTYPES[x.dtype],
        workspace=workspace.data_ptr(),
        threads=threads(),
    )
    return y


def matmul_t(dy: Tensor, q: QuantTensor, code: str, isa: str) -> Tensor:
    """dx = dy W, `[rows, in]` in dy's dtype, for dy `[rows, out]`."""
    out, in_features = q.shape
    rows = dy.shape[0]
    dx = torch.empty(rows, in_features, dtype=dy.dtype)
    if not rows:
        return dx
    tables()[code, isa].matmul_t(
        weight=_weight(q),
        dy=check(dy, (rows, out), dy.dtype, "dy"),
        dx=dx.data_ptr(),
        rows=rows,
        dtype=DTYPES[dy.dtype],
        threads=threads(),
    )
    return dx


def scale_grad(dw: Tensor, q: QuantTensor, rows: tuple[int, int], ds: Tensor, code: str, isa: str) -> None:
    """Reduce rows `rows` of the weight gradient dw `[rows, in]` to ds fp32 `[rows, groups]`: sum of dW x level."""
    count, in_features = rows[1] - rows[0], q.shape[1]
    tables()[code, isa].scale_grad(
        weight=_weight(q),
        row0=rows[0],
        row1=rows[1],
        dw=check(dw, (count, in_features), dw.dtype, "dw"),
        dtype=DTYPES[dw.dtype],
        ds=check(ds, (count, q.format.groups(in_features)), torch.float32, "ds"),
        threads=threads(),
    )
