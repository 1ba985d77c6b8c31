"""compressed-tensors' pack-quantized files, which transformers, vLLM and SGLang read.

Of a linear layer, with b bits and groups of g:

    weight_packed       int32 [out, ceil(in * b / 32)]          codes, packed along in
    weight_scale        [out, in / g]
    weight_zero_point   int32 [ceil(out * b / 32), in / g]      of asymmetric layers, packed along out
    weight_shape        int64 [2]                               out and in

    w[o, i] = weight_scale[o, i / g] * (code[o, i] - zero[o, i / g])

The zero point of a symmetric layer is 2^(b-1). qft writes 4 and 8 bits, the widths that servers have kernels for and
that every version of the library packs alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..format import FormatError
from ..reference import TORCH_DTYPE
from .checkpoint_tensors import Rows
from .directory_writer import write_directory
from .integer_grid import IntegerGrid
from .integer_layers import IntegerExport, integer_export, weight_error
from .words import pack

BITS = (4, 8)
_PACKED = "pack-quantized"


def write(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    dense: Iterable[str] = (),
    scales: str | None = None,
) -> dict[str, float]:
    """Write a model whose layers have 4- or 8-bit integer formats as a compressed-tensors checkpoint.

    Codes and zero points are the layer's own. Zero points between integers, which merging QA-LoRA leaves, make a
    layer's codes 8 bits wide (`exchange.integer_grid`).

    Args:
        model: a transformers model; it stays as it is.
        directory: new, or empty.
        tokenizer: a transformers tokenizer to save beside it.
        dense: quantized layers to write dequantized instead: each a path, a last name or a glob over paths.
        scales: type of the scales in the file, f32, f16 or bf16; None keeps each layer's own (fp32 for dq). Readers
            round them to the dtype they compute in.

    Returns:
        ||written - own|| / ||own|| of each packed layer's weight, by its path in the checkpoint.

    Raises:
        FormatError: a layer has a codebook, 2 or 3 bits, a short last group, an attached LoRA, or a scale beyond the
            type; it is named, with the way out, and nothing is written.
        ValueError: no layer is left to pack, `dense` names none, `scales` is another word, or it is no transformers
            model.
        FileExistsError: the directory holds something already.
        OSError: the disk is full or the directory cannot be written.
    """
    if scales not in (None, *TORCH_DTYPE):
        raise ValueError(f"scales={scales!r} is none of {', '.join(TORCH_DTYPE)}")

    def check(path: str, rows: Rows, grid: IntegerGrid) -> None:
        _check(path, rows, grid, _scale_dtype(rows, scales))

    export = integer_export(model, "compressed-tensors", dense, check)
    errors: dict[str, float] = {}
    tensors = _tensors(export, scales, errors)
    write_directory(model, directory, tokenizer, tensors, _config(export), dtype=export.dense_dtype)
    return errors


def _scale_dtype(rows: Rows, scales: str | None) -> torch.dtype:
    return TORCH_DTYPE[scales or rows.source.weight.format.scale.replace("dq", "f32")]


def _check(path: str, rows: Rows, grid: IntegerGrid, dtype: torch.dtype) -> None:
    """Raise FormatError where the layout, or those who read it, have no place for a layer."""
    in_features = rows.weight.shape[1]
    if rows.source.kind == "conv1d":
        raise FormatError(
            f"{path} is a Conv1D in transformers, and compressed-tensors packs nn.Linear alone; name it in dense to "
            "write it dequantized, or export to gptq"
        )
    if grid.bits not in BITS:
        raise FormatError(
            f"{path} stores {rows.source.weight.format}, and readers of compressed-tensors have kernels for 4 and 8 "
            "bits; export to gptq, or name it in dense to write it dequantized"
        )
    if grid.group and in_features % grid.group:
        raise FormatError(
            f"{path} has in_features={in_features}, which groups of {grid.group} do not divide, and compressed-tensors "
            "has no short group; quantize it with a smaller group or channel, or name it in dense to write it "
            "dequantized"
        )
    stored = grid.scales(rows.weight).to(dtype)
    if not stored.isfinite().all():
        row, group = (~stored.isfinite()).nonzero()[0].tolist()
        raise FormatError(f"the scale of {path}, row {row}, group {group} does not fit {dtype}; write scales='f32'")


def _tensors(export: IntegerExport, scales: str | None, errors: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
    yield from export.dense_tensors()
    for layer in export.layers:
        q, grid = layer.rows.weight, layer.grid
        codes, stored = grid.codes(q), grid.scales(q).to(_scale_dtype(layer.rows, scales))
        errors[layer.path] = weight_error(q, codes, grid.zero_points(q), stored)
        yield f"{layer.path}.weight_packed", pack(codes, grid.bits)
        yield f"{layer.path}.weight_scale", stored
        if not grid.symmetric:
            yield f"{layer.path}.weight_zero_point", pack(grid.zero_points(q).T, grid.bits).T.contiguous()
        yield f"{layer.path}.weight_shape", torch.tensor(q.shape)


def _config(export: IntegerExport) -> dict[str, Any]:
    """The quantization_config: one group of layers per scheme."""
    schemes: dict[tuple[int, int, bool], list[str]] = {}
    for layer in export.layers:
        schemes.setdefault((layer.grid.bits, layer.grid.group, layer.grid.symmetric), []).append(layer.path)
    groups = {}
    for number, ((bits, group, symmetric), paths) in enumerate(schemes.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group" if group else "channel",
            "group_size": group or None,
            "dynamic": False,
        }
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else paths,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": _PACKED,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": _PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(export.left_dense),
        "kv_cache_scheme": None,
    }
