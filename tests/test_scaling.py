"""How time and memory grow: the calls that are timed, lines through points, the report, and the page made of it."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import resident
import scaling
import scaling_layers
import scaling_model
import scaling_page
from scaling_layers import Axes
from scaling_model import DENSE, Shape

from qft.speed.clock import Effort

ROOT = Path(__file__).parent.parent
TINY = Shape(64, 96, 2, 2)
FEW = Axes((64,), (1, 3), (0, 4), Effort(1, 1), 1)
linux = pytest.mark.skipif(not resident.CLEAR.exists(), reason="resident memory is read from Linux's /proc")


# ---- memory


@linux
def test_the_extra_peak_of_a_call_is_what_it_holds_at_once():
    size = 40 << 20
    both = resident.extra_peak(lambda: torch.ones(size, dtype=torch.uint8) + torch.ones(size, dtype=torch.uint8))
    one = resident.extra_peak(lambda: torch.ones(size, dtype=torch.uint8))
    assert 2.9 * size < both < 3.2 * size
    assert 0.9 * size < one < 1.2 * size  # the peak of the call before is forgotten


# ---- layers


@pytest.fixture
def small(monkeypatch):
    """Layers of 96x128, no buffer to flush caches with."""
    monkeypatch.setattr(scaling_layers, "SQUARE", (96, 128))
    monkeypatch.setattr(scaling_layers, "DOWN", (128, 64))
    monkeypatch.setattr(scaling_layers, "TRAINED", 8)
    monkeypatch.setattr(scaling_layers, "BATCH", 4)
    monkeypatch.setattr(scaling_layers, "cache_flush", lambda: (int, 0))
    monkeypatch.setattr(scaling_layers, "extra_peak", lambda call: len(call()))
    monkeypatch.setattr(scaling_layers.limits, "limits", lambda rounds: {"read": 1e9 * torch.get_num_threads()})


@pytest.mark.parametrize(
    ("name", "axis", "places"),
    [("size", "size", [64]), ("rows", "rows", [1, 3]), ("rank", "rank", [0, 4]), ("threads", "threads", [1, 2])],
)
def test_every_kind_has_a_point_at_every_place(small, threads, name, axis, places):
    threads(2)
    points = scaling.LAYER_SECTIONS[name](FEW, 2)
    assert torch.get_num_threads() == 2
    assert list(dict.fromkeys(point[axis] for point in points)) == places
    whats = dict.fromkeys(point["what"] for point in points)
    assert len(points) == len(places) * len(whats) * len(scaling_layers.KINDS)
    for kind in scaling_layers.KINDS:
        assert [point[axis] for point in points if point["kind"] == kind] == [at for at in places for _ in whats]
    assert all(point["median_s"] > 0 and point["extra_bytes"] > 0 for point in points)
    dense, packed = (next(p["stored_bytes"] for p in points if p["kind"] == kind) for kind in (DENSE, "nf2 g64 f32"))
    assert dense / packed == pytest.approx(16 / 2.5)


def test_a_lora_trains_its_factors_whoever_has_it():
    w = (torch.randn(96, 128) * 0.02).bfloat16()
    for kind in scaling_layers.KINDS:
        timed = scaling_layers.adapted(kind, w, 4)
        assert timed.point["trainable"] == 4 * (96 + 128)
        assert [tuple(made.shape) for made in timed.call()] == [(512, 96), (512, 128), (4, 128), (96, 4)]
        assert timed.small()[0].shape == (512, scaling_layers.SLICE)
        assert scaling_layers.adapted(kind, w, 0).point["trainable"] == 0


@pytest.mark.parametrize("make", [scaling_layers.forward, scaling_layers.train])
def test_a_wrong_product_is_not_timed(monkeypatch, make):
    w = (torch.randn(96, 128) * 0.02).bfloat16()
    make("nf4 g64 f32", w, 3)
    matmul = scaling_layers.ops.matmul
    monkeypatch.setattr(scaling_layers.ops, "matmul", lambda x, q: matmul(x, q) * 1.02)
    with pytest.raises(ValueError, match="a wrong result is not timed"):
        make("nf4 g64 f32", w, 3)


# ---- models


def test_parameters_are_counted_as_the_model_has_them():
    model = scaling_model.dense_model(TINY)
    assert sum(parameter.numel() for parameter in model.parameters()) == TINY.parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    weight = model.model.layers[0].mlp.up_proj.weight.float()
    assert 0.019 < weight.std() < 0.021
    assert torch.isfinite(model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits).all()


def test_the_measured_models_grow_to_a_billion():
    counts = [shape.parameters for shape in scaling.MODELS]
    assert counts == sorted(counts)
    assert 1e9 < counts[-1] < 1.1e9


@linux
def test_a_model_says_what_it_takes(threads):
    threads(2)
    point = scaling_model.measure(TINY, "nf4 g64 dq", 8, 2)
    assert point["parameters"] == TINY.parameters
    assert point["trainable"] == 16 * TINY.layers * (4 * 2 * TINY.hidden + 3 * (TINY.hidden + TINY.intermediate))
    dense = 2 * 2 * scaling_model.VOCABULARY * TINY.hidden
    assert dense < point["stored_bytes"] < 2 * TINY.parameters + 4 * point["trainable"]
    assert point["step_spread_s"][0] <= point["step_s"] <= point["step_spread_s"][1]
    assert point["library_bytes"] > 0


@linux
@pytest.mark.slow
def test_a_model_is_measured_in_a_process_of_its_own():
    points = [scaling.in_child(TINY, kind, scaling.ModelEffort(8, 1), 1) for kind in ("nf4 g64 dq", DENSE)]
    packed, dense = points
    assert packed["parameters"] == dense["parameters"] == TINY.parameters
    assert packed["trainable"] == dense["trainable"] > 0
    assert packed["stored_bytes"] < dense["stored_bytes"]
    assert all(point[key] > 0 for point in points for key in ("step_s", "token_s", "library_bytes"))


def test_a_failed_child_is_one_sentence(monkeypatch):
    program = "import sys; sys.exit('FormatError: ' + sys.argv[2] + ' is no format')"
    run = scaling.subprocess.run
    monkeypatch.setattr(
        scaling.subprocess, "run", lambda words, **how: run([words[0], "-c", program, *words[4:]], **how)
    )
    with pytest.raises(ValueError, match=r"^nf9 with 1 M parameters failed: FormatError: nf9 is no format$"):
        scaling.in_child(TINY, "nf9", scaling.ModelEffort(8, 1), 1)


def test_a_step_changes_the_lora_and_a_token_costs_no_gradient():
    torch.manual_seed(0)
    model, step, token = scaling_model.calls(TINY, "nf4 g64 dq", 8)
    before = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
    assert step().isfinite()
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert token().shape == (1, 1, scaling_model.VOCABULARY)
    assert not token().requires_grad
    assert isinstance(model, nn.Module)


# ---- lines


def points_of(kind, pairs):
    return [{"kind": kind, "parameters": n, **dict.fromkeys(scaling.FITTED, y)} for n, y in pairs]


def test_a_line_goes_through_points_on_it_and_says_how_far_others_lie():
    line = scaling.fit(points_of("a", [(1e8, 3.0), (2e8, 5.0), (4e8, 9.0)]) + points_of("b", [(1, 1)]), "a", "step_s")
    assert (line["a"], line["b"] * 1e8) == (pytest.approx(1.0), pytest.approx(2.0))
    assert line["residual"] == pytest.approx(0.0, abs=1e-12)
    assert scaling.at(line, 1e9) == pytest.approx(21.0)
    bent = scaling.fit(points_of("a", [(0, 1.0), (1, 1.0), (2, 4.0)]), "a", "token_s")
    assert (bent["a"], bent["b"]) == (pytest.approx(0.5), pytest.approx(1.5))
    assert bent["residual"] == pytest.approx(1.0)


# ---- the report


def test_sections_are_written_one_by_one_and_others_stay(tmp_path, monkeypatch, threads):
    measured = iter(range(9))
    monkeypatch.setattr(scaling, "measure", lambda name, quick, threads: {"points": [next(measured)]})
    path = tmp_path / "new" / "scaling.json"
    before = str(torch.get_num_threads())
    words = ["--threads", before, "--output", str(path), "--commit", "abc"]
    assert scaling.main(["--only", "rows", "--only", "size", *words]) == 0
    assert scaling.main(["--only", "rows", "--quick", *words]) == 0
    sections = json.loads(path.read_text())["sections"]
    assert {name: section["points"] for name, section in sections.items()} == {"rows": [2], "size": [1]}
    assert sections["rows"]["command"] == f"python bench/scaling.py --quick --only rows --threads {before}"
    assert sections["rows"]["quick"] is True
    assert sections["size"]["commit"] == "abc"


def test_what_cannot_be_measured_is_one_sentence(tmp_path, monkeypatch, capsys):
    def fail(name, quick, threads):
        raise ValueError("a wrong result")

    monkeypatch.setattr(scaling, "measure", fail)
    words = ["--threads", str(torch.get_num_threads()), "--output", str(tmp_path / "out.json")]
    assert scaling.main(words) == 2
    assert capsys.readouterr().err == "scaling: a wrong result\n"
    assert not (tmp_path / "out.json").exists()


# ---- the page


def test_the_page_and_its_figures_are_those_of_the_results():
    assert scaling_page.publish(ROOT, check=True) == [], "run python bench/scaling_page.py"


@pytest.fixture
def report(tmp_path):
    """The results as they stand, in a root of their own."""
    path = tmp_path / "bench" / "results" / "scaling.json"
    path.parent.mkdir(parents=True)
    path.write_bytes((ROOT / "bench" / "results" / "scaling.json").read_bytes())
    return path


def test_check_writes_nothing_and_a_changed_figure_is_seen(tmp_path, report):
    everything = ["docs/scaling.md", "docs/figures/scaling-layers.png", "docs/figures/scaling-models.png"]
    assert scaling_page.publish(tmp_path, check=True) == everything
    assert not (tmp_path / "docs").exists()
    assert scaling_page.publish(tmp_path, check=False) == everything
    assert scaling_page.publish(tmp_path, check=True) == []
    (tmp_path / "docs" / "scaling.md").write_text("edited")
    assert scaling_page.publish(tmp_path, check=True) == everything[:1]
    scaling_page.publish(tmp_path, check=False)
    found = json.loads(report.read_text())
    found["sections"]["size"]["points"][0]["median_s"] *= 2
    report.write_text(json.dumps(found))
    assert scaling_page.publish(tmp_path, check=True) == everything


def test_every_point_has_its_time_on_the_page(report):
    found = json.loads(report.read_text())
    page = scaling_page.page(found)
    for name, section in found["sections"].items():
        part = re.search(rf"^## {scaling_page.TITLES[name]}\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]
        for point in section["points"]:
            for key in {"median_s", "step_s", "token_s"} & point.keys():
                assert f"| {scaling_page.milliseconds(point[key])} |" in part
        assert section["command"] in part
    for one in found["sections"]["model"]["larger"]:
        assert f"| {one['peak_bytes'] / 1e9:.1f} |" in page


def test_a_section_without_a_run_says_so(report):
    found = json.loads(report.read_text())
    del found["sections"]["threads"], found["sections"]["model"]
    page = scaling_page.page(found)
    assert "No run of `python bench/scaling.py --only threads` is in bench/results: not measured yet." in page
    assert "Nothing below was measured" not in page


def test_speedup_is_over_one_thread_of_the_same_kind_and_work():
    def point(kind, what, count, seconds):
        found = {"kind": kind, "what": what, "threads": count, "rows": 1, "read": 1e9, "extra_bytes": 0}
        return {**found, "median_s": seconds, "stored_bytes": 1}

    points = [point(kind, what, n, t / n) for n in (1, 4) for kind, t in (("a", 8), ("b", 2)) for what in ("x", "y")]
    section = {"points": points, "machine": {"cpu": "", "cores": 4, "threads": 4}, "versions": {"torch": ""}}
    section |= {"load_before": 0, "load_after": 0, "command": "", "date": "", "commit": "", "quick": False}
    assert scaling_page.layers("threads", section).count("| 4.00x |") == 4


def test_without_results_the_page_cannot_be_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run python bench/scaling.py"):
        scaling_page.publish(tmp_path, check=True)
