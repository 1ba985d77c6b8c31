"""Calls timed in turn, from memory: medians that can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .limits import last_level_cache

Call = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """At least `least` rounds; more, up to `most`, while fewer than `seconds` have gone by."""

    least: int = 15
    most: int = 101
    seconds: float = 5.0


QUICK = Effort(5, 5)


def interleave(calls: Sequence[Call], effort: Effort, flush: Call | Sequence[Call]) -> list[list[float]]:
    """Seconds of every round by call.

    Every round calls each once, starting one call further on each time, so that drift of the machine meets all alike.
    `flush`, one for all or one for each, runs before a call, untimed, and a first round is thrown away.
    """
    flushes = [flush] * len(calls) if callable(flush) else flush
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for done in range(-1, effort.most):
        if done >= effort.least and time.perf_counter() - start > effort.seconds:
            break
        for at in range(len(calls)):
            which = (at + done) % len(calls)
            flushes[which]()
            before = time.perf_counter()
            calls[which]()
            spent = time.perf_counter() - before
            if done >= 0:
                times[which].append(spent)
    return times


def cache_flush() -> tuple[Call, int]:
    """A call that reads a buffer of four times the last-level cache, so that what comes next comes from memory as
    weights do in a model; and the buffer's bytes."""
    buffer = torch.ones(4 * last_level_cache() // 4)
    return buffer.sum, buffer.nbytes


def before_each(flush: Call, small: Call) -> Call:
    """`flush`, then `small`: the same call on a layer of a few outputs. In a model the code is in the caches from the
    layer before, and only the weights are not; a flush alone would charge every call for the interpreter's."""

    def both() -> None:
        flush()
        small()

    return both


SMALL = 64  # outputs of such a layer


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and extremes, in seconds, and the number of rounds."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "rounds": len(seconds),
    }
