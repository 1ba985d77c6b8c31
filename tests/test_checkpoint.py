"""A checkpoint is complete or recognisably not, whatever interrupts it."""

import pytest

from qft import FormatError
from qft.disk import checkpoint


def make(parent, step, content=b"weights", sealed=True):
    directory = parent / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    (directory / "a.bin").write_bytes(content)
    (directory / "b.json").write_text("{}")
    if sealed:
        checkpoint.seal(directory)
    return directory


def test_the_newest_is_the_highest_step_not_the_last_written(tmp_path):
    newest = make(tmp_path, 100)
    make(tmp_path, 20)
    make(tmp_path, 9)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint.newest(tmp_path) == (newest, [])
    assert checkpoint.newest(tmp_path / "nothing here") == (None, [])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "no seal": (lambda d: (d / "complete.json").unlink(), "complete.json is missing"),
    "empty seal": (lambda d: (d / "complete.json").write_text(""), "complete.json is damaged"),
    "another seal": (lambda d: (d / "complete.json").write_text("[1]"), "complete.json is damaged"),
    "a file gone": (lambda d: (d / "b.json").unlink(), "b.json is missing"),
    "a file cut": (lambda d: (d / "a.bin").write_bytes(b"weight"), "a.bin has changed"),
    "a bit flipped": (lambda d: flip(d / "a.bin"), "a.bin has changed"),
}


@pytest.mark.parametrize(("harm", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_skipped_and_named(tmp_path, harm, reason):
    good, bad = make(tmp_path, 1), make(tmp_path, 2)
    harm(bad)
    assert checkpoint.newest(tmp_path) == (good, [f"{bad} is incomplete and was skipped: {reason}"])


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_pruning_keeps_the_newest_and_counts_nothing_beyond_it(tmp_path, keep):
    for step in (5, 10, 15):
        make(tmp_path, step)
    ahead = [make(tmp_path, step, sealed=False).name for step in (20, 25)]
    checkpoint.prune(tmp_path / "checkpoint-15", keep)
    left = ["checkpoint-5", "checkpoint-10", "checkpoint-15"][-keep:] + ahead
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left)


def test_a_run_is_claimed_once(tmp_path):
    path = tmp_path / "run" / "command.json"
    checkpoint.claim(path, {"steps": 4, "format": None})
    checkpoint.claim(path, {"steps": 4, "format": None})
    with pytest.raises(ValueError, match=f"^{path.parent} holds a run with steps 4, now 5; use its settings"):
        checkpoint.claim(path, {"steps": 5, "format": None})
    path.write_text("{")
    with pytest.raises(FormatError, match="is damaged; delete"):
        checkpoint.claim(path, {"steps": 4, "format": None})


def test_only_an_empty_folder_is_written_into(tmp_path):
    checkpoint.refuse_to_overwrite(tmp_path)
    checkpoint.refuse_to_overwrite(tmp_path / "new")
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="is not empty; name a new directory"):
            checkpoint.refuse_to_overwrite(taken)
