"""The benchmarks' own arithmetic: turns and medians, targets, the report and its tables; and one small real run."""

import json
import sys
from pathlib import Path

import pytest
import torch

import qft

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import cases
import contenders
import machine
import publish
import speed

LIMITS = {"read": 1e9, "write": 5e8, "copy": 1e9, "bf16": 1e12, "f32": 1e11}
SMALL = (128, 256)
OURS = cases.qft("matmul", shape=SMALL, rows=3)
DENSE = cases.peer("dense torch", OURS)
SMALL_EXPERIMENT = cases.Experiment(
    "Small",
    (OURS, *(cases.peer(who, OURS) for who in cases.PEERS), cases.qft("matmul", shape=SMALL, rows=3, kernel="scalar")),
    (*cases.against(OURS, {"dense torch": ("speedup", 1e-9)}), cases.Target(OURS, "time", 0.0)),
    headline=True,
)


# ---- cases


def test_targets_compare_cases_of_their_own_experiment():
    for experiment in cases.EXPERIMENTS:
        assert len(set(experiment.cases)) == len(experiment.cases)
        for target in experiment.targets:
            assert target.measure in cases.MEASURES
            assert {target.subject, target.against or target.subject} <= set(experiment.cases)
            assert (target.against is not None) == (target.measure in ("speedup", "time ratio"))


def test_microbenchmarks_cover_every_verb_format_layer_and_peer():
    found = cases.MICROBENCHMARKS
    assert len(set(found)) == len(found)
    verbs = {"matmul", "matmul_t", "train", "scale_grad", "quantize", "dequantize"}
    assert {case.verb for case in found if case.who == "qft"} == verbs
    assert {case.verb for case in found if case.who == "bitsandbytes"} == verbs - {"scale_grad"}
    assert {case.who for case in found} == set(contenders.CONTENDERS)
    assert {case.shape for case in found} == set(cases.LAYERS)
    assert {case.fmt for case in found if case.verb == "matmul_t"} >= set(cases.FORMATS)


def test_formats_are_spelled_as_qft_spells_them():
    spellings = {case.fmt for experiment in cases.EXPERIMENTS for case in experiment.cases if case.who == "qft"}
    assert all(str(qft.Format.parse(fmt)) == fmt for fmt in spellings)
    assert len(qft.Format.parse(cases.OWN).levels) == 11


# ---- timing


def test_calls_take_turns_and_the_first_round_is_thrown_away():
    heard = []
    calls = [lambda i=i: heard.append(i) for i in range(3)]
    times = speed.interleave(calls, speed.Effort(4, 4), lambda: heard.append("flush"))
    assert [len(seconds) for seconds in times] == [4, 4, 4]
    assert heard[::2] == ["flush"] * 15
    rounds = [heard[1::2][at : at + 3] for at in range(0, 15, 3)]
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    assert [one[0] for one in rounds] == [2, 0, 1, 2, 0]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (60.0, 7)])
def test_rounds_stay_between_least_and_most(seconds, rounds):
    assert len(speed.interleave([int], speed.Effort(3, 7, seconds), int)[0]) == rounds


def ready(read=0, written=0, operations=0):
    return contenders.Ready(int, 0.001, 100, read, written, operations, "avx512")


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
    ],
)
def test_a_target_is_met_up_to_its_limit(measure, against, measured):
    rows = {
        OURS: {"median_s": 2e-5, "read_bytes": 2000, "written_bytes": 4000},
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
    if not cases._can(who, case) and who != "qft":
        pytest.skip(f"{who} has no {verb}")
    assert contenders.prepare(case if who == "qft" else cases.peer(who, case)).error <= contenders.TOLERANCE[dtype]


def test_a_wrong_result_is_not_timed(monkeypatch):
    matmul = contenders.ops.matmul
    monkeypatch.setattr(contenders.ops, "matmul", lambda x, q: matmul(x, q) * 1.02)
    with pytest.raises(ValueError, match="a wrong result is not timed"):
        contenders.prepare(OURS)


def test_a_kernel_this_machine_lacks_is_a_reason_not_a_row():
    lacking = cases.qft("matmul", shape=SMALL, rows=1, kernel="abacus")
    entry = speed.measure(cases.Experiment("", (lacking,)), speed.Effort(1, 1), int, LIMITS)
    assert entry["rows"] == []
    assert "abacus" in entry["absent"][0]["reason"]


# ---- the machine


def test_caches_are_read_in_bytes(tmp_path):
    for index, (kind, level, size) in enumerate([("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 3, "32M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert machine.caches(tmp_path) == {"L1": 48 << 10, "L3": 32 << 20}
    assert machine.caches(tmp_path / "absent") == {}


# ---- the report and its tables


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of the small experiment, measured for real, as the command writes it."""
    path = tmp_path_factory.mktemp("report") / "results" / "cpu-speed.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "EXPERIMENTS", (SMALL_EXPERIMENT,))
        patch.setattr(machine, "last_level_cache", lambda: 1 << 16)
        assert speed.main(["--quick", "--output", str(path), "--commit", "abc", "--build-seconds", "100"]) == 0
    return json.loads(path.read_text())


def test_the_report_says_what_was_measured_where_and_how(report):
    assert report["commit"] == "abc"
    assert report["command"].startswith("python bench/speed.py --quick")
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


@pytest.fixture
def checkout(tmp_path, report):
    """A README with both blocks, and results beside it."""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    blocks = [f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in ("demo", "numbers")]
    (tmp_path / "README.md").write_text("before\n" + "between\n".join(blocks) + "after\n")
    (results / "cpu-speed.json").write_text(json.dumps(report))
    row = {
        "method": "dense",
        "bits": 16,
        "format": None,
        "before": 40.6,
        "after": 20.25,
        "own_before": 5.0,
        "own_after": 6.0,
    }
    two = {**row, "method": "loftq", "bits": 2, "format": "nf2 g64 f32", "after": 23.125}
    rows = [{**one, "bytes": 3_100_000, "trainable": 655360, "seconds": 21.4} for one in (row, two)]
    demo = {"rows": rows, "steps": 60, "rank": 16, "machine": "a machine", "seconds": 301.5}
    (results / "demo.json").write_text(json.dumps(demo))
    return tmp_path


def test_published_tables_hold_what_the_results_hold(checkout):
    assert len(publish.publish(checkout, check=True)) == 3
    assert "old" in (checkout / "README.md").read_text()
    assert publish.publish(checkout, check=False) == ["README.md", "docs/numbers.md", "docs/figures/cpu-speed.png"]
    assert publish.publish(checkout, check=True) == []
    readme, page = (checkout / "README.md").read_text(), (checkout / "docs" / "numbers.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "| nf2 g64 f32, LoftQ + LoRA | 40.60 → 23.12 | 5.00 → 6.00 | 3.10 | 655,360 | 21 |" in readme
    assert "3 of this version's 4 targets are met" in readme
    assert "quick run" in readme
    assert "**missed**" in page
    assert page.count("matmul M=3 128x256 bf16 | ") == len(SMALL_EXPERIMENT.cases)
    assert (checkout / "docs" / publish.FIGURE).stat().st_size <= 100_000


@pytest.mark.parametrize(
    "path", ["bench/results/cpu-speed.json", "bench/results/demo.json", "docs/numbers.md", "README.md"]
)
def test_a_change_on_either_side_is_a_difference(checkout, path):
    publish.publish(checkout, check=False)
    file = checkout / path
    file.write_text(file.read_text().replace('"rounds": 5', '"rounds": 6').replace("23.12", "23.99"))
    if path == "docs/numbers.md":
        file.write_text(file.read_text() + "\n")
    differing = publish.publish(checkout, check=True)
    assert differing
    assert ("docs/figures/cpu-speed.png" in differing) == (path == "bench/results/cpu-speed.json")


@pytest.mark.parametrize("text", ["", "<!-- demo:begin -->", "<!-- demo:end --> <!-- demo:begin -->"])
def test_a_readme_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match="put the two markers"):
        publish.replace_block(text, "demo", "table")


def test_missing_results_are_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    assert publish.main(["--check"]) == 2
    assert capsys.readouterr().err == "publish: cpu-speed.json is not in results; run `python bench/speed.py`\n"


def test_the_command_says_what_differs(checkout, monkeypatch, capsys):
    monkeypatch.setattr(publish, "ROOT", checkout)
    assert publish.main(["--check"]) == 1
    assert "README.md differs from bench/results" in capsys.readouterr().out
    assert publish.main([]) == 0
    assert publish.main(["--check"]) == 0
