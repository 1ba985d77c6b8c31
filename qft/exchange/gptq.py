"""GPTQ's files, which GPTQModel, transformers with optimum, vLLM and SGLang read.

Of a linear layer, with b bits and groups of g (AutoGPTQ's layout, unchanged since):

    qweight   int32 [in * b / 32, out]       codes, packed along in
    qzeros    int32 [in / g, out * b / 32]   zero points, packed along out
    scales    fp16  [in / g, out]
    g_idx     int32 [in]                     the group of each input feature

    w[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])

The format "gptq" stores every zero point less one, a slip of its first writer that readers undo, so that it cannot
hold a zero point of 0; "gptq_v2" stores them as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..format import FormatError
from .checkpoint_tensors import Rows
from .directory_writer import QUANTIZER, write_directory
from .integer_grid import IntegerGrid
from .integer_layers import IntegerExport, integer_export, weight_error
from .words import pack

FORMATS = ("gptq", "gptq_v2")
_BLOCK = re.compile(r".*?\.\d+\.(.+)")  # of a layer's path, what is within its transformer block
# vLLM runs these as one layer, and asks for its settings by the fused name
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def write(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    dense: Iterable[str] = (),
    checkpoint_format: str | None = None,
) -> dict[str, float]:
    """Write a model whose layers have integer formats as a GPTQ checkpoint.

    Codes and zero points are the layer's own; scales are rounded to fp16, which is all that GPTQ stores. Zero points
    between integers, which merging QA-LoRA leaves, make a layer's codes 8 bits wide (`exchange.integer_grid`).

    Args:
        model: a transformers model; it stays as it is.
        directory: new, or empty.
        tokenizer: a transformers tokenizer to save beside it.
        dense: quantized layers to write dequantized instead: each a path, a last name or a glob over paths.
        checkpoint_format: "gptq" or "gptq_v2"; None is "gptq", which more readers know, for a model whose layers are
            all symmetric, and "gptq_v2" otherwise.

    Returns:
        ||written - own|| / ||own|| of each packed layer's weight, by its path in the checkpoint.

    Raises:
        FormatError: a layer has a codebook, a shape that GPTQ cannot hold, an attached LoRA, a scale beyond fp16, or
            under "gptq" a zero point of 0; it is named, with the way out, and nothing is written.
        ValueError: no layer is left to pack, `dense` names none, or it is no transformers model.
        FileExistsError: the directory holds something already.
        OSError: the disk is full or the directory cannot be written.
    """
    if checkpoint_format not in (None, *FORMATS):
        raise ValueError(f"checkpoint_format {checkpoint_format!r} is unknown; use one of {', '.join(FORMATS)}")
    export = integer_export(model, "GPTQ", dense, _check)
    symmetric = all(layer.grid.symmetric for layer in export.layers)
    kind = checkpoint_format or ("gptq" if symmetric else "gptq_v2")
    minus = 1 if kind == "gptq" else 0
    for layer in export.layers:
        if minus and not layer.grid.symmetric and int(layer.grid.zero_points(layer.rows.weight).min()) == 0:
            raise FormatError(
                f"{layer.path} has a zero point of 0, which the format gptq cannot hold; write gptq_v2 instead"
            )
    errors: dict[str, float] = {}
    write_directory(
        model,
        directory,
        tokenizer,
        _tensors(export, minus, errors),
        _config(export, symmetric, kind),
        dtype=export.dense_dtype,
        quantization_file="quantize_config.json",
    )
    return errors


def _check(path: str, rows: Rows, grid: IntegerGrid) -> None:
    """Raise FormatError where the layout has no place for a layer."""
    out, in_features = rows.weight.shape
    whole = 32 if grid.bits == 3 else 32 // grid.bits  # codes that end with a word
    for what, size in (("in_features", in_features), ("out_features", out)):
        if size % whole:
            raise FormatError(
                f"{path} has {what}={size}, and GPTQ packs {grid.bits}-bit codes {whole} at a time; name it in dense "
                "to write it dequantized"
            )
    if grid.group and in_features % grid.group:
        raise FormatError(
            f"{path} has in_features={in_features}, which groups of {grid.group} do not divide, and GPTQ has no short "
            "group; quantize it with a smaller group or channel, or name it in dense to write it dequantized"
        )
    scales = grid.scales(rows.weight).half()
    if not scales.isfinite().all():
        row, group = (~scales.isfinite()).nonzero()[0].tolist()
        raise FormatError(
            f"the scale of {path}, row {row}, group {group} exceeds fp16's 65504, which GPTQ stores; name the layer in "
            "dense to write it dequantized"
        )


def _tensors(export: IntegerExport, minus: int, errors: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
    yield from export.dense_tensors()
    for layer in export.layers:
        q, grid = layer.rows.weight, layer.grid
        codes, scales = grid.codes(q), grid.scales(q).half()
        errors[layer.path] = weight_error(q, codes, grid.zero_points(q), scales)
        columns = torch.arange(q.shape[1], dtype=torch.int32)
        yield f"{layer.path}.qweight", pack(codes, grid.bits).T.contiguous()
        yield f"{layer.path}.qzeros", pack(grid.zero_points(q).T - minus, grid.bits)
        yield f"{layer.path}.scales", scales.T.contiguous()
        yield f"{layer.path}.g_idx", columns // (grid.group or q.shape[1])


def _config(export: IntegerExport, symmetric: bool, kind: str) -> dict[str, Any]:
    """The quantization_config: what most layers have, and under `dynamic` what differs."""
    settings = {layer.path: (layer.grid.bits, layer.grid.group or -1) for layer in export.layers}
    (bits, group), _ = Counter(settings.values()).most_common(1)[0]
    blocks = [path for path in export.left_dense if _BLOCK.fullmatch(path)]  # dense outside of them goes without saying
    dynamic: dict[str, dict[str, int]] = {f"-:^{re.escape(path)}$": {} for path in _with_fused(blocks)}
    for other in sorted({*settings.values()} - {(bits, group)}):
        paths = [path for path, setting in settings.items() if setting == other]
        for path in _with_fused(paths):
            dynamic[f"+:^{re.escape(path)}$"] = {"bits": other[0], "group_size": other[1]}
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": "lm_head" in settings,
        "checkpoint_format": kind,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),  # read by GPTQModel and vLLM
        **_modules_in_block(set(settings), set(blocks)),
        "meta": {"quantizer": [QUANTIZER]},
    }


def _modules_in_block(packed: set[str], dense: set[str]) -> dict[str, list[list[str]]]:
    """What optimum reads to leave layers dense: names within a block, the same in every block."""
    names = {path: (match[1] if (match := _BLOCK.fullmatch(path)) else path) for path in packed | dense}
    kept = {names[path] for path in packed}
    if not dense or not kept.isdisjoint(names[path] for path in dense):
        return {}
    return {"modules_in_block_to_quantize": [sorted(kept)]}


def _with_fused(paths: list[str]) -> list[str]:
    """The paths, and the names under which vLLM runs several of them as one layer."""
    known = set(paths)
    fused = {
        f"{parent}.{name}"
        for parent in {path.rpartition(".")[0] for path in paths}
        for name, parts in _FUSED.items()
        if all(f"{parent}.{part}" in known for part in parts)
    }
    return sorted(known | fused)
