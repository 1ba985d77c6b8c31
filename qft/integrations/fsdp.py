"""FSDP2 over packed weights: torch's `fully_shard`, applied so that scales keep the dtype they are stored in.

torch shards every Parameter by its first dimension: codes and scales by rows, LoRA's A by rank and B by rows, the 1-D
companions of double quantization by their blocks; where a length does not divide, it pads. A group of Parameters is
gathered at a time, and `MixedPrecisionPolicy.param_dtype` casts each floating one when it is. Scales rounded to bf16
make another model, so under such a policy a block has two groups: one with the policy, of the dense modules in it, and
the block's own without `param_dtype`, which holds what is packed. Without `param_dtype` a block is one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ..nn.linear import QuantLinear
from ..nn.packed import Packed
from ..notices import say_once
from ..training import ranks

Unit = list[nn.Module]  # modules whose Parameters are gathered together


def fully_shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    mp_policy: fsdp.MixedPrecisionPolicy | None = None,
    *,
    reshard_after_forward: bool | int | None = None,
    offload_policy: fsdp.OffloadPolicy | None = None,
    blocks: Iterable[nn.Module] | None = None,
) -> nn.Module:
    """Shard a quantized model over the ranks, in place; every rank calls it, with the same model.

    Adapters are attached, and what trains is chosen, before; the optimizer is made after.

    Args:
        model: on any device; its tensors move to the mesh's.
        mesh: one-dimensional, or two-dimensional with named dimensions to replicate over the first (HSDP); None is all
            ranks.
        mp_policy: as torch's `fully_shard` takes it, for everything but packed modules: their codes, scales, biases and
            qft's own LoRA keep their dtypes, and follow `reduce_dtype` alone.
        reshard_after_forward, offload_policy: as torch's `fully_shard` takes them.
        blocks: modules to gather one after the other; None takes the members of the outermost nn.ModuleLists. Blocks
            that share Parameters are gathered together, those that share some with the rest of the model with it.

    Returns:
        The model itself. Its Parameters are DTensors from here on; `qft.gather_model` gives them back whole.

    Raises:
        ValueError: there is no process group, the model is sharded already, or Parameters that train in one group have
            several dtypes.
    """
    ranks.refuse_without_group()
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} is sharded already; call fully_shard once, on the whole model")
    policy = mp_policy or fsdp.MixedPrecisionPolicy()
    units = _units(model, list(_outermost_blocks(model) if blocks is None else blocks))
    groups = list(_groups(model, units, policy))
    for members, _, _ in groups:
        _refuse_mixed_dtypes(model, members, [nested for other, _, _ in groups for nested in other])
    mesh = mesh or _all_ranks()
    _part_shared_inputs(model, units)
    whole = _left_whole(model, mesh)
    for members, its_policy, is_root in groups:
        fsdp.fully_shard(
            members[0] if len(members) == 1 else members,
            mesh=mesh,
            mp_policy=its_policy,
            offload_policy=offload_policy or fsdp.OffloadPolicy(),
            reshard_after_forward=None if is_root else reshard_after_forward,
            ignored_params=whole or None,
        )
    return model


def _all_ranks() -> DeviceMesh:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return init_device_mesh(accelerator.type if accelerator else "cpu", (ranks.count(),))


# ---------------------------------------------------------------------------------------------------------- groups


def _groups(
    model: nn.Module, units: list[Unit], policy: fsdp.MixedPrecisionPolicy
) -> Iterator[tuple[Unit, fsdp.MixedPrecisionPolicy, bool]]:
    """What goes through torch's `fully_shard`, in that order: modules, their policy, whether they are the root's.

    Groups before take their Parameters out of those after.
    """
    kept = replace(policy, param_dtype=None)
    inside = replace(policy, output_dtype=None)  # the policy's is what leaves a block, or the model
    apart = {id(module) for unit in units for module in unit}
    for unit in (*units, [model]):
        is_root = unit[0] is model
        has_packed = any(
            isinstance(module, Packed) for top in unit for module in _walk(top, apart - set(map(id, unit)))
        )
        if policy.param_dtype is None or not has_packed:
            yield unit, policy, is_root
            continue
        dense = list({id(part): part for top in unit for part in _dense_parts(top, apart)}.values())
        if dense:
            yield dense, inside, is_root
        yield unit, kept, is_root


def _dense_parts(module: nn.Module, apart: set[int]) -> Iterator[nn.Module]:
    """The largest modules below that hold Parameters, none of them packed or of another unit, and that are called."""
    for child in module.children():
        if id(child) in apart or isinstance(child, Packed):
            continue
        if _is_called(child) and not any(isinstance(m, Packed) or id(m) in apart for m in child.modules()):
            if any(True for _ in child.parameters()):
                yield child
        else:
            yield from _dense_parts(child, apart)


def _walk(top: nn.Module, apart: set[int]) -> Iterator[nn.Module]:
    """`top` and the modules below it, without those at or below the ones in `apart`."""
    if id(top) not in apart:
        yield top
        for child in top.children():
            yield from _walk(child, apart)


def _is_called(module: nn.Module) -> bool:
    """Whether it has a forward pass, at which its Parameters are gathered; a ModuleList or ParameterDict has none."""
    return type(module).forward is not nn.Module.forward


def _outermost_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Members of nn.ModuleLists that lie in no other such member; not single layers, too small for a group."""
    for child in model.children():
        is_block = isinstance(model, nn.ModuleList) and _is_called(child) and not isinstance(child, Packed)
        if is_block and any(True for _ in child.children()):
            yield child
        else:
            yield from _outermost_blocks(child)


def _units(model: nn.Module, blocks: list[nn.Module]) -> list[Unit]:
    """The blocks, those that share Parameters together, without those that share some with the rest of the model."""
    apart = set(map(id, blocks))
    rest = {id(p) for module in _walk(model, apart) for p in module._parameters.values() if p is not None}
    units: list[tuple[Unit, set[int]]] = []
    for block in {id(block): block for block in blocks}.values():
        unit, held = [block], {id(p) for p in block.parameters()}
        for other in [other for other in units if other[1] & held]:
            units.remove(other)
            unit, held = [*other[0], *unit], other[1] | held
        units.append((unit, held))
    return [unit for unit, held in units if held and not held & rest]


# ------------------------------------------------------------------------------------------------------ special cases


def _refuse_mixed_dtypes(model: nn.Module, members: Unit, groups: list[nn.Module]) -> None:
    """torch reduces the gradients of a group as one tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    others = set(map(id, groups)) - set(map(id, members))
    first: dict[torch.dtype, str] = {}
    for top in members:
        for module in _walk(top, others):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    first.setdefault(parameter.dtype, names[id(parameter)])
    if len(first) > 1:
        found = " and ".join(f"{name} in {dtype}" for dtype, name in first.items())
        raise ValueError(f"{found} train in one group, whose dtype must be one; convert what trains to torch.float32")


def _part_shared_inputs(model: nn.Module, units: list[Unit]) -> None:
    """Let layers that multiply their LoRA's input together do so only where they are gathered together."""
    home = {id(module): at for at, unit in enumerate(units) for top in unit for module in top.modules()}
    layers = [module for module in model.modules() if isinstance(module, QuantLinear) and module.shared_input]
    parted = {
        id(layer.shared_input) for layer in layers if len({home.get(id(m)) for m in layer.shared_input.layers}) > 1
    }
    for layer in layers:
        if id(layer.shared_input) in parted:
            layer.shared_input = None
    if parted:
        say_once("layers of several blocks shared their LoRA's input; they are gathered apart, and share no longer")


def _left_whole(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Codes that torch cannot shard, moved to the device: it finds a Parameter as its module's attribute, and that of a
    FloatFacingQuantLinear is another tensor."""
    device = torch.accelerator.current_accelerator() if mesh.device_type != "cpu" else torch.device("cpu")
    whole: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items() if isinstance(module, Packed) else ():
            if parameter is not None and getattr(module, name) is not parameter:
                parameter.data = parameter.data.to(device)
                whole[parameter] = path
    if whole:
        say_once(f"{', '.join(whole.values())}: parents read weight.dtype there, so the codes stay whole on every rank")
    return set(whole)
