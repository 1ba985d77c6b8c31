"""compute-sanitizer over one small shape per kernel. A tool that is missing or refuses the device has not been run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 99  # the exit code asked for where a tool finds something
# A program so small that only a tool's refusal can fail it: one allocation through the driver's own interface.
ALLOCATE = """
import ctypes, sys
cuda, context, memory = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_uint64()
calls = [lambda: cuda.cuInit(0), lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0),
         lambda: cuda.cuCtxSetCurrent(context), lambda: cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(4096)),
         lambda: cuda.cuMemFree_v2(memory)]
sys.exit(next((f"the driver returned {error}" for call in calls if (error := call())), 0))
"""


def sanitizer() -> str | None:
    """The program, where it is on the path or beside the compiler."""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def watched(tool: str, *program: str) -> subprocess.CompletedProcess[str]:
    """Run Python under a tool. Every tensor gets an allocation of its own, so that its end is an end for the tool."""
    command = [str(sanitizer()), "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, *program]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip("= ") for line in (done.stdout + done.stderr).splitlines() if line.strip("= ")]
    return " / ".join(lines[-6:]) or f"exit code {done.returncode} and not a word"


@pytest.mark.parametrize("tool", TOOLS)
def test_one_small_shape_per_kernel(tool):
    if sanitizer() is None:
        pytest.skip(f"not run: compute-sanitizer is not on the PATH, so {tool} has not looked")
    if (refusal := watched(tool, "-c", ALLOCATE)).returncode:
        pytest.skip(f"not run: {tool} refuses this machine: {last_words(refusal)}")
    done = watched(tool, str(Path(__file__).parent / "one_of_each.py"))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert "ran" in done.stdout.splitlines()
    assert "SUMMARY" in done.stdout + done.stderr, "the tool said nothing of what it saw"
