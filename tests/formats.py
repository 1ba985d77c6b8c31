"""The lists the contracts run over: a row added here is tested everywhere."""

import pytest
import torch
from torch import Tensor

from qft import kernels, native
from qft.compiler.emit import CPU_FLAGS
from qft.format import CODEBOOKS, INTEGERS, Format

# Codebooks of one's own: random distinct levels, so that no two codes can be exchanged unseen.
ELEVEN = "[-0.93 -0.71 -0.52 -0.304 -0.11 0.02 0.13 0.31 0.55 0.77 1]"
FOUR = "[-1 -0.25 0.3 1]"
TWO = "[-0.4 1]"

FORMATS = tuple(
    map(
        Format.parse,
        (
            "nf4 g64 f32",
            "nf4 g64 dq",
            "nf4 g4096 f16",
            "nf3 g32 f16",
            "nf3 channel bf16",
            "nf2 g64 bf16",
            "nf2 g128 dq",
            "fp4 g128 f32",
            "lm4 g64 dq",
            "lm3 g128 f32",
            "lm2 g64 f16",
            "int8 channel f32",
            "int8 g32 f16 zero",
            "int4 g128 f16",
            "int4 g64 dq",
            "int4 g64 f32 zero",
            "int3 g64 f32",
            "int3 g32 f16 zero",
            "int3 channel f32 zero",
            "int2 g512 bf16",
            "int2 g32 dq zero",
            f"{ELEVEN} g64 f32",
            f"{FOUR} g32 dq",
            f"{TWO} g32 f16",
        ),
    )
)

# (out_features, in_features): one weight, one row, primes, a group's edge, rows that end inside a group or a byte.
SHAPES = ((1, 1), (1, 64), (7, 129), (33, 100), (13, 31), (3, 4128), (64, 256))
ODD = (33, 100)
REAL = (4096, 1024)  # one real layer
ABOVE = 129  # rows that take panel products, and 128 row kernels, where a test asks for `panels_above`

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 7, 129)

KERNELS = tuple(row.name for row in kernels.TABLE if row.name != "cuda")  # those a CPU runs
OWN = (*CPU_FLAGS, "generic")  # the rows that are qft's own code from end to end

# Largest ||out - exact|| / ||exact||, with the exact product in float64 over the same weights.
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def has_own_kernels(fmt: Format) -> bool:
    """Whether the format's code is compiled ahead of time."""
    return fmt.code in CODEBOOKS or fmt.code in INTEGERS


def cases(verb: str, formats: tuple[Format, ...] = FORMATS, rows: tuple[str, ...] = KERNELS) -> list:
    """Parameters (fmt, kernel): every row of the table that takes the verb."""
    return [
        pytest.param(fmt, row.name, id=f"{fmt}-{row.name}")
        for fmt in formats
        for row in kernels.TABLE
        if verb in row.verbs and row.name in rows and not (row.name == "generic" and has_own_kernels(fmt))
    ]


def need(kernel: str) -> None:
    """Skip where the machine lacks the instruction set a kernel is written for."""
    if kernel in CPU_FLAGS and kernel not in native.instruction_sets():
        pytest.skip(f"this machine has no {kernel}")


def sample(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights whose rows differ in size, with a row of zeros and a row whose extreme comes with both signs."""
    weight = torch.randn(shape) * 10 ** torch.randn(shape[0], 1).clamp(-2, 2)
    if shape[0] > 2:
        weight[1] = 0
        weight[2, ::2], weight[2, 1::2] = 0.75, -0.75
    return weight.to(dtype)


def error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact||."""
    return float((out.double() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))
