"""The emulator's twins of ptx.cuh against independent statements (CuTe's layouts, the PTX ISA's tables), and nvcc on
the instructions themselves."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from simt import cute
from simt.build import SCHEDULES, build
from simt.launch import aligned, launch

pytestmark = pytest.mark.emulator

TESTS = Path(__file__).parent
SAMPLES = TESTS / "simt" / "samples"
CSRC = TESTS.parent / "csrc"

# CUTLASS, mma_traits_sm80.hpp, SM80_16x8x16_F32BF16BF16F32_TN: (thread, value) -> m + 16 k, n + 8 k, m + 16 n
MMA_A = ((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))
MMA_B = ((4, 8), (2, 2)), ((16, 1), (8, 64))
MMA_C = ((4, 8), (2, 2)), ((32, 1), (16, 8))
# CUTLASS, copy_traits_sm75.hpp, SM75_U32x4_LDSM_N and SM75_U16x8_LDSM_T: (thread, bit) -> bit of the 32 rows
LDMATRIX = {
    False: ((32, (32, 4)), (32, (1, 1024))),
    True: (((4, 8), (16, 2, 4)), ((256, 16), (1, 128, 1024))),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(SAMPLES / "run_twins.cpp", tmp_path_factory.getbasetemp() / "simt", include=[CSRC, SAMPLES])


@pytest.fixture
def run(library):
    """Launch a kernel that has nothing to complain of."""
    library.configure()

    def go(name, *arguments):
        assert launch(library, name, *arguments) is None

    return go


def words(rng, *shape):
    return aligned(rng.integers(0, 1 << 32, shape, np.uint32))


def test_prmt_picks_bytes_and_replicates_signs(run):
    rng = np.random.default_rng(0)
    low, high, selectors, result = (words(rng, 256) for _ in range(4))
    run("run_prmt", low, high, selectors, result)
    # PTX ISA: {b, a} = {{b7, b6, b5, b4}, {b3, b2, b1, b0}}; a selection's top bit replicates the sign of its byte
    for a, b, selector, got in zip(low, high, selectors, result, strict=True):
        source = a.tobytes() + b.tobytes()
        nibbles = [int(selector) >> 4 * i & 15 for i in range(4)]
        expected = bytes((source[n & 7] >> 7) * 255 if n > 7 else source[n] for n in nibbles)
        assert got.tobytes() == expected, f"prmt({a:#x}, {b:#x}, {selector:#x}) = {got:#x}"


def test_lop3_is_its_table_for_every_table(run):
    result = np.empty(256, np.uint32)
    run("run_lop3", np.array([0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA], np.uint32), result)
    assert np.array_equal(result, np.arange(256, dtype=np.uint32) * 0x01010101)  # PTX ISA: that is what a table means

    triple = words(np.random.default_rng(1), 3)
    run("run_lop3", triple, result)
    a, b, c = triple
    for function in (lambda a, b, c: a & b | c, lambda a, b, c: a ^ b ^ c, lambda a, b, c: (a & ~b) | (~a & c)):
        assert result[function(0xF0, 0xCC, 0xAA) & 0xFF] == function(a, b, c)


def test_cp_async_fills_with_zeros_what_it_does_not_read(run):
    source = aligned(np.random.default_rng(3).integers(1, 256, (17, 16), np.uint8))
    result = aligned(source)
    run("run_zero_fill", source, result)
    read = np.arange(16) < np.arange(17)[:, None]  # lane t reads t bytes
    assert np.array_equal(result, np.where(read, source, 0))


def test_cp_async_lands_as_late_as_its_wait_allows(library):
    source, result = words(np.random.default_rng(4), 32, 2, 4), np.empty((32, 3, 2), np.uint32)
    library.configure(shadow=False, **SCHEDULES["ascending-late"])
    assert launch(library, "run_lateness", source, result) is None
    poison = np.uint32(0xFFFFFFFF)  # what shared memory holds when a block starts
    first, second = source[:, 0, 0], source[:, 1, 0]
    assert np.all(result[:, 0] == poison)
    assert np.array_equal(result[:, 1, 0], first)
    assert np.all(result[:, 1, 1] == poison)
    assert np.array_equal(result[:, 2], np.stack([first, second], 1))


def test_reading_a_copy_in_flight_is_reported(library):
    source, result = words(np.random.default_rng(5), 32, 2, 4), np.empty((32, 3, 2), np.uint32)
    library.configure()
    error = launch(library, "run_lateness", source, result)
    assert error is not None
    assert "in flight" in error
    assert "run_twins.cpp" in error


def fragments(layout, values, matrix):
    """[32, values]: the elements of the matrix that each thread holds; CuTe counts down its columns."""
    places = [[cute.offset(layout, thread + 32 * value) for value in range(values)] for thread in range(32)]
    return matrix.T.ravel()[np.array(places)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_mma_multiplies_the_fragments_cute_describes(run, dtype):
    torch.manual_seed(6)
    a, b = (torch.randn(rows, 16).to(dtype) for rows in (16, 8))
    c = np.random.default_rng(6).standard_normal((16, 8), np.float32)
    bits_a, bits_b = (x.view(torch.int16).numpy().view(np.uint16) for x in (a, b))
    held = fragments(MMA_C, 4, c)
    run(
        "run_mma",
        fragments(MMA_A, 8, bits_a).view(np.uint32),
        fragments(MMA_B, 4, bits_b).view(np.uint32),
        held,
        int(dtype is torch.float16),
        0,
    )
    expected = (a.double() @ b.double().T).numpy() + c
    tolerance = 2.0**-23 * np.abs(expected).max()  # one rounding to fp32
    np.testing.assert_allclose(held, fragments(MMA_C, 4, expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("meeting", "waiting"), [(1, "lanes ffff0000 have returned"), (2, "lanes ffff0000 wait in mma.sync.m16n8k16.bf16")]
)
def test_mma_in_divergent_code_is_reported(library, meeting, waiting):
    library.configure()
    a, b, c = np.zeros(128, np.uint32), np.zeros(64, np.uint32), np.zeros(128, np.float32)
    error = launch(library, "run_mma", a, b, c, 0, meeting)
    assert error is not None
    assert "lanes 0000ffff wait in mma.sync.m16n8k16.bf16 at" in error
    assert waiting in error


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_ldmatrix_hands_out_what_cute_describes(run, transposed):
    rows = words(np.random.default_rng(7), 32, 4)  # 8 rows of 16 bytes for each of 4 matrices
    result = np.empty((32, 4), np.uint32)
    run("run_ldmatrix", rows, result, int(transposed))
    source = np.unpackbits(rows.view(np.uint8), bitorder="little")
    got = np.unpackbits(result.view(np.uint8), bitorder="little").reshape(32, 128)
    places = [[cute.offset(LDMATRIX[transposed], t + 32 * bit) for bit in range(128)] for t in range(32)]
    assert np.array_equal(got, source[np.array(places)])


INSTANTIATIONS = {
    "ptx": (
        "qft/cuda/ptx.cuh",
        """
template <typename T>
__global__ void every_instruction(const uint4* x, float* y) {
  DYN_SMEM(shared, 16);
  namespace ptx = qft::ptx;
  const uint32_t at = ptx::smem_u32(shared) + 16 * threadIdx.x;
  ptx::cp_async16(at, x, threadIdx.x);
  ptx::cp_commit();
  ptx::cp_wait<0>();
  const uint4 v = x[1], w = *reinterpret_cast<const uint4*>(shared);
  const uint32_t a[4] = {ptx::prmt(v.x, w.x, v.y), ptx::lop3<0xEA>(v.y, w.y, w.x), v.z, v.w};
  const uint32_t b[2] = {w.z, w.w};
  float c[4] = {};
  ptx::mma_m16n8k16<T>(c, a, b);
  for (int i = 0; i < 4; i++) y[i] = c[i];
}
template __global__ void every_instruction<__nv_bfloat16>(const uint4*, float*);
template __global__ void every_instruction<__half>(const uint4*, float*);
""",
        ["sm_80", "sm_90a"],
    ),
    "gemm": (
        "gemm.cuh",
        """
template __global__ void gemm<3, false>(const __nv_bfloat16*, const __nv_bfloat16*, float*, int, int, int);
template __global__ void gemm<3, true>(const __nv_bfloat16*, const __nv_bfloat16*, float*, int, int, int);
""",
        ["sm_80", "sm_90a"],
    ),
    "hopper": (
        "hopper.cuh",
        """
template __global__ void dequantized_gemm<false>(const __grid_constant__ CUtensorMap, const uint8_t*, const uint16_t*,
                                                 float*, int, int, int);
template __global__ void dequantized_gemm<true>(const __grid_constant__ CUtensorMap, const uint8_t*, const uint16_t*,
                                                float*, int, int, int);
""",
        ["sm_90a"],
    ),
}


@pytest.mark.parametrize(
    ("instructions", "twins", "tests"),
    [
        (CSRC / "qft/cuda/ptx.cuh", "ptx_twin.h", "run_twins.cpp"),
        (SAMPLES / "ptx90.cuh", "hopper_twin.h", "run_hopper_twins.cpp"),
    ],
    ids=["ptx", "ptx90"],
)
def test_every_instruction_has_a_twin_and_every_twin_a_test(instructions, twins, tests):
    def functions(path):
        return set(re.findall(r"(?:__forceinline__|SIMT_REGISTERS) \w+ (\w+)\(", path.read_text()))

    names = functions(instructions)
    assert names == functions(TESTS / "simt" / twins)
    assert names <= set(re.findall(r"ptx::(\w+)", (SAMPLES / tests).read_text()))
    compiled = INSTANTIATIONS["ptx"][1] + (SAMPLES / "hopper.cuh").read_text()
    assert names <= set(re.findall(r"ptx::(\w+)", compiled))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")
@pytest.mark.parametrize(
    ("source", "arch"), [(name, arch) for name, (_, _, archs) in INSTANTIATIONS.items() for arch in archs]
)
def test_nvcc_compiles_the_instructions(tmp_path, source, arch):
    header, text, _ = INSTANTIATIONS[source]
    unit = tmp_path / f"{source}.cu"
    unit.write_text(f'#include "{header}"\n{text}')
    target = tmp_path / f"{source}.cubin"
    command = ["nvcc", "-std=c++17", f"-arch={arch}", "-Werror=all-warnings", f"-I{CSRC}", f"-I{SAMPLES}", "-cubin"]
    done = subprocess.run([*command, "-o", target, unit], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert target.stat().st_size > 0
