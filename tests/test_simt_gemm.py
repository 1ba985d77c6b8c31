"""A cp.async / ldmatrix / mma.sync matrix product in the emulator: right, and every planted bug caught."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from simt.build import SCHEDULES, build
from simt.launch import aligned, launch
from simt.variants import WRONG, Bug, assert_right_in_every_schedule, verdict_on, write_variants

pytestmark = pytest.mark.emulator

TESTS = Path(__file__).parent
SAMPLES = TESTS / "simt" / "samples"
CSRC = TESTS.parent / "csrc"

WAIT = "    ptx::cp_wait<stages - 2>();\n"
MEET = "    __syncthreads();"
LOAD = "    load(step + stages - 1);\n"
COMMIT = "    ptx::cp_commit();\n"
INSIDE = "row < rows && column < columns"
READ_STAGE = "int at = (step + 1) % stages * kTileBytes;\n      "
A_ROW = "a_tile + swizzled<64>(row, chunk)"
BUGS = [
    Bug("no __syncthreads in the loop", "uninitialised|race", MEET, ""),
    Bug("__syncwarp in place of __syncthreads", "uninitialised|race", MEET, "__syncwarp();"),
    Bug("one warp skips the barrier", "uninitialised|race", MEET, "if (warp != 3) __syncthreads();"),
    Bug("no cp_wait", "in flight: 16-byte read", WAIT, ""),
    Bug("cp_wait one group too lax", "in flight: 16-byte read", "cp_wait<stages - 2>", "cp_wait<stages - 1>"),
    Bug("cp_wait after the barrier", "in flight: 16-byte read", WAIT, "", ((LOAD, WAIT + LOAD),)),
    Bug("load before the barrier", "race: 16-byte write", LOAD, "", ((MEET, LOAD + MEET),)),
    Bug(
        "load into the stage being read",
        "in flight: 16-byte read|uninitialised",
        "int at = step % stages * kTileBytes;\n      ",
        READ_STAGE,
    ),
    Bug("no commit", "in flight: 16-byte read", COMMIT, ""),
    Bug(
        "commit only where there is something to load",
        "in flight: 16-byte read",
        "    }\n" + COMMIT,
        COMMIT + "    }\n",
    ),
    Bug("loads past the last step", "returns before its cp.async has landed", "if (step < steps) {", "{"),
    Bug(
        "one stage too few filled before the loop",
        "in flight: 16-byte read",
        "step < stages - 1; step++) load",
        "step < stages - 2; step++) load",
    ),
    Bug("no row mask on loads", "out of bounds|uninitialised|race", INSIDE, "column < columns"),
    Bug("no column mask on loads", "out of bounds: 16-byte read", INSIDE, "row < rows"),
    Bug(
        "copies nothing instead of zeros",
        "uninitialised",
        "    ptx::cp_async16(tile",
        "    if (inside) ptx::cp_async16(tile",
    ),
    Bug("no mask on the result", "out of bounds: 4-byte write", "at_row < m && at_column < n", "at_column < n"),
    Bug("ldmatrix with another swizzle", WRONG, A_ROW, "a_tile + row * 64 + (chunk ^ row % 4) * 16"),
    Bug("ldmatrix off by half a row", "misaligned", A_ROW, "8 + " + A_ROW),
    Bug("ldmatrix without .trans", WRONG, "ldmatrix_x4<true>", "ldmatrix_x4<false>", flag=True),
    Bug(
        "tiles of B over the last of A",
        "in flight|race|uninitialised",
        "a_tiles + stages * kTileBytes;",
        "a_tiles + (stages - 1) * kTileBytes;",
    ),
    Bug("fragments of B exchanged", WRONG, "b[j + half][0] = pair[2 * half];", "b[j + half][0] = pair[half];"),
    Bug("sums start anywhere", WRONG, "float sum[2][4][4] = {};", "float sum[2][4][4];"),
    Bug("half a warp multiplies", "deadlock", "ptx::mma_m16n8k16", "if (lane < 16) ptx::mma_m16n8k16"),
]
# m, n, k: one tile exactly; one row; tails in every dimension; more steps than stages, and fewer
SHAPES = [(64, 64, 64), (1, 1, 8), (100, 77, 40), (65, 72, 168), (130, 8, 96), (3, 200, 32)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    variants = tmp_path_factory.mktemp("gemm")
    write_variants(SAMPLES / "gemm.cuh", "ptx_more.cuh", BUGS, variants)
    folder = tmp_path_factory.getbasetemp() / "simt"
    return build(SAMPLES / "run_gemm.cpp", folder, include=[variants, SAMPLES, CSRC])


class Problem:
    """c[m][n] = a[m][k] B with B given by columns [n][k] or by rows [k][n], and what c should be."""

    def __init__(self, m, n, k, b_by_k):
        torch.manual_seed(m + n + k)
        a, b = torch.randn(m, k).bfloat16(), torch.randn(*((k, n) if b_by_k else (n, k))).bfloat16()
        wide_b = b.double() if b_by_k else b.double().T
        self.sizes = m, n, k
        self.inputs = [aligned(x.view(torch.int16).numpy()) for x in (a, b)]
        self.expected = (a.double() @ wide_b).numpy()
        self.tolerance = k * 2.0**-24 * (a.double().abs() @ wide_b.abs()).numpy()  # k roundings to fp32

    def run(self, library, variant):
        """The result and the emulator's complaint."""
        result = aligned(np.full(self.sizes[:2], np.nan, np.float32))
        return result, launch(library, "run_gemm", variant, *self.sizes, *self.inputs, result)

    def is_right(self, result):
        return bool(np.all(np.abs(result - self.expected) <= self.tolerance))


@pytest.mark.parametrize("b_by_k", [False, True], ids=["b by columns", "b by rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemm_is_right_and_the_same_in_every_schedule(library, shape, b_by_k):
    m, n, k = shape
    problem = Problem(m, -(-n // 8) * 8 if b_by_k else n, k, b_by_k)  # rows of B start at multiples of 16 bytes
    assert_right_in_every_schedule(library, problem, int(b_by_k))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(library, bug, schedule):
    problem = Problem(100, 72, 168, bug.flag)
    verdict = verdict_on(library, problem, 2 + BUGS.index(bug), schedule)
    assert re.search(bug.verdict, verdict), verdict
