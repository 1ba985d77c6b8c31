"""`qft bench`: the short table measures what it says, and times nothing that is wrong."""

import pytest
import torch

from qft import kernels, ops
from qft.format import Format
from qft.speed import check, clock, limits, roofline, short_table, verbs

LIMITS = {"read": 1e9, "write": 5e8, "copy": 1e9, "bf16": 1e12, "f32": 1e11}
SMALL = ("--quick", "--shape", 48, 128, "--rows", 1, "--rows", 20)
VERBS = ("matmul", "train", "scale_grad", "quantize", "dequantize")


@pytest.fixture(autouse=True)
def small_machine(monkeypatch, threads):
    """Limits that are known, and a cache that is quick to flush."""
    threads(1)
    monkeypatch.setattr(limits, "limits", lambda rounds: dict(LIMITS))
    monkeypatch.setattr(clock, "last_level_cache", lambda: 1 << 12)


def test_the_table_has_every_verb_in_every_format_beside_dense_torch(result):
    found = result("bench", *SMALL, "--formats", "nf4 g64 f32", "--formats", "int4 g64 f16 zero", "--threads", 2)
    assert found["machine"]["threads"] == 2
    assert found["limits"] == LIMITS
    assert (found["shape"], found["dtype"]) == ([48, 128], "bf16")
    ours = [(row["task"], row["format"]) for row in found["rows"] if row["format"]]
    names = ("matmul M=1", "fwd + dx M=20", "scale_grad M=20", "quantize", "dequantize")
    assert ours == [(name, fmt) for name in names for fmt in ("nf4 g64 f32", "int4 g64 f16 zero")]
    assert [row["verb"] for row in found["rows"] if row["format"] is None] == ["matmul", "train", "scale_grad"]
    for row in found["rows"]:
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["rounds"] == 3
        least = roofline.Work(row["read_bytes"], row["written_bytes"], row["operations"])
        assert row["percent_of_roofline"] == pytest.approx(roofline.percent(least, row["median_s"], LIMITS))
        assert row["bytes_per_s"] == pytest.approx(least.nbytes / row["median_s"])
        if row["dense_s"] is not None:
            assert row["dense_over_this"] == pytest.approx(row["dense_s"] / row["median_s"])
        if row["format"]:
            assert row["relative_error"] <= check.TOLERANCE["bf16"]
    (dense,) = (row for row in found["rows"] if row["format"] is None and row["verb"] == "scale_grad")
    assert dense["dense_over_this"] == 1
    assert dense["written_bytes"] == 48 * 128 * 2  # dW is in memory


def test_what_is_printed_says_how_to_read_it(run):
    code, out, _ = run("bench", *SMALL, "--formats", "nf2 g64 f16")
    assert code == 0
    assert "limits: read 1.0, write 0.5, copy 1.0 GB/s" in out
    assert "not for comparison" in out
    assert "of roofline: the least time" in out
    problem = kernels.Problem("quantize", Format.parse("nf2 g64 f16"), "cpu", torch.bfloat16)
    lines = [line.split() for line in out.splitlines()]
    assert ["nf2", "g64", "f16", kernels.choose(problem).kernel.name] in [line[:4] for line in lines]  # in one line
    assert sum(line[:3] == ["nf2", "g64", "f16"] and line[-2] == "%" for line in lines) == 5
    assert sum(line[:2] == ["dense", "torch"] and line[-2] == "%" for line in lines) == 3


def test_a_busy_machine_is_said_to_be_one(run, monkeypatch):
    monkeypatch.setattr(short_table.os, "getloadavg", lambda: (99.0, 0, 0), raising=False)
    assert "load average 99.0 before: other work was running" in run("bench", *SMALL, "--formats", "nf2 g64 f16")[1]


def test_without_options_it_is_a_large_layer_in_four_formats(monkeypatch, run, threads):
    asked = []

    def spy(wanted, tell):
        asked.append(wanted)
        raise ValueError("seen")

    monkeypatch.setattr(short_table, "measure", spy)
    assert run("bench") == (2, "", "qft: seen\n")
    assert run("bench", "--quick", "--dtype", "float32")[0] == 2
    whole, quick = asked
    assert whole == short_table.Wanted()
    assert whole.formats == ("nf4 g64 f32", "nf3 g64 f32", "nf2 g64 f32", "int4 g64 f32")
    assert (whole.shape, whole.rows) == ((4096, 14336), (1, 8, 512))
    assert (quick.shape, quick.dtype, quick.effort.most) == ((4096, 4096), "f32", 3)


BAD = {
    "another device": (("--device", "cuda"), "not cuda; for a GPU say `make gpu-bench`"),
    "a dtype without a limit": (("--dtype", "float16"), "dtype 'float16' is not timed"),
    "no threads": (("--threads", 0), "0 threads time nothing; use 1 or more"),
    "no rows": (("--rows", 0), "0 rows of x"),
    "an empty layer": (("--shape", 0, 64), "a layer 0 x 64"),
    "no format": (("--formats", "nf5 g64"), "nf5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(run, case):
    words, said = BAD[case]
    code, out, err = run("bench", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


# ---- what is timed


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize(
    "fmt", ["nf4 g64 f32", "nf3 g64 f16", "nf2 g64 dq", "int4 g32 f16 zero", "int8 channel f32", "[-1 -0.3 1] g64 f32"]
)
def test_every_task_in_every_kind_of_format_passes_its_check(fmt, dtype):
    w = check.weight_like((96, 128), roofline.DTYPES[dtype])
    made = verbs.checked([*verbs.tasks([1, 3, 40])], w, Format.parse(fmt), dtype)
    assert [one.task.verb for one in made] == ["matmul", *VERBS]
    for one in made:
        assert one.error <= check.TOLERANCE[dtype]
        assert one.kernel
    (grad,) = (one for one in made if one.task.verb == "scale_grad")
    by_channel = Format.parse(fmt).group == 0
    assert (grad.kernel == "sum of dy y / s") == by_channel
    assert grad.work.operations == 2 * 40 * 96 * (1 if by_channel else 128)


def test_double_quantized_scales_are_compared_whole():
    """They are quantized in blocks that run through all rows: some rows of a larger weight have others."""
    w = check.weight_like((1800, 128), torch.float32)
    assert len(w[check.every(1800, check.SAMPLE[1])]) < 1800
    (made,) = verbs.checked([verbs.Task("quantize")], w, Format.parse("nf4 g64 dq"), "f32")
    assert made.error <= 1e-5


WRONG = {
    "matmul": (ops, "matmul", lambda made: made * 1.02),
    "train": (torch.autograd, "grad", lambda made: (made[0] * 1.02,)),
    "scale_grad": (torch.autograd, "grad", lambda made: (made[0] * 1.02,)),
    "quantize": (verbs, "quantize", lambda made: made.with_scales(made.scales * 1.02)),
    "dequantize": (kernels, "dequantize", lambda made: made * 1.02),
}


@pytest.mark.parametrize("verb", WRONG)
def test_a_wrong_result_is_not_timed(verb, monkeypatch, run):
    module, name, spoil = WRONG[verb]
    right = getattr(module, name)
    w = check.weight_like((96, 128), torch.bfloat16)
    if verb == "quantize":  # the weight that others are checked against is made first, and right
        calls = iter([right])
        monkeypatch.setattr(module, name, lambda *a: next(calls, lambda *b: spoil(right(*b)))(*a))
    else:
        monkeypatch.setattr(module, name, lambda *a, **k: spoil(right(*a, **k)))
    with pytest.raises(ValueError, match=f"{verb.replace('train', 'fwd . dx')}.*a wrong result is not timed"):
        verbs.checked([verbs.Task(verb, 20 if verb in VERBS[:3] else 0)], w, Format.parse("nf4 g64 f32"), "bf16")


def test_no_number_is_a_wrong_result():
    with pytest.raises(ValueError, match="relative error nan exceeds"):
        check.require(float("nan"), "bf16", "matmul")


@pytest.mark.parametrize(("rows", "verb"), [(3, "matmul"), (40, "train"), (40, "scale_grad")])
def test_dense_torch_does_the_same_work(rows, verb):
    w = check.weight_like((96, 128), torch.float32)
    x, dy = (check.operand(rows, n, w.dtype, seed) for n, seed in ((128, verbs.X), (96, verbs.DY)))
    made = verbs.dense_call(verbs.Task(verb, rows), w)()
    expected = {"matmul": (x @ w.T,), "train": (x @ w.T, dy @ w), "scale_grad": (dy.T @ x,)}[verb]
    for found, truth in zip(made if verb == "train" else (made,), expected, strict=True):
        torch.testing.assert_close(found.detach(), truth)


def test_dense_torch_has_no_call_for_what_packs():
    w = check.weight_like((96, 128), torch.float32)
    assert verbs.dense_call(verbs.Task("quantize"), w) is None
    assert verbs.dense_call(verbs.Task("dequantize"), w) is None


def test_calls_of_a_task_take_turns_with_flushed_caches(monkeypatch):
    flushed, heard = [], []
    monkeypatch.setattr(short_table, "cache_flush", lambda: (lambda: flushed.append(1), 0))
    right = short_table.interleave

    def spy(calls, effort, flush):
        heard.append(len(calls))
        return right(calls, effort, flush)

    monkeypatch.setattr(short_table, "interleave", spy)
    formats = ("nf4 g64 f32", "nf2 g64 f32")
    short_table.measure(short_table.Wanted(formats, (48, 128), (1,), effort=clock.Effort(2, 2), limit_rounds=1))
    assert heard == [3, 2, 2]  # matmul with dense torch, quantize, dequantize
    assert len(flushed) == 3 * sum(heard)  # two rounds and the one thrown away


def test_a_sample_meets_every_lane_of_a_vector():
    some = check.every(4096, 585)
    assert some.step % 2 == 1
    assert len(range(4096)[some]) >= 585
