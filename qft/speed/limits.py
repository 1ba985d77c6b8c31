"""What the machine can do: how fast it reads, writes, copies and multiplies, and what it is."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import native

FLAGS = re.compile(r"avx2|f16c|fma|avx512\w*|avx_vnni|amx\w*")
UNKNOWN_CACHE = 64 << 20  # bytes assumed where the system does not say
CPUS = Path("/sys/devices/system/cpu")


def processor() -> dict[str, Any]:
    """Model, usable cores, torch's threads, instruction sets, cache sizes in bytes."""
    info = Path("/proc/cpuinfo")
    lines = dict(re.findall(r"^([^\n:\t]+)\s*: (.*)$", info.read_text(), re.M)) if info.exists() else {}
    return {
        "cpu": lines.get("model name") or platform.processor() or platform.machine(),
        "cores": len(cores()),
        "threads": torch.get_num_threads(),
        "flags": sorted({flag for flag in lines.get("flags", "").split() if FLAGS.fullmatch(flag)}),
        "caches": caches(),
        "system": platform.system(),
    }


def cores() -> list[int]:
    """Numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def caches(folder: Path = CPUS) -> dict[str, int]:
    """Bytes of the data caches that the first usable core sees, by level; empty where the system does not say."""
    return {level: size for level, (size, _) in _caches_of(folder / f"cpu{cores()[0]}").items()}


def last_level_cache(folder: Path = CPUS) -> int:
    """Bytes of all last-level caches that the usable cores sit on: some processors have one per group of cores."""
    found: dict[str, int] = {}
    for core in cores():
        if levels := _caches_of(folder / f"cpu{core}"):
            size, sharers = levels[max(levels)]
            found[sharers] = size
    return sum(found.values()) or UNKNOWN_CACHE


def _caches_of(cpu: Path) -> dict[str, tuple[int, str]]:
    """Bytes of one core's data caches and the cores that share each, by level."""
    found = {}
    for index in sorted((cpu / "cache").glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            size = (index / "size").read_text().strip()
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            sharers = (index / "shared_cpu_list").read_text().strip()
            found["L" + (index / "level").read_text().strip()] = int(size.rstrip("KM")) * unit, sharers
    return found


def best(call: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of `rounds` calls after a first: a limit is the most that the machine can do."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def limits(rounds: int) -> dict[str, float]:
    """What the machine does at best with torch's threads, each the fastest of `rounds` calls.

    Returns:
        read, write, copy: bytes per second of buffers of eight times the last-level cache, in large pages where the
            system has them; copy counts both directions.
        bf16, f32: operations per second of a dense product, 2048 x 4096 times 4096 x 4096; multiply and add are two.
    """
    floats = partial(native.empty, 8 * last_level_cache() // 4, dtype=torch.float32, device=torch.device("cpu"))
    source, target, row = floats().fill_(1), floats(), torch.ones(4096)
    matrix = source[: source.numel() // 4096 * 4096].view(-1, 4096)
    readers = (source.sum, lambda: torch.mv(matrix, row), lambda: torch.dot(source, source))
    found = {
        "read": source.nbytes / min(best(reader, rounds) for reader in readers),
        "write": source.nbytes / best(target.zero_, rounds),
        "copy": 2 * source.nbytes / best(lambda: target.copy_(source), rounds),
    }
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        a, b = torch.randn(2048, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
        found[name] = 2 * 2048 * 4096 * 4096 / best(partial(torch.mm, a, b.T), rounds)
    return found
