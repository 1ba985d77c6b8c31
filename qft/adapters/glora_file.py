"""GLoRA's found configs and their weights on disk: a directory that is whole or not there.

glora.safetensors   what each layer's config uses, no more: PATH.glora_Ad and so on
glora.json          rank and config of each layer, and what base they belong to; sealed by a digest of its own
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..disk import tensor_file
from ..disk.files import replace_files, settle
from ..disk.tensor_file import Stored
from ..format import FormatError
from ..nn.linear import QuantLinear
from .adapted import AdaptedLinear
from .glora import PIECES, GLoRAConfig, GLoRALinear, glora_layers
from .scales import quant_layers

WEIGHTS = "glora.safetensors"
CONFIG = "glora.json"


def save_glora(model: nn.Module, directory: str | Path) -> None:
    """Write each GLoRALinear's config and what it uses, whole or not at all; the other pieces of the supernet are not.

    Other files in the directory are left alone, so it may be the one that `qft.save` wrote the base to. A LoRA beside
    GLoRA's terms is not written: that belongs to `qft.save_adapter`.

    Raises:
        ValueError: the model holds no GLoRALinear. OSError: the directory cannot be written; an older one is intact.
    """
    layers = glora_layers(model)
    tensors = {
        name: piece.detach().float().contiguous()
        for path, layer in layers.items()
        for name, piece in _named_pieces(path, layer).items()
    }
    entries = {
        path: {"rank": layer.glora_rank, "config": asdict(layer.config), "base": _base_digest(layer)}
        for path, layer in layers.items()
    }
    with replace_files(Path(directory)) as folder:
        stored = tensor_file.write(folder / WEIGHTS, tensors, {"format": "pt"})
        body = {"qft": __version__, "layers": entries, "tensors": {name: asdict(s) for name, s in stored.items()}}
        (folder / CONFIG).write_text(json.dumps(body | {"sha256": _seal(body)}, indent=1))


def load_glora(model: nn.Module, directory: str | Path) -> nn.Module:
    """Give a model the GLoRA terms that `save_glora` wrote, in place of any it has; they can train on.

    Args:
        model: the packed base they were trained on: the same codes, scales and biases.

    Returns:
        The model itself.

    Raises:
        FormatError: a file is missing or damaged, or the model is another base; the model is then left as it was.
        OSError: a file cannot be read.
    """
    directory = Path(directory)
    settle(directory)
    body = _read(directory)
    layers = quant_layers(model)
    try:
        for path, entry in body["layers"].items():
            _refuse_other_base(directory, path, layers.get(path), entry["base"])
        found = {path: (entry["rank"], GLoRAConfig(**entry["config"])) for path, entry in body["layers"].items()}
        needed = {name: shape for path in found for name, shape in _needed(path, layers[path], *found[path]).items()}
        stored = {name: Stored(s["dtype"], tuple(s["shape"]), s["sha256"]) for name, s in body["tensors"].items()}
        if {name: Stored("F32", shape, stored[name].sha256) for name, shape in needed.items()} != stored:
            raise ValueError(needed)
    except FormatError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        raise FormatError(f"{directory / CONFIG} is damaged; copy the directory again, or save it anew") from None
    tensors = tensor_file.read(directory / WEIGHTS, stored)
    for path, (rank, config) in found.items():
        layer = layers[path]
        if isinstance(layer, GLoRALinear):
            layer.release()
        with torch.no_grad():
            for name, piece in _named_pieces(path, _adopted(layer, rank, config)).items():
                piece.copy_(tensors[name])
    return model


def _adopted(layer: QuantLinear, rank: int, config: GLoRAConfig) -> GLoRALinear:
    adopted = GLoRALinear.adopt(layer, rank)
    adopted.use(config)
    return adopted


def _named_pieces(path: str, layer: GLoRALinear) -> dict[str, Tensor]:
    """What a layer's config uses, by its name in the file."""
    pieces = (piece for term in PIECES for piece in layer.pieces(term).items())
    return {f"{path}.{layer.prefix}{name}": piece for name, piece in pieces}


def _needed(path: str, layer: QuantLinear, rank: int, config: GLoRAConfig) -> dict[str, tuple[int, ...]]:
    """Shape of what a layer would use under a config, by its name in the file."""
    bias = layer.bias is not None
    twin = QuantLinear(layer.in_features, layer.out_features, layer.format, bias, device="meta")
    return {name: tuple(piece.shape) for name, piece in _named_pieces(path, _adopted(twin, rank, config)).items()}


def _read(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise FormatError(f"{directory} holds no {CONFIG}; give a directory written by qft.save_glora")
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
        seal = body.pop("sha256")
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise FormatError(f"{path} is damaged; copy the directory again, or save it anew") from None
    if seal != _seal(body):
        raise FormatError(f"{path} has changed since it was written; copy the directory again, or save it anew")
    return body


def _refuse_other_base(directory: Path, path: str, layer: QuantLinear | None, digest: str) -> None:
    if layer is None:
        raise FormatError(f"{directory} adapts {path}, which is no QuantLinear of this model; load the base it fits")
    if isinstance(layer, AdaptedLinear) and not isinstance(layer, GLoRALinear):
        raise FormatError(f"{path} is a {type(layer).__name__}, which cannot take GLoRA's terms; merge it first")
    if digest != _base_digest(layer):
        raise FormatError(f"{directory} was trained on another base: {path} differs; load the base it was trained on")


def _base_digest(layer: QuantLinear) -> str:
    """SHA-256 of what the terms were trained on: the stored weight and the bias that D scales."""
    q = layer.quant_tensor
    parts = [str(q.format), repr(q.shape), *(Stored.of(tensor).sha256 for tensor in q.tensors().values())]
    if layer.bias is not None:
        parts.append(Stored.of(layer.bias.detach()).sha256)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
