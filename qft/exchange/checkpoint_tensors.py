"""The tensors of a transformers checkpoint, and which rows of which packed weight each of them holds.

A model in memory and its checkpoint need not agree: transformers renames tensors and fuses experts while it loads, and
undoes that while it saves. In the place of a packed weight it is given the numbers of its rows to undo that on: what
comes back says which rows belong under which name.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapted import AdaptedLinear
from ..format import Format, FormatError
from ..model.targets import is_linear, matches
from ..nn.embedding import QuantEmbedding
from ..nn.experts import QuantExperts
from ..nn.linear import QuantLinear
from ..nn.packed import Packed
from ..tensor import QuantTensor


@dataclass(frozen=True)
class Source:
    """A packed weight of a model.

    Attributes:
        path: of its layer, as messages name it.
        kind: "linear", "conv1d" (whose weight a checkpoint holds as `[in, out]`), "embedding" or "experts".
        weight: `[rows, in]`; experts' rows follow each other.
        layer: the QuantLinear, with its LoRA; None for other kinds.
        shape: of the rows' numbers while transformers' conversions are undone.
    """

    path: str
    kind: str
    weight: QuantTensor
    layer: QuantLinear | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """One tensor of a checkpoint: rows of a packed weight.

    Attributes:
        source: the weight they come from.
        rows: their numbers, int64 `[..., n, 1]`, or `[..., 1, n]` where the checkpoint's tensor is the transpose.
    """

    source: Source
    rows: Tensor

    @property
    def is_matrix(self) -> bool:
        """Whether the checkpoint's tensor is `[n, in]`."""
        return self.rows.dim() == 2 and self.rows.shape[1] == 1

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA is attached to the layer."""
        return self.source.layer is not None and self.source.layer.lora_rank > 0

    @property
    def weight(self) -> QuantTensor:
        """The rows as a packed weight `[n, in]`, with scales and zero points decoded to fp32."""
        q, rows = self.source.weight, self.rows.flatten().to(self.source.weight.weight.device)
        fmt = Format(q.format.code, q.format.group, "f32", q.format.zero)
        zeros = None if q.zeros is None else q.zeros.detach()[rows]
        return QuantTensor(fmt, (len(rows), q.shape[1]), q.weight.detach()[rows], q.scales.detach()[rows], zeros)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The checkpoint's dense tensor: the weight and an attached LoRA, added in fp32 and rounded once to `dtype`."""
        weight = self.weight.dequantize()
        layer = self.source.layer
        if layer is not None and layer.lora_A is not None and layer.lora_B is not None:
            a, b = layer.lora_A.detach().float(), layer.lora_B.detach().float()[self.rows.flatten().to(weight.device)]
            if layer.lora_pooled:  # one column of A per group, for each weight of the group
                a = a.repeat_interleave(layer.format.group_size(layer.in_features), 1)[:, : layer.in_features]
            weight = torch.addmm(weight, b, a, alpha=layer.lora_scaling)
        weight = weight.to(dtype).view(*self.rows.shape[:-2], -1, weight.shape[1])
        transposed = self.source.kind == "conv1d" or self.rows.shape[-1] > 1
        return weight.transpose(-1, -2).contiguous() if transposed else weight


class CheckpointTensors:
    """What a model's checkpoint holds.

    Attributes:
        tensors: every tensor by its name in the checkpoint, tied ones once; packed weights as `Rows`.
        linears: paths of the layers that are nn.Linear, or transformers' Conv1D, where the model is dense.
        embeddings: paths of its embeddings.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: it is no transformers model, or carries an adapter that is not its layers' own LoRA.
            FormatError: the checkpoint would hold rows of several packed weights in one tensor.
        """
        skeleton = _skeleton(model)
        self.linears = [path for path, module in skeleton.named_modules() if is_linear(module)]
        self.embeddings = [path for path, module in skeleton.named_modules() if isinstance(module, nn.Embedding)]
        dense: dict[str, Tensor] = {}
        packed: dict[str, Source] = {}
        for path, module in model.named_modules():
            _refuse_adapter(path, module)
            packed.update(_sources(path, module, skeleton))
            for name, tensor in _dense_tensors(module):
                dense[f"{path}.{name}" if path else name] = tensor
        for name, other in getattr(model, "all_tied_weights_keys", {}).items():
            if name in dense and dense[name] is dense.get(other):
                del dense[name]
        self.tensors: dict[str, Tensor | Rows] = {**_as_saved(skeleton, dense), **_rows(skeleton, packed)}

    def packed(self, dense: Iterable[str] = ()) -> dict[str, Rows]:
        """The packed weights by their names, but those of layers that `dense` names: a path, a last name or a glob.

        Raises:
            ValueError: a pattern names no packed layer, or none is left.
        """
        packed, patterns = {name: rows for name, rows in self.tensors.items() if isinstance(rows, Rows)}, tuple(dense)
        if not packed:
            raise ValueError("the model holds no quantized layer; call qft.quantize_model first")
        for pattern in patterns:
            if not any(matches(rows.source.path, pattern) for rows in packed.values()):
                examples = ", ".join([rows.source.path for rows in packed.values()][:3])
                raise ValueError(f"{pattern!r} names no quantized layer; they are {examples}, ...")
        named = {rows.source.path for rows in packed.values() if any(matches(rows.source.path, p) for p in patterns)}
        if not (kept := {name: rows for name, rows in packed.items() if rows.source.path not in named}):
            raise ValueError("all quantized layers are named in dense; write the whole model with qft.exchange.dense")
        return kept


def _skeleton(model: Any) -> nn.Module:
    """The dense model of the same class and configuration, without values."""
    loaded = sys.modules.get("transformers")
    if loaded is None or not isinstance(model, loaded.PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no transformers model, whose files these are; export the model it is made of, "
            "for PEFT's after merge_and_unload()"
        )
    from accelerate import init_empty_weights

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        return type(model)(config)


def _refuse_adapter(path: str, module: nn.Module) -> None:
    if isinstance(module, AdaptedLinear):
        raise ValueError(f"{path} is a {type(module).__name__}; merge or release its adapter before exporting")
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is not None and isinstance(module, peft.BaseTunerLayer):
        raise ValueError(f"{path} carries an adapter of PEFT; call merge_and_unload() before exporting")


def _sources(path: str, module: nn.Module, skeleton: nn.Module) -> dict[str, Source]:
    """The packed weights of one module, by the names their dense ones have."""
    if isinstance(module, QuantLinear):
        kind = "linear" if isinstance(skeleton.get_submodule(path), nn.Linear) else "conv1d"
        return {f"{path}.weight": Source(path, kind, module.quant_tensor, module, (module.out_features, 1))}
    if isinstance(module, QuantEmbedding):
        q = module.quant_tensor
        return {f"{path}.weight": Source(path, "embedding", q, None, (q.shape[0], 1))}
    if not isinstance(module, QuantExperts):
        return {}
    found = {}
    for name in module.code_names:
        stack, here = module.stack(name), f"{path}.{name}"
        count, out, in_features = stack.shape
        fmt = Format(stack.format.code, stack.format.group, "f32", stack.format.zero)
        zeros = None if stack.zeros is None else stack.zeros.flatten(0, 1)
        q = QuantTensor(fmt, (count * out, in_features), stack.weight.flatten(0, 1), stack.scales.flatten(0, 1), zeros)
        shape = (count, 1, out) if module.layout.transposed else (count, out, 1)
        found[here] = Source(here, "experts", q, None, shape)
    return found


def _dense_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a module itself that are no part of packed weights or their LoRA."""
    left_out = set(module._non_persistent_buffers_set)
    if isinstance(module, Packed):
        left_out |= {*module.stored, "weight_format", "lora_A", "lora_B"}
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in left_out:
            yield name, tensor


def _as_saved(skeleton: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model in memory, as its checkpoint names and splits them."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(skeleton, dict(tensors))


def _rows(skeleton: nn.Module, packed: Mapping[str, Source]) -> dict[str, Rows]:
    """The packed weights as a checkpoint names and splits them."""
    sources, numbers, first = list(packed.values()), {}, [0]
    for name, source in packed.items():
        first.append(first[-1] + source.weight.shape[0])
        numbers[name] = torch.arange(first[-2], first[-1]).view(source.shape)
    starts, found = torch.tensor(first), {}
    for name, value in _as_saved(skeleton, numbers).items():
        of = torch.bucketize(value.flatten(), starts, right=True) - 1
        if not bool((of == of[0]).all()):
            paths = " and ".join(sources[int(i)].path for i in of.unique()[:2])
            raise FormatError(f"a checkpoint holds {paths} as one tensor, {name}; leave them dense when quantizing")
        found[name] = Rows(sources[int(of[0])], value - starts[of[0]])
    return found
