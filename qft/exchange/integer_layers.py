"""What GPTQ's and compressed-tensors' files have in common: which layers are packed there, which dense, and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..format import FormatError
from ..notices import say_once
from ..reference import per_weight
from ..tensor import QuantTensor
from .checkpoint_tensors import CheckpointTensors, Rows
from .integer_grid import WIDE, IntegerGrid


@dataclass(frozen=True)
class IntegerLayer:
    """A linear layer of the exported checkpoint.

    Attributes:
        path: the name of its tensors without their last word.
        rows: what it holds.
        grid: as which integers.
    """

    path: str
    rows: Rows
    grid: IntegerGrid


@dataclass(frozen=True)
class IntegerExport:
    """A checkpoint with packed layers.

    Attributes:
        layers: the packed ones.
        dense: every other tensor by name; `Rows` are to be dequantized.
        left_dense: paths of the weight matrices that are dense, embeddings aside.
    """

    layers: tuple[IntegerLayer, ...]
    dense: dict[str, Tensor | Rows]
    left_dense: tuple[str, ...]

    @property
    def dense_dtype(self) -> torch.dtype:
        """That of most of the dense tensors' elements."""
        sizes: Counter[torch.dtype] = Counter()
        for value in self.dense.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                sizes[value.dtype] += value.numel()
        return sizes.most_common(1)[0][0] if sizes else torch.float32

    def dense_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is not packed; what was quantized is dequantized to `dense_dtype`."""
        dtype = self.dense_dtype
        for name, value in self.dense.items():
            yield name, value.dequantize(dtype) if isinstance(value, Rows) else value.detach()


def integer_export(
    model: nn.Module, target: str, dense: Iterable[str], check: Callable[[str, Rows, IntegerGrid], None]
) -> IntegerExport:
    """Sort the tensors of a model's checkpoint.

    Args:
        target: what messages call the file.
        dense: layers to write dequantized: each a path, a last name or a glob over paths.
        check: raises FormatError where the target cannot hold a layer.

    Raises:
        ValueError: no layer is left to pack, a pattern names none, or as `CheckpointTensors`.
        FormatError: the target cannot hold a layer; it is named, with the way out.
    """
    checkpoint = CheckpointTensors(model)
    layers, others = [], dict(checkpoint.tensors)
    for name, rows in checkpoint.packed(dense).items():
        path = rows.source.path
        if rows.has_adapter:
            raise FormatError(
                f"{path} carries a LoRA, which {target} files do not hold; export it on its own and call remove_lora() "
                "(qft export: --to peft, then --without-lora), merge a pooled one with qft.merge_pooled, or name the "
                "layer in dense to merge it there"
            )
        if not rows.is_matrix or not name.endswith(".weight") or rows.source.kind == "embedding":
            raise FormatError(
                f"{path} is no linear layer in the model's checkpoint, and {target} packs those alone; name it in "
                "dense to write it dequantized"
            )
        if not (fmt := rows.source.weight.format).is_integer:
            raise FormatError(
                f"{path} stores {fmt}, and {target} holds integer codes alone; quantize it to int4 or int8, or name it "
                "in dense to write it dequantized"
            )
        grid = IntegerGrid.of(rows.weight, path, target)
        check(path, rows, grid)
        layers.append(IntegerLayer(name.removesuffix(".weight"), rows, grid))
        del others[name]
    left = {*checkpoint.linears} - {layer.rows.source.path for layer in layers}
    for name, value in others.items():
        is_matrix = value.is_matrix if isinstance(value, Rows) else value.dim() == 2
        if name.endswith(".weight") and is_matrix:
            left.add(name.removesuffix(".weight"))
    left -= {*checkpoint.embeddings}
    _say_moved(layers, target)
    return IntegerExport(tuple(layers), others, tuple(sorted(left)))


def weight_error(own: QuantTensor, codes: Tensor, zeros: Tensor, scales: Tensor) -> float:
    """||written - own|| / ||own|| of a weight written as codes `[out, in]`, zeros and scales `[out, groups]`."""
    spread = [per_weight(values.float(), own.format, own.shape[1]) for values in (zeros, scales)]
    exact = own.dequantize()
    norm = exact.norm().item()
    return torch.sub(codes, spread[0]).mul_(spread[1]).sub_(exact).norm().item() / norm if norm else 0.0


def _say_moved(layers: list[IntegerLayer], target: str) -> None:
    moved = [layer for layer in layers if layer.grid.moved]
    if moved:
        say_once(
            f"{len(moved)} of {len(layers)} layers, {moved[0].path} first, have zero points between integers, as "
            f"merging QA-LoRA leaves them; {target} holds integers, so these layers are written with {WIDE}-bit codes"
        )
