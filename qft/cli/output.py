"""What commands print: tables or JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

Justify = Literal["left", "right"]


def quiet() -> None:
    """Leave stderr to this command: transformers draws bars and gives advice of its own."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one per thing that is told about; yields the function to tell with."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    known: dict[str, Any] = {}

    def tell(what: str, done: int, total: int) -> None:
        bars.start()  # at the first telling: before it there may be an error to print
        if what not in known or bars.tasks[known[what]].finished:
            known[what] = bars.add_task(what, total=total)
        bars.update(known[what], completed=done, total=total)

    try:
        yield tell
    finally:
        if known:
            bars.stop()


def print_result(result: Mapping[str, Any], as_json: bool, shown: Any) -> None:
    if as_json:
        print(json.dumps(_plain(result), indent=1, allow_nan=False))
    elif isinstance(shown, str):
        print(shown)
    else:
        Console().print(shown)


def _plain(value: Any) -> Any:
    """What JSON can hold: it has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def new_table(*columns: str, justify: Justify = "right") -> Table:
    table = Table(box=SIMPLE_HEAD)
    for index, name in enumerate(columns):
        table.add_column(name, justify=justify if index else "left", overflow="fold")
    return table


def values(result: Mapping[str, Any]) -> Table:
    """One line per value; what is None or empty says nothing and is left out."""
    table = new_table("", "")
    for name, value in result.items():
        if value not in (None, []):
            table.add_row(name, _spelled(value))
    return table


def _spelled(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_spelled, value))
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
