"""A set of files appears whole or not at all, whatever stops its writer and wherever."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qft.disk import files

STEPS = ("mkdir", "open", "fsync", "rename", "replace", "rmdir", "unlink")  # of the os module: what can fail or be last

# Kills a writer before each of its steps, then a reader before each of its own; prints what each directory came to.
KILLER = f"""
import json, os, shutil, sys
from pathlib import Path
from qft.disk import files

STEPS = {STEPS!r}

def die_before(step):
    left = [step]
    def wrap(call):
        def counted(*args, **keywords):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return call(*args, **keywords)
        return counted
    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))

def put(directory, version):
    with files.replace_files(directory) as folder:
        (folder / "a").write_bytes(version * 50000)
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_bytes(version)

def killed(action, step):
    child = os.fork()
    if child == 0:
        die_before(step)
        action()
        os._exit(0)
    return os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 9

def versions(directory):
    return [(directory / "a").read_bytes()[:1].decode(), (directory / "sub" / "b").read_bytes().decode()]

root, outcomes = Path(sys.argv[1]), []
for step in range(1000):
    directory = root / str(step)
    put(directory, b"1")
    (directory / "task").write_text("the user's")
    if not killed(lambda: put(directory, b"2"), step):
        break
    after = []
    for reader in range(1000):
        copy = root / f"{{step}} {{reader}}"
        shutil.copytree(directory, copy)
        interrupted = killed(lambda: files.settle(copy), reader)
        files.settle(copy)
        after.append(versions(copy) + [(copy / "task").read_text()])
        if not interrupted:
            break
    outcomes.append(after)
print(json.dumps(outcomes))
"""


def put(directory: Path, version: str) -> None:
    with files.replace_files(directory) as folder:
        (folder / "a").write_text(version)
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text(version)


def contents(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_kill_before_any_step_leaves_the_old_set_or_the_new(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path)], capture_output=True, text=True, check=True)
    outcomes = json.loads(run.stdout)
    mixed = [o for step in outcomes for o in step if o not in (["1", "1", "the user's"], ["2", "2", "the user's"])]
    assert not mixed
    versions = [{o[0] for o in step} for step in outcomes]
    assert all(len(seen) == 1 for seen in versions), "a second kill changed which version counts"
    order = [seen.pop() for seen in versions]
    assert order == sorted(order)
    assert order.count("1") >= 5
    assert order.count("2") >= 5
    assert max(map(len, outcomes)) >= 5, "no reader was interrupted"


def fail_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Make the os module's step-th call, and no other, find the disk full; returns whether it came to that."""
    left = [step]

    def wrap(call: Callable) -> Callable:
        def counted(*args, **keywords):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **keywords)

        return counted

    for name in STEPS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return lambda: left[0] < 0


def test_a_disk_full_at_any_step_leaves_the_old_set_or_the_new(tmp_path: Path) -> None:
    old = {"a": "1", "sub/b": "1", "task": "the user's"}
    new = {"a": "2", "sub/b": "2", "task": "the user's"}
    seen = []
    for step in range(1000):
        directory = tmp_path / str(step)
        put(directory, "1")
        (directory / "task").write_text("the user's")
        with pytest.MonkeyPatch.context() as patch:
            failed = fail_at(step, patch)
            with contextlib.suppress(OSError):
                put(directory, "2")
        if not failed():
            break
        at_once = contents(directory)
        files.settle(directory)
        seen.append(contents(directory))
        assert seen[-1] in (old, new)
        if seen[-1] == old:
            assert at_once == old, "a failed save left something behind"
    assert old in seen
    assert new in seen


def test_a_failed_first_save_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.replace_files(tmp_path / "new") as folder:
        (folder / "a" / "b").write_text("1")
    assert not (tmp_path / "new").exists()


def test_readers_that_settle_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    names = [f"{folder}{number}" for folder in ("", "sub/", "sub/sub/") for number in range(10)]
    for turn in range(20):
        for name in names:
            path = tmp_path / str(turn) / files.WRITTEN / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(files.settle, [tmp_path / str(turn)] * 4))
        assert contents(tmp_path / str(turn)) == {name: name for name in names}


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / files.WRITING).mkdir()
    (tmp_path / files.WRITING / "half").write_text("")
    put(tmp_path, "1")
    assert contents(tmp_path) == {"a": "1", "sub/b": "1"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_one_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "task"
    seen = set()
    for step in range(1000):
        path.write_text("1")
        with pytest.MonkeyPatch.context() as patch:
            failed = fail_at(step, patch)
            with contextlib.suppress(OSError), files.replace_file(path) as temporary:
                temporary.write_text("2")
        if not failed():
            break
        seen.add(path.read_text())
        assert contents(tmp_path) == {"task": path.read_text()}
    assert seen == {"1", "2"}
