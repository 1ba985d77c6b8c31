"""The losses of a run: whole, in order, and without what a kill or another attempt left behind."""

import json

import pytest

from qft import FormatError
from qft.training import losses


def test_a_run_is_read_back_as_it_was(tmp_path):
    path = tmp_path / losses.NAME
    losses.begin(path, 0)
    run = [(1, 5.0), (2, 1 / 3), (3, 1e-30)]
    for row in run:
        losses.append(path, *row)
    assert losses.last_run(tmp_path) == run
    assert path.read_text().splitlines()[:2] == ["step,loss", "1,5.0"]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [(1, 4.0), (2, 3.0)]), (9, [(1, 4.0), (2, 3.0), (3, 2.0)])])
def test_a_run_that_goes_on_drops_what_lies_beyond_its_checkpoint(tmp_path, step, kept):
    path = tmp_path / losses.NAME
    path.write_text("step,loss\n1,4.0\n2,3.0\n3,2.0\n")
    losses.begin(path, step)
    assert losses.last_run(tmp_path) == kept
    losses.append(path, step + 1, 1.0)
    assert losses.last_run(tmp_path) == [*kept, (step + 1, 1.0)]


@pytest.mark.parametrize("end", ["3,2", "3", "3,\n", "3,nan\n", "x,1.0\n", "\udc80\n"])
def test_half_a_line_is_none(tmp_path, end):
    path = tmp_path / losses.NAME
    path.write_bytes(b"step,loss\n1,4.0\n2,3.0\n" + end.encode(errors="surrogateescape"))
    assert losses.last_run(tmp_path) == [(1, 4.0), (2, 3.0)]
    losses.begin(path, 9)
    assert path.read_text() == "step,loss\n1,4.0\n2,3.0\n"


def test_the_trainers_own_log_serves_too(tmp_path):
    assert losses.last_run(tmp_path) == []
    logs = [{"step": 10, "loss": 3.5, "grad_norm": 1.0}, {"step": 10, "eval_loss": 3.0}, {"step": 20, "loss": 2.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    assert losses.last_run(tmp_path) == [(10, 3.5), (20, 2.5)]
    (tmp_path / "losses.csv").write_text("step,loss\n1,9.0\n")
    assert losses.last_run(tmp_path) == [(1, 9.0)]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"log_history": [{"loss": 1.0}]}', '{"log_history": [{"loss": "a", "step": 1}]}']
)
def test_a_damaged_log_is_named(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(FormatError, match=r"trainer_state.json is damaged .*; copy it again, or delete it"):
        losses.last_run(tmp_path)
