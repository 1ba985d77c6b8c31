"""What runs on a GPU, without one: cases, arithmetic, the driver that survives crashes, reports and tables."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

import qft

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import gpu_cases  # noqa: E402
import gpu_contenders  # noqa: E402
import gpu_probe  # noqa: E402
import gpu_speed  # noqa: E402
import gpu_step  # noqa: E402
import gpu_tables  # noqa: E402
from cases import Case  # noqa: E402
from gpu_cases import BNB, CHANNEL, DENSE, FORMATS, ITEMS, NF4, ROWS, STEPS, TARGETS, key  # noqa: E402

SMALL = (96, 320)
LIMITS = {"copy": 1e12, "bf16": 1e14}
GPU = {"gpu": "Some GPU", "capability": "9.0", "multiprocessors": 132, "l2_bytes": 50 << 20, "bytes": 80 << 30}
GPU |= {"driver": "580", "cuda": "13.0", "torch": "2.11"}
has_gpu = Path("/dev/nvidiactl").exists()
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # children use none of the threads lost


def load(path):
    spec = importlib.util.spec_from_file_location(f"gpu_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = load(ROOT / "tests" / "gpu" / "run.py")
sanitizer = load(ROOT / "tests" / "gpu" / "test_gpu_sanitizer.py")


class FakeGpu:
    """Runs what it is to time, once, and says what it was told to."""

    def rotation(self, nbytes):
        return 2

    def graph(self, calls):
        assert len(calls) == 2
        for call in calls:
            call()
        return [4e-6, 1e-6, 2e-6, 3e-6, 9e-6]


# ------------------------------------------------------------------------------------------------------------ cases


def test_every_verb_format_shape_and_number_of_rows_is_a_case():
    found = set(ITEMS)
    assert len(found) == len(ITEMS) == len({key(item) for item in ITEMS})
    assert ROWS == (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
    assert [str(qft.Format.parse(fmt)) for fmt in (*FORMATS, CHANNEL)] == [*FORMATS, CHANNEL]
    shapes = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
    for shape, fmt in product(shapes, FORMATS):
        assert {Case("qft", verb, shape, fmt) for verb in ("quantize", "dequantize")} <= found
        for verb, rows in product(("matmul", "matmul_t", "scale_grad"), ROWS):
            assert {Case("qft", verb, shape, fmt, rows), Case(DENSE, verb, shape, None, rows)} <= found
        for kernel, rows in product(("cuda", "panel"), (16, 32, 64, 128)):
            assert Case("qft", "matmul", shape, fmt, rows, kernel=kernel) in found
    assert set(STEPS) <= found


def test_the_most_telling_cases_come_first():
    large = [item for item in ITEMS if isinstance(item, Case) and (item.who, item.kernel) == ("qft", None)]
    assert large[: len(ROWS)] == [Case("qft", "matmul", (8192, 8192), NF4, rows) for rows in ROWS]
    place = {item: at for at, item in enumerate(ITEMS)}
    assert max(place[target.subject] for target in TARGETS) < place[STEPS[0]] < 100
    for target in TARGETS:
        assert target.against is None or place[target.against] < place[STEPS[0]]


# ------------------------------------------------------------------------------------------- figures of a checked case


@pytest.mark.parametrize(
    ("rows", "nbytes", "bound_s", "by"),
    [(1, 500_000, (500_000 + 2 * 320 + 2 * 96) / 1e12, "memory"), (10**6, 1, 2e6 * 96 * 320 / 1e12, "arithmetic")],
)
def test_a_row_has_quartiles_bandwidth_and_distance_to_the_roofline(rows, nbytes, bound_s, by):
    case = Case("qft", "matmul", SMALL, NF4, rows)
    seconds = [5e-4, 1e-4, 2e-4, 3e-4, 4e-4]
    row = gpu_speed.row(case, gpu_contenders.Ready([int], 0.001, nbytes, "cuda"), seconds, {"copy": 1e12, "bf16": 1e12})
    assert (row["q1_s"], row["median_s"], row["q3_s"]) == pytest.approx((1.5e-4, 3e-4, 4.5e-4))
    assert row["percent_of_roofline"] == pytest.approx(100 * bound_s / 3e-4)
    assert row["bound_by"] == by
    assert row["gb_per_s"] == pytest.approx((nbytes + 2 * rows * (320 + 96)) / 3e-4 / 1e9)


@pytest.mark.parametrize("fmt", [*FORMATS, CHANNEL])
def test_every_case_of_a_weight_passes_its_check(fmt):
    """On the CPU, where the table has no row "cuda" and the peers run too; gemlite needs a GPU."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    cases = [case for case in gpu_cases.weight_cases(SMALL, fmt) if case.rows in (0, 1, 16) and case.who != "gemlite"]
    assert {case.verb for case in cases} == {"quantize", "dequantize", "matmul", "matmul_t", "scale_grad"}
    for case in cases:
        row = gpu_speed.measure(case, FakeGpu(), LIMITS, "cpu")
        if case.kernel in ("cuda", gpu_cases.PERMUTES):
            assert "the weight is on cpu" in row["reason"]
        else:
            assert (row["median_s"], row["copies"]) == (3e-6, 2), row
            assert row["relative_error"] <= 5e-3


@pytest.mark.parametrize("verb", ["matmul", "matmul_t", "scale_grad", "dequantize"])
def test_a_wrong_result_is_not_timed(verb, monkeypatch):
    run = getattr(gpu_contenders.kernels, verb)
    monkeypatch.setattr(gpu_contenders.kernels, verb, lambda *arguments: run(*arguments) * 1.02)
    row = gpu_speed.measure(Case("qft", verb, SMALL, NF4, 0 if verb == "dequantize" else 3), FakeGpu(), LIMITS, "cpu")
    assert re.match(r"the relative error 0\.02 exceeds 0\.005; not timed", row["error"])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for names it has since renamed
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.who)
def test_a_training_step_trains_what_it_says(step):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    figures = gpu_step.training_step(replace(step, rows=32), "cpu", samples=4, **sizes)
    shapes = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    wanted = sum(16 * (out + width) if step.rank else out for out, width in shapes)
    assert figures["trained"] == wanted
    assert len(figures["seconds"]) == 4
    with pytest.raises(ValueError, match="the loss went from"):
        gpu_step.training_step(replace(step, rows=32, rate=0.0), "cpu", samples=1, **sizes)


# ------------------------------------------------------------------------------------------------------- the driver

FEW = ITEMS[:6]


def fake_row(item):
    return {**gpu_speed.entry(item), "median_s": 1e-6, "q1_s": 1e-6, "q3_s": 1e-6, "speedup": None,
            "percent_of_roofline": 50.0, "read_bytes": 1, "written_bytes": 1}  # fmt: skip


def fake_session(items, known, until):
    if not known:
        yield {"limits": LIMITS, "clocks": []}
    for item in items:
        yield key(item)
        yield fake_row(item)


def gathered(session, seconds=20.0, report=None):
    report = report or {"runs": [], "rows": []}
    gpu_speed.gather(report, FEW, session, time.monotonic() + seconds, lambda: None)
    return report


def test_what_a_report_has_is_not_measured_again():
    report = gathered(fake_session)
    assert [row["key"] for row in report["rows"]] == [key(item) for item in FEW]
    report["rows"] = report["rows"][::2]
    gathered(fake_session, report=report)
    assert sorted(row["key"] for row in report["rows"]) == sorted(key(item) for item in FEW)
    assert [row["run"] for row in report["rows"]] == [0, 0, 0, 1, 1, 1]
    assert [run["limits"] for run in report["runs"]] == [LIMITS, LIMITS]


@pytest.mark.parametrize(
    ("die", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process ended with code -9"),
        (lambda: int("no number"), "ValueError: invalid literal"),
    ],
)
def test_a_case_that_kills_its_process_is_an_error_and_the_others_go_on(die, words):
    def session(items, known, until):
        yield {"limits": LIMITS}
        for item in items:
            yield key(item)
            if item == FEW[2]:
                die()
            yield fake_row(item)

    rows = {row["key"]: row for row in gathered(session)["rows"]}
    assert rows.keys() == {key(item) for item in FEW}
    assert rows.pop(key(FEW[2]))["error"].startswith(words)
    assert not any("error" in row for row in rows.values())


def test_the_time_is_kept(monkeypatch):
    """Items are begun while there is time for them: more for a training step."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(gpu_probe, "Gpu", lambda *_, quick: FakeGpu())
    monkeypatch.setattr(gpu_speed.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu_speed, "measure", lambda item, gpu, limits: fake_row(item))
    begun = [got for got in gpu_speed.session((*FEW, *STEPS), LIMITS, until=36) if isinstance(got, str)]
    assert begun == [key(item) for item in FEW[:4]]  # at 0, 10, 20 and 30 s
    clock = iter((0, 9))
    begun = [got for got in gpu_speed.session(STEPS, LIMITS, until=50) if isinstance(got, str)]
    assert begun == [key(STEPS[0])]
    monkeypatch.undo()
    assert gathered(fake_session, gpu_speed.CASE_S - 0.1)["rows"] == []


def test_what_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(gpu_speed, "CASE_S", 0.2)
    monkeypatch.setattr(gpu_speed, "GRACE_S", 0.5)

    def session(items, known, until):
        yield {"limits": LIMITS}
        yield key(items[0])
        yield fake_row(items[0])
        yield key(items[1])
        time.sleep(60)

    begun = time.monotonic()
    first, second = gathered(session, 1.0)["rows"]
    assert time.monotonic() - begun < 5
    assert (first["key"], second["key"]) == (key(FEW[0]), key(FEW[1]))
    assert second["error"].startswith("stopped after")


def test_a_session_that_comes_to_nothing_is_not_begun_again():
    begun = []

    def session(items, known, until):
        begun.append(1)
        yield {"limits": LIMITS}

    report = {"runs": [], "rows": []}
    gpu_speed.gather(report, FEW, session, time.monotonic() + 20, lambda: begun.append(0))
    assert begun == [0]  # one save of one session, which counted in a process of its own


def test_a_machine_that_measures_nothing_is_one_sentence():
    def session(items, known, until):
        raise RuntimeError("no kernel image is available")
        yield

    with pytest.raises(OSError, match="nothing could be measured: RuntimeError: no kernel image"):
        gathered(session)


# ---------------------------------------------------------------------------------------------- from end to end


def small_session(items, known, until):
    yield {"limits": LIMITS, "clocks": []}
    for item in items:
        yield key(item)
        yield gpu_speed.measure(item, FakeGpu(), LIMITS, "cpu")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The command on cases that a CPU measures, with a clock that lies; returns its exit code and report."""
    items = tuple(
        Case(who, "matmul", SMALL, fmt, rows) for rows in (1, 16) for who, fmt in ((DENSE, None), ("qft", NF4))
    )
    items += (Case("qft", "matmul", SMALL, NF4, 16, kernel="cuda"), Case("qft", "dequantize", SMALL, NF4))
    monkeypatch.setattr(gpu_speed, "ITEMS", items)
    monkeypatch.setattr(gpu_speed, "TARGETS", (gpu_cases.Target(items[1], "speedup", 1.5, items[0]),))
    monkeypatch.setattr(gpu_speed, "session", small_session)
    monkeypatch.setattr(gpu_speed, "absent_peers", lambda: {BNB: "not installed"})
    monkeypatch.setattr(gpu_probe, "found_gpu", lambda: GPU)
    output = tmp_path / "results" / "Some-GPU.json"

    def run(*arguments, commit="abc"):
        code = gpu_speed.main([*arguments, "--commit", commit, "--budget", "60"])
        return code, json.loads(output.read_text())

    run.output, run.items = output, items
    return run


def test_the_command_writes_json_and_markdown_and_resumes(bench, capsys):
    code, report = bench("--output", str(bench.output), "--only", "M=1 ")
    assert code == 0
    assert (report["kind"], report["commit"], report["machine"]) == ("gpu speed", "abc", GPU)
    assert report["versions"]["torch"] == torch.__version__
    assert [row["speedup"] for row in report["rows"]] == [1.0, 1.0]
    assert [(target["measured"], target["met"]) for target in report["targets"]] == [(1.0, False)]
    first = bench.output.read_text()

    code, report = bench("--resume", str(bench.output), commit="abc+")
    assert (code, report["commit"]) == (0, "abc")
    assert [row["key"] for row in report["rows"]] == [key(item) for item in bench.items]
    assert json.loads(first)["rows"] == report["rows"][:2]
    rows = report["rows"]
    code, report = bench("--output", str(bench.output))
    assert report["rows"] == rows  # a second call goes on, too, and there was nothing left
    text = bench.output.with_suffix(".md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| qft, nf4 g64 f32 | 3, 1x, 1 % | not measured |" in text
    assert (
        "| qft, nf4 g64 f32, kernel cuda |  |  |  |  | not run | not measured | not measured | not measured |  |"
        in text
    )
    assert "- matmul M=16 96x320 bf16: qft, nf4 g64 f32, kernel cuda: kernel 'cuda' cannot run matmul" in text
    assert "- bitsandbytes: not installed" in text
    assert "1000 GB/s copy, 100 TFLOP/s cuBLAS bf16" in text
    assert "| dense LoRA, rank 16 | not measured |" in text


def test_a_report_of_another_machine_or_commit_is_not_gone_on_with(bench, capsys):
    bench("--output", str(bench.output), "--only", "dequantize")
    assert gpu_speed.main(["--resume", str(bench.output), "--commit", "other"]) == 2
    assert "is of Some GPU at commit abc; start another file" in capsys.readouterr().err
    bench.output.write_text("{}")
    assert gpu_speed.main(["--resume", str(bench.output), "--commit", "abc"]) == 2
    assert capsys.readouterr().err == f"gpu_speed: {bench.output} holds no report of gpu speed\n"


def test_the_page_says_what_was_never_measured(bench, tmp_path):
    empty = gpu_tables.section(tmp_path)
    assert empty.count("not measured yet |") == len(TARGETS)
    bench("--output", str(bench.output), "--only", "M=1 ")
    page = gpu_tables.section(bench.output.parent)
    assert page.startswith("## GPU speed: Some GPU\n")
    assert "speedup against dense torch | at least 1.5x | 1x | **missed** |" in page
    assert "not measured yet" not in page


# ------------------------------------------------------------------------------------------------------ the test runner

TESTS = """
import os, pytest
def test_good(): pass
def test_dies(): os.kill(os.getpid(), 9)
@pytest.mark.parametrize("one", [1, 2])
def test_after(one): assert one == 1
def test_skips(): pytest.skip("not run: the tool refuses")
"""


def test_the_runner_records_each_outcome_and_survives_a_crash(tmp_path):
    file = tmp_path / "test_gpu_sample.py"
    file.write_text(TESTS)
    found = {test["name"].partition("::")[2]: test for test in runner.drive(file, tmp_path, time.monotonic() + 60)}
    outcomes = {name: test["outcome"] for name, test in found.items()}
    assert outcomes == {"test_good": "passed", "test_dies": "failed", "test_after[1]": "passed",
                        "test_after[2]": "failed", "test_skips": "not run"}  # fmt: skip
    assert "code -9" in found["test_dies"]["why"]
    assert "assert 2 == 1" in found["test_after[2]"]["why"]
    assert found["test_skips"]["why"] == "not run: the tool refuses"


def test_the_runner_misses_no_test(tmp_path):
    """A file that cannot be imported, a test that hangs with what it has started, and tests never begun."""
    broken = tmp_path / "test_gpu_broken.py"
    broken.write_text("import a_module_that_is_nowhere")
    (test,) = runner.drive(broken, tmp_path, time.monotonic() + 60)
    assert test["outcome"] == "failed"
    assert "a_module_that_is_nowhere" in test["why"]

    hanging = tmp_path / "test_gpu_hanging.py"
    hanging.write_text("import subprocess\ndef test_a(): subprocess.run(['sleep', '100'])\ndef test_b(): pass")
    begun = time.monotonic()
    hung, late = runner.drive(hanging, tmp_path, begun + 4)
    assert time.monotonic() - begun < 20
    assert hung["why"] == "stopped after 4 s"
    assert late["why"] == "never begun: stopped after 4 s"

    def collects(log, file, seconds):
        with log.open("a") as opened:
            opened.write('{"collected": ["a", "b"]}\n')
        return "stopped after 1 s"

    tests = runner.drive(tmp_path / "test_gpu_slow.py", tmp_path, time.monotonic() + 60, collects)
    assert [(test["name"], test["outcome"], test["why"]) for test in tests] == [
        (name, "failed", "never begun: stopped after 1 s") for name in "ab"
    ]


@pytest.mark.parametrize(("outcomes", "code"), [("pn", 0), ("pf", 1), ("n", 1)])
def test_the_runners_report_and_exit_code(outcomes, code, tmp_path, capsys):
    words = {"p": "passed", "f": "failed", "n": "not run"}
    tests = [
        {"name": f"tests/gpu/a.py::{o}", "outcome": words[o], "seconds": 1, "why": f"a.py:5\nE   why {o}\n"}
        for o in outcomes
    ]
    report = {"kind": "gpu tests", "date": "2026-01-01", "commit": "abc", "machine": GPU, "versions": {"nvcc": "13.0"},
              "build_s": 60.0, "tests_s": 30.0, "tests": tests}  # fmt: skip
    output = tmp_path / "tests.json"
    assert runner.write(report, output) == code
    assert json.loads(output.read_text()) == report
    text = capsys.readouterr().out
    assert text.startswith(output.with_suffix(".md").read_text())
    counts = " | ".join(str(outcomes.count(letter)) for letter in "pfn")
    assert f"| tests/gpu/a.py | {counts} |" in text
    assert ("\n- tests/gpu/a.py::n: why n\n" in text) == ("n" in outcomes)
    assert "## GPU tests: Some GPU" in gpu_tables.section(tmp_path)


@pytest.mark.parametrize(
    ("small", "real", "outcome"),
    [
        ("echo Device not supported; exit 1", "exit 0", "not run: memcheck refuses this machine: Device not supported"),
        ("exit 0", "echo ran; echo ERROR SUMMARY: 0 errors", None),
        ("exit 0", "echo ran; echo ERROR SUMMARY: 1 error; exit 99", AssertionError),
        ("exit 0", "echo ran", AssertionError),
        ("exit 0", "echo ERROR SUMMARY: 0 errors", AssertionError),
    ],
)
def test_a_sanitizer_that_refuses_has_not_passed(small, real, outcome, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\ncase "$*" in *one_of_each*) {real};; *) {small};; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if outcome is None:
        sanitizer.test_one_small_shape_per_kernel("memcheck")
    elif isinstance(outcome, str):
        with pytest.raises(pytest.skip.Exception, match=outcome):
            sanitizer.test_one_small_shape_per_kernel("memcheck")
    else:
        with pytest.raises(outcome):
            sanitizer.test_one_small_shape_per_kernel("memcheck")


# ------------------------------------------------------------------------------------------------------- without a GPU


@pytest.mark.skipif(has_gpu, reason="says what happens on a machine without a GPU; this one has one")
@pytest.mark.parametrize(("script", "name"), [("bench/gpu_speed.py", "gpu_speed"), ("tests/gpu/run.py", "gpu")])
def test_without_a_gpu_one_sentence_and_exit_code_2(script, name):
    done = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"{name}: PyTorch sees no CUDA GPU; run this on a machine with a GPU\n", done.stderr)


@pytest.mark.skipif(has_gpu, reason="says what happens on a machine without a GPU; this one has one")
def test_the_gpu_tests_need_no_optional_package_and_skip_in_one_sentence():
    absent = ("bitsandbytes", "gemlite", "typer", "rich", "accelerate", "matplotlib", "pytest_benchmark")
    program = f"import sys, pytest\nsys.modules.update(dict.fromkeys({absent}))\n"
    program += "sys.exit(pytest.main(['tests/gpu', '-rs', '-o', 'addopts=', '--strict-markers', '-m', 'gpu']))"
    # pytest_benchmark is a plugin of pytest's: it must not be looked for
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:]
    reasons = set(re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", done.stdout, re.MULTILINE))
    assert reasons == {"needs a CUDA device; torch sees none"}
    assert re.search(r"^=* ?[3-9]\d\d skipped", done.stdout, re.MULTILINE)
