"""Tables and figures of the benchmarks: they hold what the results hold, and a missed target is explained or named."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import qft
from qft.speed.roofline import Work

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import cases
import contenders
import experiments
import format_errors
import publish
import speed
import speed_page

LIMITS = {"read": 1e9, "write": 5e8, "copy": 1e9, "bf16": 1e12, "f32": 1e11}
ONE = cases.qft("matmul", rows=1)
NAMED = cases.qft("matmul", rows=1, kernel="avx2")
MANY = cases.qft("matmul", rows=64)
SEARCH = cases.qft("quantize", search=True)
STEP = cases.Step("qft", "nf4 g64 f32")
TARGETS = (
    *cases.against(ONE, "one token", dense_torch=("speedup", 2.0), bitsandbytes=("speedup", 5.0)),
    cases.Target(NAMED, "speedup", 0.6, ONE, "avx2"),
)
EXPERIMENTS = (
    cases.Experiment("One token", (ONE, NAMED, *(cases.peer(who, ONE) for who in cases.PEERS)), TARGETS, headline=True),
    cases.Experiment("M=1", (cases.qft("matmul", rows=2),), series="over rows"),
    cases.Experiment("M=64", (MANY, cases.peer("dense torch", MANY)), series="over rows"),
    cases.Experiment("Search", (SEARCH,), (cases.Target(SEARCH, "time", 60.0, row="quantize"),), headline=True),
    cases.Experiment("Step", (STEP,)),
)
SECONDS = {"qft": 2e-3, "dense torch": 6e-3, "bitsandbytes": 8e-3, "bitsandbytes eval": 1e-3, "torch int4": 1.5e-3}


def made(monkeypatch, quick=False, without=()):
    """A report as `speed.run` makes it, of times that are known."""
    with monkeypatch.context() as patch:
        patch.setattr(speed, "EXPERIMENTS", EXPERIMENTS)
        patch.setattr(speed.limits, "limits", lambda rounds: LIMITS)
        patch.setattr(speed, "cache_flush", lambda: (int, 0))
        patch.setattr(speed, "interleave", lambda calls, effort, flush: [[call()] * 3 for call in calls])

        def prepare(case):
            if case.who in without:
                raise contenders.UnavailableError("it is not installed")
            return contenders.Ready(lambda: SECONDS[case.who], 0.001, 100, Work(1000, 0, 0), "avx512")

        patch.setattr(speed, "prepare", prepare)
        options = speed.argparse.Namespace(
            commit="abc", quick=quick, cache="cold", only="", output=None, build_seconds=100
        )
        return speed.run(options, [])


@pytest.fixture
def report(monkeypatch):
    return made(monkeypatch)


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
    lines = [{"format": "nf4 g64 f16", "bits": 4.25, "error": 0.0921, "searched": 0.083}]
    errors = {"command": "a command", "date": "2026-01-02T03:04", "commit": "abc", "shape": [64, 128], "rows": lines}
    (results / "format-errors.json").write_text(json.dumps(errors))
    return tmp_path


WRITTEN = ["README.md", "docs/numbers.md", "docs/figures/cpu-speed.png", "docs/figures/format-errors.png"]


def test_published_tables_hold_what_the_results_hold(checkout):
    assert publish.publish(checkout, check=True) == WRITTEN
    assert "old" in (checkout / "README.md").read_text()
    assert publish.publish(checkout, check=False) == WRITTEN
    assert publish.publish(checkout, check=True) == []
    readme, page = (checkout / "README.md").read_text(), (checkout / "docs" / "numbers.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "| nf2 g64 f32, LoftQ + LoRA | 40.60 → 23.12 | 5.00 → 6.00 | 3.10 | 655,360 | 21 |" in readme
    assert "5 of 6 targets are met" in readme  # three speeds, a time, the build's size and seconds
    times = "**2 ms** | 0 % | 8 ms (4x) | 1 ms (0.5x) | 6 ms (3x) | 1.5 ms (0.75x) |"
    assert f"| matmul M=1 4096x4096 bf16 | nf4 g64 f32 | {times}" in readme
    assert "search" not in readme  # no peer does that
    assert "| `nf4 g64 f16` | 4.250 | 0.0921 | 0.0830 |" in page
    assert page.count("### over rows\n") == 1
    assert page.count("matmul M=64 4096x4096 bf16 | ") == 2
    for name in WRITTEN[2:]:
        assert (checkout / name).stat().st_size <= 150_000


@pytest.mark.parametrize(
    "path", [f"bench/results/{name}.json" for name in publish.MADE_BY] + ["docs/numbers.md", "README.md"]
)
def test_a_change_on_either_side_is_a_difference(checkout, path):
    publish.publish(checkout, check=False)
    file = checkout / path
    changed = (
        file.read_text().replace('"rounds": 3', '"rounds": 4').replace("23.12", "23.99").replace("0.0921", "0.093")
    )
    file.write_text(changed + "\n" * (path == "docs/numbers.md"))
    differing = publish.publish(checkout, check=True)
    assert differing
    assert ("docs/figures/cpu-speed.png" in differing) == (path == "bench/results/cpu-speed.json")
    assert ("docs/figures/format-errors.png" in differing) == (path == "bench/results/format-errors.json")


# ---- targets


KEY = "matmul M=1 4096x4096 bf16: qft, nf4 g64 f32: speedup against bitsandbytes, nf4 g64 f32"


def targets_of(report, ggml=None):
    return speed_page.held(report, ggml)


GGML = {
    "comparisons": [
        {"shape": [64, 64], "rows": 1, "dtype": "bf16", "qft": "nf4 g64 f32", "ggml": "q4_0", "ratio": ratio,
         "least": least, "met": met}
        for ratio, least, met in ((1.2, 1.0, True), (0.9, 1.0, False), (0.5, None, None))
    ]
}  # fmt: skip


def test_every_row_of_the_table_is_there_with_its_verdict(report):
    lines = speed_page.by_row(targets_of(report)).splitlines()[2:]
    assert [line.split("**")[1] for line in lines] == [*experiments.ROWS, "ggml"]
    found = {line.split("**")[1]: line for line in lines}
    # The hardest of a row is the one that reaches least of its bound: 3x of 2x, and 4x of 5x
    assert (
        "| 1 of 2 | 4x (matmul M=1 4096x4096 bf16: qft, nf4 g64 f32: speedup against bitsandbytes" in found["one token"]
    )
    assert found["quantize"].endswith("at most 60 ms) | met |")
    assert found["batch"].endswith("| 0 of 0 |  | not measured |")
    assert found["ggml"].endswith("| not measured |")


def test_the_hardest_of_a_row_reaches_least_of_its_bound():
    bounds = [("at least", 2.0, 1.5), ("at most", 10.0, 16.0), ("at most", 10.0, 4.0), ("at least", 1.0, 3.0)]
    reached = [speed_page._reached({"how": how, "limit": limit, "measured": at}) for how, limit, at in bounds]
    assert reached == pytest.approx([0.75, 0.625, 2.5, 3.0])


def test_targets_against_ggml_are_a_row_of_the_table(report):
    found = [one for one in targets_of(report, GGML) if one["row"] == "ggml"]
    assert [(one["measured"], one["met"]) for one in found] == [(1.2, True), (0.9, False)]
    assert speed_page.by_row(targets_of(report, GGML)).splitlines()[-1].endswith("| **missed** |")


@pytest.mark.parametrize(
    ("met", "verdict"),
    [
        ([True, True], "met"),
        ([True, False], "**missed**"),
        ([None, False], "**missed**"),
        ([True, None], "not measured"),
        ([], "not measured"),
    ],
)
def test_a_row_is_met_where_all_its_targets_are(met, verdict):
    assert speed_page.verdict([{"met": one} for one in met]) == verdict


def test_a_tally_counts_targets_and_rows(monkeypatch, report):
    assert speed_page.tally(targets_of(report)) == (
        "5 of 6 targets are met; of the 11 rows of the table, 3 are met in full"
    )
    lacking = made(monkeypatch, without=("bitsandbytes",))
    assert "5 of 6 targets are met, 1 not measured" in speed_page.tally(targets_of(lacking))
    assert "not run | it is not installed" in "\n".join(speed_page.sections(lacking))


# ---- what is missed


WHY = {"profile": "60 % of cycles wait for memory", "next": "prefetch two rows ahead"}


def test_a_missed_target_must_be_explained_by_a_profile_and_a_next_idea(report):
    targets = targets_of(report)
    both = [f"missed without its {part} in explanations.json: [one token] {KEY}" for part in ("profile", "next")]
    assert speed_page.unexplained(report, targets, {}) == both
    assert speed_page.unexplained(report, targets, {KEY: {**WHY, "next": ""}}) == both[1:]
    assert speed_page.unexplained(report, targets, {KEY: WHY}) == []
    assert speed_page.unexplained(report, targets, {"one token": WHY}) == []
    idle = "explained in explanations.json but not missed: avx2"
    assert speed_page.unexplained(report, targets, {KEY: WHY, "avx2": WHY}) == [idle]
    assert speed_page.unexplained({**report, "quick": True}, targets, {}) == []


def test_the_page_says_why_a_target_is_missed(report):
    targets = targets_of(report)
    said = speed_page.missed(targets, {KEY: WHY, "one token": {"profile": "a row's", "next": "a row's"}})
    why = "- Profile: 60 % of cycles wait for memory\n- Next: prefetch two rows ahead"
    assert said == f"**one token**, {KEY}: 4x, at least 5x\n\n{why}"
    assert speed_page.missed(targets, {"one token": WHY}) == f"**one token**, 1 of its targets\n\n{why}"
    assert "- Profile: none yet\n- Next: nothing named yet" in speed_page.missed(targets, {})
    assert speed_page.missed([one for one in targets if one["met"]], {}) == "No target is missed."


def test_the_command_says_what_differs_and_what_is_not_explained(checkout, monkeypatch, capsys):
    monkeypatch.setattr(publish, "ROOT", checkout)
    assert publish.main(["--check"]) == 1
    assert "README.md differs from bench/results" in capsys.readouterr().out
    assert publish.main([]) == 0
    assert publish.main(["--check"]) == 1
    out = capsys.readouterr().out
    assert f"missed without its next in explanations.json: [one token] {KEY}" in out
    (checkout / "bench" / "results" / "explanations.json").write_text(json.dumps({"one token": WHY}))
    assert publish.main(["--check"]) == 1  # the page has it not yet
    assert publish.main([]) == 0
    assert publish.main(["--check"]) == 0
    assert "prefetch two rows ahead" in (checkout / "docs" / "numbers.md").read_text()


# ---- what is not there


@pytest.mark.parametrize("text", ["", "<!-- demo:begin -->", "<!-- demo:end --> <!-- demo:begin -->"])
def test_a_readme_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match="put the two markers"):
        publish.replace_block(text, "demo", "table")


def test_missing_results_are_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    assert publish.main(["--check"]) == 2
    assert capsys.readouterr().err == "publish: cpu-speed.json is not in results; run `python bench/speed.py`\n"


def test_a_quick_run_says_that_it_is_one(monkeypatch, report):
    assert "not for comparison" in speed_page.machine_line(made(monkeypatch, quick=True))
    assert "not for comparison" not in speed_page.machine_line(report)


# ---- errors of formats


def test_errors_of_formats_are_those_of_the_formats():
    rows = {row["format"]: row for row in format_errors.errors((64, 256))}
    for fmt, row in rows.items():
        assert (
            row["bits"]
            == qft.quantize(format_errors.weight_like((64, 256), format_errors.torch.float32), fmt).bits_per_weight
        )
        assert row["searched"] < row["error"]
    assert {fmt.split()[0] for fmt in rows} == {*format_errors.CODEBOOKS, *format_errors.INTEGERS}
    assert rows["nf2 g64 f16"]["error"] > rows["nf3 g64 f16"]["error"] > rows["nf4 g64 f16"]["error"]
    # Normal weights, groups of 64: within a few per cent of docs/starting-points.md's plain column
    assert rows["nf4 g64 f16"]["error"] == pytest.approx(0.092, rel=0.05)


def test_the_errors_file_is_written_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(format_errors, "errors", lambda: [{"format": "a", "bits": 1, "error": 0.5, "searched": 0.25}])
    assert format_errors.main(["--output", str(tmp_path / "errors.json")]) == 0
    written = json.loads((tmp_path / "errors.json").read_text())
    assert written["rows"][0]["searched"] == 0.25
    assert written["commit"]
    assert "error 0.5000  searched 0.2500" in capsys.readouterr().out


# ---- the microbenchmarks


@pytest.fixture
def plugin():
    """bench/conftest.py, under a name of its own."""
    path = Path(speed.__file__).with_name("conftest.py")
    spec = importlib.util.spec_from_file_location("bench_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Printed:
    """What a terminal reporter is told."""

    def __init__(self):
        self.lines = []

    def section(self, title):
        self.lines.append(title)

    def line(self, text):
        self.lines.append(text)


def bench_run(plugin, disabled=False):
    """A benchmark that has run, and its session."""
    config = SimpleNamespace(limits=LIMITS)
    plugin.pytest_configure(config)
    stats = SimpleNamespace(stats=SimpleNamespace(median=4e-6))
    extra = {"kernel": "avx512", "relative_error": 0.002}
    benchmark = SimpleNamespace(name="test_verb[matmul M=1: qft]", stats=stats, extra_info=extra, disabled=disabled)
    note = plugin.of_roofline.__wrapped__(SimpleNamespace(config=config), LIMITS)
    note(benchmark, Work(1000, 1000, 0))
    return config, benchmark.extra_info


def test_every_microbenchmark_says_how_near_it_came(plugin):
    config, extra = bench_run(plugin)
    assert extra["percent_of_roofline"] == pytest.approx(50)  # 1000 bytes written at 5e8 take 2 of 4 microseconds
    assert extra["bytes_per_s"] == pytest.approx(5e8)
    assert (extra["bound_by"], extra["limits"], extra["kernel"]) == ("memory", LIMITS, "avx512")
    plugin.pytest_terminal_summary(printed := Printed(), config)
    assert printed.lines[1].startswith("measured: read 1.0, write 0.5")
    assert printed.lines[2].split() == [
        "matmul",
        "M=1:",
        "qft",
        "0.004",
        "ms",
        "0.5",
        "GB/s",
        "50",
        "%",
        "memory",
        "error",
        "0.002",
        "avx512",
    ]


def test_without_timing_nothing_is_said(plugin):
    config, extra = bench_run(plugin, disabled=True)
    assert "percent_of_roofline" not in extra
    plugin.pytest_terminal_summary(printed := Printed(), config)
    assert printed.lines == []


def test_limits_are_measured_once_a_session(plugin, monkeypatch):
    monkeypatch.setattr(plugin.limits, "limits", lambda rounds: {"rounds": rounds})
    request = SimpleNamespace(config=SimpleNamespace())
    assert plugin.machine_limits.__wrapped__(request) == {"rounds": plugin.ROUNDS} == request.config.limits
    assert plugin.machine_limits._fixture_function_marker.scope == "session"
