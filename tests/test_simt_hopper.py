"""mbarrier, TMA and wgmma in the emulator: each against CuTe's layouts, then a warp-specialised kernel that is right,
and every bug planted in it caught."""

import itertools
import re
from ctypes import c_uint64
from pathlib import Path

import numpy as np
import pytest
import torch
from simt import cute
from simt.build import SCHEDULES, build
from simt.launch import aligned, launch
from simt.variants import WRONG, Bug, assert_right_in_every_schedule, verdict_on, write_variants

pytestmark = pytest.mark.emulator

TESTS = Path(__file__).parent
SAMPLES = TESTS / "simt" / "samples"
CSRC = TESTS.parent / "csrc"
PARTS = ["hopper.cpp", "wgmma.cpp"]

PRODUCER_WAIT = "      ptx::mbarrier_wait(empty + 8 * stage, (round + 1) % 2);\n"
CONSUMER_WAIT = "      ptx::mbarrier_wait(full + 8 * stage, round % 2);\n"
LOAD = "ptx::tma_load_2d(x_tile + stage * kTileBytes, &x_map, k, row, full + 8 * stage);"
DECODE = "      decode_tile("
FENCE = "      ptx::fence_proxy_async();\n"
ANNOUNCE = "ptx::mbarrier_arrive_expect_tx(full + 8 * stage, kTileBytes);"
WGMMA_FENCE = "      ptx::wgmma_fence();\n"
COMMIT = "      ptx::wgmma_commit();\n"
WAIT = "      ptx::wgmma_wait<0>();\n"
RELEASE = "      ptx::mbarrier_arrive(empty + 8 * stage);\n"
STEPS = "step < steps; step++) {\n      const int stage = step % kStages, round = step / kStages, k"
BUGS = [
    Bug("no fence.proxy.async", "without a fence.proxy.async after it", FENCE, ""),
    Bug(
        "fence.proxy.async before the stores",
        "without a fence.proxy.async after it",
        FENCE,
        "",
        ((DECODE, FENCE + DECODE),),
    ),
    Bug("one thread fences for all", "without a fence.proxy.async after it", FENCE, "if (thread == 0)" + FENCE),
    Bug(
        "no wgmma wait before the release", "in flight: .* write", WAIT + RELEASE + "    }", RELEASE + "    }\n" + WAIT
    ),
    Bug("release before the wait", "race: .* write", WAIT + RELEASE, RELEASE + WAIT),
    Bug("wait one group too lax", "(in flight|race): .* write", "wgmma_wait<0>", "wgmma_wait<1>"),
    Bug("no release", "deadlock", RELEASE, ""),
    Bug("producer does not wait", "in flight: .* write|nothing has written", PRODUCER_WAIT, ""),
    Bug("consumer does not wait", "race: wgmma|while a copy is writing it|nothing has written", CONSUMER_WAIT, ""),
    Bug("wrong parity for empty", "deadlock", "empty + 8 * stage, (round + 1) % 2", "empty + 8 * stage, round % 2"),
    Bug(
        "wrong parity for full",
        "deadlock|race: wgmma|while a copy is writing it|nothing has written",
        "full + 8 * stage, round % 2",
        "full + 8 * stage, (round + 1) % 2",
    ),
    Bug("too few bytes announced", "deadlock", ANNOUNCE, ANNOUNCE.replace("kTileBytes", "kTileBytes / 2")),
    Bug("too many bytes announced", "deadlock", ANNOUNCE, ANNOUNCE.replace("kTileBytes", "2 * kTileBytes")),
    Bug(
        "no bytes announced",
        "deadlock|race: wgmma|while a copy is writing it",
        ANNOUNCE,
        "ptx::mbarrier_arrive(full + 8 * stage);",
    ),
    Bug(
        "full counts too few arrivals",
        "arrivals of this phase are in already|race: wgmma|nothing has written",
        "init(full + 8 * stage, kGroup)",
        "init(full + 8 * stage, kGroup - 1)",
    ),
    Bug(
        "full counts too many arrivals",
        "deadlock",
        "init(full + 8 * stage, kGroup)",
        "init(full + 8 * stage, kGroup + 1)",
    ),
    Bug(
        "empty counts too few arrivals",
        "(in flight|race): .* write",
        "init(empty + 8 * stage, kGroup)",
        "init(empty + 8 * stage, 32)",
    ),
    Bug("no __syncthreads after the initialisation", "(race|uninitialised): 8-byte atomic", "  __syncthreads();\n", ""),
    Bug(
        "no fence after the initialisation",
        "did not follow with fence.mbarrier_init",
        "    ptx::fence_mbarrier_init();\n",
        "",
    ),
    Bug("thread 0 arrives before it has decoded", "race: wgmma", ANNOUNCE, ";", ((LOAD, "{" + ANNOUNCE + LOAD + "}"),)),
    Bug(
        "loads a tile that nobody waits for",
        "ends without a wait for the last TMA load",
        STEPS,
        STEPS.replace("step < steps", "step <= steps"),
    ),
    Bug("stores without swizzle", WRONG, "(chunk ^ row % 8) * 16", "chunk * 16"),
    Bug("descriptor with another stride", WRONG, "row_group = 8 * 128", "row_group = 4 * 128"),
    Bug("descriptor with another swizzle", WRONG, "swizzle_128 = 1", "swizzle_128 = 2"),
    Bug("steps of K too long", "not aligned to the 1024-byte period", "x + k * (32 >> 4)", "x + k * (64 >> 4)"),
    Bug("the other major order", WRONG, "wgmma_m64k16<0, backward>", "wgmma_m64k16<0, !backward>"),
    Bug(
        "the other major order, backward",
        "race: wgmma|nothing has written",
        "wgmma_m64k16<0, backward>",
        "wgmma_m64k16<0, !backward>",
        flag=True,
    ),
    Bug(
        "tiles aligned to 128 bytes only",
        "TMA load to shared address",
        "DYN_SMEM(shared, 1024)",
        "DYN_SMEM(shared, 128)",
    ),
    Bug(
        "accumulators read before the wait",
        WRONG,
        WAIT,
        "      early = sum[5];\n" + WAIT,
        (("float sum[32];", "float sum[32], early = 0;"), ("= sum[j];", "= j == 5 ? early : sum[j];")),
    ),
    Bug(
        "accumulators written before the wait",
        "wrote accumulator 3 of a wgmma before",
        WAIT,
        "      sum[3] = 0;\n" + WAIT,
    ),
    Bug("accumulators never cleared", WRONG, "step + k > 0);", "true);"),
    Bug("no wgmma.fence", "without a wgmma.fence since", WGMMA_FENCE, ""),
    Bug(
        "wgmma.fence in the first step only", "without a wgmma.fence since", WGMMA_FENCE, "if (step == 0)" + WGMMA_FENCE
    ),
    Bug("no wgmma commit", "in flight: .* write", COMMIT, ""),
    Bug(
        "a warp skips a step",
        "different descriptors",
        WGMMA_FENCE,
        "if (threadIdx.x >= 224 && step == 1) continue;\n" + WGMMA_FENCE,
    ),
    Bug(
        "weights in the other stage",
        "race: wgmma|nothing has written",
        "w_tiles + stage * kTileBytes",
        "w_tiles + (stage + 1) % kStages * kTileBytes",
    ),
    Bug("no mask on the codes", "out of bounds: 4-byte read", "if (out < outs && in < ins)", "if (in < ins)"),
    Bug(
        "no mask on the result",
        "out of bounds: 4-byte write",
        "at_row < m && at_column < columns",
        "at_column < columns",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "simt"


@pytest.fixture(scope="module")
def twins(folder):
    return build(SAMPLES / "run_hopper_twins.cpp", folder, include=[SAMPLES, CSRC], parts=PARTS)


@pytest.fixture(scope="module")
def library(folder, tmp_path_factory):
    variants = tmp_path_factory.mktemp("hopper")
    write_variants(SAMPLES / "hopper.cuh", "ptx90.cuh", BUGS, variants)
    return build(SAMPLES / "run_hopper.cpp", folder, include=[variants, SAMPLES, CSRC], parts=PARTS)


def bf16_bits(tensor):
    return tensor.view(torch.int16).numpy().view(np.uint16)


# ---- wgmma against CUTLASS, mma_traits_sm90_gmma.hpp

T = 8  # bf16 elements in 16 bytes
MODES = {"none": (0, 0), "32B": (3, 1), "64B": (2, 2), "128B": (1, 3)}  # value in the descriptor, bits of the swizzle
NONE, COPY, OVERWRITE, DIVERGE, ABANDON = range(5)  # Meddling in run_hopper_twins.cpp
SUMS = ((4, 8, 4), (2, 2, None)), ((128, 1, 16), (64, 8, 512))  # CLayout_64xN: (thread, value) -> m + 64 n


def operand(extent, by_k, mode, step):
    """How an operand of `extent` x 16 lies: CuTe's canonical layout from (m or n, k) to elements, the two byte offsets
    of its descriptor, the bytes it takes, and the byte where step `step` of 16 k begins in it."""
    chunks = 1 << MODES[mode][1]  # in a row of the swizzle
    if by_k:  # groups of eight rows, with a gap between them
        stride = 8 * chunks * 16 + 1024
        if mode == "none":  # the two halves of K lie a leading offset apart
            leading = extent // 8 * stride
            layout = ((8, extent // 8), (T, 2)), ((T, stride // 2), (1, leading // 2))
            return layout, leading, stride, 2 * leading, 0
        layout = ((8, extent // 8), (T, 2)), ((chunks * T, stride // 2), (1, T))
        return layout, 16, stride, extent // 8 * stride, 32 * step
    if mode == "none":  # eight by eight blocks: along M or N by the stride offset, along K by the leading one
        stride, leading = 128, extent // 8 * 128 + 256
        layout = ((T, extent // 8), (8, 2)), ((1, stride // 2), (T, leading // 2))
        return layout, leading, stride, 2 * leading, 0
    spans = extent // (chunks * T)
    leading = 2 * 8 * chunks * 16 + 1024  # from span to span along M or N: two groups of eight k, and a gap
    stride = 8 * chunks * 16
    layout = ((chunks * T, spans), (8, 2)), ((1, leading // 2), (chunks * T, stride // 2))
    return layout, leading, stride, spans * leading, 0


def place(image, base, matrix, by_k, mode, step):
    """Write matrix [extent, 16] into the bf16 image of shared memory at byte `base`; returns its descriptor and end."""
    extent = matrix.shape[0]
    layout, leading, stride, size, begin = operand(extent, by_k, mode, step)
    value, bits = MODES[mode]
    for k, at in itertools.product(range(16), range(extent)):
        address = base + begin + 2 * cute.offset(layout, at + extent * k)
        image[cute.swizzle(bits, 4, 3, address) // 2] = matrix[at, k]
    descriptor = (base + begin) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | value << 62
    return descriptor, base + (size + 1023) // 1024 * 1024


WGMMAS = [
    (n, a_by_m, b_by_n, mode)
    for n, a_by_m, b_by_n, mode in itertools.product((8, 128, 256), (0, 1), (0, 1), MODES)
    if not b_by_n or n > 8 or mode == "none"  # N-major tiles are whole spans wide
    if not (n == 256 and mode == "none")  # its 256 columns with the gaps fill more than shared memory
]


@pytest.mark.parametrize(("n", "a_by_m", "b_by_n", "mode"), WGMMAS)
def test_wgmma_multiplies_the_operands_cute_describes(twins, n, a_by_m, b_by_n, mode):
    torch.manual_seed(n)
    a, b = (torch.randn(extent, 16).bfloat16() for extent in (64, n))
    c = np.random.default_rng(n).standard_normal((64, n), np.float32)
    step = (1 << MODES[mode][1]) // 2 - 1 if mode != "none" else 0  # the last 16 of K that a swizzled row holds
    image = np.full(100 * 1024, 0x7FFF, np.uint16)  # NaN wherever no operand lies
    a_descriptor, end = place(image, 0, bf16_bits(a), not a_by_m, mode, step)
    b_descriptor, end = place(image, end, bf16_bits(b), not b_by_n, mode, step)
    image = aligned(image[: end // 2])

    (thread_shape, (two, pairs, _)), strides = SUMS
    layout = (thread_shape, (two, pairs, n // 8)), strides
    places = np.array([[cute.offset(layout, t + 128 * v) for v in range(n // 2)] for t in range(128)])
    sums = aligned(c.T.ravel()[places])
    twins.configure(**SCHEDULES["ascending-late"])
    chain = 3
    arguments = (
        n,
        a_by_m,
        b_by_n,
        image,
        image.nbytes,
        c_uint64(a_descriptor),
        c_uint64(b_descriptor),
        sums,
        chain,
        NONE,
    )
    assert launch(twins, "run_wgmma", *arguments) is None

    expected = c + chain * (a.double() @ b.double().T).numpy()
    tolerance = chain * 2.0**-23 * np.abs(expected).max()
    np.testing.assert_allclose(sums, expected.T.ravel()[places], rtol=0, atol=tolerance)


def test_a_tensor_core_reads_when_it_pleases(twins):
    """Operands overwritten before the wait, and nothing that judges it: the old ones count, or the new ones."""
    ones = aligned(np.full(16384 // 2, 0x3F80, np.uint16))
    descriptor = c_uint64(1024 >> 4 << 32 | 1 << 62)

    def product(**schedule):
        sums = aligned(np.zeros((128, 4), np.float32))
        twins.configure(shadow=False, **schedule)
        assert (
            launch(twins, "run_wgmma", 8, 0, 0, ones, ones.nbytes, descriptor, descriptor, sums, 1, OVERWRITE) is None
        )
        return set(sums.ravel())

    assert product(order="ascending", lazy_async=True) == {0}
    assert {16} in [product(order="random", lazy_async=False, seed=seed) for seed in range(1, 9)]


@pytest.mark.parametrize(
    ("b_start", "base_offset", "meddling", "report"),
    [
        (0, 1, NONE, "has a base offset"),
        (128, 0, NONE, "is not aligned to the 1024-byte period of its swizzle"),
        (16384, 0, NONE, "reads shared address 0x[0-9a-f]+, which nothing has written"),
        (1 << 17, 0, NONE, "out of bounds"),
        (0, 0, COPY, "reads shared address 0x[0-9a-f]+ while a copy is writing it"),
        (0, 0, OVERWRITE, "in flight: .* write of dynamic shared memory"),
        (0, 0, DIVERGE, "the warpgroup diverges: thread [0-9]+ is in wgmma.(fence|commit_group) at"),
        (0, 0, ABANDON, "returns with a wgmma in flight"),
    ],
)
def test_a_misused_wgmma_is_reported(twins, b_start, base_offset, meddling, report):
    image, sums = aligned(np.zeros(16384, np.uint8)), aligned(np.zeros((128, 4), np.float32))
    a = 1024 >> 4 << 32 | 1 << 62
    b = a | b_start >> 4 | base_offset << 49
    twins.configure(**SCHEDULES["ascending-late"])
    arguments = 8, 0, 0, image, image.nbytes, c_uint64(a), c_uint64(b), sums, 1, meddling
    error = launch(twins, "run_wgmma", *arguments)
    assert error is not None
    assert re.search(report, error), error


# ---- TMA and mbarrier

BOXES = [  # element, swizzle, box (columns, rows)
    (np.uint16, 128, (64, 64)), (np.uint16, 64, (32, 24)), (np.uint16, 32, (16, 9)), (np.uint16, 0, (40, 7)),
    (np.uint8, 128, (128, 16)), (np.uint32, 128, (32, 20)), (np.uint32, 0, (4, 3)),
]  # fmt: skip
ORIGINS = [(0, 0), (5, 3), (-3, -2), (190, 60), (250, 0), (0, -200)]  # of the box in a matrix of 200 x 70


@pytest.mark.parametrize("origin", ORIGINS, ids=str)
@pytest.mark.parametrize(("element", "span", "box"), BOXES)
def test_tma_brings_a_box_in_its_swizzle_with_zeros_outside(twins, element, span, box, origin):
    (columns, rows), (box_columns, box_rows), (column, row) = (200, 70), box, origin
    stride = 832  # bytes: more than a row, a multiple of 16
    rng = np.random.default_rng(0)
    memory = aligned(rng.integers(1, 256, (rows, stride), np.uint8))
    matrix = memory[:, : columns * np.dtype(element).itemsize].view(element)
    brought = np.zeros((box_rows, box_columns), element)
    for y, x in itertools.product(range(box_rows), range(box_columns)):
        if 0 <= row + y < rows and 0 <= column + x < columns:
            brought[y, x] = matrix[row + y, column + x]
    linear = brought.view(np.uint8).ravel()
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[span]
    expected = np.full(-(-linear.size // 1024) * 1024, 0, np.uint8)
    expected[[cute.swizzle(bits, 4, 3, address) for address in range(linear.size)]] = linear

    image = aligned(np.empty(linear.size, np.uint8))
    for schedule in SCHEDULES.values():
        twins.configure(**schedule)
        sizes = columns, rows, stride, box_columns, box_rows, matrix.itemsize, span, column, row
        assert launch(twins, "run_tma", memory, *sizes, image) is None
        assert np.array_equal(image, expected[: linear.size])


REFUSED = [  # row bytes, box columns, box rows, swizzle
    (840, 64, 8, 128, "multiples of 16 bytes"),
    (384, 64, 8, 128, "rows do not overlap"),
    (832, 64, 257, 128, "box sides are 1 to 256"),
    (832, 20, 8, 0, "a box row is a multiple of 16 bytes"),
    (832, 16, 8, 48, "the swizzle is 0, 32, 64 or 128 bytes"),
    (832, 128, 8, 128, "as long as the swizzle span"),
    (832, 32, 8, 128, "as long as the swizzle span"),
]


@pytest.mark.parametrize(("row_bytes", "box_columns", "box_rows", "swizzle", "rule"), REFUSED)
def test_a_tensor_map_that_breaks_a_rule_is_reported(twins, row_bytes, box_columns, box_rows, swizzle, rule):
    memory, image = aligned(np.zeros((70, 840), np.uint8)), aligned(np.empty(box_columns * box_rows * 2, np.uint8))
    twins.configure()
    sizes = 200, 70, row_bytes, box_columns, box_rows, 2, swizzle, 0, 0
    error = launch(twins, "run_tma", memory, *sizes, image)
    assert error is not None
    assert rule in error


@pytest.mark.parametrize(("landed", "report"), [(0, "in flight: 1-byte read"), (1, "race: 1-byte read")])
def test_reading_a_box_that_one_has_not_waited_for_is_reported(twins, landed, report):
    twins.configure(**SCHEDULES["ascending-late"])
    error = launch(twins, "run_peek", aligned(np.zeros((64, 128), np.uint8)), landed, np.zeros(1, np.uint8))
    assert error is not None
    assert report in error
    assert "asynchronous" in error


def test_an_mbarrier_passes_mail_round_after_round(twins):
    for schedule in SCHEDULES.values():
        log = np.empty((5, 64), np.int32)
        twins.configure(**schedule)
        assert launch(twins, "run_rounds", log) is None
        assert np.array_equal(log, np.repeat(100 + np.arange(5), 64).reshape(5, 64))


# ---- the kernel

LEVELS = torch.linspace(-1, 1, 16).bfloat16()
# m, outs, ins: one tile; one row; tails in every dimension; more steps than stages
SHAPES = [(64, 64, 64), (1, 8, 8), (100, 72, 136), (65, 200, 264), (130, 264, 24)]


class Problem:
    """y = x W^T, or x W backward, with W = levels[codes], and what y should be."""

    def __init__(self, m, outs, ins, backward):
        torch.manual_seed(m + outs + ins)
        codes = torch.randint(16, (outs, ins), dtype=torch.uint8)
        x = torch.randn(m, outs if backward else ins).bfloat16()
        w = LEVELS[codes.long()].double()
        w = w if backward else w.T
        self.sizes = int(backward), m, outs, ins
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        self.inputs = [aligned(array) for array in (bf16_bits(x), packed.numpy(), bf16_bits(LEVELS))]
        self.expected = (x.double() @ w).numpy()
        self.tolerance = w.shape[0] / 16 * 2.0**-24 * (x.double().abs() @ w.abs()).numpy()  # a rounding per 16 products

    def run(self, library, variant):
        """The result and the emulator's complaint."""
        result = np.full(self.expected.shape, np.nan, np.float32)
        return result, launch(library, "run_hopper", variant, *self.sizes, *self.inputs, result)

    def is_right(self, result):
        return bool(np.all(np.abs(result - self.expected) <= self.tolerance + 1e-6 * np.abs(self.expected)))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_right_and_the_same_in_every_schedule(library, shape, backward):
    problem = Problem(*shape, backward)
    assert_right_in_every_schedule(library, problem, int(backward))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(library, bug, schedule):
    problem = Problem(100, 264, 72, True) if bug.flag else Problem(100, 72, 264, False)  # five steps of K
    verdict = verdict_on(library, problem, 2 + BUGS.index(bug), schedule)
    assert re.search(bug.verdict, verdict), verdict
