"""docs/starting-points.md says what bench/results/starting-points.json holds."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import publish
import starting_points


def test_the_page_is_what_the_results_say():
    results = json.loads(starting_points.RESULT.read_text())
    page = starting_points.PAGE.read_text()
    assert publish.replace_block(page, "measured", starting_points.tables(results)) == page
    for row in results["starts"]["rows"]:
        row["error"] *= 1.1
    assert publish.replace_block(page, "measured", starting_points.tables(results)) != page


def test_every_row_is_a_start_by_its_name():
    results = json.loads(starting_points.RESULT.read_text())
    assert [row["start"] for row in results["starts"]["rows"]][: len(starting_points.STARTS)] == [
        *starting_points.STARTS
    ]
    assert {name.partition(",")[0] for name in starting_points.STARTS} == set(starting_points.NEEDS)


@pytest.mark.parametrize("part", starting_points.PARTS)
def test_a_part_alone_is_kept_beside_the_others(part, tmp_path, monkeypatch):
    page, result = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("<!-- measured:begin -->\n<!-- measured:end -->\n")
    result.write_text('{"kept": {}}')
    monkeypatch.setattr(starting_points, "PAGE", page)
    monkeypatch.setattr(starting_points, "RESULT", result)
    monkeypatch.setattr(starting_points, "PARTS", {part: (lambda: {"rows": 1}, lambda report: f"{report['rows']} row")})
    monkeypatch.setattr(sys, "argv", ["starting_points.py", "--part", part])
    starting_points.main()
    assert json.loads(result.read_text()) == {"kept": {}, part: {"rows": 1}}
    assert "1 row" in page.read_text()
