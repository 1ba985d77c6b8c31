"""What a call takes of memory, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"  # proc(5): what clear_refs takes to set the peak back to the present


def resident(key: str = "VmRSS") -> int:
    """Bytes in memory now, or the most so far under "VmHWM". OSError: the system is not Linux."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(key))


def extra_peak(call: Callable[[], Any]) -> int:
    """Bytes by which resident memory rises at most during a call. OSError: the system is not Linux."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back first, so that what the call takes is seen
    CLEAR.write_text(FORGET_PEAK)
    before = resident()
    call()
    return resident("VmHWM") - before
