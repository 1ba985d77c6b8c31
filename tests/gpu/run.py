"""`make gpu`: build in place for the GPU at hand, run every test of this folder, and write down what happened.

    python tests/gpu/run.py [--build] [--output FILE] [--commit NAME] [--budget S]

Needs no network and no git. Each file of tests runs in a process of its own, all at once; a crash costs the test it
happened in, and the rest goes on in another process. What was not run, and why, is in the report: never as passed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(HERE)]
try:
    import gpu_probe
    import gpu_tables
    import machine
    from session import read
except ModuleNotFoundError as missing:
    sys.exit(f"gpu: {sys.executable} has no {missing.name}; say make gpu PYTHON=... with one that has torch and pytest")

Start = Callable[[Path, Path, float], str]  # (log, file of tests, seconds) -> how the process ended, in words


def build(seconds: float) -> None:
    """The calls that setup.py makes, without setuptools: qft/_native*.so for this interpreter and this GPU.

    Raises:
        OSError: CMake is missing, fails, or takes longer.
    """
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    until, environment = time.monotonic() + seconds, {**os.environ, "PATH": path}
    configure = ["-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    for arguments in (configure, ["--build", str(folder), "-j", str(os.cpu_count() or 1)]):
        command = [shutil.which("cmake", path=path) or "cmake", *arguments]
        try:
            left = until - time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=environment, check=False)
        except subprocess.TimeoutExpired:
            raise OSError(f"the build took more than {seconds:.0f} s") from None
        if done.returncode:
            raise OSError(f"the build failed: {(done.stdout + done.stderr).strip()[-6000:]}")
    (module,) = folder.glob("_native*.so")
    shutil.copy2(module, ROOT / "qft" / f"{module.name}.new")
    os.replace(ROOT / "qft" / f"{module.name}.new", ROOT / "qft" / module.name)


def start(log: Path, file: Path, seconds: float) -> str:
    """One process of pytest over what the log does not know yet."""
    command = [sys.executable, str(HERE / "session.py"), str(log), str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            said = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            return f"stopped after {seconds:.0f} s"
    return f"the process ended with code {process.returncode}: {said.strip()[-2000:]}"


def drive(file: Path, folder: Path, until: float, process: Start = start) -> list[dict[str, Any]]:
    """Every test of a file with its outcome; a process that dies is followed by another for the tests after."""
    log = folder / f"{file.stem}.jsonl"
    while True:
        known = len(read(log))
        words = process(log, file, max(1.0, until - time.monotonic()))
        lines = read(log)
        outcomes = {line["name"]: line for line in lines if "name" in line}
        for name, line in outcomes.items():
            if line["outcome"] == "begun":
                died = {"name": name, "outcome": "failed", "seconds": None, "why": words}
                outcomes[name] = died
                with log.open("a") as opened:
                    opened.write(json.dumps(died) + "\n")
        collected = next((line["collected"] for line in lines if "collected" in line), [])
        if not collected:
            return [{"name": _node(file), "outcome": "failed", "seconds": None, "why": f"not collected: {words}"}]
        left = [name for name in collected if name not in outcomes]
        if not left or time.monotonic() > until or len(lines) <= known + 1:
            never = {"outcome": "failed", "seconds": None, "why": f"never begun: {words}"}
            return [outcomes.get(name, {"name": name, **never}) for name in collected]


def _node(file: Path) -> str:
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name


def versions() -> dict[str, str]:
    """Of what the tests ran with."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout if nvcc else ""
    release = re.search(r"release ([\d.]+)", said)
    return {"python": platform.python_version(), "nvcc": release[1] if release else "not found"}


def run(options: argparse.Namespace) -> int:
    begun = time.monotonic()
    until = begun + options.budget
    at = gpu_probe.found_gpu()
    build(until - begun)
    if options.build:
        return 0
    built = time.monotonic()
    commit, built_with = options.commit or machine.commit(), versions()
    files = sorted(HERE.glob("test_gpu_*.py"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(files)) as pool:
        tests = [test for found in pool.map(partial(drive, folder=Path(folder), until=until), files) for test in found]
    report = {
        "kind": "gpu tests",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": at,
        "versions": built_with,
        "build_s": round(built - begun, 1),
        "tests_s": round(time.monotonic() - built, 1),
        "tests": tests,
    }
    name = f"{gpu_probe.file_name(at['gpu'])}-{report['date'][:10]}-tests.json"
    return write(report, options.output or ROOT / "bench" / "results" / name)


def write(report: dict[str, Any], output: Path) -> int:
    """Save and print; 0 where tests passed and none failed."""
    gpu_probe.save(report, output)
    text = gpu_tables.tests(report)
    output.with_suffix(".md").write_text(text + "\n")
    print(f"{text}\n\n{output}")
    outcomes = [test["outcome"] for test in report["tests"]]
    return 0 if "passed" in outcomes and "failed" not in outcomes else 1


def main(argv: Sequence[str]) -> int:
    """0: no test failed; 1: some did, or none passed; 2: nothing could be run, and one sentence says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: bench/results/<gpu>-<date>-tests.json")
    parser.add_argument("--commit", help="recorded in the report; default: what git says")
    parser.add_argument("--build", action="store_true", help="build and stop")
    parser.add_argument("--budget", type=float, default=520, metavar="S", help="seconds, the build included")
    try:
        return run(parser.parse_args(argv))
    except OSError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
