"""Experts that were quantized one by one, as transformers 4 with bitsandbytes saved them, for the fused modules of
transformers 5."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..format import Format, FormatError
from ..model.targets import Target
from ..nn.experts import QuantExperts, layout_of, oriented
from ..stack import QuantStack
from ..tensor import QuantTensor
from . import bitsandbytes_weight as weights
from .checkpoint_files import CheckpointFiles
from .loader import Loader

States = Mapping[str, weights.State]  # of the weights that make one projection, by name


def read_experts(
    files: CheckpointFiles,
    target: Target,
    parts: Mapping[str, States],
    loader: Loader,
    requantize: Format | None,
) -> QuantExperts:
    """The experts with the codes, levels and scales they are stored with; double-quantized scales become fp32.

    The gate and what it gates lie in one matrix here, and each has a mean of its own that its scales are coded around.
    Where a block straddles rows, all experts of the layer are quantized again, to `requantize`.

    Args:
        target: the dense experts, without values.
        parts: of each projection.
        loader: says which rows of which weight go where.

    Raises:
        FormatError: an expert is missing, has another shape or is damaged; blocks straddle rows and `requantize` is
            None; or the experts of one layer have several formats.
    """
    again = any(state.straddles for states in parts.values() for state in states.values())
    if missing := [name for name in target.weights if name not in parts]:
        raise FormatError(f"{files.directory} holds no {target.path}.{missing[0]}; copy the directory again")
    stacks: dict[str, QuantTensor | QuantStack] = {}
    errors: dict[str, tuple[float, ...]] = {}
    for projection, states in parts.items():
        matrices, error, norm = [], 0.0, 0.0
        for name, state in states.items():
            q, own_error, own_norm = weights.read(files, name, state, requantize, again)
            matrices.append(q.with_scales(q.scales))
            error, norm = math.hypot(error, own_error * own_norm), math.hypot(norm, own_norm)
        stacks[projection] = _fuse(files, target, projection, dict(zip(states, matrices, strict=True)), loader)
        errors[projection] = (error / norm if norm else 0.0,)
    formats = {stack.format for stack in stacks.values()}
    if len(formats) > 1:
        spelled = ", ".join(sorted(map(str, formats)))
        raise FormatError(f"{target.path} in {files.directory} has projections in {spelled}; they must have one format")
    made = QuantExperts(target.module, formats.pop(), "meta")
    made.set_packed(stacks)
    made.start_errors = errors if again else {}
    read = [state for states in parts.values() for state in states.values()]
    made.dense_nbytes = sum(math.prod(state.shape) * state.dtype.itemsize for state in read)
    return made


def _fuse(
    files: CheckpointFiles, target: Target, projection: str, matrices: Mapping[str, QuantTensor], loader: Loader
) -> QuantStack:
    """The rows of weights where transformers puts them: it is given their numbers to fuse."""
    layout = layout_of(target.module)
    experts, out, in_features = oriented(target.module, projection).shape
    numbers, rows = {}, 0
    for name, q in matrices.items():
        numbers[name] = torch.arange(rows, rows := rows + q.shape[0])[:, None]
    order = loader.fuse(files, numbers)
    order = order.transpose(-1, -2) if layout is not None and layout.transposed else order
    one = next(iter(matrices.values()))
    alike = all((q.format, q.shape[1]) == (one.format, in_features) for q in matrices.values())
    if not alike or order.shape != (experts, out, 1):
        raise FormatError(
            f"{files.where(next(iter(matrices)))} and its like make no {target.path}.{projection} "
            f"{[experts, out, in_features]} of one format; copy the directory again"
        )
    picked = order.flatten()
    stored = {of: torch.cat([q.tensors()[of] for q in matrices.values()])[picked] for of in one.tensors()}
    stacked = {of: tensor.view(experts, out, -1) for of, tensor in stored.items()}
    return QuantStack(one.format, (experts, out, in_features), **stacked)
