"""The table that picks a kernel for each verb and says why the others were passed over.

A row of `TABLE` is one way to run some verbs. `choose` takes the first row that can run a problem and is not known to
be slower than a later one; naming a row in a call skips the second question. There is no other `if device` in the
package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import native, reference
from .compiler.emit import CPU_FLAGS, generic_code, table_code
from .compiler.jit import build
from .crossovers import Rows, rows_served, spell
from .format import CODEBOOKS, INTEGERS, Format
from .notices import say_once

if TYPE_CHECKING:
    from .tensor import QuantTensor

VERBS = ("quantize", "dequantize", "matmul", "matmul_t", "scale_grad")

# Bytes of dense weights a panel product holds at a time, reused from panel to panel: small enough to stay in a
# last-level cache, large enough that torch.mm runs at its full rate. CPU: measured flat from 4 to 16 MiB at 512 rows.
# CUDA: two thirds of an H100's L2; not measured yet.
PANEL_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}

# Outputs of a forward panel come in multiples of this, however wide the layer: torch.mm arranges x anew for each panel,
# and shares its outputs among threads in large pieces. CPU: measured on 4 cores with AVX-512 at 128 rows, 4096 x 14336
# in bf16: panels of 128 outputs take 1.3 times as long as the whole weight, of 256 and 512 1.05, of 320 1.75.
PANEL_OUTPUTS = 256

# Up to this many rows, 16 at most, a GPU looks 16 levels up two at a time in shared memory; above, by byte permutes.
# Counted from the sm_90a code, not measured: permutes are bound by integer instructions to 20 codes a clock and
# multiprocessor whatever the rows, less than an H100's memory brings; the table is bound by shared memory, where
# activations are read too, to 34 codes with 8 rows, 27 with 16, 18 with 32.
PAIR_TABLE_ROWS = 16


def slow_products(instruction_sets: tuple[str, ...]) -> tuple[torch.dtype, ...]:
    """What torch.mm multiplies far slower than fp32 on a CPU: fp16 up to a hundred times, and bf16 forty times where
    there is AVX2 and no AVX-512 (timed with torch held to AVX2)."""
    return (torch.float16, torch.bfloat16) if instruction_sets[-1] == "avx2" else (torch.float16,)


SLOW_PRODUCTS = slow_products(native.instruction_sets())


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked: one verb on one weight."""

    verb: str
    fmt: Format
    device: str  # as torch spells it: "cpu", "cuda:1"
    dtype: torch.dtype
    rows: int = 0  # rows of x or dy; 0 for verbs without

    @property
    def kind(self) -> str:
        """Of device, without its number."""
        return self.device.partition(":")[0]


@dataclass(frozen=True)
class Kernel:
    """One row of the table. `cannot` and `slower`, which is told the row's name, return why not, or None; `about` says
    what it does."""

    name: str
    verbs: tuple[str, ...]
    about: str
    cannot: Callable[[Problem], str | None]
    slower: Callable[[Problem, str], str | None] = field(default=lambda problem, name: None)


@dataclass(frozen=True)
class Choice:
    """The kernel taken, and why each row before it was passed over."""

    kernel: Kernel
    passed_over: tuple[tuple[str, str], ...]


def _not_on_cpu(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"the weight is on {problem.device}, this kernel runs on the CPU"
    return _other_dtype(problem)


def _other_dtype(problem: Problem) -> str | None:
    if problem.dtype not in native.DTYPES:
        return f"it takes float32, bfloat16 or float16, not {problem.dtype}"
    return None


OLDEST_GPU = (8, 0)  # compute capability: mma.sync of bf16 and cp.async came with it


def _not_on_cuda(problem: Problem) -> str | None:
    """Why CUDA kernels cannot run a problem at all."""
    if problem.kind != "cuda":
        return f"the weight is on {problem.device}, this kernel runs on a CUDA device"
    if reason := _other_dtype(problem):
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(problem.device)
    named = f"{problem.device} has compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST_GPU:
        return f"{named}, the kernels need {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    code = table_code(problem.fmt, "cuda")
    if native.serves(code, capability):
        return None
    _compile_at_first_need(problem.fmt.code, capability)
    if native.serves(code, capability):
        return None
    there = ", ".join(native.cuda_targets().get(code, ())) or "no GPU"
    return f"{named}, qft was built for {there}; install it again where nvcc is on the PATH"


def _no_small_product(problem: Problem) -> str | None:
    if reason := _not_on_cuda(problem):
        return reason
    if problem.verb == "matmul" and problem.dtype == torch.float32:
        return "tensor cores multiply bfloat16 and float16, not float32"
    return None


def _without(isa: str) -> Callable[[Problem], str | None]:
    def cannot(problem: Problem) -> str | None:
        if isa not in native.instruction_sets():
            return f"this machine has no {isa}"
        if reason := _not_on_cpu(problem):
            return reason
        return (
            None
            if _compiled(problem.fmt, isa)
            else f"no compiled kernels for {problem.fmt.code}: no C++ compiler was found"
        )

    return cannot


def _rows_served(problem: Problem, name: str) -> Rows:
    """The rows for which a kernel was the fastest; generic, which was not timed, is as slow as scalar."""
    machine = ("cuda",) if problem.kind == "cuda" else native.instruction_sets()
    dtype = str(problem.dtype).removeprefix("torch.")
    return rows_served("scalar" if name == "generic" else name, problem.verb, dtype, machine)


def _many_rows(problem: Problem, name: str) -> str | None:
    """Why a row kernel leaves a product to a panel, or to a plainer row kernel."""
    if problem.verb not in ("matmul", "matmul_t"):
        return None
    least, most = _rows_served(problem, name)
    rows = max(problem.rows, 1)
    if least <= rows and (most is None or rows <= most or _no_thread_pool()):
        return None
    return f"{problem.rows} rows: it is the fastest for {spell((least, most))}"


def _few_rows(problem: Problem, name: str) -> str | None:
    """Why a panel leaves a product to a row kernel."""
    if problem.verb == "scale_grad":
        return None
    for kernel in TABLE:
        if kernel.slower is _many_rows and _many_rows(problem, kernel.name) is None and _runs(kernel, problem):
            return f"{problem.rows} rows: {kernel.name} is faster for {spell(_rows_served(problem, kernel.name))}"
    return None


def _runs(kernel: Kernel, problem: Problem) -> bool:
    return problem.verb in kernel.verbs and kernel.cannot(problem) is None


def _no_thread_pool() -> bool:
    return native.forked() and torch.get_num_threads() > 1


def _no_panel(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return _not_on_cuda(problem)
    if reason := _other_dtype(problem):
        return reason
    if _no_thread_pool():
        return "torch's threads do not survive fork; torch.set_num_threads(1) in the child allows panel products"
    return None


def _built_in(problem: Problem) -> str | None:
    if reason := _not_on_cpu(problem):
        return reason
    return f"{problem.fmt.code} has kernels of its own" if _is_built(problem.fmt) else None


def _is_built(fmt: Format) -> bool:
    return fmt.code in CODEBOOKS or fmt.code in INTEGERS


def _compiled(fmt: Format, isa: str) -> bool:
    """Whether a CPU's kernels for the format exist; levels of the user's own are compiled at first need."""
    table = table_code(fmt, isa), isa
    if table in native.tables():
        return True
    if _is_built(fmt):
        return False
    _compile_at_first_need(fmt.code)
    return table in native.tables()


@cache
def _compile_at_first_need(code: str, capability: tuple[int, int] | None = None) -> None:
    """Tried once per process: a compiler that fails is not run again at every call. With `capability`, for that GPU."""
    try:
        if capability is None:
            _compile_for_cpu(Format(code, 64))
        else:
            _compile_for_gpu(Format(code, 64), capability)
    except OSError as reason:
        slower = "generic kernel" if capability is None else "reference"
        say_once(f"{code} runs on the {slower}, which is slower: {reason}")


def _compile_for_cpu(fmt: Format) -> None:
    wanted = [isa for isa in native.instruction_sets() if (table_code(fmt, isa), isa) not in native.tables()]
    if wanted and not _is_built(fmt):
        for library in build(dict.fromkeys(wanted, fmt.code)):
            _load(library)


def _compile_for_gpu(fmt: Format, capability: tuple[int, int]) -> None:
    # Hopper's own instructions need the name with an a
    name = f"{capability[0]}{capability[1]}{'a' if capability == (9, 0) else ''}"
    (library,) = build({"cuda": table_code(fmt, "cuda")}, name)
    _load(library, f"sm_{name}")


def _load(library: Path, target: str = "") -> None:
    native.load(str(library), target)
    _chosen.cache_clear()  # it may serve better what something else was chosen for


def compile(fmt: Format | str) -> list[str]:
    """Build what kernels of a format this machine lacks; returns the instruction sets that have them.

    Formats of named codes come compiled. Levels of the user's own are built with the system's C++ compiler (`c++`,
    `g++` or `clang++` on the path) the first time they are used, or by this call, and cached by content under
    `QFT_CACHE` (`~/.cache/qft` where that is unset). For a GPU every format comes compiled, levels of the user's own
    included, where qft was installed with `nvcc`; for a GPU it was not built for, `nvcc` builds them here.

    Raises:
        FormatError: `fmt` spells no format.
        OSError: no compiler was found, it failed, or the cache cannot be written.
    """
    fmt = Format.parse(fmt)
    _compile_for_cpu(fmt)
    made = [isa for isa in native.instruction_sets() if (table_code(fmt, isa), isa) in native.tables()]
    if not torch.cuda.is_available() or (capability := torch.cuda.get_device_capability()) < OLDEST_GPU:
        return made
    if not native.serves(table_code(fmt, "cuda"), capability):
        _compile_for_gpu(fmt, capability)
    return [*made, "cuda"]


def _row_kernel(isa: str) -> Kernel:
    verbs = VERBS[:4]
    how = "bf16 multiplied by dot products" if isa == "avx512_bf16" else "row by row"
    return Kernel(isa, verbs, f"codes decoded in {isa} registers, {how}", _without(isa), _many_rows)


TABLE: tuple[Kernel, ...] = (
    Kernel(
        "cuda",
        ("quantize", "dequantize", "matmul"),
        "codes decoded in registers; products on tensor cores, 64 rows a launch",
        _no_small_product,
        _many_rows,
    ),
    *(_row_kernel(isa) for isa in reversed([isa for isa in CPU_FLAGS if isa != "scalar"])),
    Kernel(
        "panel",
        ("matmul", "matmul_t", "scale_grad"),
        "dense panels that stay in the cache, multiplied by torch.mm",
        _no_panel,
        _few_rows,
    ),
    _row_kernel("scalar"),
    Kernel("generic", VERBS[:4], "levels read at run time, one code at a time", _built_in, _many_rows),
    Kernel("reference", VERBS, "obvious torch on a dense weight", lambda problem: None),
)


def choose(problem: Problem, name: str | None = None) -> Choice:
    """The kernel for a problem: the first row that serves, or the one named.

    Raises:
        ValueError: `name` is no row of the table, or that row cannot run the problem.
    """
    passed_over: list[tuple[str, str]] = []
    for kernel in TABLE:
        if problem.verb not in kernel.verbs or name not in (None, kernel.name):
            continue
        reason = kernel.cannot(problem) or (kernel.slower(problem, kernel.name) if name is None else None)
        if reason is None:
            return Choice(kernel, tuple(passed_over))
        passed_over.append((kernel.name, reason))
    if passed_over:
        raise ValueError(f"kernel {name!r} cannot run {problem.verb} for {problem.fmt}: {passed_over[-1][1]}")
    names = ", ".join(kernel.name for kernel in TABLE if problem.verb in kernel.verbs)
    raise ValueError(f"there is no kernel {name!r} for {problem.verb}; use one of {names}")


Selection = tuple[str, tuple[str, str] | None]  # a row's name; its (code, instruction set) where it is compiled


@lru_cache(maxsize=4096)
def _chosen(
    verb: str, fmt: Format, device: torch.device, dtype: torch.dtype, rows: int, name: str | None, no_threads: bool
) -> Selection:
    """What `choose` answers, remembered: asking the table takes longer than a small product.

    `no_threads` is part of the question, as a fork changes the answer. `_chosen.cache_clear()` forgets them all.
    """
    kernel = choose(Problem(verb, fmt, str(device), dtype, rows), name).kernel.name
    return kernel, None if kernel in ("panel", "reference") else _table_of(fmt, kernel)


def _select(verb: str, q: QuantTensor, dtype: torch.dtype, rows: int = 0, name: str | None = None) -> Selection:
    selection = _chosen(verb, q.format, q.weight.device, dtype, rows, name, _no_thread_pool())
    if selection[0] == "reference" and name is None:
        where = f"{q.weight.device} in {dtype}"
        say_once(f"{verb} of {q.format} on {where} uses the reference: no compiled kernel takes it")
    return selection


def _check_operand(operand: Tensor, q: QuantTensor, width: int, name: str) -> None:
    """Raise unless `operand` is a floating matrix `[rows, width]` on the weight's device."""
    if not operand.is_floating_point():
        raise TypeError(f"{name} is {operand.dtype}; kernels take floating tensors, convert it with .float()")
    if operand.dim() != 2 or operand.shape[1] != width:
        expected = f"(rows, {width}) for a weight of shape {q.shape}"
        raise ValueError(f"{name} has shape {tuple(operand.shape)}, expected {expected}")
    if operand.device != q.weight.device:
        raise ValueError(f"{name} is on {operand.device}, but the weight is on {q.weight.device}; move one of them")


def _table_of(fmt: Format, kernel: str) -> tuple[str, str]:
    """(code, instruction set) of a compiled kernel by its row's name."""
    return (generic_code(fmt), "scalar") if kernel == "generic" else (table_code(fmt, kernel), kernel)


def quantize(
    weight: Tensor,
    fmt: Format,
    kernel: str | None = None,
    *,
    search: bool = False,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Packed codes, scales (fp32 under dq) and zeros as stored, and the index of the first non-finite weight or -1.

    `search` and `importance` are those of `reference.quantize`.
    """
    name = choose(Problem("quantize", fmt, str(weight.device), weight.dtype), kernel).kernel.name
    if name != "reference":
        table = _table_of(fmt, name)
        return native.quantize(weight.contiguous(), fmt, *table, search=search, importance=importance)
    finite = weight.isfinite().flatten()
    if not finite.all():
        bad = int((~finite).nonzero()[0, 0])
        return weight.new_empty(0), weight.new_empty(0), None, bad
    codes, scales, zeros = reference.quantize(weight, fmt, search, importance)
    scale_dtype = torch.float32 if fmt.scale == "dq" else reference.TORCH_DTYPE[fmt.scale]
    zeros = None if zeros is None else zeros.to(reference.TORCH_DTYPE[native.ZERO_DTYPE[fmt.scale]])
    return reference.pack(codes, fmt), scales.to(scale_dtype), zeros, -1


def dequantize(
    q: QuantTensor, dtype: torch.dtype = torch.float32, kernel: str | None = None, out: Tensor | None = None
) -> Tensor:
    """Dense weight `[out, in]`: fp32 level x scale, rounded once to `dtype`; written into `out` where that is given."""
    _, table = _select("dequantize", q, dtype, name=kernel)
    if out is not None:
        native.check(out, q.shape, dtype, "out", q.weight.device)
    if table is None:
        dense = reference.dequantize(q.unpack(), q.scales, q.zeros, q.format, dtype)
        return dense if out is None else out.copy_(dense)
    if out is None:
        out = native.empty(*q.shape, dtype=dtype, device=q.weight.device)
    else:
        increment_version(out)  # what autograd may have kept of it is overwritten
    native.dequantize(q, out, (0, q.shape[0]), (0, q.shape[1]), *table)
    return out


def matmul(x: Tensor, q: QuantTensor, kernel: str | None = None) -> Tensor:
    """y = x Wt: `[rows, out]` in x's dtype, for x `[rows, in]`."""
    _check_operand(x, q, q.shape[1], "x")
    name, table = _select("matmul", q, x.dtype, x.shape[0], kernel)
    if table is not None:
        return native.matmul(x.contiguous(), q, *table, PAIR_TABLE_ROWS)
    if name == "panel":
        return _panel_matmul(x.contiguous(), q)
    return reference.matmul(x, dequantize(q, x.dtype, "reference"))


def matmul_t(dy: Tensor, q: QuantTensor, kernel: str | None = None) -> Tensor:
    """dx = dy W: `[rows, in]` in dy's dtype, for dy `[rows, out]`."""
    _check_operand(dy, q, q.shape[0], "dy")
    name, table = _select("matmul_t", q, dy.dtype, dy.shape[0], kernel)
    if table is not None:
        return native.matmul_t(dy.contiguous(), q, *table)
    if name == "panel":
        return _panel_matmul_t(dy.contiguous(), q)
    return reference.matmul_t(dy, dequantize(q, dy.dtype, "reference"))


def scale_grad(dy: Tensor, x: Tensor, q: QuantTensor, kernel: str | None = None) -> Tensor:
    """Gradient of the scales, fp32 `[out, groups]`, for dy `[rows, out]`, x `[rows, in]`; dW comes in panels."""
    _check_operand(dy, q, q.shape[0], "dy")
    _check_operand(x, q, q.shape[1], "x")
    if dy.shape[0] != x.shape[0] or dy.dtype != x.dtype:
        rows = f"{dy.shape[0]} rows of {dy.dtype} and x {x.shape[0]} of {x.dtype}"
        raise ValueError(f"dy has {rows}; they must be the same")
    name, _ = _select("scale_grad", q, x.dtype, x.shape[0], kernel)
    if name == "reference":
        return reference.scale_grad(dy, x, q.unpack(), q.zeros, q.format)
    return _panel_scale_grad(dy.contiguous(), x.contiguous(), q)


def channel_scale_grad(dy: Tensor, x: Tensor, y: Tensor, q: QuantTensor) -> Tensor:
    """Gradient of per-channel scales, fp32 `[out, 1]`, from y = x Wt as it was computed: no weight gradient is formed.

    ds = sum over rows of dy * y / s (PEQA, section 3, with y / s for the unscaled product); where s is 0, which hides
    the product, the sum is taken in full. Nothing waits for the device.
    """
    _, table = _chosen("dequantize", q.format, dy.device, dy.dtype, 0, None, _no_thread_pool())
    if table is None:
        return scale_grad(dy, x, q)
    dy = dy.contiguous()
    scales = q.scales[:, 0]
    ds = torch.where(scales == 0, 0, native.dot_columns(dy, y.contiguous(), q, *table) / scales)
    native.zero_scale_grad(dy, x.contiguous(), q, ds, *table)
    return ds[:, None]


def _elementwise(q: QuantTensor) -> tuple[str, str]:
    """The kernel that fills panels: the one dequantize would take."""
    name, _ = _chosen("dequantize", q.format, q.weight.device, torch.float32, 0, None, _no_thread_pool())
    return _table_of(q.format, name)


def _panels(total: int, bytes_each: int, multiple: int, device: str) -> list[tuple[int, int]]:
    """Cut `total` rows or columns of `bytes_each` bytes into panels of PANEL_BYTES, in multiples of `multiple`."""
    size = max(multiple, PANEL_BYTES[device] // max(1, bytes_each) // multiple * multiple)
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def product_dtype(dtype: torch.dtype, device: str = "cpu") -> torch.dtype:
    """Dtype for dense products of `dtype`: fp32 on a CPU where torch.mm is slow."""
    return torch.float32 if device == "cpu" and dtype in SLOW_PRODUCTS else dtype


def _row_chunks(rows: int, width: int) -> list[tuple[int, int]]:
    """Rows of an fp16 operand converted to fp32 at a time, on a CPU: half a panel's bytes, for they lie beside one."""
    return _panels(rows, 2 * 4 * width, 16, "cpu")


def _panel_matmul(x: Tensor, q: QuantTensor) -> Tensor:
    out, in_features = q.shape
    device, dtype = x.device, product_dtype(x.dtype, x.device.type)
    y = torch.empty(x.shape[0], out, dtype=x.dtype, device=device)
    panels = _panels(out, in_features * dtype.itemsize, PANEL_OUTPUTS, device.type)
    scratch = torch.empty(panels[0][1], in_features, dtype=dtype, device=device)
    table = _elementwise(q)
    for first, last in panels:
        panel = scratch[: last - first]
        native.dequantize(q, panel, (first, last), (0, in_features), *table)
        if dtype == x.dtype:
            torch.mm(x, panel.T, out=y[:, first:last])
        else:
            for top, bottom in _row_chunks(x.shape[0], in_features):
                y[top:bottom, first:last] = x[top:bottom].to(dtype) @ panel.T
    return y


def _panel_matmul_t(dy: Tensor, q: QuantTensor) -> Tensor:
    out, in_features = q.shape
    device, dtype = dy.device, product_dtype(dy.dtype, dy.device.type)
    dx = torch.empty(dy.shape[0], in_features, dtype=dy.dtype, device=device)
    panels = _panels(in_features, out * dtype.itemsize, native.BLOCK, device.type)
    scratch = torch.empty(out * panels[0][1], dtype=dtype, device=device)
    table = _elementwise(q)
    for first, last in panels:
        panel = scratch[: out * (last - first)].view(out, last - first)
        native.dequantize(q, panel, (0, out), (first, last), *table)
        if dtype == dy.dtype:
            torch.mm(dy, panel, out=dx[:, first:last])
        else:
            for top, bottom in _row_chunks(dy.shape[0], out):
                dx[top:bottom, first:last] = dy[top:bottom].to(dtype) @ panel
    return dx


def _panel_scale_grad(dy: Tensor, x: Tensor, q: QuantTensor) -> Tensor:
    out, in_features = q.shape
    device, dtype = x.device, product_dtype(x.dtype, x.device.type)
    ds = torch.empty(out, q.format.groups(in_features), dtype=torch.float32, device=device)
    # half a panel's rows: torch.mm keeps a copy of what it writes
    panels = _panels(out, 2 * in_features * dtype.itemsize, 16, device.type)
    scratch = torch.empty(panels[0][1], in_features, dtype=dtype, device=device)
    table = _elementwise(q)
    for first, last in panels:
        dw = scratch[: last - first]
        if dtype == x.dtype:
            torch.mm(dy[:, first:last].T, x, out=dw)
        else:
            dw.zero_()
            for top, bottom in _row_chunks(x.shape[0], in_features):
                dw.addmm_(dy[top:bottom, first:last].T.to(dtype), x[top:bottom].to(dtype))
        native.scale_grad(dw, q, (first, last), ds[first:last], *table)
    return ds


def explain(fmt: Format | str, out_features: int, in_features: int, rows: int = 1, dtype: torch.dtype = torch.bfloat16,
            device: str = "cpu") -> dict[str, Choice]:  # fmt: skip
    """Per verb, the kernel this machine takes for a layer of this shape and why each row before it was passed over."""
    fmt = Format.parse(fmt)
    return {verb: choose(Problem(verb, fmt, device, dtype, rows if verb in VERBS[2:] else 0)) for verb in VERBS}
