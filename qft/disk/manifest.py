"""qft.json: what a saved model is made of. Plain JSON, checked in every field, sealed by a digest of its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .. import __version__
from ..format import Format, FormatError
from .files import STREAMING
from .tensor_file import DTYPES, Stored

NAME = "qft.json"
METHOD = "qft"  # transformers' quant_method: what it prints where nobody has registered it
LAYOUT = 2  # of the directory; a reader refuses a later one
FIRST_LAYOUT = 1  # of a directory of linear layers whose tensors are all in WEIGHTS: what the first qft reads too
WEIGHTS = "model.safetensors"
T = TypeVar("T")


@dataclass(frozen=True)
class Lora:
    """A LoRA as `QuantLinear.add_lora` attaches it; `scaling` multiplies B A; `pooled` is QA-LoRA's."""

    rank: int
    alpha: float
    scaling: float
    dropout: float
    pooled: bool = False


@dataclass(frozen=True)
class Projection:
    """One stack of weights of a QuantExperts: (experts, out_features, in_features), and errors as of a `Layer`."""

    shape: tuple[int, ...]
    errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One QuantLinear, QuantEmbedding or QuantExperts.

    Attributes:
        format: of the stored tensors.
        shape: (out_features, in_features), (num_embeddings, embedding_dim), or that of the experts' first projection.
        bias: whether it has one.
        lora: the attached LoRA, or None.
        faces: dtype its parent takes for the activations' (a `FloatFacingQuantLinear`), or an embedding returns; None
            for the rest.
        stored_scale: the scale type before training held the scales in fp32.
        errors: relative error of the layer's start, step by step, where known.
        dense_nbytes: bytes of the weights before they were quantized, where known.
        kind: "linear", "embedding" or "experts".
        projections: of experts, by name.
    """

    format: Format
    shape: tuple[int, ...]
    bias: bool
    lora: Lora | None = None
    faces: str | None = None
    stored_scale: str = "f32"
    errors: tuple[float, ...] = ()
    dense_nbytes: int | None = None
    kind: str = "linear"
    projections: dict[str, Projection] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Projection]:
        """The weights it holds, by the names of their codes."""
        return self.projections or {"weight": Projection(self.shape, self.errors)}


@dataclass(frozen=True)
class Shard:
    """One of several files of tensors: SHA-256 of the whole file, for whoever copies it, and the names in it."""

    sha256: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A saved model.

    Attributes:
        architecture: name of the model's class.
        builds_itself: whether transformers can build that class from config.json.
        layers: its quantized layers, by path.
        tensors: what is stored, by name.
        tied: tensors that are one with another: their names, and that one's.
        orders: of tensors that are not row-major in memory, their dimensions from slowest to fastest: matrix products
            round differently on another layout.
        buffers: dtype of the floating buffers that are in no file, by name.
        files: SHA-256 of the other files a load reads, by name.
        tokenizer: names of the tokenizer's files.
        shards: the files that hold the tensors, by name; empty where model.safetensors holds all of them.
        version: the qft that saved it.
    """

    architecture: str
    builds_itself: bool
    layers: dict[str, Layer]
    tensors: dict[str, Stored]
    tied: dict[str, str]
    orders: dict[str, tuple[int, ...]]
    buffers: dict[str, str]
    files: dict[str, str]
    tokenizer: tuple[str, ...] = ()
    shards: dict[str, Shard] = field(default_factory=dict)
    version: str = __version__

    def by_file(self) -> dict[str, dict[str, Stored]]:
        """What each file of tensors holds."""
        if not self.shards:
            return {WEIGHTS: self.tensors}
        return {file: {name: self.tensors[name] for name in shard.tensors} for file, shard in self.shards.items()}

    def file_of(self, name: str) -> str:
        """The file that holds a tensor, or the one it is tied to."""
        return next(file for file, held in self.by_file().items() if self.tied.get(name, name) in held)

    def to_json(self) -> bytes:
        """The text of qft.json."""
        plain = not self.shards and all(layer.kind == "linear" for layer in self.layers.values())
        layout = FIRST_LAYOUT if plain else LAYOUT
        body = {"layout": layout} | asdict(self) | {"layers": layers_to_json(self.layers)}
        return json.dumps(body | {"sha256": _digest(body)}, indent=1).encode()

    @staticmethod
    def read(directory: Path) -> Manifest:
        """The manifest of a directory.

        Raises:
            FormatError: there is none, or it is damaged. OSError: it cannot be read.
        """
        path = directory / NAME
        if not path.is_file():
            raise FormatError(_no_manifest(directory))
        try:
            body = json.loads(path.read_bytes())
            seal = body.pop("sha256")
            layout = _is(int, body.pop("layout"))
            if layout > LAYOUT:
                raise FormatError(f"{path} has layout {layout}, this qft reads {LAYOUT}; update qft")
            if seal != _digest({"layout": layout} | body):
                raise FormatError(f"{path} has changed since it was written; copy the directory again, or save it anew")
            return _manifest(body)
        except FormatError as error:
            raise FormatError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            raise FormatError(f"{path} is damaged; copy the directory again, or save it anew") from None


def quantization_config(layers: Mapping[str, Layer], buffers: Mapping[str, str]) -> dict[str, Any]:
    """The entry of that name in a transformers model's config.json: enough for `from_pretrained` to open the model.

    `buffers` are those of `Manifest` that are not in fp32, as the model's code makes them.
    """
    return {
        "quant_method": METHOD,
        "open_with": "import qft, then from_pretrained; or qft.load (pip install qft)",
        "version": __version__,
        "layers": layers_to_json(layers),
        "buffers": {name: dtype for name, dtype in buffers.items() if dtype != "F32"},
    }


def layers_to_json(layers: Mapping[str, Layer]) -> dict[str, dict[str, Any]]:
    """Layers by path, as qft.json and config.json hold them."""
    return {path: asdict(layer) | {"format": str(layer.format)} for path, layer in layers.items()}


def layers_from_json(entries: Any, source: str) -> dict[str, Layer]:
    """The reverse of `layers_to_json`. Raises FormatError, which names `source`, where the entries are damaged."""
    try:
        return {_is(str, path): _layer(entry) for path, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(f"{source} describes its quantized layers wrongly ({error!r}); save the model anew") from None


def _no_manifest(directory: Path) -> str:
    if (directory / STREAMING).is_dir():
        return f"{directory} holds a model that qft quantize has not finished; repeat that command, and it goes on"
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.bin")):
        return (
            f"{directory} holds weights but no {NAME}: it is a dense model, or an incomplete copy; load a dense one "
            "with transformers' from_pretrained and call qft.quantize_model"
        )
    return f"{directory} holds no {NAME}; give a directory written by qft.save"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _manifest(body: dict[str, Any]) -> Manifest:
    texts: dict[str, dict[str, str]] = {
        name: {_is(str, key): _is(str, value) for key, value in body[name].items()}
        for name in ("tied", "buffers", "files")
    }
    if unknown := set(texts["buffers"].values()) - set(DTYPES):
        raise ValueError(unknown)
    tensors = {
        name: Stored(_is(str, entry["dtype"]), _sizes(entry["shape"]), _is(str, entry["sha256"]))
        for name, entry in body["tensors"].items()
    }
    return Manifest(
        architecture=_is(str, body["architecture"]),
        builds_itself=_is(bool, body["builds_itself"]),
        layers={path: _layer(entry) for path, entry in body["layers"].items()},
        tensors=tensors,
        orders={name: _order(order, len(tensors[name].shape)) for name, order in body["orders"].items()},
        tokenizer=tuple(_inside(_is(str, name)) for name in body["tokenizer"]),
        shards=_shards(body.get("shards", {}), tensors),
        version=_is(str, body["version"]),
        **texts,
    )


def _shards(entries: dict[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Shard]:
    shards = {
        _inside(_is(str, file)): Shard(_is(str, entry["sha256"]), tuple(_is(str, name) for name in entry["tensors"]))
        for file, entry in entries.items()
    }
    held = [name for shard in shards.values() for name in shard.tensors]
    if shards and sorted(held) != sorted(tensors):
        raise ValueError(held)
    return shards


def _layer(entry: dict[str, Any]) -> Layer:
    fmt = Format.parse(entry["format"])
    kind, faces, shape = _is(str, entry.get("kind", "linear")), entry["faces"], _sizes(entry["shape"])
    if kind not in ("linear", "embedding", "experts") or len(shape) != (3 if kind == "experts" else 2):
        raise ValueError(kind)
    projections = {_is(str, name): _projection(each) for name, each in entry.get("projections", {}).items()}
    if bool(projections) != (kind == "experts") or (kind == "embedding" and faces is None):
        raise ValueError(kind)
    if faces is not None and not DTYPES[faces].is_floating_point:
        raise ValueError(faces)
    lora = entry["lora"]
    if lora is not None and kind != "linear":
        raise ValueError(lora)
    return Layer(
        format=fmt,
        shape=shape,
        bias=_is(bool, entry["bias"]),
        lora=None if lora is None else _lora(lora, fmt, shape),
        faces=faces,
        stored_scale=replace(fmt, scale=_is(str, entry["stored_scale"])).scale,
        errors=tuple(_finite(error) for error in entry["errors"]),
        dense_nbytes=None if entry["dense_nbytes"] is None else _is(int, entry["dense_nbytes"]),
        kind=kind,
        projections=projections,
    )


def _projection(entry: dict[str, Any]) -> Projection:
    count, out, in_features = _sizes(entry["shape"])
    return Projection((count, out, in_features), tuple(_finite(error) for error in entry["errors"]))


def _lora(entry: dict[str, Any], fmt: Format, shape: tuple[int, ...]) -> Lora:
    rank = _is(int, entry["rank"])
    alpha, scaling, dropout = (_finite(entry[name]) for name in ("alpha", "scaling", "dropout"))
    lora = Lora(rank, alpha, scaling, dropout, _is(bool, entry.get("pooled", False)))
    most = min(shape[0], fmt.groups(shape[1]) if lora.pooled else shape[1])
    if not 1 <= rank <= most or lora.alpha <= 0 or not 0 <= lora.dropout < 1 or (lora.pooled and not fmt.is_integer):
        raise ValueError(lora)
    return lora


def _is(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise TypeError(value)
    return value


def _finite(value: Any) -> float:
    number = float(_is(float, value))
    if not math.isfinite(number):
        raise ValueError(number)
    return number


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(_is(int, value) for value in values)
    if any(size < 0 for size in sizes):
        raise ValueError(sizes)
    return sizes


def _order(values: Any, rank: int) -> tuple[int, ...]:
    order = _sizes(values)
    if sorted(order) != list(range(rank)):
        raise ValueError(order)
    return order


def _inside(name: str) -> str:
    """A file's name, which must not lead out of the directory."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise ValueError(name)
    return name
