"""The training loss of a run, step by step: `losses.csv`, a line per optimizer step. Standard library only.

A run appends as it goes, so the file can be watched. One that goes on from a checkpoint drops what lies beyond that
checkpoint first, with the half of a line that a kill may have left.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..disk.files import replace_file
from ..format import FormatError

NAME = "losses.csv"
TRAINER = "trainer_state.json"  # where transformers' Trainer keeps its own
HEADER = "step,loss"

Curve = list[tuple[int, float]]  # optimizer step, mean loss of its batch in nats per token


def begin(path: Path, step: int) -> Curve:
    """Start the file of a run at `step`: 0, or that of the checkpoint it goes on from; what is kept of it."""
    kept = [row for row in _rows(path) if row[0] <= step]
    with replace_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in (HEADER, *(f"{at},{loss!r}" for at, loss in kept))))
    return kept


def append(path: Path, step: int, loss: float) -> None:
    """Add a step to the file of a run."""
    with open(path, "a") as file:
        file.write(f"{step},{loss!r}\n")


def last_run(directory: Path) -> Curve:
    """The losses of the run that made a model, where its directory says them; else nothing.

    Reads what `qft finetune` leaves beside a model, or transformers' Trainer.

    Raises:
        FormatError: the Trainer's file is damaged.
    """
    if (directory / NAME).is_file():
        return _rows(directory / NAME)
    if not (directory / TRAINER).is_file():
        return []
    try:
        logs = json.loads((directory / TRAINER).read_bytes())["log_history"]
        curve = [(int(log["step"]), float(log["loss"])) for log in logs if "loss" in log]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{directory / TRAINER} is damaged ({error!r}); copy it again, or delete it") from None
    return [(step, loss) for step, loss in curve if math.isfinite(loss)]


def _rows(path: Path) -> Curve:
    """The whole lines of a file, up to the first that is none."""
    rows: Curve = []
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
    for line in lines[1:]:
        step, _, loss = line.partition(",")
        try:
            row = int(step), float(loss)
        except ValueError:
            break
        if not (line.endswith("\n") and math.isfinite(row[1])):
            break
        rows.append(row)
    return rows
