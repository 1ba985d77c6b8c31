"""A directory on this machine as a language model and its tokenizer, dense or quantized."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..format import FormatError
from ..model.layer_report import LayerReport, Report, report
from ..nn.packed import stored_names
from .directory import is_quantized, kind_of, load
from .manifest import Manifest
from .tensor_file import DTYPES

CHOICES = ("auto", "float32", "bfloat16", "float16")


def device() -> torch.device:
    """Where the commands run a model: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(directory: str | Path, dtype: str = "auto", requantize: str | None = None) -> nn.Module:
    """The causal language model in a directory, in eval mode.

    Args:
        directory: written by transformers' save_pretrained or by `qft.save`. Nothing is looked up elsewhere.
        dtype: of what is not quantized; auto keeps the file's.
        requantize: as in `qft.load`.

    Raises:
        OSError: there is no model in the directory.
        ValueError: the dtype is none of `CHOICES`.
        FormatError: its files are damaged, or the architecture is no causal language model.
    """
    path = Path(directory)
    if dtype not in CHOICES:
        raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(CHOICES)}")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no directory; give one written by save_pretrained or by qft quantize")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json; give a directory written by save_pretrained or qft")
    if is_quantized(path) or requantize is not None:
        model = load(path, requantize=requantize)
        return (model if dtype == "auto" else model.to(getattr(torch, dtype))).eval()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if config.is_encoder_decoder:
            raise FormatError(f"{path} holds a {config.model_type} encoder-decoder; this command needs a causal model")
        return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, local_files_only=True).eval()
    except SafetensorError as error:
        raise FormatError(f"{path} holds damaged weights ({error}); copy the model again") from None


def describe(directory: str | Path) -> Report:
    """What of the model in a directory is quantized; of what `qft.save` wrote, from its description alone.

    Raises:
        FormatError: the description is missing or damaged.
    """
    if kind_of(directory) not in ("qft", None):
        return report(load(directory))
    made = Manifest.read(Path(directory))
    sizes = {name: math.prod(stored.shape) * DTYPES[stored.dtype].itemsize for name, stored in made.tensors.items()}
    layers: list[LayerReport] = []
    holder: dict[str, str] = {}  # the path that each stored weight was first met under
    packed: set[str] = set()
    for path, layer in made.layers.items():
        prefix, rank = f"{path}.".lstrip("."), layer.lora.rank if layer.lora else 0
        everything = sum(math.prod(weight.shape) for weight in layer.weights.values())
        for name, weight in layer.weights.items():
            here = path if layer.kind != "experts" else prefix + name
            stored = [made.tied.get(prefix + each, prefix + each) for each in stored_names(name)]
            first = holder.setdefault(stored[0], here)
            nbytes = sum(sizes.get(each, 0) for each in stored)
            count = math.prod(weight.shape)
            dense = (layer.dense_nbytes or 2 * everything) * count // everything
            shares = "" if first == here else first
            layers.append(
                LayerReport(
                    here, layer.format, weight.shape, nbytes, dense, rank, weight.errors, "", layer.kind, shares
                )
            )
            packed.update(stored)
        packed.add(f"{prefix}weight_format")
    total, own = sum(sizes.values()), [layer for layer in layers if not layer.shares]
    floating = {name for name, stored in made.tensors.items() if DTYPES[stored.dtype].is_floating_point}
    alone = sum(math.prod(made.tensors[name].shape) for name in floating - packed)
    parameters = alone + sum(layer.weights for layer in own)
    return Report(tuple(layers), total, total - sum(layer.nbytes for layer in own), parameters)


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer in a model's directory.

    Raises:
        OSError: there is none.
    """
    path = Path(directory)
    if not (path / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{path} holds no tokenizer; copy the files of the model's tokenizer into it")
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def vocabulary(model: Any) -> int:
    """Number of token ids the model's embedding knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def row_length(model: Any, wanted: int | None = None) -> int:
    """Longest row to feed the model, in tokens: `wanted`, or 256, or as many positions as it was built for.

    Raises:
        ValueError: `wanted` is beyond the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if wanted is None:
        return min(256, positions or 256)
    if positions is not None and wanted > positions:
        raise ValueError(f"block size {wanted} is beyond the model's {positions} positions; use {positions} or less")
    return wanted
