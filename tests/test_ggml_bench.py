"""The comparison with ggml, without ggml: what it refuses, its arithmetic, whose turn it is, and its page."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import cases
import ggml
import ggml_library
import ggml_page


def row(who, fmt, seconds, *, rows=1, shape=cases.UP, place="", dtype="f32", stored=4000):
    made = {"who": who, "format": fmt, "place": place, "dtype": dtype, "rows": rows, "shape": list(shape)}
    made |= {"stored_bytes": stored, "weight_error": 0.1, "relative_error": 0.001}
    return ggml.figures(made, [seconds] * 3, read=1e9)


ROWS = [
    row("qft", "nf4 g64 f32", 2e-5, dtype="bf16"),
    row("qft", "nf4 g64 f32", 3e-5),
    row("qft", "nf3 g64 f32", 8e-5, dtype="bf16"),
    row("ggml", "q4_0", 5e-5, place="plain"),
    row("ggml", "q4_0", 4e-5, place="CPU_REPACK"),
    row("ggml", "q4_0", 1e-6, place="plain", rows=2),
    row("ggml", "iq4_nl", 1e-5, place="plain"),
    row("ggml", "q3_K", 4e-5, place="plain"),
]


def report(**changes):
    made = {
        "command": "python bench/ggml.py --ggml DIR",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc",
        "versions": {"torch": "2.13"},
        "machine": {"cpu": "Some CPU", "cores": 4},
        "ggml": {"version": "0.21.0", "commit": "d99724f", "features": ["AVX2", "REPACK"], "threads": 4},
        "shared_threads": False,
        "quick": False,
        "limits": {"read": 1e9},
        "rows": ROWS,
        "comparisons": ggml.comparisons(ROWS),
        "disturbance": {"qft": {"usual_s": 1e-3, "disturbed_s": 2e-3}, "ggml": {"usual_s": 3e-3, "disturbed_s": 4e-3}},
        "load_before": 0.25,
        "load_after": 1.0,
    }
    return {**made, **changes}


# ---- the library


def test_a_folder_without_ggml_is_refused_in_one_sentence(tmp_path, capsys):
    assert ggml.main(["--ggml", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ggml: cannot use ggml in ")
    assert "BUILD_SHARED_LIBS=ON" in said
    assert said.count("\n") == 1


def test_a_file_that_is_no_library_is_refused(tmp_path, capsys):
    (tmp_path / "libggml-base.so").write_text("no library")
    assert ggml.main(["--ggml", str(tmp_path)]) == 2
    assert "libggml-base.so" in capsys.readouterr().err


def test_libraries_load_base_first_and_one_for_the_cpu(tmp_path):
    for name in ("libggml.so", "libggml-cpu.so", "libggml-base.so", "libggml-cuda.so"):
        (tmp_path / name).touch()
    names = ["libggml-base.so", "libggml-cpu.so", "libggml.so"]
    assert [path.name for path in ggml_library.find(tmp_path)] == names
    (tmp_path / "libggml-cpu-haswell.so").touch()
    with pytest.raises(OSError, match="holds 2 libraries for the CPU"):
        ggml_library.find(tmp_path)


def test_symbols_come_from_the_first_library_that_has_them():
    names = list(ggml_library.FUNCTIONS)
    functions = {name: SimpleNamespace() for name in names}
    first = SimpleNamespace(**{name: functions[name] for name in names[:5]})
    second = SimpleNamespace(
        **{name: functions[name] if name in names[5:] else SimpleNamespace() for name in names[4:]}
    )
    bound = ggml_library.bind([first, second])
    assert bound == functions
    assert all(bound[name] is functions[name] for name in names)
    assert functions["ggml_init"].argtypes == (ggml_library.InitParams,)
    del second.ggml_threadpool_new
    with pytest.raises(OSError, match="no ggml_threadpool_new"):
        ggml_library.bind([first, second])


# ---- whose turn it is


def test_openmp_libraries_are_told_apart():
    lines = ("torch/lib/libgomp.so.1", "torch/lib/libgomp.so.1", "lib/libgo.so")
    maps = "\n".join(f"1-2 r-xp 0 8:1 5 /a/{name}" for name in lines)
    assert ggml.openmp_runtimes(maps) == ["libgomp.so.1"]
    assert ggml.openmp_runtimes(maps + "\n5-6 r-xp 0 8:1 7 /usr/lib/libomp.so.5") == ["libgomp.so.1", "libomp.so.5"]


def test_a_busy_process_never_comes_to_rest(monkeypatch):
    ggml.quiet()
    clock = iter(range(1000))
    monkeypatch.setattr(ggml, "PATIENCE", 0.01)
    monkeypatch.setattr(ggml.time, "process_time", lambda: next(clock) * ggml.REST)
    with pytest.raises(OSError, match="do not come to rest"):
        ggml.quiet()


@pytest.mark.parametrize("shared", [False, True])
def test_the_other_sides_threads_sleep_before_a_turn(monkeypatch, shared):
    heard = []
    turns = object.__new__(ggml.Turns)
    turns.ggml = SimpleNamespace(pause=lambda: heard.append("pause"), resume=lambda: heard.append("resume"))
    turns.side, turns.shared = "", shared
    turns.flush = {side: lambda side=side: heard.append(f"flush {side}") for side in ("qft", "ggml")}
    monkeypatch.setattr(ggml, "quiet", lambda: heard.append("quiet"))
    for side in ("ggml", "ggml", "qft"):
        turns.before(side, lambda: heard.append("small"))()
    expected = "pause quiet resume|flush ggml|small|flush ggml|small|pause quiet|flush qft|small"
    handed = [word for part in expected.split("|") for word in (part.split() if part[:5] == "pause" else [part])]
    assert heard == [word for word in handed if not shared or word.startswith(("flush", "small"))]


# ---- figures


def test_a_row_says_bits_tokens_and_bandwidth():
    made = row("ggml", "q4_0", 2e-5, rows=4, shape=(100, 64), stored=3600)
    assert made["bits_per_weight"] == 4.5
    assert made["tokens_per_s"] == pytest.approx(4 / 2e-5)
    assert made["bytes_per_s"] == pytest.approx(3600 / 2e-5)
    assert made["percent_of_read"] == pytest.approx(18.0)
    assert (made["median_s"], made["rounds"]) == (2e-5, 3)


def test_a_pair_is_compared_with_the_faster_memory_at_the_same_rows():
    found = {(one["qft"], one["dtype"], one["ggml"]): one for one in ggml.comparisons(ROWS)}
    assert set(found) == {
        *((("nf4 g64 f32", dtype, name)) for dtype in ("bf16", "f32") for name in ("q4_0", "iq4_nl")),
        ("nf3 g64 f32", "bf16", "q3_K"),
    }
    best = found["nf4 g64 f32", "bf16", "q4_0"]
    assert (best["place"], best["met"]) == ("CPU_REPACK", True)
    assert best["ratio"] == pytest.approx(2.0)
    assert found["nf4 g64 f32", "bf16", "iq4_nl"]["met"] is False
    assert found["nf4 g64 f32", "f32", "q4_0"]["least"] is None


def test_only_one_token_through_the_wide_layers_is_held_to_a_target():
    pairs = [
        [
            row("qft", "nf4 g64 f32", 1e-5, dtype="bf16", **at),
            row("ggml", "q4_0", 1e-5, **at),
            row("ggml", "iq4_nl", 1e-5, **at),
        ]
        for at in ({"shape": cases.SQUARE}, {"shape": cases.DOWN}, {"shape": cases.UP, "rows": 2})
    ]
    assert [[one["least"] for one in ggml.comparisons(pair)] for pair in pairs] == [[None] * 2, [1.0] * 2, [None] * 2]


def test_every_code_has_a_partner_of_about_the_same_bits():
    assert {code for code, _ in ggml.PAIRS} == {"nf4", "nf3", "nf2", "int4"}
    assert {name for _, name in ggml.PAIRS} <= set(ggml_library.TYPES)


def test_a_wrong_product_is_not_timed():
    x, w = torch.randn(3, 64), torch.randn(8, 64)
    assert ggml.check(x @ w.T, x, w, 1e-5, "a product") < 1e-5
    with pytest.raises(ValueError, match="a product: the relative error"):
        ggml.check(1.02 * (x @ w.T), x, w, ggml.GGML_TOLERANCE, "a product")


def test_our_formats_are_checked_and_called_on_the_same_numbers(monkeypatch):
    weight = (torch.randn(128, 256) * 0.02).bfloat16()
    monkeypatch.setattr(ggml, "weight_like", lambda shape, dtype: weight)
    made = ggml.ours((128, 256), (1, 3))
    assert [one.row["rows"] for one in made] == [1, 3] * 8
    assert {tuple(one.call().shape) for one in made} == {(1, 128), (3, 128)}
    assert {tuple(one.small().shape) for one in made} == {(1, ggml.SLICE), (3, ggml.SLICE)}
    by_dtype = {one.row["dtype"]: one.call().float() for one in made[:4] if one.row["rows"] == 3}
    assert torch.allclose(by_dtype["bf16"], by_dtype["f32"], atol=0.05)


def test_folders_of_this_machine_stay_out_of_the_report():
    options = argparse.Namespace(ggml=Path("/x/build"), output=Path("/y/out.json"))
    words = ["--ggml", "/x/build", "--threads", "2", "--output", "/y/out.json"]
    assert ggml.nameless(words, options) == ["--ggml", "DIR", "--threads", "2", "--output", "out.json"]


# ---- the page


def test_without_a_run_the_page_says_so(tmp_path):
    assert ggml_page.section(tmp_path).endswith("not measured yet.")


@pytest.mark.parametrize("changes", [{}, {"shared_threads": True}, {"quick": True}])
def test_the_page_shows_targets_ratios_and_rows(tmp_path, changes):
    (tmp_path / ggml_page.NAME).write_text(json.dumps(report(**changes)))
    page = ggml_page.section(tmp_path)
    assert "1 of 3 targets are met." in page
    assert "| 14336x4096 M=1 bf16: nf4 g64 f32 | q4_0 (CPU_REPACK) | at least 1x | 2.00x | met |" in page
    assert "| 14336x4096 M=1 bf16: nf3 g64 f32 | q3_K (plain) | at least 1x | 0.50x | **missed** |" in page
    assert "| 14336x4096 | nf4 g64 f32, f32 | q4_0 | 1.33x |" in page
    assert "| 14336x4096 | ggml, q4_0, plain | 0.00 | 10.0 % | 0.05 ms | 0.05 .. 0.05, 3 | 20000 | 0.1 | 8 % |" in page
    assert ("same OpenMP threads" in page) == changes.get("shared_threads", False)
    assert ("quick run" in page) == changes.get("quick", False)
    assert "qft takes 1 ms as timed here and 2 ms then; ggml takes 3 ms as timed here and 4 ms then" in page


def test_a_run_without_the_wide_layers_has_no_targets(tmp_path):
    rows = [row("qft", "nf3 g64 f32", 1e-5, shape=(256, 4096)), row("ggml", "q3_K", 1e-5, shape=(256, 4096))]
    (tmp_path / ggml_page.NAME).write_text(json.dumps(report(rows=rows, comparisons=ggml.comparisons(rows))))
    assert "none of the layers that targets are set for" in ggml_page.section(tmp_path)
