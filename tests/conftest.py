"""What every test has: a fixed seed, a kernel cache of its own, and outputs that show what was not written."""

import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory):
    """Kernels compiled by the tests go to a folder of the run, never to the user's cache; parallel workers share it."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
        folder.mkdir(exist_ok=True)
        patch.setenv("QFT_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_choice():
    """For tests that change the table of kernels: what was chosen is forgotten before, after, and at each call."""
    from qft import kernels

    kernels._chosen.cache_clear()
    yield kernels._chosen.cache_clear
    kernels._chosen.cache_clear()


@pytest.fixture
def needs_compiler(monkeypatch, fresh_choice):
    """As on a machine whose instruction sets all need levels of one's own compiled."""
    from qft import native
    from qft.compiler.emit import SHARED

    sets = tuple(isa for isa in native.instruction_sets() if isa not in SHARED)
    monkeypatch.setattr(native, "instruction_sets", lambda: sets)


@pytest.fixture
def panels_above(monkeypatch, fresh_choice):
    """Row kernels serve up to 128 rows, panels more, whatever was measured for this machine."""
    from formats import ABOVE

    from qft import kernels

    monkeypatch.setattr(kernels, "rows_served", lambda kernel, verb, dtype, machine: (1, ABOVE - 1))


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """Most tensors here are tiny: more threads than the smallest machine has only wait for each other."""
    torch.set_num_threads(2)


@pytest.fixture
def poisoned(monkeypatch):
    """Every torch.empty is full of NaN, or of 0xA5 where it holds bytes: what a kernel does not write is seen."""
    empty = torch.empty

    def poison(*args, **keywords):
        tensor = empty(*args, **keywords)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 0xA5)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def threads():
    """Set torch's thread count; it is put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def python():
    """Run a program in a fresh interpreter; returns what it printed, and fails with what it said on stderr."""

    def run(program: str, *, timeout: float = 120, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **environment},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    return run


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the `qft` command in this process: (exit code, stdout, stderr)."""
    from qft import cli

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["qft", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return call


@pytest.fixture
def result(run):
    """The JSON that a `qft` command prints, which must be all it prints to stdout."""

    def call(*words):
        code, out, err = run(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return call
