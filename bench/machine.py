"""What the numbers were measured on: the processor, and how fast it reads, writes, copies and multiplies."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FLAGS = re.compile(r"avx2|f16c|fma|avx512\w*|avx_vnni|amx\w*")
UNKNOWN_CACHE = 64 << 20  # bytes assumed where the system does not say


def processor() -> dict[str, Any]:
    """Model, usable cores, torch's threads, instruction sets, cache sizes in bytes."""
    info = Path("/proc/cpuinfo")
    lines = dict(re.findall(r"^([^\n:\t]+)\s*: (.*)$", info.read_text(), re.M)) if info.exists() else {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": lines.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "flags": sorted({flag for flag in lines.get("flags", "").split() if FLAGS.fullmatch(flag)}),
        "caches": caches(),
        "system": platform.system(),
    }


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of the data caches that the first core sees, by level; empty where the system does not say."""
    found = {}
    for index in sorted(folder.glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            size = (index / "size").read_text().strip()
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            found["L" + (index / "level").read_text().strip()] = int(size.rstrip("KM")) * unit
    return found


def last_level_cache() -> int:
    """Bytes."""
    return max(caches().values(), default=UNKNOWN_CACHE)


def best(call: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of `rounds` calls after a first: a limit is the most that the machine can do."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def limits(rounds: int) -> dict[str, float]:
    """Bytes per second read, written and copied (both directions counted), operations per second of dense products."""
    source = torch.ones(8 * last_level_cache() // 4)
    target, row = torch.empty_like(source), torch.ones(4096)
    matrix = source[: source.numel() // 4096 * 4096].view(-1, 4096)
    readers = (source.sum, lambda: torch.mv(matrix, row), lambda: torch.dot(source, source))
    found = {
        "read": source.nbytes / min(best(reader, rounds) for reader in readers),
        "write": source.nbytes / best(target.zero_, rounds),
        "copy": 2 * source.nbytes / best(lambda: target.copy_(source), rounds),
    }
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        a, b = torch.randn(2048, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
        found[name] = 2 * 2048 * 4096 * 4096 / best(lambda a=a, b=b: a @ b.T, rounds)
    return found


def versions() -> dict[str, str]:
    """Of Python and the packages timed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "bitsandbytes", "qft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The checkout's commit, with "+" after it where files differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return "unknown"
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") not in ("", "unknown") else "")
