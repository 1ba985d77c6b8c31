"""The emulator finds bugs: every barrier, fence, mask, wait and guard of the sample kernels is broken in turn.

All the broken copies are compiled in one go, each in a namespace of its own with the sample's own line numbers, and
every one must be caught under each schedule of the test-suite alone: by a report, or as a wrong result.
"""

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from simt.build import SCHEDULES, Library, build

pytestmark = pytest.mark.emulator
SAMPLES = Path(__file__).parent / "simt" / "samples"


@dataclass(frozen=True)
class Sample:
    """A kernel of samples/: the buffers it is given, and what it must make of them."""

    size: int
    buffers: Callable[[int], list[np.ndarray]]
    expected: Callable[[list[np.ndarray], int], dict[int, np.ndarray]]  # buffer index -> contents


def numbers(*shape: int) -> np.ndarray:
    """Small multiples of 1/16: their sums are exact in any order."""
    return (np.random.default_rng(1).integers(-100, 100, shape) / 16).astype(np.float32)


def unset(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.full(shape, 0x77, dtype)


def row_mean_expected(buffers: list[np.ndarray], columns: int) -> dict[int, np.ndarray]:
    x = buffers[0].astype(np.float64)
    mean = x.mean(1)
    return {1: mean, 2: x - mean[:, None], 3: np.array([(x > 0).sum()])}


def pipeline_expected(buffers: list[np.ndarray], n: int) -> dict[int, np.ndarray]:
    tiles = np.zeros((-(-n // 64), 64))
    tiles.reshape(-1)[:n] = buffers[0]
    return {1: tiles.sum(0)[::-1]}


def handover_expected(buffers: list[np.ndarray], rounds: int) -> dict[int, np.ndarray]:
    return {1: buffers[0].reshape(-1, 64)[:, ::-1].reshape(-1) + 1}


SAMPLE_KERNELS = {
    "row_mean": Sample(
        100,
        lambda n: [numbers(3, n).astype(np.float16), unset(3), unset(3, n, dtype=np.float16), np.zeros(1, np.int32)],
        row_mean_expected,
    ),
    "transpose": Sample(
        5,
        lambda n: [numbers(n, 8, 8), unset(n, 8, 8)],
        lambda buffers, n: {1: buffers[0].transpose(0, 2, 1)},
    ),
    "last_block": Sample(
        333,
        lambda n: [numbers(n), unset(5), np.zeros(1, np.uint32), unset(1)],
        lambda buffers, n: {2: np.zeros(1), 3: buffers[0].sum(dtype=np.float64, keepdims=True)},
    ),
    "pipeline": Sample(300, lambda n: [numbers(n), unset(64)], pipeline_expected),
    "histogram": Sample(
        4096,
        lambda n: [np.random.default_rng(1).integers(0, 256, n, np.uint8), np.zeros(256, np.uint32)],
        lambda buffers, n: {1: np.bincount(buffers[0], minlength=256)},
    ),
    "handover": Sample(
        3,
        lambda n: [np.arange(2 * n * 64, dtype=np.int32), unset(2 * n * 64, dtype=np.int32)],
        handover_expected,
    ),
}

# What is broken, the text (it occurs once), its replacement, and what the report says: "wrong" where no rule is broken
# but the result is.
BUGS = {
    "row_mean": [
        ("no barrier after the warps' sums", "}\n  __syncthreads();\n  if (warp", "}\n  if (warp", "race|uninit"),
        ("no barrier after the mean", "}\n  __syncthreads();\n  for", "}\n  for", "race|uninit"),
        ("a warp barrier where the block's is needed", "}\n  __syncthreads();\n  if (warp",
         "}\n  __syncwarp();\n  if (warp", "race|uninit"),
        ("a barrier for warp 0 only", "if (warp == 0) {", "if (warp == 0) { __syncthreads();",
         "different barriers|deadlock|not ordered|uninit|returned"),
        ("early return before a barrier", "__shared__ float row_mean;",
         "__shared__ float row_mean; if (threadIdx.x >= columns) return;", "returned|deadlock"),
        ("a shuffle in divergent code", "if (warp == 0) {\n    float total",
         "if (warp == 0 && lane < 16) {\n    float total", "deadlock"),
        ("a shuffle that reads a lane outside its mask", "__shfl_xor_sync(0xffffffffu, sum",
         "__shfl_xor_sync(lane < 16 ? 0xffffu : 0xffff0000u, sum", "not in the mask"),
        ("a mask without the caller", "__ballot_sync(0xffffffffu", "__ballot_sync(0xfffffffeu", "not in its own mask"),
        ("a vote in a loop that lanes leave apart", "i < padded;", "i < columns;", "deadlock"),
        ("a read past the row", "i < columns ? __half2float", "i < columns + 1 ? __half2float", "wrong|out of"),
        ("a write past the output", "for (int i = thread; i < columns; i += 32 * kWarps)\n    centred",
         "for (int i = thread; i < columns + 1; i += 32 * kWarps)\n    centred", "out of bounds|race between blocks"),
        ("static shared memory one too small", "float sums[kWarps];", "float sums[kWarps - 1];", "out of bounds"),
        ("lanes without a sum", "if (lane == 0) {\n    sums", "if (lane == 0 && warp) {\n    sums", "uninit"),
        ("lanes beyond the warps' sums", "lane < kWarps ? sums[lane] : 0.0f", "sums[lane]", "out of bounds"),
        ("an accumulator never set to 0", "float sum = 0;", "float sum;", "wrong"),
        ("two blocks write one row", "mean[blockIdx.x] =", "mean[blockIdx.x / 2] =", "race between blocks"),
        ("a row not fully written", "for (int i = thread; i < columns; i += 32 * kWarps)\n    centred",
         "for (int i = thread + 1; i < columns; i += 32 * kWarps)\n    centred", "not fully written"),
        ("a division by zero", "(columns + 31) / 32 * 32", "(columns + 31) / (columns - 100) * 32", "division"),
    ],
    "transpose": [
        ("no warp barrier after the store", "= pair;\n    __syncwarp();", "= pair;", "race|uninit"),
        ("no warp barrier before reuse", "}\n    __syncwarp();", "}", "race"),
        ("a warp barrier for half the lanes", "= pair;\n    __syncwarp();",
         "= pair;\n    __syncwarp(lane < 16 ? 0xffffu : 0xffff0000u);", "race|uninit"),
        ("dynamic shared memory half as large", "1, 64, 2 * 256, in", "1, 64, 256, in", "out of bounds"),
        ("a slice that starts too late", "+ warp * 64;", "+ warp * 64 + 2;", "out of bounds"),
        ("a write to the input", "out[t * 64 + i] = tile[i % 8 * 8 + i / 8];",
         "const_cast<float*>(in)[t * 64 + i] = tile[i % 8 * 8 + i / 8];", "input buffer in"),
        ("a misaligned vector load", "(in + t * 64)[lane]", "(in + t * 64 + (lane < 31))[lane]", "misaligned"),
        ("a misaligned vector store", "tile + 2 * lane)", "tile + 2 * lane + 1)", "misaligned"),
        ("a slice of odd length", "+ warp * 64;", "+ warp * 61;", "misaligned"),
        ("the last tile is left out", "t < tiles;", "t < tiles - 1;", "not fully written"),
        ("a wrong index", "tile[i % 8 * 8 + i / 8]", "tile[i % 8 * 8 + i / 16]", "wrong"),
    ],
    "last_block": [
        ("no barrier after the vote", "__syncthreads();", "", "race|uninit|bool"),
        ("no fence before the count", "    __threadfence();\n", "", "race between blocks"),
        ("a fence of the block only", "__threadfence();", "__threadfence_block();", "race between blocks"),
        ("the fence before the write", "parts[blockIdx.x] = part;\n    __threadfence();",
         "__threadfence();\n    parts[blockIdx.x] = part;", "race between blocks"),
        ("a count that is no atomic", "atomicAdd(arrived, 1u)", "(*arrived)++", "race between blocks"),
        ("every block adds up", "if (!last) return;", "", "race between blocks|uninit"),
        ("the first block adds up", "== gridDim.x - 1;", "== 0;", "race between blocks|uninit"),
        ("a shuffle for the lanes with work", "for (int distance = 16; distance; distance /= 2) total +=",
         "for (int distance = 16; distance && threadIdx.x < gridDim.x; distance /= 2) total +=", "deadlock"),
        ("an output that is read first", "*sum = total;", "*sum += total;", "uninit"),
    ],
    "pipeline": [
        ("no barrier in the ring", "    __syncthreads();\n", "", "race|in flight|uninit"),
        ("the wait is one group short", "wait<kStages - 2>();", "wait<kStages - 1>();", "in flight"),
        ("no wait in the loop", "wait<kStages - 2>();", "", "in flight"),
        ("copies still in flight at the end", "tile < tiles; tile++", "tile < tiles - 1; tile++", "in flight"),
        ("no commit", "    commit();\n", "", "in flight"),
        ("the stage in use is overwritten", "load(tile + kStages - 1);", "load(tile + kStages);",
         "race|in flight|uninit"),
        ("the copy runs ahead of the barrier", "    __syncthreads();\n    load(tile + kStages - 1);",
         "    load(tile + kStages - 1);\n    __syncthreads();", "race|in flight"),
        ("no zero fill", "at < n ? 16 : 0", "16", "wrong"),
        ("the source runs past the end", "x + min(at, n - 4), at < n ? 16 : 0", "x + at, 16", "out of bounds"),
        ("a misaligned source", "x + min(at, n - 4)", "x + 1", "misaligned"),
        ("a misaligned destination", "[4 * thread], x", "[4 * thread + 2], x", "misaligned"),
    ],
    "histogram": [
        ("no barrier after clearing", "= 0;\n  __syncthreads();", "= 0;", "race|uninit"),
        ("no barrier after counting", "}\n  __syncthreads();", "}", "race"),
        ("a read past the input", "i < n / 16;", "i <= n / 16;", "out of bounds"),
        ("an input that is not registered", 'simt::add_buffer(bytes, n, "bytes");', "", "in no buffer"),
        ("half the counters cleared", "for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;",
         "for (int i = threadIdx.x; i < 128; i += blockDim.x) local[i] = 0;", "uninit"),
        ("counters not cleared at all", "for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;", "",
         "uninit"),
        ("counts that are no atomics", "atomicAdd(&local[word >> shift & 255], 1u)", "local[word >> shift & 255]++",
         "race"),
        ("totals that are no atomics", "atomicAdd(&counts[i], local[i])", "counts[i] += local[i]",
         "race between blocks"),
        ("a shift as wide as the word", "shift < 32;", "shift <= 32;", "shift of"),
    ],
    "handover": [
        ("consumers do not wait for full", "      bar_sync(1, 128);\n      to[", "      to[", "race|uninit|deadlock"),
        ("producers do not wait for empty", "if (r > 0) bar_sync(2, 128);", "", "race|deadlock"),
        ("a barrier that expects half the threads", "shared[lane] = from[r * 64 + lane];\n      bar_sync(1, 128);",
         "shared[lane] = from[r * 64 + lane];\n      bar_sync(1, 64);", "expect|race|deadlock"),
        ("the wrong barrier", "if (r + 1 < rounds) bar_sync(2, 128);", "if (r + 1 < rounds) bar_sync(3, 128);",
         "deadlock"),
        ("an index below the array", "shared[63 - lane]", "shared[62 - lane]", "out of bounds"),
        ("two blocks write one half", "out + blockIdx.x * rounds * 64", "out", "race between blocks"),
    ],
}  # fmt: skip
PLANTED = [(sample, *bug) for sample, bugs in BUGS.items() for bug in bugs]


def broken(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    return text.replace(old, new)


def translation_unit(variants: list[tuple[str, str]]) -> str:
    """One source with every (sample, text) in a namespace, and one exported function that runs the n-th."""
    lines = ["#include <cuda_runtime.h>", "#include <cuda_fp16.h>"]
    pairs = list(enumerate(variants))
    for i, (sample, text) in pairs:
        body = re.sub(r"#(pragma once|include.*)", "", text)
        lines += [f"namespace variant{i} {{", f'#line 1 "{sample}.cuh"', body, "}"]
    runs = "\n".join(f"if (variant == {i}) ok = variant{i}::run_{sample}(buffers, n);" for i, (sample, _) in pairs)
    return (
        "\n".join(lines)
        + f"""
SIMT_EXPORT const char* run_variant(int variant, void* const* buffers, int n) {{
  simt::clear_buffers();
  bool ok = false;
  {runs}
  if (!ok) return simt::error();
  for (int i = 0; i < 4; i++)
    if (simt::unwritten(buffers[i])) return "not fully written";
  return "";
}}
"""
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    """Variants 0..len(PLANTED)-1 are the bugs, those after them the samples as they are."""
    folder = tmp_path_factory.getbasetemp() / "simt"
    folder.mkdir(exist_ok=True)
    texts = {sample: (SAMPLES / f"{sample}.cuh").read_text() for sample in SAMPLE_KERNELS}
    variants = [(sample, broken(texts[sample], old, new)) for sample, _, old, new, _ in PLANTED]
    variants += texts.items()
    source = folder / "bugs.cpp"
    source.write_text(translation_unit(variants))
    built = build(source, folder, flags=["-w"])
    built.functions.run_variant.restype = ctypes.c_char_p
    return built


def verdict(library: Library, variant: int, sample: Sample) -> str:
    """The report, "wrong" if the result is, "" if all is well."""
    buffers = sample.buffers(sample.size)
    given = [buffer.copy() for buffer in buffers]
    pointers = (ctypes.c_void_p * 4)(*(buffer.ctypes.data for buffer in buffers))
    report = library.functions.run_variant(variant, pointers, sample.size).decode()
    if report:
        return report
    for index, contents in sample.expected(given, sample.size).items():
        # float16 outputs carry one rounding of 11 bits, fp32 ones the rounding of a quotient
        tolerance = 2**-10 if buffers[index].dtype == np.float16 else 2**-22
        if not np.allclose(buffers[index].astype(np.float64), contents, rtol=tolerance, atol=tolerance):
            return "wrong"
    return ""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", range(len(PLANTED)), ids=[f"{sample}: {name}" for sample, name, *_ in PLANTED])
def test_a_planted_bug_is_caught(library, bug, schedule):
    sample, *_, expected = PLANTED[bug]
    library.configure(**SCHEDULES[schedule])
    found = verdict(library, bug, SAMPLE_KERNELS[sample])
    assert re.search(expected, found), found or "not caught"


EVERY_SCHEDULE = {
    **SCHEDULES,
    **{
        f"{order}-{'late' if late else 'early'}-{preempt or 'no'}-preemption": {
            "order": order, "lazy_async": late, "preempt": preempt, "seed": 11,
        }
        for order in ("ascending", "descending", "breadth", "random")
        for late in (True, False)
        for preempt in (0, 5)
    },
}  # fmt: skip


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
@pytest.mark.parametrize("sample", SAMPLE_KERNELS)
def test_a_right_kernel_raises_no_alarm(library, sample, schedule):
    library.configure(**EVERY_SCHEDULE[schedule])
    variant = len(PLANTED) + list(SAMPLE_KERNELS).index(sample)
    assert verdict(library, variant, SAMPLE_KERNELS[sample]) == ""
