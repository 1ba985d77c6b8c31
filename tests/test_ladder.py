"""The ladder's page is that of its results, and says what they say."""

import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import methods  # noqa: E402
import methods_page  # noqa: E402

ORDER = ("cloq", "qera_exact", "qera_diag", "loftq", "plain")


def rows():
    """Results in which every start is a point better than the next, and seeds differ by a tenth."""
    made = []
    for case in methods.cases():
        place = ORDER.index(case.start) if case.start in ORDER else 2.5
        before = 40 + place + case.seed / 10
        figures = {"before": before, "after": before - 10, "own_before": 9.0, "own_after": 10.0}
        stored = {"bits": None if case.format is None else 2.25, "bytes": 1, "start_seconds": 1.0}
        made.append({**vars(case), **figures, **stored, "train_seconds": 1.0})
    return made


def test_the_page_and_the_figure_are_those_of_the_results():
    assert methods_page.publish(ROOT, check=True) == [], "run python bench/methods_page.py"


def test_every_format_meets_every_start_once():
    every = list(methods.cases())
    assert len(set(every)) == len(every)
    tuned = {(case.format, case.start) for case in every if case.rank == methods.RANK}
    starts = ("plain", "search", "loftq", "qera_diag", "qera_exact", "cloq", "cloq + rilq")
    assert tuned >= set(product(methods.FORMATS, starts))
    scales = {(case.format, case.start) for case in every if case.rank == 0}
    assert scales == set(product(methods.FORMATS, ("plain", "search", "gptq")))
    assert {case.seed for case in every} == {0, 1, 2}


def test_the_order_is_said_and_an_inversion_too():
    made = rows()
    said = methods_page.verdicts(made)
    assert "`nf2 g64 f16`, perplexity before tuning: cloq 40.10 < qera_exact 41.10 < qera_diag 42.10" in said
    assert "not the order expected" not in said
    for row in made:
        if row["start"] == "loftq" and row["format"] == "nf2 g64 f16":
            row["before"] = 39.0
    assert "loftq 39.00 < cloq 40.10" in methods_page.verdicts(made)
    assert "not the order expected" in methods_page.verdicts(made)


def test_the_best_start_is_measured_against_the_dense_model_of_its_rank():
    made = rows()
    for row in made:
        if row["format"] is None:
            row["after"] = 29.0 if row["rank"] == methods.RANK else 20.0
    said = methods_page.verdicts(made)
    assert f"at rank {methods.RANK}, at most 2.25 stored bits" in said
    assert "30.10, +3.79 % over dense LoRA's 29.00" in said
    assert "30.10, +50.50 % over dense LoRA's 20.00" in said


def test_runs_are_measured_against_the_dense_run_of_their_seed():
    """Fewer seeds must not look better for being the easy ones."""
    made = rows()
    for row in made:
        row["after"] = (30.0 if row["format"] is None else 33.0) * (1 + row["seed"])
    one = [
        row for row in made if (row["format"], row["start"], row["rank"], row["seed"]) == ("nf4 g64 f16", "cloq", 16, 2)
    ]
    assert methods_page._over_dense(made, one) == pytest.approx(10)


def test_what_was_not_run_is_named():
    with pytest.raises(ValueError, match=r"no run of None, dense, rank 16; run python bench/methods\.py"):
        methods_page.verdicts([row for row in rows() if row["format"]])


def test_the_tables_have_a_line_for_every_start_and_the_figure_names_its_results(tmp_path):
    made = rows()
    body = methods_page.body(made)
    assert body.count("\n| `") == len({(row["format"], row["start"], row["rank"]) for row in made if row["format"]})
    assert "| `lm2 g64 f16` | cloq | 40.10 (40.00 .. 40.20) | 30.10 (30.00 .. 30.20) |" in body
    methods_page.draw(made, "digest", tmp_path / "figure.png")
    assert b"digest" in (tmp_path / "figure.png").read_bytes()
