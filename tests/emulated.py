"""The CUDA kernels run on the host by the SIMT emulator, on CPU tensors: one function per verb.

A library per width and kind of code is compiled on first use and lives as long as the process. A schedule is what
`simt.build` can configure: one of `SCHEDULES`, or fields of one's own such as `{"multiprocessors": 1}`. What the
emulator finds is raised as `KernelError`.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from ctypes import Structure, byref, c_bool, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from simt import build as simt
from torch import Tensor

from qft.compiler.emit import emit_loadable, table_code
from qft.double_quant import dynamic_map
from qft.format import DQ_BLOCK, INTEGERS, ZERO_DTYPE, Format
from qft.kernels import PAIR_TABLE_ROWS
from qft.reference import TORCH_DTYPE, search_factors
from qft.tensor import QuantTensor

VERBS = Path(__file__).parent / "simt" / "verbs.cpp"
CSRC = Path(__file__).parent.parent / "csrc"

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # qft::Dtype
SCALES = {"f32": 0, "f16": 1, "bf16": 2, "dq": 3}  # qft::Scale

Schedule = Mapping[str, object]
SCHEDULES: tuple[Schedule, ...] = tuple(simt.SCHEDULES.values())
FIRST = SCHEDULES[0]


class KernelError(Exception):
    """What the emulator found wrong with a kernel, with file and line."""


# ------------------------------------------------------------------------------------------- the structs of launch.h


class _Struct(Structure):
    def __init__(self, **fields: Any) -> None:
        missing = {name for name, _ in self._fields_} - fields.keys()
        assert not missing, f"{type(self).__name__} lacks {missing}"
        super().__init__(**fields)


class _Place(Structure):
    _fields_ = [("threads", c_int), ("device", c_int), ("stream", c_void_p)]


class _Weight(_Struct):
    _fields_ = [
        *((name, c_void_p) for name in ("codes", "scales", "zeros", "absmax", "offset", "dynamic_map", "levels")),
        *((name, c_int64) for name in ("out", "in_", "row_bytes", "group", "groups")),
        ("scale_kind", c_int),
        ("zero_kind", c_int),
    ]


class _QuantizeArgs(_Struct):
    _fields_ = [
        ("weight", c_void_p),
        *((name, c_int64) for name in ("out", "in_", "row_bytes", "group", "groups")),
        ("dtype", c_int),
        ("zero", c_bool),
        ("scale_kind", c_int),
        ("zero_kind", c_int),
        ("levels", c_void_p),
        ("count", c_int),
        ("factors", c_void_p),
        ("factor_count", c_int),
        *((name, c_void_p) for name in ("importance", "codes", "scales", "zeros", "bad")),
        ("place", _Place),
    ]


class _DequantizeArgs(_Struct):
    _fields_ = [
        ("weight", _Weight),
        *((name, c_int64) for name in ("row0", "row1", "col0", "col1")),
        ("out", c_void_p),
        ("stride", c_int64),
        ("dtype", c_int),
        ("place", _Place),
    ]


class _MatmulArgs(_Struct):
    _fields_ = [
        ("weight", _Weight),
        ("x", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("dtype", c_int),
        ("workspace", c_void_p),
        ("pair_table_rows", c_int),
        ("place", _Place),
    ]


class _ScaleGradArgs(_Struct):
    _fields_ = [
        ("weight", _Weight),
        ("row0", c_int64),
        ("row1", c_int64),
        ("dw", c_void_p),
        ("dtype", c_int),
        ("ds", c_void_p),
        ("place", _Place),
    ]


class _DotColumnsArgs(_Struct):
    _fields_ = [
        ("a", c_void_p),
        ("b", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("dtype", c_int),
        ("total", c_void_p),
        ("workspace", c_void_p),
        ("place", _Place),
    ]


class _ZeroScaleGradArgs(_Struct):
    _fields_ = [
        ("weight", _Weight),
        ("dy", c_void_p),
        ("x", c_void_p),
        ("rows", c_int64),
        ("dtype", c_int),
        ("ds", c_void_p),
        ("place", _Place),
    ]


ARGUMENTS = {
    "dequantize": _DequantizeArgs,
    "dot_columns": _DotColumnsArgs,
    "matmul": _MatmulArgs,
    "quantize": _QuantizeArgs,
    "scale_grad": _ScaleGradArgs,
    "zero_scale_grad": _ZeroScaleGradArgs,
}


WORKSPACES = ("dot_columns", "matmul")  # verbs that need scratch

# Verbs that are compiled together, so that a test file waits for what it runs.
ELEMENTWISE = ("quantize", "dequantize", "scale_grad", "zero_scale_grad", "dot_columns")
PRODUCTS = ("matmul",)


# -------------------------------------------------------------------------------------------------------- libraries


def code_of(fmt: Format | str) -> str:
    """The kernels that serve a format: a name of INTEGERS, or `levelsN` for codebooks of that width."""
    return table_code(Format.parse(fmt), "cuda")


def _source(code: str, verbs: tuple[str, ...]) -> str:
    """A table of kernels that has but these verbs, and compiles in a fraction of the time."""
    headers = {"gemm_small" if verb == "matmul" else verb for verb in verbs}
    kind = f"Levels::integer, {INTEGERS[code]}" if code in INTEGERS else f"Levels::codebook, {code[-1]}"
    fields = {verb: verb if verb == "dot_columns" else f"{verb}<{code}>" for verb in verbs}
    fields |= {f"{verb}_workspace": f"{verb}_workspace" for verb in verbs if verb in WORKSPACES}
    newline = "\n"
    return f"""#include "qft/cuda/code.cuh"
{newline.join(f'#include "qft/cuda/{header}.cuh"' for header in sorted(headers))}
namespace qft::QFT_ISA {{
struct {code} : Code<{kind}> {{}};
static Kernels some() {{
  Kernels table = {{}};
{newline.join(f"  table.{field} = {kernel};" for field, kernel in fields.items())}
  return table;
}}
static const Kernels kernels = some();
}}  // namespace qft::QFT_ISA
extern "C" __attribute__((visibility("default"))) const qft::Kernels* qft_kernels() {{
  return &qft::QFT_ISA::kernels;
}}
"""


FOLDER = tempfile.TemporaryDirectory(prefix="qft-simt-")  # of sources and objects, gone with the process


class Library:
    """The kernels of one code, or some verbs of them, compiled from the sources under `csrc`.

    Raises:
        RuntimeError: the compiler refuses them; its own text.
    """

    def __init__(self, code: str, verbs: tuple[str, ...] | None = None, csrc: Path = CSRC, jobs: int = 2) -> None:
        folder = Path(FOLDER.name)
        source = Path(tempfile.mkdtemp(dir=folder)) / f"{code}.cpp"
        text = _source(code, verbs) if verbs else emit_loadable(code, "cuda")
        source.write_text(text.replace("qft_kernels()", "plain_kernels()"))  # verbs.cpp puts its own checks before them
        self._emulator = simt.build(
            [source, VERBS], folder, include=[csrc], define={"QFT_ISA": "emulated"}, flags=["-Wextra"], jobs=jobs
        )
        self._functions = self._emulator.functions
        for verb in ARGUMENTS:
            getattr(self._functions, f"run_{verb}").restype = c_char_p
        for verb in WORKSPACES:
            getattr(self._functions, f"{verb}_workspace").restype = c_int64
        self._compare_structs()

    def _compare_structs(self) -> None:
        mine = [ctypes.sizeof(struct) for struct in ARGUMENTS.values()]
        theirs = (c_int64 * len(mine))()
        self._functions.struct_sizes(theirs)
        assert mine == list(theirs), f"the structs of {__name__} and of launch.h differ: {mine}, {list(theirs)} bytes"

    @property
    def path(self) -> Path:
        """A library of kernels as `qft.native.load` takes them; their instruction set is called `emulated`."""
        return self._emulator.path

    def blocks(self) -> int:
        """Blocks that the emulator has run."""
        return self._emulator.stats.blocks

    def use(self, schedule: Schedule) -> None:
        self._emulator.configure(**schedule)

    def workspace(self, verb: str, *sizes: int) -> Tensor:
        """Scratch of just the size that the verb asks for under the schedule in use."""
        return torch.full((getattr(self._functions, f"{verb}_workspace")(*map(c_int64, sizes)),), torch.nan)

    def run(self, verb: str, **fields: Any) -> None:
        """Run a verb under the schedule in use.

        Raises:
            KernelError: the emulator's message.
        """
        if error := getattr(self._functions, f"run_{verb}")(byref(ARGUMENTS[verb](place=_Place(), **fields))):
            raise KernelError(error.decode())


_libraries: dict[tuple[str, tuple[str, ...] | None], Library] = {}


def library(code: str, verbs: tuple[str, ...] | None = None, jobs: int = 2) -> Library:
    """The library of a code, of all verbs or some, built on first use."""
    if (code, verbs) not in _libraries:
        _libraries[code, verbs] = Library(code, verbs, jobs=jobs)
    return _libraries[code, verbs]


def build(codes: Iterable[str], parts: Iterable[tuple[str, ...]] = (ELEMENTWISE, PRODUCTS)) -> None:
    """Build the libraries that the functions below take for these codes, two files at a time."""
    wanted = [(code, verbs) for verbs in parts for code in sorted(set(codes))]
    for first in wanted[:1]:
        library(*first)  # the emulator itself is compiled once, with the first
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: library(*part, jobs=1), wanted))


@dataclass(frozen=True)
class Mutant:
    """A verb's kernel with one mistake: `old` of `file`, a path below csrc/qft/cuda, replaced by `new`."""

    name: str
    verb: str
    code: str
    file: str
    old: str
    new: str

    def build(self, folder: Path) -> Library:
        """Compile it from a changed copy of the sources, made in `folder`."""
        csrc = folder / self.name.replace(" ", "-")
        shutil.copytree(CSRC, csrc)
        path = csrc / "qft" / "cuda" / self.file
        text = path.read_text()
        assert text.count(self.old) == 1, f"{self.file} holds {self.old!r} {text.count(self.old)} times"
        path.write_text(text.replace(self.old, self.new))
        return Library(self.code, (self.verb,), csrc, jobs=1)


# ------------------------------------------------------------------------------------------------------------ verbs


def _levels(fmt: Format) -> Tensor:
    """fp32 `[16]`; integer kernels read none."""
    levels = fmt.levels[:16]
    return torch.tensor(levels + (0.0,) * (16 - len(levels)), dtype=torch.float32)


def _address(tensor: Tensor | None, before: int = 0) -> int | None:
    """Of a contiguous tensor, less `before` elements."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr() - before * tensor.element_size()


class _Packed:
    """A weight and what keeps its arrays alive. It may pretend to have `rows_before` more rows, which no kernel is let
    read: its arrays then begin as far below what is theirs."""

    def __init__(self, q: QuantTensor, rows_before: int = 0) -> None:
        out, in_features = q.shape
        fmt, groups = q.format, q.format.groups(in_features)
        assert rows_before * groups % DQ_BLOCK == 0
        self.arrays = (q, _levels(fmt), dynamic_map().contiguous())
        self.weight = _Weight(
            codes=_address(q.weight, rows_before * q.weight.shape[1]),
            scales=_address(q.weight_scales, rows_before * groups),
            zeros=_address(q.weight_zeros, rows_before * groups),
            absmax=_address(q.weight_scales_absmax, rows_before * groups // DQ_BLOCK),
            offset=_address(q.weight_scales_offset),
            dynamic_map=_address(self.arrays[2]) if fmt.scale == "dq" else None,
            levels=_address(self.arrays[1]),
            out=rows_before + out,
            in_=in_features,
            row_bytes=q.weight.shape[1],
            group=fmt.group_size(in_features),
            groups=groups,
            scale_kind=SCALES[fmt.scale],
            zero_kind=SCALES[ZERO_DTYPE[fmt.scale]],
        )


def _kernels(code: str, verbs: tuple[str, ...], kernels: Library | None, schedule: Schedule) -> Library:
    kernels = kernels or library(code, verbs)
    kernels.use(schedule)
    return kernels


def quantize(
    weight: Tensor,
    fmt: Format,
    schedule: Schedule = FIRST,
    *,
    search: bool = False,
    importance: Tensor | None = None,
    kernels: Library | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """As `qft.native.quantize`, but the last is the flat index of the first weight that is not finite, or 2^63 - 1."""
    out, in_features = weight.shape
    groups, levels = fmt.groups(in_features), _levels(fmt)
    factors = torch.tensor(search_factors(fmt)) if search else None
    codes = torch.full((out, fmt.row_bytes(in_features)), 0xA5, dtype=torch.uint8)
    scales = torch.full((out, groups), torch.nan, dtype=TORCH_DTYPE["f32" if fmt.scale == "dq" else fmt.scale])
    zeros = torch.full((out, groups), torch.nan, dtype=TORCH_DTYPE[ZERO_DTYPE[fmt.scale]]) if fmt.zero else None
    bad = torch.tensor([-1])
    _kernels(code_of(fmt), ELEMENTWISE, kernels, schedule).run(
        "quantize",
        weight=_address(weight),
        out=out,
        in_=in_features,
        row_bytes=codes.shape[1],
        group=fmt.group_size(in_features),
        groups=groups,
        dtype=DTYPES[weight.dtype],
        zero=fmt.zero,
        scale_kind=SCALES[fmt.scale],
        zero_kind=SCALES[ZERO_DTYPE[fmt.scale]],
        levels=_address(levels),
        count=min(len(fmt.levels), 16),
        factors=_address(factors),
        factor_count=0 if factors is None else len(factors),
        importance=_address(importance),
        codes=_address(codes),
        scales=_address(scales),
        zeros=_address(zeros),
        bad=_address(bad),
    )
    return codes, scales, zeros, int(bad)


def dequantize(
    q: QuantTensor,
    dtype: torch.dtype = torch.float32,
    rectangle: tuple[tuple[int, int], tuple[int, int]] | None = None,
    schedule: Schedule = FIRST,
    *,
    out: Tensor | None = None,
    rows_before: int = 0,
    kernels: Library | None = None,
) -> Tensor:
    """Rows and columns `rectangle` of W, dense; the whole where None. `out` may be rows of a wider matrix."""
    rows, columns = rectangle or ((0, q.shape[0]), (0, q.shape[1]))
    packed = _Packed(q, rows_before)
    if out is None:
        out = torch.full((rows[1] - rows[0], columns[1] - columns[0]), torch.nan, dtype=dtype)
    _kernels(code_of(q.format), ELEMENTWISE, kernels, schedule).run(
        "dequantize",
        weight=packed.weight,
        row0=rows_before + rows[0],
        row1=rows_before + rows[1],
        col0=columns[0],
        col1=columns[1],
        out=out.data_ptr(),
        stride=out.stride(0),
        dtype=DTYPES[out.dtype],
    )
    return out


def matmul(
    x: Tensor,
    q: QuantTensor,
    schedule: Schedule = FIRST,
    *,
    pair_table_rows: int = PAIR_TABLE_ROWS,
    kernels: Library | None = None,
) -> Tensor:
    """y = x Wt, `[rows, out]` in x's dtype, for x `[rows, in]`."""
    packed, used = _Packed(q), _kernels(code_of(q.format), PRODUCTS, kernels, schedule)
    workspace = used.workspace("matmul", *q.shape, x.shape[0])
    y = torch.full((x.shape[0], q.shape[0]), torch.nan, dtype=x.dtype)
    used.run(
        "matmul",
        weight=packed.weight,
        x=_address(x),
        y=_address(y),
        rows=x.shape[0],
        dtype=DTYPES[x.dtype],
        workspace=_address(workspace),
        pair_table_rows=pair_table_rows,
    )
    return y


def scale_grad(
    dw: Tensor,
    q: QuantTensor,
    schedule: Schedule = FIRST,
    *,
    rows: tuple[int, int] | None = None,
    rows_before: int = 0,
    kernels: Library | None = None,
) -> Tensor:
    """fp32 `[rows, groups]`: the sum of dW x level over each group, for dW `[rows, in]` of rows `rows` of W."""
    first, last = rows or (0, q.shape[0])
    packed = _Packed(q, rows_before)
    ds = torch.full((last - first, q.format.groups(q.shape[1])), torch.nan)
    _kernels(code_of(q.format), ELEMENTWISE, kernels, schedule).run(
        "scale_grad",
        weight=packed.weight,
        row0=rows_before + first,
        row1=rows_before + last,
        dw=_address(dw),
        dtype=DTYPES[dw.dtype],
        ds=_address(ds),
    )
    return ds


def zero_scale_grad(
    dy: Tensor,
    x: Tensor,
    q: QuantTensor,
    ds: Tensor,
    schedule: Schedule = FIRST,
    *,
    kernels: Library | None = None,
) -> Tensor:
    """A copy of ds fp32 `[out]` in which per-channel scales of 0 have got their gradients, for dy `[rows, out]` and x
    `[rows, in]`."""
    packed, ds = _Packed(q), ds.clone()
    _kernels(code_of(q.format), ELEMENTWISE, kernels, schedule).run(
        "zero_scale_grad",
        weight=packed.weight,
        dy=_address(dy),
        x=_address(x),
        rows=x.shape[0],
        dtype=DTYPES[x.dtype],
        ds=_address(ds),
    )
    return ds


def dot_columns(a: Tensor, b: Tensor, schedule: Schedule = FIRST, *, kernels: Library | None = None) -> Tensor:
    """fp32 `[columns]`: the sum over rows of a x b, both `[rows, columns]`."""
    used = _kernels("int4", ELEMENTWISE, kernels, schedule)
    workspace, total = used.workspace("dot_columns", *a.shape), torch.full((a.shape[1],), torch.nan)
    used.run(
        "dot_columns",
        a=_address(a),
        b=_address(b),
        rows=a.shape[0],
        columns=a.shape[1],
        dtype=DTYPES[a.dtype],
        total=_address(total),
        workspace=_address(workspace),
    )
    return total
