"""The short table: every verb in some formats on one layer, dense torch beside them, and how far each is from what the
machine allows. Everything is measured anew; nothing is read from disk or kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import __version__
from ..format import Format
from . import check, limits, roofline
from .clock import SMALL, Call, Effort, before_each, cache_flush, interleave, spread
from .roofline import DTYPES, Work
from .verbs import Checked, Task, checked, dense_call, tasks

FORMATS = ("nf4 g64 f32", "nf3 g64 f32", "nf2 g64 f32", "int4 g64 f32")
SHAPE, SMALL_SHAPE = (4096, 14336), (4096, 4096)  # of Llama-3-8B: larger than most caches, and its smallest square
ROWS = (1, 8, 512)
EFFORT, SHORT_EFFORT = Effort(5, 31, 3.0), Effort(3, 3)
LIMIT_ROUNDS, SHORT_LIMIT_ROUNDS = 10, 3

Progress = Callable[[str, int, int], None]  # what, done, in all


@dataclass(frozen=True)
class Wanted:
    """What the table is of.

    Attributes:
        formats: spelled, or as Format.
        shape: (out_features, in_features).
        rows: of x, one task for each; see `verbs.tasks`.
        dtype: of x and of the dense weight: bf16 or f32.
        effort: rounds of each task, over its formats and dense torch.
        limit_rounds: calls of which the machine's limits are the fastest.

    Raises:
        FormatError: a format's spelling is none.
        ValueError: a size is below 1, or the dtype has no limits.
    """

    formats: Sequence[Format | str] = FORMATS
    shape: tuple[int, int] = SHAPE
    rows: Sequence[int] = ROWS
    dtype: str = "bf16"
    effort: Effort = EFFORT
    limit_rounds: int = LIMIT_ROUNDS

    def __post_init__(self) -> None:
        for text in self.formats:
            Format.parse(text)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not timed; use one of {', '.join(DTYPES)}")
        if min(*self.shape, *self.rows) < 1:
            rows = ", ".join(map(str, self.rows))
            raise ValueError(f"{rows} rows of x and a layer {self.shape[0]} x {self.shape[1]}: use 1 or more of each")


def measure(wanted: Wanted, tell: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """The table with what it was measured on, ready for JSON: seconds, bytes and operations, each per second or alone.

    Raises:
        FormatError: a format cannot hold the layer.
        ValueError: a kernel's result is wrong.
    """
    begun, load = time.perf_counter(), _load()
    steps = len(wanted.formats) + 1
    tell("limits", 0, 1)
    found = limits.limits(wanted.limit_rounds)
    tell("limits", 1, 1)
    w = check.weight_like(wanted.shape, DTYPES[wanted.dtype])
    all_tasks = list(tasks(wanted.rows))
    ready: list[Checked] = []
    small: dict[tuple[Task, str], Call] = {}
    for at, fmt in enumerate(wanted.formats):
        tell("checks against the reference", at, steps - 1)
        ready += checked(all_tasks, w, Format.parse(fmt), wanted.dtype)
        few = checked(all_tasks, w[:SMALL].clone(), Format.parse(fmt), wanted.dtype)
        small.update({(one.task, one.fmt): one.call for one in few})
    tell("checks against the reference", steps - 1, steps - 1)
    flush, _ = cache_flush()
    rows: list[dict[str, Any]] = []
    for at, task in enumerate(all_tasks):
        tell("tasks timed", at, len(all_tasks))
        mine = [one for one in ready if one.task == task]
        rows += _rows(task, mine, w, wanted, flush, small, found)
    tell("tasks timed", len(all_tasks), len(all_tasks))
    return {
        "versions": {"qft": __version__, "torch": torch.__version__},
        "machine": limits.processor(),
        "load_before": load,
        "limits": found,
        "shape": list(wanted.shape),
        "dtype": wanted.dtype,
        "rows": rows,
        "seconds": time.perf_counter() - begun,
    }


def _rows(
    task: Task,
    ready: Sequence[Checked],
    w: torch.Tensor,
    wanted: Wanted,
    flush: Call,
    small: dict[tuple[Task, str], Call],
    found: dict[str, float],
) -> list[dict[str, Any]]:
    """One task in every format, and dense torch's, timed in turn; `small` holds the calls on a few outputs."""
    dense = dense_call(task, w)
    few = dense_call(task, w[:SMALL].clone())
    calls = [one.call for one in ready] + ([] if dense is None else [dense])
    before = [before_each(flush, small[task, one.fmt]) for one in ready]
    before += [] if few is None else [before_each(flush, few)]
    times = interleave(calls, wanted.effort, before)
    dense_s = spread(times[-1])["median_s"] if dense else None
    rows = [
        {
            **_row(task, one.fmt, one.kernel, one.work, seconds, found, dense_s),
            "relative_error": one.error,
        }
        for one, seconds in zip(ready, times, strict=False)
    ]
    if dense:
        verb = "weight_grad" if task.verb == "scale_grad" else task.verb
        least = roofline.work(verb, wanted.shape, w.nbytes, task.rows, wanted.dtype)
        rows.append(_row(task, None, "torch", least, times[-1], found, dense_s))
    return rows


def _row(
    task: Task,
    fmt: str | None,
    kernel: str,
    work: Work,
    seconds: Sequence[float],
    found: dict[str, float],
    dense_s: float | None,
) -> dict[str, Any]:
    figures = spread(seconds)
    median = figures["median_s"]
    return {
        "task": task.name,
        "verb": task.verb,
        "x_rows": task.rows,
        "format": fmt,
        "kernel": kernel,
        **figures,
        "read_bytes": work.read,
        "written_bytes": work.written,
        "operations": work.operations,
        "bytes_per_s": work.nbytes / median,
        "dense_s": dense_s,
        "dense_over_this": dense_s / median if dense_s else None,
        "percent_of_roofline": roofline.percent(work, median, found),
        "bound_by": roofline.bound(work, found)[1],
    }


def _load() -> float | None:
    """Load average of the last minute, where the system has one: what else ran."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
