"""A dense checkpoint of a packed model: what transformers, vLLM and converters to other formats read without qft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_tensors import CheckpointTensors, Rows
from .directory_writer import write_directory


def write(model: nn.Module, directory: str | Path, tokenizer: Any = None, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the dense model: every packed weight dequantized, its LoRA added, and rounded once to `dtype`.

    Args:
        model: a transformers model; it stays packed.
        directory: new, or empty.
        tokenizer: a transformers tokenizer to save beside it.
        dtype: of all floating tensors but those that the model's class keeps in fp32.

    Raises:
        ValueError: it is no transformers model, the dtype is not floating, or an adapter that is not its layers' own
            LoRA is attached.
        FileExistsError: the directory holds something already.
        OSError: the disk is full or the directory cannot be written.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype} holds no weights; write them as torch.bfloat16, float16 or float32")
    write_directory(model, directory, tokenizer, _tensors(model, CheckpointTensors(model), dtype), dtype=dtype)


def _tensors(model: Any, checkpoint: CheckpointTensors, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    wide = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, value in checkpoint.tensors.items():
        if isinstance(value, Rows):
            yield name, value.dequantize(dtype)
        elif value.is_floating_point() and wide.isdisjoint(name.split(".")):
            yield name, value.detach().to(dtype)
        else:
            yield name, value.detach()
