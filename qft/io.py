"""Models on disk: a directory that is whole or not there, and that says of every byte what it must be.

    model.safetensors        every Parameter and persistent buffer, tied ones once
    qft.json                 what the model is made of (qft/manifest.py)
    config.json, generation_config.json     of a transformers model
    the tokenizer's files    if one was given

Nothing in a directory is executed, pickled, or looked up elsewhere.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import manifest as manifests
from . import tensor_file
from .adapters.adapted import AdaptedLinear
from .adapters.scales import remember_scale, remembered_scale, rounded, rounding_error
from .files import digest, replace_files, settle
from .format import FormatError
from .manifest import Layer, Lora, Manifest
from .model import is_linear
from .nn import FloatFacingQuantLinear, QuantLinear
from .tensor import STORED
from .tensor_file import DTYPE_NAMES, DTYPES

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"


# ------------------------------------------------------------------------------------------------------------ save


def save(
    model: nn.Module, directory: str | Path, tokenizer: Any = None, round_scales: bool = False
) -> dict[str, float]:
    """Write a model to a directory, as one: a kill or a full disk leaves what was there before.

    Parameters and persistent buffers are stored as they are, LoRA included. A tokenizer already in the directory stays
    unless another is given; files that qft did not write are not touched.

    Args:
        model: any module. One whose class is transformers' own is built from the directory alone by `load`.
        directory: made if absent.
        tokenizer: a transformers tokenizer to save beside it.
        round_scales: write scales that were held in fp32 to train in the type they had before; the model keeps its own.

    Returns:
        With `round_scales`, ||rounded - fp32|| / ||fp32|| of the scales of each QuantLinear by path; else nothing.

    Raises:
        FormatError: a scale does not fit the type it had.
        ValueError: a tensor has no values (meta), or a module holds state that is no tensor.
        TypeError: a QuantLinear of a class that qft does not know.
        OSError: the disk is full or the directory cannot be written.
    """
    directory = Path(directory)
    tensor_file.refuse_unstorable(dict(_tensors(model)))
    _refuse_extra_state(model)
    layers = {path: module for path, module in _modules(model) if isinstance(module, QuantLinear)}
    errors: dict[str, float] = {}
    as_stored: dict[QuantLinear, QuantLinear] = {}
    for path, layer in layers.items() if round_scales else ():
        if layer not in as_stored:
            as_stored[layer] = _rounded_twin(layer, path)
        errors[path] = rounding_error(layer.quant_tensor, as_stored[layer].quant_tensor)
    tensors, tied = _untie(dict(_tensors(model, as_stored)))
    with replace_files(directory) as folder:
        older = _tokenizer_in(directory)
        names = older if tokenizer is None else _save_tokenizer(tokenizer, folder)
        _save_configs(model, folder)
        made = Manifest(
            architecture=type(model).__name__,
            builds_itself=_is_transformers_own(model),
            layers={path: _describe(as_stored.get(layer, layer), path) for path, layer in layers.items()},
            tensors=tensor_file.write(folder / WEIGHTS, tensors, {"format": "pt"}),
            tied=tied,
            orders={name: order for name, tensor in tensors.items() if (order := _order(tensor))},
            buffers={name: DTYPE_NAMES[buffer.dtype] for name, buffer in _rebuilt_buffers(model)},
            files={name: digest(folder / name) for name in (CONFIG, GENERATION) if (folder / name).exists()},
            tokenizer=names,
        )
        (folder / manifests.NAME).write_bytes(made.to_json())
    # of an earlier save; qft.json no longer names them, so nothing depends on this
    for name in {CONFIG, GENERATION, *older} - {*made.files, *made.tokenizer}:
        (directory / name).unlink(missing_ok=True)
    return errors


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every path it has."""
    return model.named_modules(remove_duplicate=False)


def _tensors(model: nn.Module, instead: dict[QuantLinear, QuantLinear] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, by path."""
    for path, module in _modules(model):
        holder = (instead or {}).get(module, module)  # type: ignore[call-overload]
        for name, tensor in (*holder._parameters.items(), *holder._buffers.items()):
            if tensor is not None and name not in holder._non_persistent_buffers_set:
                yield _join(path, name), tensor


def _rebuilt_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating buffers that no file holds: the model's own code makes them."""
    for path, module in _modules(model):
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_floating_point() and not isinstance(module, QuantLinear):
                yield _join(path, name), buffer


def _untie(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor in memory once, and the other names of those that have several."""
    first: dict[Any, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        key = place if tensor.numel() else id(tensor)
        if first.setdefault(key, name) != name:
            tied[name] = first[key]
    return {name: tensor for name, tensor in tensors.items() if name not in tied}, tied


def _order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from slowest to fastest in memory; nothing for a row-major tensor, or one with gaps."""
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda i: -strides[i]))
    return order if tensor.permute(order).is_contiguous() and not tensor.is_contiguous() else ()


def _rounded_twin(layer: QuantLinear, path: str) -> QuantLinear:
    """The layer with rounded scales, sharing everything else."""
    twin = copy.copy(layer)
    twin._parameters, twin._buffers = dict(layer._parameters), dict(layer._buffers)
    twin.set_quantized(rounded(layer, path))
    return twin


def _describe(layer: QuantLinear, path: str) -> Layer:
    if type(layer) not in (QuantLinear, FloatFacingQuantLinear):
        way_out = layer.way_to_save if isinstance(layer, AdaptedLinear) else "convert the layer first"
        raise TypeError(f"{path} is a {type(layer).__name__}; qft.save knows QuantLinear itself, {way_out}")
    lora = None
    if layer.lora_rank:
        dropout = float(getattr(layer.lora_dropout, "p", 0.0))
        lora = Lora(layer.lora_rank, float(layer.lora_alpha), float(layer.lora_scaling), dropout, layer.lora_pooled)
    return Layer(
        format=layer.format,
        shape=(layer.out_features, layer.in_features),
        bias=layer.bias is not None,
        lora=lora,
        faces=DTYPE_NAMES[layer.weight.dtype] if isinstance(layer, FloatFacingQuantLinear) else None,
        stored_scale=remembered_scale(layer),
        errors=tuple(map(float, layer.init_errors)),
        dense_nbytes=layer.dense_nbytes or None,
    )


def _refuse_extra_state(model: nn.Module) -> None:
    for path, module in _modules(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"{path or 'the model'} keeps extra state in a {type(module).__name__}; qft.save stores tensors alone"
            )


def _save_tokenizer(tokenizer: Any, folder: Path) -> tuple[str, ...]:
    tokenizer.save_pretrained(folder)
    return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))


def _tokenizer_in(directory: Path) -> tuple[str, ...]:
    """Names of the tokenizer's files that an earlier save left; none where that save cannot be read."""
    try:
        return Manifest.read(directory).tokenizer
    except FormatError:  # this save replaces it
        return ()


def _is_transformers_own(model: nn.Module) -> bool:
    return type(model).__module__.startswith("transformers.") and _transformers_class(type(model).__name__) is type(
        model
    )


def _save_configs(model: nn.Module, folder: Path) -> None:
    config: Any = getattr(model, "config", None)
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(config, "to_json_file"):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config.to_json_file(folder / CONFIG)
    if hasattr(generation, "to_json_file"):
        generation.to_json_file(folder / GENERATION)


# ------------------------------------------------------------------------------------------------------------ load


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a model that `save` wrote, in eval mode.

    Args:
        directory: what `save` wrote. An interrupted save of it is completed first.
        model: the skeleton: a module of the same architecture, dense or quantized, on any device. Needed unless the
            model's class is transformers' own. It is filled in place, its linear layers replaced as saved; all its
            Parameters and persistent buffers come from the file.

    Returns:
        The model: the skeleton itself, or, where that is a single linear layer, the QuantLinear in its place.

    Raises:
        FormatError: a file is missing, damaged or tampered with, holds a dense model, or does not fit the skeleton,
            which is then left as it was; file and tensor are named.
        OSError: there is no such directory, or it cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no directory; give one written by qft.save")
    settle(directory)
    made = Manifest.read(directory)
    for name, wanted in made.files.items():
        if name not in (CONFIG, GENERATION):
            raise FormatError(f"{directory / manifests.NAME} lists {name}, which is no file of a model; save it anew")
        if not (directory / name).is_file():
            raise FormatError(f"{directory / name} is missing; copy the directory again, or save it anew")
        if digest(directory / name) != wanted:
            raise FormatError(f"{directory / name} has changed since it was written; copy it again, or save it anew")
    if not (directory / WEIGHTS).is_file():
        raise FormatError(f"{directory / WEIGHTS} is missing; copy the directory again, or save it anew")
    if model is None:
        model = _build(directory, made)
    replacements = _replacements(directory, made, model)
    slots = _slots(model, replacements)
    _check(directory, made, slots)
    _refuse_meta_buffers(model)
    tensors = tensor_file.read(directory / WEIGHTS, made.tensors)
    for path, layer in replacements.items():
        name = _join(path, "weight_format")
        spelling = bytes(tensors[made.tied.get(name, name)].tolist()).decode(errors="replace")
        if spelling != str(layer.format):
            raise FormatError(
                f"{name} in {directory / WEIGHTS} spells {spelling!r}, {manifests.NAME} '{layer.format}'; save it anew"
            )
    for name, order in made.orders.items():
        inverse = sorted(range(len(order)), key=order.__getitem__)
        tensors[name] = tensors[name].permute(order).contiguous().permute(inverse)
    _fill(slots, tensors, made.tied)
    for path, layer in replacements.items():
        if faces := made.layers[path].faces:
            FloatFacingQuantLinear.adopt(layer, DTYPES[faces])
    _cast_buffers(model, made.buffers)
    return _put(model, replacements).eval()


@dataclass(frozen=True)
class _Slot:
    """Where a tensor goes: an entry of a module's Parameters or buffers, and what is there now."""

    module: nn.Module
    name: str
    now: Tensor
    device: torch.device

    @property
    def is_parameter(self) -> bool:
        return self.name in self.module._parameters


def _transformers_class(name: str) -> Any:
    """The model class of that name in transformers, or None."""
    import transformers

    kind = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def _build(directory: Path, made: Manifest) -> nn.Module:
    """The model's own skeleton: Parameters without values, buffers as its code makes them."""
    if not (made.builds_itself and CONFIG in made.files):
        raise FormatError(
            f"{directory} holds a {made.architecture}, which its files cannot build; call load(directory, model)"
        )
    import transformers
    from accelerate import init_empty_weights

    kind = _transformers_class(made.architecture)
    if kind is None:
        raise FormatError(
            f"{directory} holds a {made.architecture}, which transformers {transformers.__version__} does not have; "
            "update transformers, or call load(directory, model)"
        )
    try:
        # by class, never through Auto classes: those may run code that a config names
        config = kind.config_class.from_dict(json.loads((directory / CONFIG).read_bytes()))
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            model = kind(config)
        if GENERATION in made.files:
            model.generation_config = transformers.GenerationConfig.from_dict(
                json.loads((directory / GENERATION).read_bytes())
            )
    except Exception as error:  # a constructor of another package raises what it likes
        raise FormatError(
            f"{directory / CONFIG} builds no {made.architecture} ({error}); save the model again"
        ) from error
    return model


def _replacements(directory: Path, made: Manifest, model: nn.Module) -> dict[str, QuantLinear]:
    """QuantLinear layers without values, for the paths where the directory has one."""
    layers, way_out = {}, "give the skeleton it was saved from"
    for path, entry in made.layers.items():
        try:
            old = model.get_submodule(path)
        except AttributeError:
            raise FormatError(f"{directory} quantizes {path}, which the model does not have; {way_out}") from None
        shape = _linear_shape(old)
        if shape != entry.shape:
            theirs = f"is {type(old).__name__}" + (f" {list(shape)}" if shape else "")
            raise FormatError(
                f"{directory} quantizes {path} {list(entry.shape)}, which {theirs} in the model; {way_out}"
            )
        layers[path] = _without_values(entry)
    return layers


def _linear_shape(module: nn.Module) -> tuple[int, ...] | None:
    """(out_features, in_features), or None if the module is not linear."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module._parameters["weight"].shape[::-1]) if is_linear(module) else None  # type: ignore[union-attr]


def _without_values(entry: Layer) -> QuantLinear:
    out, in_features = entry.shape
    layer = QuantLinear(in_features, out, entry.format, bias=entry.bias, device="meta")
    if lora := entry.lora:
        width = entry.format.groups(in_features) if lora.pooled else in_features
        a, b = torch.empty(lora.rank, width, device="meta"), torch.empty(out, lora.rank, device="meta")
        layer.add_lora(lora.rank, lora.alpha, lora.dropout, A=a, B=b, pooled=lora.pooled)
        layer.lora_scaling = lora.scaling
    remember_scale(layer, entry.stored_scale)
    layer.init_errors, layer.dense_nbytes = entry.errors, entry.dense_nbytes or 0
    return layer


def _slots(model: nn.Module, replacements: Mapping[str, QuantLinear]) -> dict[str, _Slot]:
    """The place of every Parameter and persistent buffer, by path."""
    slots = {}
    for path, module in _modules(model):
        holder = replacements.get(path, module)
        weight = module._parameters.get("weight")
        for name, tensor in (*holder._parameters.items(), *holder._buffers.items()):
            if tensor is None or name in holder._non_persistent_buffers_set:
                continue
            here = tensor if holder is module or weight is None else weight
            slots[_join(path, name)] = _Slot(holder, name, tensor, torch.device("cpu") if here.is_meta else here.device)
    return slots


def _check(directory: Path, made: Manifest, slots: Mapping[str, _Slot]) -> None:
    """Refuse a file that does not fit the model, before anything is read or changed."""
    names = {**dict.fromkeys(made.tensors), **made.tied}
    for name, first in made.tied.items():
        if name in made.tensors or first not in made.tensors:
            raise FormatError(
                f"{directory / manifests.NAME} ties {name} to {first}, which cannot be; save the model again"
            )
    for name in slots.keys() - names.keys():
        raise FormatError(f"{directory} holds no {name}, which the model needs; give the skeleton it was saved from")
    for name in names.keys() - slots.keys():
        raise FormatError(
            f"{directory} holds {name}, for which the model has no place; give the skeleton it was saved from"
        )
    served: dict[tuple[int, str], str] = {}
    for name, slot in slots.items():
        first = made.tied.get(name, name)
        stored, now = made.tensors[first], slot.now
        exact = isinstance(slot.module, QuantLinear) and slot.name in (*STORED, "weight_format")
        wanted = DTYPE_NAMES.get(now.dtype) if exact or not now.is_floating_point() else None
        fits = stored.dtype == wanted if wanted else stored.dtype in DTYPES and DTYPES[stored.dtype].is_floating_point
        if stored.shape != tuple(now.shape) or not fits:
            raise FormatError(
                f"{name} in {directory / WEIGHTS} is {stored}, the model needs {wanted or 'floating'} "
                f"{list(now.shape)}; give the skeleton it was saved from"
            )
        if served.setdefault((id(slot.module), slot.name), first) != first:
            raise FormatError(
                f"{name} shares its module in the model, not in {directory}; give the skeleton it was saved from"
            )


def _refuse_meta_buffers(model: nn.Module) -> None:
    for name, buffer in _rebuilt_buffers(model):
        if buffer.is_meta:
            raise ValueError(
                f"{name} of the skeleton is on the meta device and in no file; build the skeleton on the CPU"
            )


def _fill(slots: Mapping[str, _Slot], tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    placed: dict[tuple[str, bool], Tensor] = {}
    for name, slot in slots.items():
        key = tied.get(name, name), slot.is_parameter
        if key not in placed:
            value = tensors[key[0]].to(slot.device)
            trains = slot.now.requires_grad and value.is_floating_point()
            placed[key] = nn.Parameter(value, requires_grad=trains) if slot.is_parameter else value
        home: dict[str, Any] = slot.module._parameters if slot.is_parameter else slot.module._buffers
        home[slot.name] = placed[key]


def _cast_buffers(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Give the buffers that the model's own code made the dtype they had when it was saved."""
    for name, buffer in list(_rebuilt_buffers(model)):
        path, _, leaf = name.rpartition(".")
        if name in dtypes and DTYPES[dtypes[name]] != buffer.dtype:
            model.get_submodule(path)._buffers[leaf] = buffer.to(DTYPES[dtypes[name]])


def _put(model: nn.Module, replacements: Mapping[str, QuantLinear]) -> nn.Module:
    for path, layer in replacements.items():
        parent, _, name = path.rpartition(".")
        if not path:
            return layer
        setattr(model.get_submodule(parent), name, layer)
    return model


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
