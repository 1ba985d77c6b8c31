"""A progress bar, where one is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(wanted: bool, total: int, what: str = "quantizing") -> Iterator[Callable[[str], None]]:
    """A progress bar over layers; yields the function that moves it on and says where it is."""
    if not wanted:
        yield lambda path: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as drawn:
        task = drawn.add_task(what, total=total)
        yield lambda path: drawn.update(task, advance=1, description=path)
