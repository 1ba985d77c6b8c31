"""The emulator does what CUDA documents: every feature against a statement of its own, and its reports word by word."""

import ctypes
import itertools
import re
import subprocess
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from simt.build import ORDERS, SCHEDULES, Library, build, compile_library

pytestmark = pytest.mark.emulator
SAMPLES = Path(__file__).parent / "simt" / "samples"
PROBES = [SAMPLES / "probes.cpp", SAMPLES / "arithmetic.cpp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp() / "simt"  # one for all files: the emulator is compiled once


@pytest.fixture(scope="module")
def hooks(folder) -> Library:
    return build(PROBES, folder)


@pytest.fixture(scope="module")
def plain(folder) -> Library:
    return build(PROBES[0], folder, hooks=False)


@pytest.fixture
def probes(hooks) -> Library:
    hooks.configure()
    return hooks


@pytest.fixture(params=[*SCHEDULES, "breadth"])
def schedule(request) -> dict[str, object]:
    return {**SCHEDULES, "breadth": {"order": "breadth"}}[request.param]


def call(library: Library, name: str, *arguments: object) -> str:
    """Run a probe: the report, "" for none."""
    function = getattr(library.functions, f"run_{name}")
    function.restype = ctypes.c_char_p
    report = function(*(a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments))
    return "" if report is None else report.decode()


# ---- threads, blocks, schedules


@pytest.mark.parametrize(
    ("grid", "block"), [((2, 3, 2), (4, 3, 2)), ((1, 1, 1), (1024, 1, 1)), ((3, 1, 1), (70, 1, 1))]
)
def test_every_thread_knows_its_place(probes, schedule, grid, block):
    probes.configure(**schedule)
    threads, blocks = int(np.prod(block)), int(np.prod(grid))
    out = np.full((blocks, threads, 6), 99, np.uint32)
    assert call(probes, "indices", out, *grid, *block) == ""
    places = [
        [(x, y, z, i, j, k) for z in range(block[2]) for y in range(block[1]) for x in range(block[0])]
        for k in range(grid[2])
        for j in range(grid[1])
        for i in range(grid[0])
    ]
    assert np.array_equal(out, places)


def turns(library: Library, **config: object) -> list[list[int]]:
    """Three blocks of 64 threads, numbered over the grid, as they come by before and after a barrier."""
    library.configure(**config)
    count, at = np.zeros(2, np.int32), np.full((2, 3 * 64), -1, np.int32)
    assert call(library, "order", count, at, 3, 64) == ""
    assert [sorted(row) for row in at.tolist()] == [list(range(3 * 64))] * 2
    return at.tolist()


def test_orders_are_what_they_are_called(probes):
    """Ascending and breadth begin with thread 0 of block 0, descending with the last of the last; random is neither."""
    up, down = list(range(192)), list(range(191, -1, -1))
    assert turns(probes, order="ascending") == [up, up]
    assert turns(probes, order="descending") == [down, down]
    assert turns(probes, order="breadth") == [up, up]
    drawn = turns(probes, order="random", seed=3)
    assert up not in drawn
    assert down not in drawn
    assert [t // 64 for t in drawn[0][::64]] not in ([0, 1, 2], [2, 1, 0])  # blocks are drawn too
    assert sum(a // 32 != b // 32 for a, b in itertools.pairwise(drawn[0])) > 48  # and warps take turns
    assert drawn == turns(probes, order="random", seed=3)
    assert drawn != turns(probes, order="random", seed=4)


def test_preemption_yields_at_memory_accesses(probes):
    out = np.zeros((1, 64, 6), np.uint32)
    switches = []
    for preempt in (0, 2):
        probes.configure(preempt=preempt)
        before = probes.stats.switches
        assert call(probes, "indices", out, 1, 1, 1, 64, 1, 1) == ""
        switches.append(probes.stats.switches - before)
    assert switches[0] == 64
    assert switches[1] > 64 + 6 * 64 / 4  # every other of 6 * 64 stores, give or take


def test_stats_count(probes):
    before = [getattr(probes.stats, name) for name, _ in probes.stats._fields_]
    data = np.arange(64, dtype=np.int32)
    assert call(probes, "reverse", data, np.zeros_like(data), 64) == ""
    after = [getattr(probes.stats, name) for name, _ in probes.stats._fields_]
    switches, accesses, collectives, barriers, blocks = (a - b for a, b in zip(after, before, strict=True))
    assert (collectives, barriers, blocks) == (0, 1, 1)
    assert switches == 64 + 64  # each thread to the barrier, and on
    assert accesses >= 64 * 5  # at least the five of every thread's own


def test_unknown_config_fields_are_named(probes):
    with pytest.raises(ValueError, match="no field 'lazy' in Config; it has order, seed"):
        probes.configure(lazy=True)


# ---- collectives


def segment(lane: int, width: int) -> int:
    return lane // width * width


@pytest.mark.parametrize("width", [32, 16, 8, 2, 1])
def test_shuffles(probes, schedule, width):
    """The CUDA guide: a source out of the segment's range leaves the lane its own value; __shfl_sync wraps around."""
    probes.configure(**schedule)
    rng = np.random.default_rng(width)
    values = rng.integers(-1000, 1000, 32).astype(np.int32)
    for amount in (0, 1, 5, 16, 31):
        operand = np.concatenate([[amount], rng.integers(0, 64, 31)]).astype(np.int32)
        out = np.zeros((4, 32), np.int32)
        assert call(probes, "shuffles", values, out, operand, width, ctypes.c_uint32(0xFFFFFFFF)) == ""
        for lane in range(32):
            first = segment(lane, width)
            assert out[0, lane] == values[first + operand[lane] % width]
            other = lane ^ amount
            # an earlier segment may be read, a later one not
            assert out[1, lane] == values[other if segment(other, width) <= first else lane]
            assert out[2, lane] == values[lane + amount if lane + amount < first + width else lane]
            assert out[3, lane] == values[lane - amount if lane - amount >= first else lane]


def test_shuffles_of_sixteen_bytes(probes):
    values = np.random.default_rng(0).standard_normal((32, 2))
    out = np.zeros((4, 32, 2))
    operand = np.full(32, 3, np.int32)
    assert call(probes, "shuffles_wide", values, out, operand, 32) == ""
    assert np.array_equal(out[0], np.repeat(values[3:4], 32, 0))
    assert np.array_equal(out[1], values[np.arange(32) ^ 3])


def test_shuffles_of_part_of_a_warp(probes, schedule):
    probes.configure(**schedule)
    mask = 0x0F0F0F0F
    values, out = np.arange(32, dtype=np.int32), np.full((4, 32), -1, np.int32)
    operand = np.full(32, 1, np.int32)
    assert call(probes, "shuffles", values, out, operand, 4, ctypes.c_uint32(mask)) == ""
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    assert out[1, lanes].tolist() == [lane ^ 1 for lane in lanes]
    assert (out[:, [lane for lane in range(32) if lane not in lanes]] == -1).all()
    report = call(probes, "shuffles", values, out, np.full(32, 4, np.int32), 8, ctypes.c_uint32(mask))
    what = r"shuffle: lane \d+ reads lane \d+, which is not in the mask 0f0f0f0f in __shfl_\w+ at .*probes.cpp:\d+"
    assert re.search(what, report)


def test_a_width_that_is_no_power_of_two(probes):
    values, out = np.zeros(32, np.int32), np.zeros((4, 32), np.int32)
    report = call(probes, "shuffles", values, out, values, 12, ctypes.c_uint32(0xFFFFFFFF))
    assert re.search(r"__shfl_sync at .*probes.cpp:\d+: width 12 is not a power of two up to 32", report)


@pytest.mark.parametrize("threads", [32, 64, 70])
def test_votes_and_reductions(probes, schedule, threads):
    probes.configure(**schedule)
    values = np.random.default_rng(threads).integers(0, 100, threads).astype(np.int32)
    out = np.zeros((9, threads), np.uint32)
    assert call(probes, "votes", values, out, threads) == ""
    for first in range(0, threads, 32):
        warp = values[first : first + 32].astype(np.int64)
        expected = [
            sum(int(v & 1) << lane for lane, v in enumerate(warp)),
            int((warp > 90).any()),
            int((warp < 99).all()),
            warp.sum(),
            (warp - 50).min() % 2**32,
            (warp - 50).max() % 2**32,
            np.bitwise_and.reduce(warp | 3),
            np.bitwise_or.reduce(warp),
            np.bitwise_xor.reduce(warp),
        ]
        assert out[:, first : first + len(warp)].tolist() == [[int(e)] * len(warp) for e in expected]


@pytest.mark.parametrize(
    ("kind", "report"),
    [
        (0, r"^$"),
        (1, r"lanes 0000ffff wait in mma at here:1\n +lanes ffff0000 wait in mma at there:2"),
        (2, r"lanes of warp 0 meet at different barriers, .*probes.cpp:\d+ and .*probes.cpp:\d+"),
        (3, r"bar.sync 16, 32 at here:3: ids are 0 to 15, counts multiples of 32 up to the block's 32 threads"),
        (4, r"bar.sync 1, 33 at here:4"),
        (5, r"thread 31 .*: .*probes.cpp:\d+: __builtin_assume\(lane < 31\) does not hold"),
    ],
)
def test_where_a_warp_may_split(probes, schedule, kind, report):
    probes.configure(**schedule)
    out = np.zeros(32, np.int32)
    assert re.search(report, call(probes, "two_places", out, kind))
    if kind == 0:
        assert np.array_equal(out, np.arange(32) ^ 16)


# ---- atomics


def test_atomics(probes, schedule):
    """Replayed in the order in which they came by: the old values of one address tell it."""
    probes.configure(**schedule)
    threads = 48
    cells = np.array([5, 5000, 3, 20, 77, 0xFF, 0, 0, 4, 4, 0], np.uint32)
    old = np.zeros((11, threads), np.uint32)
    start = cells.copy()
    assert call(probes, "atomics", cells, old, threads) == ""
    value = (np.arange(threads, dtype=np.int64) * 7 + 3) % 32
    assert cells[0] == start[0] + value.sum()
    assert cells[1] == start[1] - value.sum()
    assert cells[2] == max(start[2], value.max())
    assert cells[3] == min(start[3], value.min())
    assert sorted([*old[4], cells[4]]) == sorted([start[4], *value])  # every value goes in once and comes out once
    assert cells[5] == np.bitwise_and.reduce(np.append(value | 64, start[5]))
    assert cells[6] == np.bitwise_or.reduce(value)
    assert cells[7] == np.bitwise_xor.reduce(value)
    count_up = [(4 + i) % 10 for i in range(threads + 1)]  # 0..9 and round again
    assert sorted(old[8]) == sorted(count_up[:-1])
    assert cells[8] == count_up[-1]
    count_down = [(4 - i) % 10 for i in range(threads + 1)]
    assert sorted(old[9]) == sorted(count_down[:-1])
    assert cells[9] == count_down[-1]
    won = [t for t in range(threads) if old[10, t] == t]  # thread t swaps t for t + 1
    assert cells[10] == len(won)
    assert won == list(range(len(won)))
    assert won


def test_atomic_sums_of_floats(probes, schedule):
    probes.configure(**schedule)
    single, double = np.array([0.5], np.float32), np.array([0.25])
    assert call(probes, "add_floats", single, double) == ""
    assert (single[0], double[0]) == (128.5, 64.25)


# ---- shared memory


@pytest.mark.parametrize("align", [16, 128, 1024, 4096])
@pytest.mark.parametrize("nbytes", [64, 1000, 232448])
def test_dynamic_shared_memory_has_the_alignment_asked_for_and_no_more(probes, align, nbytes):
    out = np.zeros(4, np.uint64)
    assert call(probes, "dynamic_address", out, align, ctypes.c_int(nbytes)) == ""
    pointer, address, inside, same = out.tolist()
    assert pointer % (2 * align) == align
    assert address % align == 0
    assert inside == address + 5
    assert same == 1


def test_static_and_declared_shared_memory(probes, schedule):
    probes.configure(**schedule)
    data = np.arange(100, 164, dtype=np.int32)
    out = np.zeros(64, np.int32)
    assert call(probes, "reverse", data, out, 64) == ""
    assert np.array_equal(out, data[::-1] + 2 * np.tile(data[:2], 32))


def test_shared_arrays_of_sixteen_bit_floats(probes, schedule):
    probes.configure(**schedule)
    data = np.arange(64).astype(np.float16)
    out = np.zeros((2, 64), np.float32)
    assert call(probes, "shared_halves", data, out) == ""
    assert np.array_equal(out, [data[::-1].astype(np.float32) + 1] * 2)


def test_shared_memory_starts_poisoned(plain):
    out = np.zeros(4, np.float32)
    assert call(plain, "poison", out, 0) == ""
    assert np.isnan(out).all()


def test_static_shared_memory_ends_where_the_variable_does(probes):
    out = np.zeros(1, np.int32)
    assert call(probes, "past_static", out, 8) == ""
    report = call(probes, "past_static", out, 16)
    assert re.search(r"out of bounds: 8-byte read of static shared memory at __shared__ small\+16 at .*:\d+", report)


def test_local_variables_start_as_a_pattern(probes, plain):
    """So that an accumulator never set to 0 is not right by luck: large, and the same in every run."""
    for library in (probes, plain):
        out = np.zeros(1, np.float32)
        assert call(library, "unset_local", out, 3) == ""
        assert out.view(np.uint32)[0] == 0xFEFEFEFE


def test_one_alignment_per_kernel(probes):
    assert "DYN_SMEM with two alignments, 16 and 32" in call(probes, "two_alignments", np.zeros(1, np.int32))


# ---- memory order


@pytest.mark.parametrize("fences", [1, 2])
def test_a_fenced_flag_orders_two_warps(probes, schedule, fences):
    probes.configure(**schedule)
    data, ready = np.zeros(1, np.int32), np.zeros(1, np.int32)
    assert call(probes, "flag", data, ready, fences) == ""
    assert data[0] == 43


def test_fenced_flags_pass_on_what_their_warp_has_learnt(probes, schedule):
    probes.configure(**schedule)
    data, ready = np.zeros(1, np.int32), np.zeros(3, np.int32)
    assert call(probes, "flag_chain", data, ready) == ""
    assert data[0] == 43


def test_a_flag_without_a_fence_is_a_race(probes, schedule):
    probes.configure(**schedule)
    report = call(probes, "flag", np.zeros(1, np.int32), np.zeros(1, np.int32), 0)
    assert re.search(r"thread 32 .*: race: 4-byte read of data\+0 at .*probes.cpp:\d+\n"
                     r" +is not ordered after the write by thread 0 at .*probes.cpp:\d+", report)  # fmt: skip


def test_a_fence_covers_only_what_comes_before_it(probes):
    arrays = [np.zeros(1, np.int32) for _ in range(3)]
    report = call(probes, "late_write", *arrays)
    assert re.search(r"block \(1,0,0\) .*: race between blocks: 4-byte read of data\+0 .*\n"
                     r" +is not ordered after the write by block \(0,0,0\) at .*probes.cpp:\d+", report)  # fmt: skip


def test_what_one_thread_is_told_the_block_knows_behind_a_barrier(probes):
    data, count, out = (np.zeros(1, np.int32) for _ in range(3))
    assert call(probes, "overheard", data, count, out, 1) == ""
    assert out[0] == 5
    report = call(probes, "overheard", data, count * 0, out, 0)
    assert re.search(r"block \(1,0,0\) thread 32 .*race between blocks: 4-byte read of data\+0", report)


def test_one_fence_serves_the_block_behind_a_barrier(probes, schedule):
    probes.configure(**schedule)
    parts, count, total = np.zeros(192, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.int32)
    assert call(probes, "whole_block", parts, count, total, 1) == ""
    assert total[0] == 3 * sum(range(64))


def test_one_fence_without_the_barrier_serves_one_thread(probes, schedule):
    probes.configure(**schedule)
    report = call(probes, "whole_block", np.zeros(192, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.int32), 0)
    assert "race between blocks: 4-byte read of parts+" in report


def test_order_is_passed_on_from_block_to_block(probes):
    data, first, second, out = (np.zeros(1, np.int32) for _ in range(4))
    assert call(probes, "relay", data, first, second, out, 2) == ""
    assert out[0] == 5
    report = call(probes, "relay", data, first * 0, second * 0, out, 1)
    assert re.search(r"block \(2,0,0\) .*race between blocks: 4-byte read of data\+0", report)


def test_a_counter_cleared_without_a_barrier(probes, schedule):
    probes.configure(**schedule)
    assert re.search(r"race|uninitialised", call(probes, "cleared_late", np.zeros(1, np.int32)))


@pytest.mark.parametrize("ordered_warp", [0, 1])
def test_two_readers_are_remembered(probes, schedule, ordered_warp):
    probes.configure(**schedule)
    report = call(probes, "two_readers", np.zeros(1, np.int32), np.zeros(2, np.int32), ordered_warp)
    assert re.search(rf"race: 4-byte (write of x\+0 .*\n.* the read by thread {32 * (1 - ordered_warp)}|"
                     rf"read of x\+0 .*\n.* the write by thread 64)", report)  # fmt: skip


def test_a_write_after_another_blocks_read(probes, schedule):
    """In either order of the blocks, although block 1 has read the byte itself in between."""
    probes.configure(**schedule)
    assert "race between blocks" in call(probes, "read_then_write", np.zeros(1, np.int32), np.zeros(2, np.int32))


def test_a_launch_is_ordered_after_the_one_before(probes, schedule):
    probes.configure(**schedule)
    x = np.arange(64, dtype=np.int32)
    assert call(probes, "two_launches", x) == ""
    assert np.array_equal(x, np.arange(64) + 2)


# ---- asynchronous copies


@pytest.mark.parametrize("pending", [0, 1, 2, 3])
def test_a_wait_leaves_the_youngest_groups_in_flight(probes, schedule, pending):
    probes.configure(**schedule)
    data, out = np.arange(12, dtype=np.int32), np.zeros(4, np.int32)
    for group in range(3):
        report = call(probes, "groups", data, out, pending, group)
        if group < 3 - pending:
            assert report == ""
            assert np.array_equal(out, data[4 * group :][:4])
        else:
            what = rf"in flight: .* of dynamic shared memory\+{16 * group} .*\n +while an asynchronous copy writes it"
            assert re.search(what, report)


def test_a_wait_behind_the_barrier_is_too_late(probes, schedule):
    """Whoever comes first: the reader meets the copy in flight, or a write that nothing orders before it."""
    probes.configure(**schedule)
    report = call(probes, "late_wait", np.ones(1, np.int32), np.zeros(1, np.int32))
    assert re.search(r"thread 32 .*: (in flight|race): 4-byte read of dynamic shared memory\+0", report)


# ---- buffers


def test_unwritten_bytes_are_counted(probes):
    out = np.zeros(100, np.uint8)
    assert call(probes, "write_some", out, 100, 60) == ""
    probes.functions.count_unwritten.restype = ctypes.c_size_t
    assert probes.functions.count_unwritten(out.ctypes.data_as(ctypes.c_void_p)) == 40
    assert (out != 0).sum() == 60


@pytest.mark.parametrize(
    ("nbytes", "threads", "report"),
    [
        (64, 5, r"thread 4 .*: out of bounds: 16-byte read in no buffer, 0 bytes past the end of in \(64 bytes\) at"),
        (60, 4, r"thread 3 .*: out of bounds: 16-byte read at byte 48 of buffer in \(60 bytes\) at .*probes.cpp:\d+"),
    ],
)  # fmt: skip
def test_reads_past_the_end(probes, nbytes, threads, report):
    memory = np.zeros(65536, np.uint8)
    assert re.search(report, call(probes, "wide_read", memory, memory[32768:], nbytes, threads))


def test_a_misaligned_vector_is_named_with_its_type(probes):
    memory = np.zeros(65536, np.uint8)
    start = -memory.ctypes.data % 16 + 4
    report = call(probes, "wide_read", memory[start:], memory[32768 + start - 4 :], 64, 1)
    what = r"misaligned: 0x\w+ as 'const struct uint4', which needs a multiple of 16, at .*probes.cpp:\d+:\d+"
    assert re.search(what, report)


def test_memory_is_registered_once(probes):
    x = np.zeros(200, np.int32)
    assert "buffers whole and part overlap" in call(probes, "overlap", x, 0)
    assert "in no buffer" in call(probes, "overlap", x, 1)  # two inputs may; then the launch takes place


def test_large_copies_are_seen(probes):
    """g++ makes library calls of them, which -fsanitize=thread leaves to its own runtime."""
    data = np.arange(64, dtype=np.int32)
    out = np.zeros(128, np.int32)
    assert call(probes, "large_copy", data, out, 0) == ""
    assert np.array_equal(out[:64], data)
    assert re.search(
        r"out of bounds: 260-byte read at byte 0 of buffer in \(256 bytes\)", call(probes, "large_copy", data, out, 4)
    )
    assert re.search(
        r"out of bounds: 260-byte write at byte 0 of buffer out", call(probes, "large_copy", data, out, -4)
    )


# ---- what kernels may do to the process


def signal_state() -> list[bytes]:
    """What the C library holds of the signals a launch takes over (struct sigaction: handler, first mask word, flags)
    and of this thread's alternate stack."""
    libc = ctypes.CDLL(None)
    state = []
    for signal in (4, 6, 7, 8, 11):
        action = ctypes.create_string_buffer(152)
        assert libc.sigaction(signal, None, action) == 0
        state.append(action.raw[:16] + action.raw[136:140])
    stack = ctypes.create_string_buffer(24)
    assert libc.sigaltstack(None, stack) == 0
    return [*state, stack.raw[:12] + stack.raw[16:]]


@pytest.mark.parametrize(
    ("kind", "report"),
    [
        (0, r"thread 3 .*: out of bounds: dynamic shared memory \(guard page\), 0x\w+ at .*probes.cpp:\d+"),
        (1, r"thread 3 .*: illegal address, 0x8 at .*probes.cpp:\d+"),
        (2, r"thread 3 .*: integer division by zero, 0x\w+ at .*probes.cpp:\d+"),
        (3, r"thread 3 .*: __trap\(\)"),
        (4, r"thread 3 .*: aborted \(a failed assert, or an exception that leaves the kernel\)"),
    ],
)
def test_faults_end_the_launch_and_nothing_else(plain, schedule, kind, report):
    plain.configure(**schedule)
    before = signal_state()
    for _ in range(3):
        assert re.search(report, call(plain, "wild", np.zeros(1, np.int32), kind))
    assert signal_state() == before
    assert call(plain, "wild", np.zeros(1, np.int32), 9) == ""


def test_hooks_see_a_wild_pointer_before_it_faults(probes, schedule):
    probes.configure(**schedule)
    report = call(probes, "wild", np.zeros(1, np.int32), 1)
    assert re.search(r"thread 3 .*: illegal address: 4-byte write in no buffer, of 0x8 at .*probes.cpp:\d+", report)
    report = call(probes, "wild", np.zeros(1, np.int32), 2)
    assert re.search(r"thread 3 .*: undefined behaviour: division by zero .* at .*probes.cpp:\d+:\d+", report)


def test_a_stack_overflow_is_told(plain):
    assert call(plain, "recurse", np.zeros(1, np.int32), 20) == ""
    assert "stack overflow" in call(plain, "recurse", np.zeros(1, np.int32), 100000)


def test_host_code_may_throw(plain):
    assert re.search(
        r"^caught: block \(0,0,0\) thread 3 .*illegal address", call(plain, "throwing", np.zeros(1, np.int32))
    )


def test_an_endless_wait_ends(probes, schedule):
    probes.configure(**schedule, max_steps=1000)
    report = call(probes, "spin", np.zeros(1, np.int32))
    assert "gave way 1000 times in this launch: a wait that never ends?" in report


def test_early_return_is_a_choice(probes, schedule):
    probes.configure(**schedule)
    out = np.zeros(40, np.int32)
    assert re.search(r"__syncthreads at .*:\d+ after 24 threads of the block have returned|deadlock",
                     call(probes, "early_return", out))  # fmt: skip
    probes.configure(**schedule, early_exit_ok=True)
    assert call(probes, "early_return", out) == ""
    assert (out == 5).all()


@pytest.mark.parametrize(
    ("shape", "report"),
    [
        ((1, 0, 0), "launch refused: 0 threads a block; a block has 1 to 1024"),
        ((1, 1025, 0), "launch refused: 1025 threads a block"),
        ((0, 32, 0), "launch refused: 0 blocks"),
        ((1, 32, 232449), "launch refused: 232449 bytes of dynamic shared memory; a block has 232448"),
    ],
)
def test_impossible_launches_are_refused(probes, shape, report):
    blocks, threads, smem = shape
    assert report in call(probes, "shape", blocks, threads, ctypes.c_size_t(smem))


def test_the_picture_of_a_deadlock(folder):
    folder.mkdir(exist_ok=True)
    source = folder / "deadlock.cpp"
    source.write_text("""#include <cuda_runtime.h>
__global__ void stuck(int* out) {
  if (threadIdx.x >= 64 && threadIdx.x % 2) __syncwarp();
  if (threadIdx.x == 96) return;
  __syncthreads();
  *out = 0;
}
SIMT_EXPORT const char* run_stuck(int* out) {
  simt::clear_buffers();
  simt::add_buffer(out, 4, "out", simt::OUT);
  return simt::launch(stuck, 1, 128, 0, out) ? "" : simt::error();
}
""")
    library = build(source, folder)
    for schedule in SCHEDULES.values():
        library.configure(**schedule)
        report = call(library, "stuck", np.zeros(1, np.int32)).replace(str(folder), "")
        assert report == (
            "block (0,0,0): deadlock, no lane can go on:\n"
            "    warps 0 to 1:\n"
            "      lanes ffffffff wait in __syncthreads at /deadlock.cpp:5\n"
            "    warp 2:\n"
            "      lanes 55555555 wait in __syncthreads at /deadlock.cpp:5\n"
            "      lanes aaaaaaaa wait in __syncwarp at /deadlock.cpp:3\n"
            "    warp 3:\n"
            "      lanes 00000001 have returned\n"
            "      lanes aaaaaaaa wait in __syncwarp at /deadlock.cpp:3\n"
            "      lanes 55555554 wait in __syncthreads at /deadlock.cpp:5"
        )


# ---- libraries and the build


def test_libraries_do_not_share_anything(hooks, plain):
    hooks.configure(order="random", seed=5)
    plain.configure(order="descending")
    assert (hooks.config.order, plain.config.order) == (ORDERS["random"], ORDERS["descending"])
    before = plain.stats.blocks
    assert "__trap()" in call(hooks, "wild", np.zeros(1, np.int32), 3)
    assert plain.stats.blocks == before
    assert call(plain, "wild", np.zeros(1, np.int32), 9) == ""
    assert "__trap()" in hooks.error()
    assert plain.error() == ""


def test_a_library_loaded_twice_is_one_and_has_the_defaults(hooks):
    hooks.configure(order="random", preempt=3)
    again = Library(hooks.path, hooks=True)
    assert (again.config.order, again.config.preempt, again.config.lazy_async) == (ORDERS["ascending"], 0, True)
    assert again.config.multiprocessors == 4
    hooks.configure(preempt=2)
    assert again.config.preempt == 2


def test_a_library_exports_nothing_unasked(hooks):
    symbols = subprocess.run(["nm", "-D", "--defined-only", hooks.path], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in symbols.stdout.splitlines()}
    assert {"simt_config", "simt_stats", "simt_error"} < names
    assert all(re.match(r"run_\w+|simt_(config|reset_config|stats|error)|count_unwritten", name) for name in names)


def test_any_thread_may_launch(hooks):
    """Each OS thread has its own copy of the static shared memory."""
    hooks.configure()
    data, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    reports = []
    worker = threading.Thread(target=lambda: reports.append(call(hooks, "reverse", data, out, 64)))
    worker.start()
    worker.join()
    assert reports == [""]
    assert out[63] == data[0] + 2 * data[1]
    assert call(hooks, "reverse", data, out, 64) == ""


def test_nothing_is_compiled_twice(folder, tmp_path):
    source = tmp_path / "one.cpp"
    source.write_text("#include <cuda_runtime.h>\nSIMT_EXPORT int answer() { return ANSWER; }\n")
    path = compile_library(source, folder, define={"ANSWER": 42})
    written = path.stat().st_mtime_ns
    assert compile_library(source, folder, define={"ANSWER": 42}) == path
    assert path.stat().st_mtime_ns == written
    other = compile_library(source, folder, define={"ANSWER": 43})
    assert other != path
    assert [ctypes.CDLL(str(p)).answer() for p in (path, other)] == [42, 43]
    assert not list(folder.glob(".*"))  # no partial files are left


def test_the_example_of_the_readme(folder, tmp_path, monkeypatch):
    """Its two files as they stand, with a kernel that leaves out the last number or not."""
    host, program = re.findall(r"```(?:cpp|python)?\n(.*?)```", (SAMPLES.parent / "README.md").read_text(), re.S)[:2]
    assert "run_scale" in host
    (tmp_path / "scale_test.cpp").write_text(host)
    monkeypatch.chdir(tmp_path)
    n = 1000
    x, y = np.arange(n, dtype=np.float32), np.zeros(n, np.float32)
    for missing in (0, 1):
        (tmp_path / "scale.cuh").write_text(
            f"""#include <cuda_runtime.h>
            __global__ void scale(const float* x, float* y, int n) {{
              const int i = blockIdx.x * blockDim.x + threadIdx.x;
              if (i < n - {missing}) y[i] = 2 * x[i];
            }}"""
        )
        names = {"Path": Path, "folder": folder, "x": x, "y": y, "n": n}
        if missing:
            with pytest.raises(AssertionError):
                exec(program, names)
            assert call(names["library"], "scale", x, y, n) == "y is not fully written"
        else:
            exec(program, names)
            assert np.array_equal(y, 2 * x)


def test_refused_sources_raise_with_the_compilers_text(folder, tmp_path):
    source = tmp_path / "old.cpp"
    source.write_text("#include <cuda_runtime.h>\n#if __CUDA_ARCH__ >= 900\n#endif\n")
    with pytest.raises(RuntimeError, match="__CUDA_ARCH__"):
        compile_library(source, folder)


def test_the_portable_context_switch(folder):
    """Same results with ucontext, which other processors need."""
    library = build(SAMPLES / "probes.cpp", folder, hooks=False, emulator_flags=["-DSIMT_UCONTEXT"])
    data, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    for schedule in SCHEDULES.values():
        library.configure(**schedule)
        out[:] = 0
        assert call(library, "reverse", data, out, 64) == ""
        assert np.array_equal(out, data[::-1] + 2 * np.tile(data[:2], 32))
    assert "illegal address" in call(library, "wild", np.zeros(1, np.int32), 1)


# ---- arithmetic


def test_every_16_bit_pattern_widens(probes):
    bits = np.arange(65536, dtype=np.uint16)
    half, bfloat = np.zeros(65536, np.float32), np.zeros(65536, np.float32)
    assert call(probes, "widen", bits, half, bfloat) == ""
    assert np.array_equal(half, bits.view(np.float16).astype(np.float32), equal_nan=True)
    by_torch = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(bfloat, by_torch, equal_nan=True)


def hard_floats() -> np.ndarray:
    """Random patterns of all exponents, exact ties of both types and their neighbours, and the special ones."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 50_000, dtype=np.uint64)
    ties = np.concatenate([rng.integers(0, 2**16, 5_000, dtype=np.uint64) << 16 | 0x8000,
                           rng.integers(0, 2**19, 5_000, dtype=np.uint64) << 13 | 0x1000])  # fmt: skip
    special = [0, 2**31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 1]
    patterns = np.concatenate([patterns, ties, ties - 1, ties + 1, np.array(special, np.uint64)])
    return (patterns & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def test_floats_narrow_to_the_nearest(probes):
    x = hard_floats()
    half, bfloat = np.zeros(len(x), np.uint16), np.zeros(len(x), np.uint16)
    assert call(probes, "narrow", x, half, bfloat, len(x)) == ""
    nan = np.isnan(x)
    with np.errstate(over="ignore"):
        assert np.array_equal(half[~nan], x[~nan].astype(np.float16).view(np.uint16))
    by_torch = torch.from_numpy(x[~nan]).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bfloat[~nan], by_torch)
    assert (half[nan] == 0x7FFF).all()
    assert (bfloat[nan] == 0x7FFF).all()


FORMATS = {"half": (10, -14, 15), "bfloat16": (7, -126, 127)}  # fraction bits, least and greatest exponent


def values_of(kind: str, bits: np.ndarray) -> list[Fraction]:
    if kind == "half":
        return [Fraction(float(v)) for v in bits.view(np.float16)]
    return [Fraction(float(v)) for v in (bits.astype(np.uint32) << 16).view(np.float32)]


def nearest(kind: str, x: Fraction) -> int:
    """The 16 bits of x rounded once to nearest, ties to even; x must not be 0."""
    fraction, least, greatest = FORMATS[kind]
    magnitude = abs(x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    while Fraction(2) ** exponent > magnitude:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    exponent = max(exponent, least)
    units = round(magnitude / Fraction(2) ** (exponent - fraction))  # Python rounds ties to even
    bits = units + ((exponent - least) << fraction)  # a carry runs into the exponent by itself; subnormals have none
    largest = (greatest - least + 2) << fraction
    return min(bits, largest) | (0x8000 if x < 0 else 0)


@pytest.mark.parametrize("kind", FORMATS)
def test_sixteen_bit_arithmetic_rounds_once(probes, kind):
    """Against exact fractions; fused multiply-add includes sums that a double cannot hold."""
    rng = np.random.default_rng(2)
    n = 600
    top = 0x7C00 if kind == "half" else 0x7F80
    a, b, c = ((rng.integers(0, top, n) | rng.integers(0, 2, n) << 15).astype(np.uint16) for _ in "abc")
    one = 0x3C00 if kind == "half" else 0x3F80
    # near-equal magnitudes; and products that are ties but for a tiny addend, which only exact sums can tell
    a[:150] = one + rng.integers(0, 64, 150)
    b[:150] = one + rng.integers(0, 64, 150)
    c[:75] = one + rng.integers(0, 64, 75)
    c[75:150] = rng.integers(1, 9, 75) | (rng.integers(0, 2, 75) << 15)
    operations = [
        lambda x, y, z: x + y,
        lambda x, y, z: x - y,
        lambda x, y, z: x * y,
        lambda x, y, z: x / y if y else None,
        lambda x, y, z: x * y + z,
        lambda x, y, z: max(x, y),
        lambda x, y, z: min(x, y),
    ]
    exact = list(zip(*(values_of(kind, v) for v in (a, b, c)), strict=True))
    least = 0 if kind == "half" else Fraction(2) ** -126  # below, float itself has no room for rounding only once
    for index, operation in enumerate(operations):
        single, paired = np.zeros(n, np.uint16), np.zeros(n, np.uint16)
        assert call(probes, kind, index, a, b, c, single, n) == ""
        assert call(probes, f"{kind}2", index, a, b, c, paired, n // 2) == ""
        assert np.array_equal(single, paired)
        if index < 4:  # the operators
            assert call(probes, f"{kind}2", 7 + index, a, b, c, paired, n // 2) == ""
            assert np.array_equal(single, paired)
        for i, operands in enumerate(exact):
            result = operation(*operands)
            if result and abs(result) >= least:
                assert single[i] == nearest(kind, result), (index, a[i], b[i], c[i])


def test_single_precision(probes):
    rng = np.random.default_rng(3)
    n = 2000
    a, b, c = ((rng.standard_normal(n) * 10.0 ** rng.integers(-8, 8, n)).astype(np.float32) for _ in "abc")
    sums = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(*(v.tolist() for v in (a, b, c)), strict=True)]
    expected = [
        a + b,
        a - b,
        a * b,
        a / b,
        np.array([float(x) for x in sums]).astype(np.float32),  # no sum here lies so near a tie that double misleads
        np.float32(1) / a,
        np.rint(a),
        np.minimum(a, b) + np.maximum(a, b),
        a * b + c,
    ]  # fmt: skip
    for index, values in enumerate(expected):
        out = np.zeros(n, np.float32)
        assert call(probes, "float", index, a, b, c, out, n) == ""
        assert np.array_equal(out, values), index


def test_rounding_to_integers_saturates(probes):
    small, limits = [0.5, 1.5, 2.5, -0.5, -1.5, 0.0, -0.0, 3.7, -3.7], [2147483520.0, -2147483648.0, 4294967040.0]
    x = np.array([*small, *limits, 1e10, -1e10, 5e9, np.inf, -np.inf, np.nan], np.float32)
    out, unsigned = np.zeros((4, len(x)), np.int32), np.zeros((4, len(x)), np.uint32)
    assert call(probes, "rounding", x, out, unsigned, len(x)) == ""
    for row, function in enumerate((np.rint, np.trunc, np.floor, np.ceil)):
        rounded = np.nan_to_num(function(x.astype(np.float64)), nan=0.0, posinf=1e30, neginf=-1e30)
        assert np.array_equal(out[row], np.clip(rounded, -(2**31), 2**31 - 1).astype(np.int64))
        assert np.array_equal(unsigned[row], np.clip(rounded, 0, 2**32 - 1).astype(np.int64))


def test_bit_operations(probes):
    rng = np.random.default_rng(4)
    a, b, c = (rng.integers(0, 2**32, 500, dtype=np.uint64).astype(np.uint32) for _ in "abc")
    a[:3] = 0, 1, 2**32 - 1
    out = np.zeros((10, 500), np.uint32)
    assert call(probes, "bit_operations", a, b, c, out, 500) == ""
    for i, (x, y, z) in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        octets = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        digits = f"{x:032b}"
        both = y << 32 | x
        signed = [v - 2**32 if v >> 31 else v for v in (x, y)]
        assert out[:, i].tolist() == [
            int.from_bytes(bytes(octets[z >> shift & 7] for shift in (0, 4, 8, 12)), "little"),
            digits.count("1"),
            32 if x == 0 else digits.index("1"),
            digits[::-1].find("1") + 1,
            int(digits[::-1], 2),
            both << (z % 32) >> 32 & 0xFFFFFFFF,
            both >> (z % 32) & 0xFFFFFFFF,
            x * y >> 32,
            signed[0] * signed[1] >> 32 & 0xFFFFFFFF,
            x,
        ]


def test_bits_do_not_depend_on_the_schedule(probes):
    """Sums in a fixed order are fixed bits, whoever runs first."""
    x = np.random.default_rng(5).integers(0, 100, 64).astype(np.int32)
    seen = set()
    for order, seed in itertools.product(ORDERS, range(3)):
        probes.configure(order=order, seed=seed)
        out = np.zeros(64, np.int32)
        assert call(probes, "reverse", x, out, 64) == ""
        seen.add(out.tobytes())
    assert len(seen) == 1
