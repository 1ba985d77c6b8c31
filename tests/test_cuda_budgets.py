"""Registers, spills and instructions of the compiled CUDA kernels, held to tests/budgets.toml. No GPU is needed."""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from qft.compiler.emit import built_codes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import cuda_resources  # noqa: E402

BUDGETS = tomllib.loads((ROOT / "tests" / "budgets.toml").read_text())
TARGETS = ("sm_80", "sm_90a")

pytestmark = pytest.mark.budget


@pytest.fixture(scope="module")
def build():
    """The newest CUDA build that was made for both targets."""
    if shutil.which("nvcc") is None:
        pytest.skip("NOT CHECKED: nvcc is not on the PATH, so no CUDA kernel was compiled")
    folder = cuda_resources.build_folder()
    if {kernel.architecture for kernel in cuda_resources.kernels(folder)} != set(TARGETS):
        pytest.skip("NOT CHECKED: qft was built for the GPU of this machine alone")
    return folder


@pytest.fixture(scope="module")
def kernels(build):
    return cuda_resources.kernels(build)


def over(kernels, figure, limit):
    """Kernels whose figure exceeds what `limit` of them allows, in words."""
    return {
        f"{kernel.name} {kernel.architecture}: {getattr(kernel, figure)}"
        for kernel in kernels
        if getattr(kernel, figure) > limit(kernel)
    }


def test_every_code_was_compiled_for_every_target(build, kernels):
    assert {log.name for log in build.glob("*.log")} == {f"{code}.cu.log" for code in built_codes("cuda")}
    families = {(kernel.family, kernel.architecture) for kernel in kernels}
    assert {(name, target) for name in BUDGETS["registers"] for target in TARGETS} <= families


def test_no_kernel_spills(kernels):
    assert not over(kernels, "spills", lambda kernel: 0)
    assert not over(kernels, "stack", lambda kernel: 0)


def test_no_kernel_takes_more_registers_than_its_budget(kernels):
    assert not over(kernels, "registers", lambda kernel: BUDGETS["registers"].get(kernel.family, 64))


def test_the_main_loop_stays_within_its_instructions(build):
    if cuda_resources.disassembler() is None:
        pytest.skip("NOT CHECKED: nvdisasm was not found; install nvidia-cuda-nvdisasm")
    counted = {}
    for key in BUDGETS["instructions_per_code"]:
        code, decoder = key.split(": ")
        loops = cuda_resources.main_loops(build, "sm_90a", f"{code}.cu")
        (counted[key],) = (
            loop.per_code(tiles=1)
            for name, loop in loops.items()
            if re.fullmatch(rf"gemm_small<{re.escape(decoder)}, \d, __nv_bfloat16, 1, false>", name)
        )
    assert {
        key: round(count, 2) for key, count in counted.items() if count > BUDGETS["instructions_per_code"][key]
    } == {}


LOG = """ptxas info    : Compiling entry function '_Z4copyIfEvPKT_PS0_' for 'sm_90a'
ptxas info    : Function properties for _Z4copyIfEvPKT_PS0_
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem
ptxas info    : Compiling entry function '_ZN3qft4cuda3addEv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 9 registers, 360 bytes cmem[0]
"""


def test_what_ptxas_says_is_read(tmp_path):
    (tmp_path / "a.log").write_text(LOG)
    assert cuda_resources.kernels(tmp_path) == [
        cuda_resources.Kernel("copy<float>", "sm_90a", 40, 8, 16, 256),
        cuda_resources.Kernel("add", "sm_80", 9, 0, 0, 0),
    ]
    assert [kernel.family for kernel in cuda_resources.kernels(tmp_path)] == ["copy", "add"]


SASS = """
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   LDS R3, [R4] ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, RZ ;
.L_x_2:
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/              @P0  BRA `(.L_x_2) ;
        /*0050*/                   NOP ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
        /*0080*/              @P2  BRA `(.L_x_3) ;
.L_x_3:
        /*0090*/                   EXIT ;
"""


def test_the_loop_with_the_most_products_is_counted():
    loop = cuda_resources.main_loop(SASS.splitlines())
    assert loop == cuda_resources.Loop(instructions=6, products=3)
    assert loop.per_code(tiles=1) == 6 / 24
    assert cuda_resources.main_loop(["        /*0000*/                   EXIT ;"]) is None
