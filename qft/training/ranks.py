"""Several processes that train one model together, as torchrun and accelerate start them; alone, each is the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def join() -> None:
    """Meet the other ranks, where torchrun or `accelerate launch` has started this process."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=on_cpu())


def refuse_without_group() -> None:
    """Raise ValueError where there is no process group, which a sharded model needs even of one rank."""
    if not (dist.is_available() and dist.is_initialized()):
        start = "start with torchrun, and call torch.distributed.init_process_group()"
        raise ValueError(f"there is no process group; {start}")


def on_cpu() -> bool:
    """Whether ranks compute on the CPU: it has to be said to accelerate, which would take each for a run of its own."""
    return not torch.accelerator.is_available()


def count() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is rank 0, which writes what all share."""
    return count() == 1 or dist.get_rank() == 0


def on_first(function: Callable[[], T]) -> T:
    """What `function` returns on the first rank, once all have come here; every rank gets it, or its OSError or
    ValueError."""
    if count() == 1:
        return function()
    dist.barrier()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = function()
        except (OSError, ValueError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """The first rank runs the block, then the others do."""
    if not is_first():
        dist.barrier()
    yield
    if count() > 1 and is_first():
        dist.barrier()
