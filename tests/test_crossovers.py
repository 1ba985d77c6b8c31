"""Which kernel serves how many rows: what the file says, how the table of kernels reads it, and how it is measured."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from formats import ABOVE

import qft
from qft import crossovers, kernels, native
from qft.compiler.emit import CPU_FLAGS
from qft.crossovers import DTYPES, NO_ROWS, VERBS, rows_served
from qft.format import Format, FormatError
from qft.kernels import TABLE, Problem, choose

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import crossovers as bench

FILE = Path(crossovers.__file__).with_name(crossovers.FILE)
MACHINES = json.loads(FILE.read_text())["machines"]
NF4 = Format.parse("nf4 g64")
SETS = native.instruction_sets()
REASONED = {"basis": "reasoned", "why": "a test"}


# ------------------------------------------------------------------------------------------------------- the file


def test_every_machine_is_there_with_what_it_was_measured_on():
    assert list(MACHINES) == [*CPU_FLAGS, "cuda"], "run bench/crossovers.py --best for the one that is missing"
    for name, about in MACHINES.items():
        if about["basis"] == "measured":
            assert about["command"].startswith("python bench/crossovers.py")
            assert {"date", "commit", "formats", "shapes", "torch_held_by", "versions", "machine"} <= {*about}
        else:
            assert len(about["why"]) > 40
        assert name != "cuda" or about["basis"] == "reasoned"  # no GPU has been timed


@pytest.mark.parametrize("machine", CPU_FLAGS)
def test_every_kernel_of_a_machine_has_its_rows(machine, monkeypatch):
    sets = list(CPU_FLAGS)[: list(CPU_FLAGS).index(machine) + 1]
    monkeypatch.setattr(native, "instruction_sets", lambda: tuple(sets))
    monkeypatch.setattr(kernels, "_compiled", lambda fmt, isa: True)  # whatever this machine's compiler was asked for
    expected = set()
    for verb in VERBS:
        for dtype in native.DTYPES:
            names, reasons = bench.runnable(verb, dtype, NF4)
            assert {*names, *reasons} == {*CPU_FLAGS}
            expected |= {(name, verb, str(dtype).removeprefix("torch.")) for name in names}
    assert {*crossovers.parse(FILE.read_text())[machine]} == expected
    assert {kernel for kernel, _, _ in expected} == {*sets}


def test_a_gpu_takes_its_own_kernel_for_what_one_launch_covers():
    for dtype in DTYPES:
        expected = NO_ROWS if dtype == "float32" else (1, 64)
        assert rows_served("cuda", "matmul", dtype, ("cuda",)) == expected
        assert rows_served("cuda", "matmul_t", dtype, ("cuda",)) == NO_ROWS


def test_what_was_timed_says_what_is_served():
    for about in MACHINES.values():
        for one in about["served"]:
            assert ("lead" in one) == (about["basis"] == "measured")
            if "lead" in one:
                leads = {int(rows): lead for rows, lead in one["lead"].items()}
                assert bench.fastest(leads) == (one["least"], one["most"])


def test_the_file_is_as_the_benchmark_writes_it():
    assert bench.render(MACHINES) == FILE.read_text()


ENTRY = {"kernel": "avx2", "verb": "matmul", "dtype": "float32", "least": 1, "most": 9}


def text_of(**changed):
    return json.dumps({"machines": {"avx2": {**REASONED, "served": [{**ENTRY, **changed}]}}})


def test_rows_are_looked_up_for_the_best_machine_that_is_known(monkeypatch):
    machines = {"avx2": {"least": 2, "most": None}, "avx512": {"least": 1, "most": 9}}
    served = {name: {**REASONED, "served": [{**ENTRY, **rows}]} for name, rows in machines.items()}
    monkeypatch.setattr(crossovers, "_known", lambda: crossovers.parse(json.dumps({"machines": served})))
    question = "avx2", "matmul", "float32"
    assert rows_served(*question, ("scalar", "avx2")) == (2, None)
    assert rows_served(*question, ("scalar", "avx2", "avx1024")) == (2, None)
    assert rows_served(*question, ("scalar", "avx2", "avx512")) == (1, 9)  # panels are faster there
    assert rows_served(*question, ("scalar",)) == NO_ROWS
    for other in (("avx1024", *question[1:]), ("avx2", "matmul_t", "float32"), ("avx2", "matmul", "float64")):
        assert rows_served(*other, ("scalar", "avx2")) == NO_ROWS


MALFORMED = {
    "no JSON": ("machines:", 'no JSON object with "machines"'),
    "a list": ("[1]", 'no JSON object with "machines"'),
    "no machines": ("{}", 'no JSON object with "machines"'),
    "machines in a list": ('{"machines": []}', 'no JSON object with "machines"'),
    "a machine that is no object": ('{"machines": {"avx2": 1}}', "'avx2' needs a basis, measured or reasoned"),
    "a guess": (text_of().replace("reasoned", "guessed"), "'avx2' needs a basis, measured or reasoned"),
    "no entries": (
        '{"machines": {"avx2": {"basis": "reasoned"}}}',
        "'avx2' needs a basis, measured or reasoned, and a list",
    ),
    "an entry without most": (text_of().replace('"most"', '"more"'), "an entry is kernel, verb, dtype, least and most"),
    "an entry that is a word": (
        '{"machines": {"avx2": {"basis": "reasoned", "served": ["all"]}}}',
        "'avx2' holds 'all'; an entry is",
    ),
    "a verb without rows": (text_of(verb="quantize"), "use a kernel, matmul or matmul_t, and float32, bfloat16"),
    "a dtype in short": (text_of(dtype="bf16"), "names ('avx2', 'matmul', 'bf16')"),
    "a kernel that is no word": (text_of(kernel=[]), "names ([], 'matmul', 'float32')"),
    "an entry twice": (
        json.dumps({"machines": {"avx2": {**REASONED, "served": 2 * [ENTRY]}}}),
        "'avx2' holds avx2 matmul float32 twice",
    ),
    "less than a row": (text_of(least=0), "gives avx2 matmul float32 rows 0 to 9; use 1 or more, in order"),
    "half a row": (text_of(most=4.5), "rows 1 to 4.5; use 1 or more, in order"),
    "true": (text_of(least=True), "rows True to 9"),
    "out of order": (text_of(least=9, most=7), "rows 9 to 7"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_in_a_sentence(text, sentence):
    with pytest.raises(FormatError) as refused:
        crossovers.parse(text)
    said = str(refused.value)
    assert sentence in said
    assert said.startswith("crossovers.json: ")
    assert said.endswith("; python bench/crossovers.py writes it anew")


# ----------------------------------------------------------------------------------------------- the table reads it


def reasons(verb, dtype, rows):
    """The row that is taken, and why those before it were not."""
    choice = choose(Problem(verb, NF4, "cpu", dtype, rows))
    return choice.kernel.name, dict(choice.passed_over)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_the_first_that_serves_is_taken_and_a_panel_where_none_does(verb, dtype):
    for rows in (0, *range(1, 300), 2048, 1 << 20):
        expected = "panel"
        for name in SETS:  # plainest first, so that the best that serves is what remains
            if any(row.name == name and verb in row.verbs for row in TABLE):
                least, most = rows_served(name, verb, str(dtype).removeprefix("torch."), SETS)
                if least <= max(rows, 1) and (most is None or rows <= most != 0):
                    expected = name
        assert reasons(verb, dtype, rows)[0] == expected, rows


@pytest.fixture
def told(monkeypatch):
    """`told(avx2=(1, 24))`: these kernels serve these rows of any product, others none."""

    def tell(**served):
        monkeypatch.setattr(kernels, "rows_served", lambda kernel, *rest: served.get(kernel, NO_ROWS))

    return tell


def test_between_two_row_kernels_and_a_panel(told):
    if len(SETS) < 3:
        pytest.skip("needs a machine with two instruction sets beside scalar")
    best, plainer = SETS[-1], SETS[-2]
    if choose(Problem("matmul", NF4, "cpu", torch.bfloat16, 1), best).kernel.name != best:
        pytest.skip(f"{best} does not multiply")
    told(**{best: (2, 24), plainer: (1, 8)})
    taken = {rows: reasons("matmul", torch.bfloat16, rows) for rows in (0, 1, 2, 8, 24, 25)}
    assert {rows: name for rows, (name, _) in taken.items()} == {
        0: plainer, 1: plainer, 2: best, 8: best, 24: best, 25: "panel",
    }  # fmt: skip
    assert taken[1][1][best] == "1 rows: it is the fastest for 2 to 24"
    assert taken[25][1][best] == "25 rows: it is the fastest for 2 to 24"
    assert taken[25][1][plainer] == "25 rows: it is the fastest for 1 to 8"
    told(**{best: (2, None)})
    assert reasons("matmul", torch.bfloat16, 1 << 20)[0] == best
    name, why = reasons("matmul", torch.bfloat16, 1)
    assert name == "panel"
    assert why[best] == "1 rows: it is the fastest for 2 and more"
    assert why[plainer] == "1 rows: it is the fastest for no number of rows"


def test_a_row_kernel_after_the_panel_is_asked_too(told):
    told(scalar=(1, 3))
    taken = {rows: reasons("matmul_t", torch.float32, rows) for rows in (3, 4)}
    assert [name for name, _ in taken.values()] == ["scalar", "panel"]
    assert taken[3][1]["panel"] == "3 rows: scalar is faster for 1 to 3"


@pytest.mark.usefixtures("needs_compiler")
def test_a_panel_does_not_wait_for_a_kernel_that_cannot_run(told, monkeypatch):
    """Levels of one's own without a compiler: only generic runs them, and it has the rows of scalar."""
    monkeypatch.setenv("PATH", "")
    kernels._compile_at_first_need.cache_clear()
    own = Format.parse("[-1 -0.123 0.456 1] g64")
    told(**dict.fromkeys(SETS, (1, 100)) | {"scalar": (1, 2)})
    names = [choose(Problem("matmul", own, "cpu", torch.float32, rows)).kernel.name for rows in (2, 3)]
    kernels._compile_at_first_need.cache_clear()
    assert names == ["generic", "panel"]


def test_a_child_without_threads_keeps_to_row_kernels(told, monkeypatch):
    told(**dict.fromkeys(SETS, (1, 2)))
    monkeypatch.setattr(kernels, "_no_thread_pool", lambda: True)
    name, _ = reasons("matmul", torch.bfloat16, 500)
    assert name == next(row.name for row in TABLE if row.name in SETS)


@pytest.mark.usefixtures("panels_above")
def test_products_on_either_side_of_a_crossover_agree():
    q = qft.quantize(torch.randn(65, 130), "nf4 g64")
    x, dy = torch.randn(ABOVE, 130), torch.randn(ABOVE, 65)
    for verb, operand in (("matmul", x), ("matmul_t", dy)):
        few, many = (getattr(kernels, verb)(operand[:rows], q) for rows in (ABOVE - 1, ABOVE))
        assert reasons(verb, torch.float32, ABOVE - 1)[0] != reasons(verb, torch.float32, ABOVE)[0] == "panel"
        assert torch.allclose(few, many[:-1], atol=1e-5)


# ------------------------------------------------------------------------------------------------- how it is measured


LEADS = {
    "leads to a crossover": ({1: 6.0, 4: 2.0, 16: 1.01, 32: 0.9, 64: 0.5}, (1, 16)),
    "noise around 1 changes nothing": ({1: 6.0, 4: 0.99, 16: 1.5, 32: 0.5}, (1, 16)),
    "a plainer kernel is faster first": ({1: 0.8, 2: 1.2, 4: 2.0, 8: 0.9}, (2, 4)),
    "leads far, and then no more": ({1: 40.0, 4: 6.0, 8: 0.5}, (1, 4)),
    "never": ({1: 0.9, 2: 0.4}, NO_ROWS),
    "still ahead at the most rows": ({1: 2.0, 256: 1.2, bench.MOST: 1.01}, (1, None)),
    "still ahead where timing stopped": ({1: 2.0, 64: 1.2}, (1, 64)),
    "far ahead where timing stopped": ({1: 2.0, 8: 40.0}, (1, None)),
}


@pytest.mark.parametrize(("leads", "served"), LEADS.values(), ids=LEADS)
def test_a_kernel_serves_where_it_leads(leads, served):
    assert bench.fastest(leads) == served
    entry = bench.entry("avx2", "matmul", "float32", leads)
    assert (entry["least"], entry["most"]) == served


def test_a_lead_is_against_the_best_alternative_that_comes_later():
    seconds = [{"best": 1.0, "plain": 2.0, "panel": 8.0}, {"best": 4.0, "plain": 32.0, "panel": 8.0}]
    names = ["best", "plain"]
    assert bench.lead("best", names, seconds) == pytest.approx(4)  # of plain (2, 8) and panel (8, 2): both 4
    assert bench.lead("plain", names, seconds) == pytest.approx(1)  # a better kernel is no alternative
    seconds[0]["plain"] = 1.0
    assert bench.lead("best", names, seconds) == pytest.approx(bench.TIE * 8**0.5)
    seconds[0]["plain"], seconds[1]["plain"] = 1.0, 4.0
    assert bench.lead("best", names, seconds) == pytest.approx(bench.TIE)  # what runs alike goes to the better set


@pytest.fixture
def pretend(monkeypatch):
    """Products take what a function of (kernel, rows) says; the calls made are returned."""

    def install(seconds):
        made = []

        def timed(verb, x, layer, names, effort, flush):
            made.append((len(x), layer, tuple(names)))
            return {name: seconds(name, len(x)) for name in (*names, "panel")}

        monkeypatch.setattr(bench, "timed", timed)
        return made

    return install


WANTED = bench.Wanted((1, 2, 4, 8, 16), 4, ("nf4 g64 f32", "nf2 g64 f32"), ((8, 64), (16, 64)))
LAYERS = ["nf4 first", "nf2 first", "nf4 second", "nf2 second"]


def curve(names=("best", "plain")):
    return bench.curve("matmul", torch.float32, list(names), LAYERS, WANTED, lambda: None)


def test_a_kernel_far_behind_panels_is_timed_no_further(pretend):
    speeds = {"best": 1e-6, "plain": 2e-6, "panel": 3e-6}
    made = pretend(lambda name, rows: speeds[name] * (rows if name == "plain" else 1))
    leads = curve()
    assert leads["plain"] == pytest.approx({1: 1.5, 2: 0.75, 4: 0.375, 8: 0.1875})  # behind by 1.5 twice: 4 and 8 rows
    assert leads["best"] == pytest.approx({1: 2 * bench.TIE, 2: 3, 4: 3, 8: 3, 16: 3})  # against plain, then panels
    assert [layer for rows, layer, _ in made if rows == 4] == LAYERS
    assert [layer for rows, layer, _ in made if rows == 8] == ["nf4 first", "nf4 second"]  # above `many`: one format
    assert made[-1][2] == ("best",)
    pretend(lambda name, rows: 1e-6 if name == "panel" else 1e-5)
    assert {name: [*lead] for name, lead in curve().items()} == {"best": [1, 2], "plain": [1, 2]}


def test_a_slow_call_is_the_last(pretend):
    pretend(lambda name, rows: rows * (0.09 if name == "panel" else 0.001))
    assert [*curve()["best"]] == [1, 2, 4]


def layer():
    return bench.layers(bench.Wanted(formats=("nf4 g64 f32",), shapes=((128, 256),)))[0]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_real_calls_are_timed_once_their_results_agree(verb, dtype):
    names, _ = bench.runnable(verb, dtype, NF4)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(5)).to(dtype)
    seconds = bench.timed(verb, x, layer(), names, bench.QUICK.effort, lambda: None)
    assert [*seconds] == [*names, "panel"]
    assert all(0 < each < 1 for each in seconds.values())
    assert "scalar" in names


def test_a_result_that_differs_from_the_panels_is_not_timed(monkeypatch):
    exact = kernels._panel_matmul
    monkeypatch.setattr(kernels, "_panel_matmul", lambda x, q: 1.01 * exact(x, q))
    with pytest.raises(ValueError, match=r"matmul of nf4 g64 f32 by scalar, 3 rows of float32: the relative error"):
        bench.timed("matmul", torch.randn(3, 256), layer(), ["scalar"], bench.QUICK.effort, lambda: None)


def test_a_kernel_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(native, "instruction_sets", lambda: ("scalar",))
    names, why = bench.runnable("matmul", torch.float32, NF4)
    assert names == ["scalar"]
    assert why["avx2"] == "kernel 'avx2' cannot run matmul for nf4 g64 f32: this machine has no avx2"


# what the process of a machine prints, and what its file then holds
PART = {"basis": "measured", "date": "2026-01-01T00:00:00+00:00", "load_before": 0.5, "served": [
    {"kernel": "scalar", "verb": "matmul", "dtype": "float32", "least": 1, "most": 7, "lead": {"1": 2.0, "7": 1.5}},
]}  # fmt: skip


@pytest.fixture
def child(monkeypatch):
    """Instead of the process that measures: what it was started with; it prints PART or fails."""
    started = []

    def run(command, *, env, **rest):
        started.append((command, env))
        return subprocess.CompletedProcess(command, run.code, json.dumps(PART))

    run.code = 0
    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench.machine, "commit", lambda: "abc")
    return run, started


def test_what_was_measured_replaces_its_machine_and_no_other(child, tmp_path, capsys):
    output = tmp_path / "made.json"
    assert bench.main(["--best", "scalar", "--output", str(output)]) == 0
    made = json.loads(output.read_text())["machines"]
    assert {name: about for name, about in made.items() if name != "scalar"} == {
        name: about for name, about in MACHINES.items() if name != "scalar"
    }
    assert made["scalar"]["served"] == PART["served"]
    assert made["scalar"]["command"] == "python bench/crossovers.py --best scalar --output made.json"
    assert crossovers.parse(output.read_text())["scalar"] == {("scalar", "matmul", "float32"): (1, 7)}
    assert str(tmp_path) not in output.read_text() + capsys.readouterr().out


def test_a_quick_run_writes_nothing(child, capsys):
    before = FILE.read_bytes()
    assert bench.main(["--quick"]) == 0
    assert FILE.read_bytes() == before
    assert [command[-3:] for command, _ in child[1]] == [["--as", name, "--quick"] for name in SETS]
    assert capsys.readouterr().out == ""


def test_torch_is_held_to_the_instruction_set_but_for_the_best(child, monkeypatch):
    monkeypatch.setattr(native, "instruction_sets", lambda: ("scalar", "avx2", "avx512", "avx1024"))
    options = argparse.Namespace(quick=True, output=None, commit=None)
    held = {}
    for name in native.instruction_sets():
        held[name] = bench.measure_apart(name, options, [])["torch_held_by"]
        assert held[name].items() <= child[1][-1][1].items()
    assert {name for name, switches in held.items() if switches} == {"avx2", "avx512"}
    monkeypatch.setattr(native, "instruction_sets", lambda: ("scalar", "avx2"))
    assert bench.measure_apart("avx2", options, [])["torch_held_by"] == {}


def test_a_process_that_fails_is_told_in_a_sentence(child, capsys):
    child[0].code = 3
    assert bench.main(["--best", "scalar", "--quick"]) == 2
    assert capsys.readouterr().err == "crossovers: as scalar: the process that measures ended with 3\n"


def test_a_machine_is_measured_from_end_to_end(python):
    """On a small layer, in a process of its own: `measure` hides what is better for good."""
    program = f"""
import json, sys
sys.path.insert(0, {str(Path(bench.__file__).parent)!r})
import crossovers, torch
from qft.speed.clock import Effort
torch.set_num_threads(1)
crossovers.tell = lambda line: None
wanted = crossovers.Wanted((1, 3), 0, ("nf4 g64 f32",), ((128, 256),), Effort(2, 2))
print(json.dumps(crossovers.measure("scalar", wanted)))
"""
    found = json.loads(python(program))
    assert [(one["kernel"], one["verb"], one["dtype"]) for one in found["served"]] == [
        ("scalar", verb, str(dtype).removeprefix("torch.")) for verb in VERBS for dtype in native.DTYPES
    ]
    assert {tuple(one["lead"]) for one in found["served"]} <= {("1",), ("1", "3")}
    crossovers.parse(bench.render({"scalar": found}))
