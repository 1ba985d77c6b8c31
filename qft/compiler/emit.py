"""Emit the C++ that instantiates the kernel templates for a code. Numbers only: the algorithms stay in csrc/.

Standard library only: CMake runs this before anything is installed.
"""

from __future__ import annotations

import hashlib
import struct

from ..format import CODEBOOKS, INTEGERS, Format

# Where kernels spell their vectors, straight-line code is not to be vectorized on top: GCC would compute the addresses
# of a tile's rows in vector registers, where each load waits for its own: a third of the time of a product of one row.
_VECTORS_AS_SPELLED = "-fno-tree-slp-vectorize"

_AVX512 = (
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mfma",
    "-mf16c",
    "-mbmi2",
    "-mprefer-vector-width=512",
    _VECTORS_AS_SPELLED,
)

# What each CPU instruction set's sources are compiled with; csrc/qft/cpu/isa holds a file of vectors of the same name.
CPU_FLAGS: dict[str, tuple[str, ...]] = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-mbmi2", _VECTORS_AS_SPELLED),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
}
# Contraction is off so that each product rounds where the reference rounds it; fused steps are spelled in the kernels.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-exceptions",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
)

# As above for nvcc; where the kernels go is named apart, by CUDA_TARGETS or for the one GPU at hand.
CUDA_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden")
OLDEST_CUDA = (12, 0)  # release of nvcc: the first that knows sm_90a
# Machine code for A100 and its kin, for Hopper, and PTX that drivers translate for whatever is newer.
CUDA_TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80")

# Instruction sets whose codebooks are all read at run time: a lookup takes as long whatever the table holds, and levels
# of the user's own need no compiler there. Of the others only the plainest has such kernels beside its compiled ones.
SHARED = ("avx512_bf16", "cuda")

GENERIC_BITS = (1, 2, 3, 4)  # widths of codebooks read at run time
GENERIC_CODES = tuple(f"levels{bits}" for bits in GENERIC_BITS)


def generic_code(fmt: Format) -> str:
    """Name of the kernels that run `fmt`'s codebook without having been compiled for it."""
    return f"levels{fmt.bits}"


def table_code(fmt: Format, isa: str) -> str:
    """Name of the kernels that run `fmt` on an instruction set; on some, all codebooks of a width share theirs."""
    return generic_code(fmt) if isa in SHARED and not fmt.is_integer else fmt.code


def symbol(code: str) -> str:
    """A C++ identifier for a code: its name, or a hash of its levels."""
    return code if code.isidentifier() else "levels_" + hashlib.sha256(code.encode()).hexdigest()[:16]


def emit(code: str, isa: str) -> str:
    """C++ (for `isa` "cuda", CUDA) source of the kernels of one code: a name of `CODEBOOKS` or `INTEGERS`, levels in
    brackets, or `levelsN`."""
    name = symbol(code)
    verbs = ("qft/cuda/verbs.cuh",) if isa == "cuda" else ("qft/cpu/verbs.h", "qft/cpu/formats.h")
    if isa == "cuda":
        kind = "integer" if code in INTEGERS else "codebook"
        body = f"struct {name} : Code<Levels::{kind}, {INTEGERS.get(code) or code.removeprefix('levels')}> {{"
    elif code in INTEGERS:
        body = f"struct {name} : Integer<{INTEGERS[code]}> {{"
    elif code in GENERIC_CODES:
        body = f"struct {name} : AnyCodebook<{code.removeprefix('levels')}> {{"
    else:
        fmt = Format(code, 64)
        values = ", ".join(_hex_float(level) for level in fmt.levels)
        body = (
            f"struct {name} : CompiledCodebook<{name}> {{\n"
            f"  static constexpr int bits = {fmt.bits}, count = {len(fmt.levels)};\n"
            f"  static constexpr float values[count] = {{{values}}};"
        )
    includes = "\n".join(f'#include "{header}"' for header in verbs)
    return f"""// Emitted by qft.compiler for {code}; edit csrc/qft, not this.
{includes}

namespace qft::QFT_ISA {{
{body}
  static constexpr const char* name = "{code}";
}};
extern const Kernels {name}_kernels;
const Kernels {name}_kernels = kernels_of<{name}>(QFT_STRING(QFT_ISA));
}}  // namespace qft::QFT_ISA
"""


def emit_loadable(code: str, isa: str) -> str:
    """`emit`, with the one exported function by which a shared library hands over its kernels."""
    return emit(code, isa) + (
        f'extern "C" __attribute__((visibility("default"))) const qft::Kernels* qft_kernels() {{\n'
        f"  return &qft::QFT_ISA::{symbol(code)}_kernels;\n}}\n"
    )


def emit_registry(tables: list[tuple[str, str]]) -> str:
    """C++ source of the list of the kernel tables `(code, isa)` that were built in."""
    declared = "\n".join(
        f"namespace qft::{isa} {{ extern const Kernels {symbol(code)}_kernels; }}" for code, isa in tables
    )
    listed = ",\n".join(f"  &qft::{isa}::{symbol(code)}_kernels" for code, isa in tables)
    return f"""// Emitted by qft.compiler.
#include "qft/launch.h"

{declared}

namespace qft {{
extern const Kernels* const kBuiltKernels[];
extern const int kBuiltKernelCount;
const Kernels* const kBuiltKernels[] = {{
{listed}
}};
const int kBuiltKernelCount = {len(tables)};
}}  // namespace qft
"""


def built_codes(isa: str) -> list[str]:
    """The codes compiled ahead of time for an instruction set."""
    if isa in SHARED:
        return [*GENERIC_CODES, *INTEGERS]
    return [*CODEBOOKS, *INTEGERS, *(GENERIC_CODES if isa == "scalar" else ())]


def _hex_float(value: float) -> str:
    exact = struct.unpack("<f", struct.pack("<f", value))[0].hex()
    return f"{exact}f"
