"""Checkpoints of a sharded model: each rank writes its shards, and a kill at any moment leaves the one before.

    directory/checkpoint-<step>/    what trains and the optimizer's state; complete.json once every rank has written

The files are torch.distributed.checkpoint's. Their index is a pickle, as torch's checkpoints are: open only your own.
All ranks must see one directory; on several machines that is a shared file system.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parallel import DistributedDataParallel

from ..disk import checkpoint
from ..format import FormatError
from ..notices import say_once
from ..training import ranks

KEPT = 2  # checkpoints: the one before stays until the newest is complete
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # in the names of torch.compile's and checkpointing's modules


def save_sharded(
    model: nn.Module,
    directory: str | Path,
    step: int,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    frozen: bool = False,
    keep: int = KEPT,
) -> Path:
    """Write a checkpoint, each rank its own shards; every rank calls it.

    Args:
        model: sharded by `qft.fully_shard`, torch's or accelerate's, or the same on every rank (DDP).
        directory: of the run's checkpoints.
        step: what training has done so far; a checkpoint of the same step is replaced.
        optimizer: whose state goes along.
        frozen: write what does not train too, such as the codes. The directory that the model was loaded from has them.
        keep: complete checkpoints to keep, this one included; older ones are deleted.

    Returns:
        The checkpoint's directory.

    Raises:
        ValueError: there is no process group, or `keep` is less than 1.
        OSError: a rank cannot write. The checkpoints before are as they were.
    """
    ranks.refuse_without_group()
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the checkpoint just written; use 1 or more")
    path = Path(directory) / f"checkpoint-{step}"
    ranks.on_first(lambda: shutil.rmtree(path) if path.exists() else None)
    try:
        dcp.save(_state(model, optimizer, frozen), checkpoint_id=path)
    except CheckpointException as error:
        raise OSError(f"{path} cannot be written ({_reason(error)}); make room and save again") from None

    def complete() -> None:
        checkpoint.seal(path)
        checkpoint.prune(path, keep)

    ranks.on_first(complete)
    return path


def load_sharded(model: nn.Module, directory: str | Path, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Go on from the newest complete checkpoint, each rank reading what it holds; every rank calls it.

    There may be more ranks than at the save, or fewer. Incomplete checkpoints are skipped, which is said.

    Args:
        model, optimizer: as for `save_sharded`, with the same things training.
        directory: of the run's checkpoints.

    Returns:
        The step of that checkpoint; 0 where there is none, and nothing has changed.

    Raises:
        FormatError: the checkpoint does not hold what this model trains, or not the optimizer's state.
        ValueError: there is no process group.
        OSError: the directory cannot be read.
    """
    ranks.refuse_without_group()
    path, skipped = ranks.on_first(lambda: checkpoint.newest(Path(directory)))
    for sentence in skipped:
        say_once(sentence)
    if path is None:
        return 0
    state = _state(model, optimizer, frozen=False)
    try:
        dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:
        way_out = "build the model and optimizer as they were at the save, or use another directory"
        raise FormatError(f"{path} does not fit this run ({_reason(error)}); {way_out}") from None
    states.set_model_state_dict(model, state["model"], options=states.StateDictOptions(strict=False))
    if optimizer is not None:
        states.set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return int(path.name.rpartition("-")[2])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None, frozen: bool) -> dict[str, Any]:
    tensors = states.get_model_state_dict(model)
    if not frozen:
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        # by every name: torch's own option for this leaves the second name of a tied Parameter
        for name, parameter in inner.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                for wrapper in WRAPPERS:
                    name = name.replace(wrapper, "")
                tensors.pop(name, None)
    state: dict[str, Any] = {"model": tensors}
    if optimizer is not None:
        state["optimizer"] = states.get_optimizer_state_dict(model, optimizer)
    return state


def _reason(error: CheckpointException) -> str:
    """The first line of the first rank's failure."""
    rank, (failure, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {str(failure).splitlines()[0] if str(failure) else type(failure).__name__}"
