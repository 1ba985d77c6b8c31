"""A directory that transformers' from_pretrained and vLLM open, written as one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..disk import checkpoint, tensor_file
from ..disk.files import replace_files

SHARD_BYTES = 5_000_000_000  # of one file of weights, as save_pretrained has it
QUANTIZER = f"qft:{__version__}"


def write_directory(
    model: Any,
    directory: str | Path,
    tokenizer: Any,
    tensors: Iterable[tuple[str, Tensor]],
    quantization: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    quantization_file: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write configs, tokenizer and weights; a kill or a full disk leaves nothing.

    Args:
        model: a transformers model; its configurations are written, not its tensors.
        directory: new, or empty.
        tokenizer: a transformers tokenizer, or None.
        tensors: name and value, each asked for when the one before it is on the disk or in the shard being filled.
        quantization: the `quantization_config` of config.json; None says that the model is dense.
        dtype: what config.json calls the model's dtype; None leaves what it says.
        quantization_file: a file of its own to write `quantization` to as well.
        shard_bytes: a file of weights that would become longer is followed by another.

    Raises:
        FileExistsError: the directory holds something already.
        OSError: the disk is full or the directory cannot be written.
    """
    directory = Path(directory)
    checkpoint.refuse_to_overwrite(directory)
    with replace_files(directory) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        names = _write_shards(folder, tensors, shard_bytes)
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.architectures = [type(model).__name__]
        if _holds_packed_head(model, names):
            config.tie_word_embeddings = False  # a reader would give it the embedding's dense weight
        if dtype is not None:
            config.dtype = dtype
        entries = json.loads(config.to_json_string())
        if quantization is not None:
            entries["quantization_config"] = dict(quantization)
        _write_json(folder / "config.json", entries)
        if quantization_file is not None:
            _write_json(folder / quantization_file, dict(quantization or {}))
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.to_json_file(folder / "generation_config.json")


def _holds_packed_head(model: Any, names: Iterable[str]) -> bool:
    """Whether a weight that is tied in the model has tensors of its own beside, or instead of, a dense one."""
    tied = getattr(model, "all_tied_weights_keys", {})
    layers = tuple(target.removesuffix("weight") for target in tied)
    dense = {*tied, *(f"{layer}bias" for layer in layers)}
    return any(name.startswith(layers) and name not in dense for name in names)


def _write_json(path: Path, entries: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n")


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> list[str]:
    """model.safetensors, or several files and the index that says which tensor is in which; the tensors' names."""
    files: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        tensor_file.write(folder / f"{len(files)}.safetensors", shard, {"format": "pt"})
        files.append(sorted(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return files[0]
    weight_map = {}
    for number, names in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / name)
        weight_map.update(dict.fromkeys(names, name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)
    return [name for names in files for name in names]


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
