"""What the machine can do, calls timed in turn, and the least that a verb costs."""

import pytest
import torch

import qft
from qft.speed import clock, limits, roofline

LIMITS = {"read": 1e9, "write": 5e8, "copy": 1e9, "bf16": 1e12, "f32": 1e11}


# ---- the machine


def lay_out(folder, cpu, *levels):
    """A core's caches as the system shows them: (kind, level, size, sharers)."""
    for index, (kind, level, size, sharers) in enumerate(levels):
        place = folder / f"cpu{cpu}" / "cache" / f"index{index}"
        place.mkdir(parents=True)
        for name, value in (("type", kind), ("level", level), ("size", size), ("shared_cpu_list", sharers)):
            (place / name).write_text(f"{value}\n")


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(limits, "cores", lambda: [1, 2, 5, 6])


def test_caches_are_read_in_bytes(tmp_path, four_cores):
    lay_out(tmp_path, 1, ("Data", 1, "48K", "1"), ("Instruction", 1, "32K", "1"), ("Unified", 3, "32M", "0-3"))
    assert limits.caches(tmp_path) == {"L1": 48 << 10, "L3": 32 << 20}
    assert limits.caches(tmp_path / "absent") == {}


def test_every_last_level_cache_that_the_cores_sit_on_counts_once(tmp_path, four_cores):
    for cpu, sharers in ((1, "0-3"), (2, "0-3"), (5, "4-7"), (6, "4-7"), (9, "8-11")):
        lay_out(tmp_path, cpu, ("Data", 1, "48K", str(cpu)), ("Unified", 3, "32M", sharers))
    assert limits.last_level_cache(tmp_path) == 64 << 20
    assert limits.last_level_cache(tmp_path / "absent") == limits.UNKNOWN_CACHE


def test_a_limit_is_the_fastest_of_its_calls_and_the_first_is_left_out(monkeypatch):
    ticks = iter([0.0, 0.1, 1.0, 1.5, 2.0, 2.3, 3.0, 3.9])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(ticks))
    assert limits.best(int, 3) == pytest.approx(0.3)


def test_limits_are_measured(monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(limits, "last_level_cache", lambda: 1 << 16)
    found = limits.limits(1)
    assert set(found) == set(LIMITS)
    assert all(1e7 < limit < 1e15 for limit in found.values())
    assert limits.processor()["threads"] == 1


# ---- the clock


def test_calls_take_turns_and_the_first_round_is_thrown_away():
    heard = []
    calls = [lambda i=i: heard.append(i) for i in range(3)]
    times = clock.interleave(calls, clock.Effort(4, 4), lambda: heard.append("flush"))
    assert [len(seconds) for seconds in times] == [4, 4, 4]
    assert heard[::2] == ["flush"] * 15
    rounds = [heard[1::2][at : at + 3] for at in range(0, 15, 3)]
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    assert [one[0] for one in rounds] == [2, 0, 1, 2, 0]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (60.0, 7)])
def test_rounds_stay_between_least_and_most(seconds, rounds):
    assert len(clock.interleave([int], clock.Effort(3, 7, seconds), int)[0]) == rounds


def test_the_flush_reads_four_times_the_cache(monkeypatch):
    monkeypatch.setattr(clock, "last_level_cache", lambda: 1 << 12)
    flush, nbytes = clock.cache_flush()
    assert nbytes == 4 << 12
    assert flush() == nbytes // 4  # of ones: all of it was read


def test_a_spread_is_median_and_extremes():
    assert clock.spread([5.0, 1.0, 2.0]) == {"median_s": 2.0, "min_s": 1.0, "max_s": 5.0, "rounds": 3}


# ---- the roofline


@pytest.mark.parametrize(
    ("work", "seconds", "by"),
    [
        (roofline.Work(2000, 10, 0), 2e-6, "memory"),
        (roofline.Work(10, 2000, 0), 4e-6, "memory"),
        (roofline.Work(10, 10, 3_000_000), 3e-6, "arithmetic"),
        (roofline.Work(10, 10, 3_000_000, "f32"), 3e-5, "arithmetic"),
    ],
)
def test_the_slowest_of_memory_and_arithmetic_bounds(work, seconds, by):
    assert roofline.bound(work, LIMITS) == (pytest.approx(seconds), by)
    assert roofline.percent(work, 2 * seconds, LIMITS) == pytest.approx(50)


def test_the_least_of_every_verb_is_counted_from_its_tensors():
    w = torch.randn(64, 128, dtype=torch.bfloat16)
    q = qft.quantize(w, "nf4 g64 f32")
    x, dy = torch.randn(3, 128).bfloat16(), torch.randn(3, 64).bfloat16()
    product = 2 * 3 * 64 * 128
    stored = q.nbytes
    expected = {
        "matmul": (stored + x.nbytes, dy.nbytes, product),
        "matmul_t": (stored + dy.nbytes, x.nbytes, product),
        "train": (2 * stored + x.nbytes + dy.nbytes, x.nbytes + dy.nbytes, 2 * product),
        "scale_grad": (stored + x.nbytes + dy.nbytes, 0, product),
        "weight_grad": (x.nbytes + dy.nbytes, w.nbytes, product),
        "channel_scale_grad": (2 * dy.nbytes, 0, 2 * 3 * 64),
    }
    for verb, least in expected.items():
        assert roofline.work(verb, (64, 128), stored, 3) == roofline.Work(*least, "bf16")
    assert roofline.work("quantize", (64, 128), stored) == roofline.Work(w.nbytes, stored, 0)
    assert roofline.work("dequantize", (64, 128), stored, dtype="f32") == roofline.Work(stored, 2 * w.nbytes, 0, "f32")
    search = roofline.search_work((64, 128), stored, 33)
    assert search == roofline.Work(w.nbytes, stored, 4 * 33 * 64 * 128, "f32")
    assert search.nbytes == w.nbytes + stored


@pytest.mark.parametrize(("verb", "dtype"), [("transmogrify", "bf16"), ("matmul", "f64")])
def test_what_has_no_roofline_is_refused(verb, dtype):
    with pytest.raises(ValueError, match=r"transmogrify.*unknown|f64.*no measured limit"):
        roofline.work(verb, (64, 64), 100, 1, dtype)
