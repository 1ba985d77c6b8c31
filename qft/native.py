"""The one doorway to compiled kernels: checks device, dtype, contiguity and shape, then passes raw pointers.

Nothing here chooses a kernel (`kernels.py` does) and nothing behind it knows torch. Tensors are checked at every call;
what follows from numbers alone (a layout, a `_native.Weight` of these addresses) is remembered.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import record_function

from .double_quant import dynamic_map_on
from .format import DQ_BLOCK, ZERO_DTYPE, Format
from .reference import TORCH_DTYPE, search_factors

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

_CPU = torch.device("cpu")
_ALL_FINITE = torch.iinfo(torch.int64).max  # what quantize writes where no weight is bad

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


@lru_cache(maxsize=256)
def _place_of(threads: int, device: int, stream: int) -> Any:
    return _native.Place(threads=threads, device=device, stream=stream)


def _place(device: torch.device) -> Any:
    """Where a verb runs: torch's threads, or torch's current stream on a CUDA device."""
    if device == _CPU:
        return _place_of(threads(), 0, 0)
    return _place_of(0, device.index, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=1)
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets this processor runs and qft has kernels for, plainest first."""
    return tuple(_native.instruction_sets())


@lru_cache(maxsize=1)
def tables() -> dict[tuple[str, str], Any]:
    """Kernel tables by (code, instruction set); `load` adds to it."""
    return {(kernels.code, kernels.isa): kernels for kernels in _native.built_kernels()}


@lru_cache(maxsize=1)
def cuda_targets() -> dict[str, tuple[str, ...]]:
    """What the CUDA kernels of a code are there for, as nvcc names it: sm_80 machine code, compute_80 portable PTX."""
    built = tuple(_native.CUDA_TARGETS.split())
    return {code: built for code, isa in tables() if isa == "cuda"}


def serves(code: str, capability: tuple[int, int]) -> bool:
    """Whether CUDA kernels of a code run on a GPU of this compute capability.

    Machine code runs on its own major version from its minor upwards, and with an a on its own GPU alone; PTX runs on
    everything newer.
    """
    for target in cuda_targets().get(code, ()):
        kind, _, name = target.partition("_")
        own = name.endswith("a")
        major, minor = divmod(int(name.rstrip("a")), 10)
        exact = capability == (major, minor)
        if exact or (not own and (capability[0] == major or kind == "compute") and capability > (major, minor)):
            return True
    return False


def load(path: str, target: str = "") -> None:
    """Add the kernels of a library made by `qft.compile`, for `target` where they are CUDA's; OSError where the machine
    refuses it."""
    try:
        kernels = _native.load_kernels(path)
    except ImportError as error:
        raise OSError(f"{path} did not load: {error}") from error
    if kernels.isa == "cuda":
        cuda_targets()[kernels.code] = (target,)
    tables()[kernels.code, kernels.isa] = kernels


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; on a CPU, what is large asks for pages of 2 MiB, which are written and read faster."""
    fresh = torch.empty(shape, dtype=dtype, device=device)
    if device == _CPU:
        _native.ask_for_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def _scratch(floats: int, device: torch.device) -> Tensor | None:
    return torch.empty(floats, dtype=torch.float32, device=device) if floats else None


@cache
def _levels(fmt: Format) -> Tensor:
    """Levels by code, fp32 `[2^bits]` (up to 16; 8-bit kernels read none), in host memory whatever the device. Kept:
    kernels hold their address."""
    count = 1 << min(fmt.bits, 4)
    return torch.tensor((fmt.levels + (0.0,) * count)[:count], dtype=torch.float32)


@lru_cache(maxsize=16)
def _factors(fmt: Format, device: torch.device) -> Tensor:
    """What a scale search tries, fp32, where the kernel runs."""
    return torch.tensor(search_factors(fmt), dtype=torch.float32, device=device)


def check(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, name: str, device: torch.device) -> int:
    """Address of a contiguous tensor of this shape, dtype and device; ValueError or TypeError names what differs."""
    if tensor is None:
        raise ValueError(f"{name} is missing; this format needs it with shape {shape} and {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but this kernel runs on {device}; move it with .to({device})")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}; convert it with .to({dtype})")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")
    if (address := tensor.data_ptr()) or not tensor.numel():
        return address
    raise ValueError(f"{name} is sharded over ranks and has no memory of its own; take it from qft.gather_model(model)")


def _device(isa: str, tensor: Tensor) -> torch.device:
    """Where the tensors of a call must lie: on the CPU, or on the CUDA device that `tensor` is on."""
    if isa == "cuda":
        return tensor.device if tensor.is_cuda else torch.device("cuda")
    return _CPU


def _run(verb: str, table: tuple[str, str], fmt: Format, shape: tuple[int, ...], *fields: Any, **named: Any) -> None:
    """Call one verb of a kernel table with the fields of its argument struct (csrc/qft/launch.h), in their order or by
    name, which takes longer. OSError: CUDA refused it; the message names verb, format and shape."""
    call = getattr(tables()[table], verb)
    try:
        if torch.autograd._profiler_enabled():
            with record_function(f"qft {verb} {fmt} {table[1]}"):
                call(*fields, **named)
        else:
            call(*fields, **named)
    except RuntimeError as error:
        raise OSError(f"{verb} of {fmt} {tuple(shape)} on {table[1]} failed: {error}") from error


@lru_cache(maxsize=4096)
def _layout(fmt: Format, shape: tuple[int, int]) -> list[tuple[int, str, tuple[int, ...], torch.dtype]]:
    """Of each tensor that such a weight is stored as: its place in `tensor.STORED`, name, shape and dtype."""
    out, in_features = shape
    dq, groups = fmt.scale == "dq", fmt.groups(in_features)
    stored: list[tuple[int, str, tuple[int, ...], torch.dtype]] = [
        (0, "weight", (out, fmt.row_bytes(in_features)), torch.uint8),
        (1, "weight_scales", (out, groups), torch.uint8 if dq else TORCH_DTYPE[fmt.scale]),
    ]
    if fmt.zero:
        stored.append((2, "weight_zeros", (out, groups), TORCH_DTYPE[ZERO_DTYPE[fmt.scale]]))
    if dq:
        stored.append((3, "weight_scales_absmax", (-(-out * groups // DQ_BLOCK),), torch.float32))
        stored.append((4, "weight_scales_offset", (1,), torch.float32))
    return stored


@lru_cache(maxsize=1 << 14)
def _weight_at(
    fmt: Format,
    shape: tuple[int, int],
    device: torch.device,
    codes: int,
    scales: int,
    zeros: int,
    absmax: int,
    offset: int,
) -> Any:
    """What kernels read of a weight whose stored tensors lie at these addresses, 0 for those it has not."""
    out, in_features = shape
    return _native.Weight(
        codes=codes,
        scales=scales,
        zeros=zeros,
        absmax=absmax,
        offset=offset,
        dynamic_map=dynamic_map_on(device).data_ptr() if fmt.scale == "dq" else 0,
        levels=_levels(fmt).data_ptr(),
        out=out,
        in_=in_features,
        row_bytes=fmt.row_bytes(in_features),
        group=fmt.group_size(in_features),
        groups=fmt.groups(in_features),
        scale_kind=SCALES[fmt.scale],
        zero_kind=ZEROS[fmt.scale],
    )


def _weight(q: QuantTensor, device: torch.device) -> Any:
    addresses = [0, 0, 0, 0, 0]
    for at, name, shape, dtype in _layout(q.format, q.shape):
        addresses[at] = check(getattr(q, name), shape, dtype, name, device)
    return _weight_at(q.format, q.shape, device, *addresses)


def quantize(
    weight: Tensor, fmt: Format, code: str, isa: str, *, search: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Packed codes uint8 `[out, row_bytes]`, scales and zeros `[out, groups]` as stored (fp32 scales under dq), and the
    flat index of the first weight that is not finite, or -1. `search` and `importance` are those of
    `reference.quantize`."""
    device, (out, in_features) = _device(isa, weight), weight.shape
    address = check(weight, (out, in_features), weight.dtype, "weight", device)
    groups = fmt.groups(in_features)
    scale_dtype = torch.float32 if fmt.scale == "dq" else TORCH_DTYPE[fmt.scale]
    codes = empty(out, fmt.row_bytes(in_features), dtype=torch.uint8, device=device)
    scales = empty(out, groups, dtype=scale_dtype, device=device)
    zeros = torch.empty(out, groups, dtype=TORCH_DTYPE[ZERO_DTYPE[fmt.scale]], device=device) if fmt.zero else None
    bad = torch.empty(1, dtype=torch.int64, device=device)
    factors = _factors(fmt, device) if search else None
    weights = 0 if importance is None else check(importance, (in_features,), torch.float32, "importance", device)
    _run(
        "quantize",
        (code, isa),
        fmt,
        weight.shape,
        weight=address,
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
        factors=0 if factors is None else factors.data_ptr(),
        factor_count=0 if factors is None else len(factors),
        importance=weights,
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        zeros=0 if zeros is None else zeros.data_ptr(),
        bad=bad.data_ptr(),
        place=_place(device),
    )
    first = int(bad.item())
    return codes, scales, zeros, -1 if first == _ALL_FINITE else first


def dequantize(
    q: QuantTensor, out: Tensor, rows: tuple[int, int], columns: tuple[int, int], code: str, isa: str
) -> None:
    """Write the rectangle `rows` x `columns` of W into `out`; columns start on a multiple of `BLOCK`."""
    device, shape = _device(isa, q.weight), (rows[1] - rows[0], columns[1] - columns[0])
    _run(
        "dequantize",
        (code, isa),
        q.format,
        q.shape,
        _weight(q, device),
        *rows,
        *columns,
        check(out, shape, out.dtype, "out", device),
        shape[1],
        DTYPES[out.dtype],
        _place(device),
    )


def matmul(x: Tensor, q: QuantTensor, code: str, isa: str, pair_table_rows: int = 0) -> Tensor:
    """y = x Wt, `[rows, out]` in x's dtype, for x `[rows, in]`. On CUDA 16 levels are looked up two at a time for up to
    `pair_table_rows` rows, 16 at most."""
    device, (out, in_features), rows = _device(isa, q.weight), q.shape, x.shape[0]
    y = torch.empty(rows, out, dtype=x.dtype, device=device)
    if not rows:
        return y
    floats = tables()[code, isa].matmul_workspace(out, in_features, rows, device.index or 0)
    workspace = _scratch(floats, device)
    _run(
        "matmul",
        (code, isa),
        q.format,
        q.shape,
        _weight(q, device),
        check(x, (rows, in_features), x.dtype, "x", device),
        y.data_ptr(),
        rows,
        DTYPES[x.dtype],
        0 if workspace is None else workspace.data_ptr(),
        pair_table_rows,
        _place(device),
    )
    return y


def matmul_t(dy: Tensor, q: QuantTensor, code: str, isa: str) -> Tensor:
    """dx = dy W, `[rows, in]` in dy's dtype, for dy `[rows, out]`."""
    device, (out, in_features), rows = _device(isa, q.weight), q.shape, dy.shape[0]
    dx = torch.empty(rows, in_features, dtype=dy.dtype, device=device)
    if not rows:
        return dx
    _run(
        "matmul_t",
        (code, isa),
        q.format,
        q.shape,
        _weight(q, device),
        check(dy, (rows, out), dy.dtype, "dy", device),
        dx.data_ptr(),
        rows,
        DTYPES[dy.dtype],
        _place(device),
    )
    return dx


def scale_grad(dw: Tensor, q: QuantTensor, rows: tuple[int, int], ds: Tensor, code: str, isa: str) -> None:
    """Reduce rows `rows` of the weight gradient dw `[rows, in]` to ds fp32 `[rows, groups]`: sum of dW x level."""
    device, count, in_features = _device(isa, q.weight), rows[1] - rows[0], q.shape[1]
    _run(
        "scale_grad",
        (code, isa),
        q.format,
        q.shape,
        _weight(q, device),
        *rows,
        check(dw, (count, in_features), dw.dtype, "dw", device),
        DTYPES[dw.dtype],
        check(ds, (count, q.format.groups(in_features)), torch.float32, "ds", device),
        _place(device),
    )


def dot_columns(a: Tensor, b: Tensor, q: QuantTensor, code: str, isa: str) -> Tensor:
    """Sum over the rows of a * b, fp32 `[columns]`, for a and b `[rows, columns]` of one dtype."""
    device, (rows, columns) = _device(isa, a), a.shape
    total = torch.empty(columns, dtype=torch.float32, device=device)
    floats = tables()[code, isa].dot_columns_workspace(rows, columns, device.index or 0)
    workspace = _scratch(floats, device)
    _run(
        "dot_columns",
        (code, isa),
        q.format,
        q.shape,
        check(a, (rows, columns), a.dtype, "a", device),
        check(b, (rows, columns), a.dtype, "b", device),
        rows,
        columns,
        DTYPES[a.dtype],
        total.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        _place(device),
    )
    return total


def zero_scale_grad(dy: Tensor, x: Tensor, q: QuantTensor, ds: Tensor, code: str, isa: str) -> None:
    """Write those numbers of ds fp32 `[out]` whose per-channel scale is 0: sum over rows of dy * (x . level)."""
    device, (out, in_features), rows = _device(isa, q.weight), q.shape, x.shape[0]
    _run(
        "zero_scale_grad",
        (code, isa),
        q.format,
        q.shape,
        _weight(q, device),
        check(dy, (rows, out), dy.dtype, "dy", device),
        check(x, (rows, in_features), dy.dtype, "x", device),
        rows,
        DTYPES[dy.dtype],
        check(ds, (out,), torch.float32, "ds", device),
        _place(device),
    )
