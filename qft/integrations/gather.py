"""A sharded model, whole again on one rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# What nn.Module keeps beside its tensors and children: hooks, which are the sharding's.
_STATE = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


@torch.no_grad()
def gather_model(model: nn.Module, rank: int = 0) -> nn.Module | None:
    """The model as it was before it was sharded, with its present values, on the CPU of one rank; every rank calls it.

    One Parameter at a time is whole on the other ranks, and on the device. What comes back has no hooks, and does for
    all that takes an unsharded model: `qft.save`, `qft.save_adapter`, `qft.save_scales`, PEFT's `save_pretrained`.

    Args:
        model: what `fully_shard` (qft's, torch's or accelerate's) was called on; one that is not sharded is copied too.
        rank: the one that gets the model.

    Returns:
        The model on that rank, None on the others.
    """
    here = not dist.is_initialized() or dist.get_rank() == rank
    tensors: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        copy = _whole(tensor, here)
        if copy is not None:
            tensors[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return _rebuilt(model, tensors, {}) if here else None


def _whole(tensor: Tensor, here: bool) -> Tensor | None:
    """A copy of all of a tensor on the CPU, where it is wanted; every rank takes part."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=whole is tensor) if here else None


def _rebuilt(module: nn.Module, tensors: dict[int, Tensor], done: dict[int, nn.Module]) -> nn.Module:
    """The module of its own class, without the sharding's, over other tensors."""
    if id(module) in done:
        return done[id(module)]
    kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    made: Any = kind.__new__(kind)
    done[id(module)] = made
    own = {name: value for name, value in vars(module).items() if not name.startswith("__composable_api")}
    own.pop("forward", None)  # accelerate's, bound to the sharded model
    made.__dict__.update(own)
    made.__dict__.update({name: value for name, value in vars(nn.Module()).items() if name not in _STATE})
    for name in ("_parameters", "_buffers"):
        made.__dict__[name] = {key: None if t is None else tensors[id(t)] for key, t in vars(module)[name].items()}
    made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    made._modules = {
        name: None if child is None else _rebuilt(child, tensors, done) for name, child in module._modules.items()
    }
    if "shared_input" in made.__dict__:
        made.shared_input = None
    return made  # type: ignore[no-any-return]
