"""The benchmarks' own arithmetic: cases, targets, checks before timing, the report; and one small real run."""

import json
import sys
from pathlib import Path

import pytest
import torch

import qft
from qft.speed import check, clock, limits, roofline

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import cases
import contenders
import experiments
import jobs
import speed

LIMITS = {"read": 1e9, "write": 5e8, "copy": 1e9, "bf16": 1e12, "f32": 1e11}
SMALL = (128, 256)
OURS = cases.qft("matmul", shape=SMALL, rows=3)
DENSE = cases.peer("dense torch", OURS)
SMALL_EXPERIMENT = cases.Experiment(
    "Small",
    (OURS, *(cases.peer(who, OURS) for who in cases.PEERS), cases.qft("matmul", shape=SMALL, rows=3, kernel="scalar")),
    (*cases.against(OURS, "one token", dense_torch=("speedup", 1e-9)), cases.Target(OURS, "time", 0.0, row="quantize")),
    headline=True,
)


# ---- cases


def test_targets_compare_cases_of_their_own_experiment():
    for experiment in experiments.EXPERIMENTS:
        assert len(set(experiment.cases)) == len(experiment.cases)
        for target in experiment.targets:
            assert target.measure in cases.MEASURES
            assert {target.subject, target.against or target.subject} <= set(experiment.cases)
            assert (target.against is not None) == (target.measure in ("speedup", "time ratio"))


HELD = ("nf4 g64 f32", "nf3 g64 f32", "nf2 g64 f32", "int4 g64 f32")
WIDE = ((4096, 14336), (14336, 4096))


def bounds(row):
    """(measure, limit, who it is against, format, shape, rows) of the targets of one row of the table."""
    return {
        (
            target.measure,
            target.limit,
            getattr(target.against, "who", None),
            target.subject.fmt,
            getattr(target.subject, "shape", None),
            target.subject.rows,
        )
        for experiment in experiments.EXPERIMENTS
        for target in experiment.targets
        if target.row == row
    }


def test_every_row_of_the_table_of_targets_is_held_to_its_bounds():
    nf4, square, down = HELD[0], (4096, 4096), (4096, 14336)
    against = (
        ("read bandwidth", 85, None),
        ("speedup", 3.0, "dense torch"),
        ("speedup", 25.0, "bitsandbytes"),
        ("speedup", 1.5, "bitsandbytes eval"),
        ("speedup", 1.0, "torch int4"),
    )
    assert bounds("one token") == {(*bound, fmt, shape, 1) for bound in against for fmt in HELD for shape in WIDE}
    growth = {("time ratio", 1.6, "qft", fmt, down, 8) for fmt in HELD}
    int4 = {("speedup", 1.0, "torch int4", fmt, down, rows) for fmt in HELD for rows in (2, 4, 8, 16)}
    assert bounds("few tokens") == growth | int4
    both = [(rows, shape) for rows in (128, 512, 2048) for shape in (square, down)]
    dense = {("time ratio", limit, "dense torch", nf4, shape, rows) for rows, shape in both for limit in (1.05, 1.10)}
    assert bounds("batch") == dense
    assert bounds("scale_grad") == {("time ratio", 1.15, "dense torch", nf4, shape, 512) for shape in (square, down)}
    times = {(5.0, nf4), (60.0, "lm4 g64 f32")}
    assert bounds("quantize") == {("time", limit, None, fmt, square, 0) for limit, fmt in times}
    assert bounds("dequantize") == {("write bandwidth", 70, None, fmt, square, 0) for fmt in HELD}
    assert bounds("loftq") == {
        (measure, limit, None, fmt, square, 0)
        for measure, limit in (("time", 1000.0), ("error", 0.5))
        for fmt in (nf4, "nf2 g64 f32")
    }
    assert bounds("avx2") == {("speedup", 0.6, "qft", fmt, shape, 1) for fmt in HELD for shape in WIDE}
    assert bounds("step") == {("time ratio", 1.15, "dense torch", nf4, None, 1024)}
    assert bounds("earlier") >= {("speedup", 10, "bitsandbytes", nf4, square, 1)}


def test_every_target_stands_in_a_row_and_every_row_has_one():
    rows = [target.row for experiment in experiments.EXPERIMENTS for target in experiment.targets]
    assert set(rows) == set(experiments.ROWS)


def test_kinds_of_a_case_are_named_apart():
    for experiment in experiments.EXPERIMENTS:
        names = [(case.work, case.name) for case in experiment.cases]
        assert len(set(names)) == len(names)
    assert cases.qft("quantize", search=True).work == "quantize with scale search 4096x4096 bf16"
    assert cases.qft("dequantize", into=True).work == "dequantize into a tensor 4096x4096 bf16"
    assert cases.qft("loftq", dtype="f32").work == "loftq r=64 T=5 4096x4096 f32"
    assert cases.qft("matmul", rows=8).work == "matmul M=8 4096x4096 bf16"


def test_both_sides_of_the_crossing_are_timed_over_all_rows():
    series = [experiment for experiment in experiments.EXPERIMENTS if experiment.series]
    assert [experiment.cases[0].rows for experiment in series] == [2**power for power in range(12)]
    for experiment in series:
        who = {(case.who, case.kernel) for case in experiment.cases}
        assert who >= {("qft", None), ("qft", "panel"), ("dense torch", None), ("bitsandbytes", None)}
        assert (("qft", "avx512") in who) == (experiment.cases[0].rows <= 256)


def test_microbenchmarks_cover_every_verb_format_layer_and_peer():
    found = experiments.MICROBENCHMARKS
    assert len(set(found)) == len(found)
    verbs = {"matmul", "matmul_t", "train", "scale_grad", "quantize", "dequantize"}
    assert {case.verb for case in found if case.who == "qft"} == verbs
    assert {case.verb for case in found if case.who == "bitsandbytes"} == verbs - {"scale_grad"}
    assert {case.who for case in found} == set(contenders.CONTENDERS)
    assert {case.shape for case in found} == set(cases.LAYERS)
    assert {case.fmt for case in found if case.verb == "matmul_t"} >= set(cases.FORMATS)


def test_formats_are_spelled_as_qft_spells_them():
    every = (case for experiment in experiments.EXPERIMENTS for case in experiment.cases)
    spellings = {case.fmt for case in every if case.who == "qft"}
    assert all(str(qft.Format.parse(fmt)) == fmt for fmt in spellings)
    assert len(qft.Format.parse(cases.OWN).levels) == 11


# ---- rows


def ready(read=0, written=0, operations=0):
    return contenders.Ready(int, 0.001, 100, roofline.Work(read, written, operations), "avx512")


@pytest.mark.parametrize(
    ("cost", "bound_s", "by"),
    [
        (ready(2000, 10), 2e-6, "memory"),
        (ready(10, 2000), 4e-6, "memory"),
        (ready(10, 10, 3_000_000), 3e-6, "arithmetic"),
    ],
)
def test_a_row_has_median_spread_and_distance_to_the_roofline(cost, bound_s, by):
    row = speed.row(OURS, cost, [5e-5, 1e-5, 2e-5], LIMITS)
    assert (row["median_s"], row["min_s"], row["max_s"], row["rounds"]) == (2e-5, 1e-5, 5e-5, 3)
    assert row["percent_of_roofline"] == pytest.approx(100 * bound_s / 2e-5)
    assert row["bound_by"] == by


@pytest.mark.parametrize(
    ("measure", "against", "measured"),
    [
        ("speedup", DENSE, 0.5),
        ("time ratio", DENSE, 2.0),
        ("read bandwidth", None, 10.0),
        ("write bandwidth", None, 40.0),
        ("time", None, 0.02),
        ("error", None, 0.3),
    ],
)
def test_a_target_is_met_up_to_its_limit(measure, against, measured):
    rows = {
        OURS: {"median_s": 2e-5, "read_bytes": 2000, "written_bytes": 4000, "relative_error": 0.003},
        DENSE: {"median_s": 1e-5, "read_bytes": 0, "written_bytes": 0},
    }
    at_least = cases.MEASURES[measure][0] == "at least"
    for factor, met in ((0.99, at_least), (1.01, not at_least)):
        found = cases.evaluate(cases.Target(OURS, measure, measured * factor, against), rows, LIMITS)
        assert found["measured"] == pytest.approx(measured)
        assert found["met"] is met


def test_a_target_whose_peer_cannot_run_is_neither_met_nor_missed():
    found = cases.evaluate(cases.Target(OURS, "speedup", 1.0, DENSE), {OURS: {"median_s": 1.0}}, LIMITS)
    assert found["measured"] is None
    assert found["met"] is None


# ---- contenders


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("verb", ["matmul", "matmul_t", "train", "scale_grad", "quantize", "dequantize"])
@pytest.mark.parametrize("who", ["qft", "bitsandbytes", "dense torch"])
def test_every_verb_of_every_contender_passes_its_check(who, verb, dtype):
    case = cases.qft(verb, shape=SMALL, rows=5 if verb not in ("quantize", "dequantize") else 0, dtype=dtype)
    if not experiments._can(who, case) and who != "qft":
        pytest.skip(f"{who} has no {verb}")
    assert contenders.prepare(case if who == "qft" else cases.peer(who, case)).error <= check.TOLERANCE[dtype]


def test_a_wrong_result_is_not_timed(monkeypatch):
    matmul = contenders.ops.matmul
    monkeypatch.setattr(contenders.ops, "matmul", lambda x, q: matmul(x, q) * 1.02)
    with pytest.raises(ValueError, match="a wrong result is not timed"):
        contenders.prepare(OURS)


def test_a_search_is_checked_against_the_references(monkeypatch):
    case = cases.qft("quantize", shape=SMALL, search=True)
    ready = contenders.prepare(case)
    assert ready.error == 0
    assert ready.work == roofline.search_work(SMALL, ready.nbytes, 66)
    right = qft.quantize
    monkeypatch.setattr(contenders.qft, "quantize", lambda w, fmt, search=False: right(w, fmt))  # searches nothing
    with pytest.raises(ValueError, match=r"quantize with scale search.*a wrong result is not timed"):
        contenders.prepare(case)


def test_dequantize_into_a_tensor_writes_where_it_is_told():
    ready = contenders.prepare(cases.qft("dequantize", shape=SMALL, into=True))
    assert ready.call().data_ptr() == ready.call().data_ptr()
    assert ready.error <= 5e-3


def test_a_kernel_this_machine_lacks_is_a_reason_not_a_row():
    lacking = cases.qft("matmul", shape=SMALL, rows=1, kernel="abacus")
    entry = speed.measure(cases.Experiment("", (lacking,)), clock.Effort(1, 1), int, LIMITS)
    assert entry["rows"] == []
    assert "abacus" in entry["absent"][0]["reason"]


# ---- whole jobs


def test_loftq_is_measured_against_the_exact_svd(monkeypatch):
    case = cases.qft("loftq", shape=(1024, 1024), dtype="f32")
    monkeypatch.setattr(jobs, "LOFTQ_ITERS", 1)
    exact = jobs.exact_error(case.shape, case.fmt)
    ready = speed.prepare(case)
    w = check.weight_like(case.shape, torch.float32)
    errors = []
    qft.loftq(w, case.fmt, 64, 1, on_step=lambda step, error: errors.append(error))
    assert ready.error == pytest.approx(errors[1] / exact - 1)
    assert ready.error < 0.005
    assert ready.work.operations == 6 * 1024 * 1024 * 64
    monkeypatch.setattr(jobs, "exact_error", lambda shape, fmt: exact / 1.1)
    with pytest.raises(ValueError, match="above the exact SVD's; it is not timed"):
        jobs.prepare(case)


@pytest.fixture(scope="module")
def steps():
    torch.manual_seed(0)
    return {step: jobs.prepare(step) for step in (cases.Step("qft", "nf4 g64 f32"), cases.Step("dense torch"))}


def test_a_step_of_the_demo_trains_what_the_demo_trains(steps):
    for step, ready in steps.items():
        held = (cell.cell_contents for cell in ready.call.__closure__)
        model = next(value for value in held if isinstance(value, torch.nn.Module))
        factors = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in factors) == 622_592  # as the demo's table has it
        before = [p.detach().clone() for p in factors]
        ready.call()
        assert any(not torch.equal(was, now) for was, now in zip(before, factors, strict=True)), step
        assert all(p.grad is None for p in factors)
        assert ready.error <= 1e-5
    ours, dense = steps.values()
    assert ours.nbytes < dense.nbytes
    assert ours.work.operations == dense.work.operations


def test_a_step_that_computes_something_else_is_not_timed(monkeypatch):
    right = jobs.model_for

    def spoilt(step):
        model, twin = right(step)
        twin.get_submodule("model.layers.0.mlp.down_proj").weight.data *= 1.1
        return model, twin

    monkeypatch.setattr(jobs, "model_for", spoilt)
    with pytest.raises(ValueError, match="off its dense twin's; it is not timed"):
        jobs.prepare(cases.Step("qft", "nf4 g64 f32"))


def test_a_checkout_without_the_demos_model_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(jobs, "EXAMPLES", tmp_path)
    with pytest.raises(contenders.UnavailableError, match="clone the repository"):
        jobs.prepare(cases.Step("dense torch"))


# ---- the report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of the small experiment, measured for real, as the command writes it."""
    path = tmp_path_factory.mktemp("report") / "results" / "cpu-speed.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "EXPERIMENTS", (SMALL_EXPERIMENT,))
        patch.setattr(limits, "last_level_cache", lambda: 1 << 16)
        patch.setattr(clock, "last_level_cache", lambda: 1 << 16)
        assert speed.main(["--quick", "--output", str(path), "--commit", "abc", "--build-seconds", "100"]) == 0
    return json.loads(path.read_text())


def test_the_report_says_what_was_measured_where_and_how(report):
    assert report["commit"] == "abc"
    # no folder of the machine's
    assert report["command"] == "python bench/speed.py --quick --output cpu-speed.json --commit abc --build-seconds 100"
    assert report["quick"] is True
    assert (report["cache"], report["flush_bytes"]) == ("cold", 4 << 16)
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert set(report["limits"]) == set(LIMITS)
    assert all(1e7 < limit < 1e15 for limit in report["limits"].values())
    assert report["build"]["met"] == {"bytes": True, "seconds": True}
    (experiment,) = report["experiments"]
    assert len(experiment["rows"]) + len(experiment["absent"]) == len(SMALL_EXPERIMENT.cases)
    assert {row["who"] for row in experiment["rows"]} >= {"qft", "bitsandbytes", "dense torch"}
    for row in experiment["rows"]:
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["rounds"] == 5
        assert row["relative_error"] <= 5e-3
    assert [target["met"] for target in experiment["targets"]] == [True, False]


def test_experiments_can_be_chosen_and_then_nothing_is_written(monkeypatch, tmp_path, capsys):
    other = cases.Experiment("Another", (OURS,), series="of a series")
    monkeypatch.setattr(speed, "EXPERIMENTS", (SMALL_EXPERIMENT, other))
    monkeypatch.setattr(speed, "RESULT", tmp_path / "result.json")
    monkeypatch.setattr(limits, "limits", lambda rounds: LIMITS)
    monkeypatch.setattr(clock, "last_level_cache", lambda: 1 << 12)
    monkeypatch.setattr(speed, "Effort", lambda: clock.Effort(1, 1))
    assert speed.main(["--only", "SERIES"]) == 0
    out = capsys.readouterr().out
    assert "of a series, Another" in out
    assert "Small" not in out
    assert not (tmp_path / "result.json").exists()
