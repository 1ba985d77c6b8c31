"""Models on disk: a directory that is whole or not there, and that says of every byte what it must be.

    model.safetensors        every Parameter and persistent buffer, tied ones once; of a model that was quantized file
                             by file several, and model.safetensors.index.json (qft/disk/streaming.py)
    qft.json                 what the model is made of (qft/disk/manifest.py)
    config.json, generation_config.json     of a transformers model
    the tokenizer's files    if one was given

Nothing in a directory is executed, pickled, or looked up elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.scales import rounded, rounding_error, store
from ..format import FormatError
from ..nn.packed import Packed, weights_of
from . import manifest as manifests
from . import tensor_file
from .described import describe_layer, put_face, without_values
from .files import digest, replace_files, settle
from .manifest import WEIGHTS, Layer, Manifest, Shard
from .skeleton import CONFIG, GENERATION, empty_model, read_config, transformers_class
from .tensor_file import DTYPE_NAMES, DTYPES, Stored

INDEX = "model.safetensors.index.json"  # which file holds which tensor, as transformers has it


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
        With `round_scales`, ||rounded - fp32|| / ||fp32|| of the scales of each quantized weight by path; else nothing.

    Raises:
        FormatError: a scale does not fit the type it had.
        ValueError: a tensor has no values (meta), or a module holds state that is no tensor.
        TypeError: a quantized layer of a class that qft does not know.
        OSError: the disk is full or the directory cannot be written.
    """
    directory = Path(directory)
    tensor_file.refuse_unstorable(dict(_tensors(model)))
    _refuse_extra_state(model)
    layers = {path: module for path, module in _modules(model) if isinstance(module, Packed)}
    errors: dict[str, float] = {}
    as_stored: dict[Packed, Packed] = {}
    first: dict[int, Packed] = {}
    for path, layer in layers.items() if round_scales else ():
        if layer not in as_stored:
            as_stored[layer] = _rounded_twin(layer, path, first)
        for weight in weights_of(path, layer):
            errors[weight.path] = rounding_error(weight.value, as_stored[layer].packed(weight.name))
    tensors, tied = _untie(dict(_tensors(model, as_stored)))
    with replace_files(directory) as folder:
        older = _saved_in(directory)
        described = {path: describe_layer(as_stored.get(layer, layer), path) for path, layer in layers.items()}
        stored = tensor_file.write(folder / WEIGHTS, tensors, {"format": "pt"})
        orders = {name: order for name, tensor in tensors.items() if (order := memory_order(tensor))}
        made = write_description(
            model, folder, described, stored, tied, orders, tokenizer, older.tokenizer if older else ()
        )
    # of an earlier save; qft.json no longer names them, so nothing depends on this
    stale = {CONFIG, GENERATION, INDEX, *(older.tokenizer if older else ()), *(older.shards if older else ())}
    for name in stale - {WEIGHTS, *made.files, *made.tokenizer}:
        (directory / name).unlink(missing_ok=True)
    return errors


def write_description(
    model: nn.Module,
    folder: Path,
    layers: Mapping[str, Layer],
    tensors: dict[str, Stored],
    tied: dict[str, str],
    orders: dict[str, tuple[int, ...]],
    tokenizer: Any = None,
    kept: tuple[str, ...] = (),
    shards: Mapping[str, Shard] | None = None,
) -> Manifest:
    """Write all of a saved model but its tensors: configurations, tokenizer, and qft.json last.

    Args:
        model: whose configurations and buffers those are; its Parameters may have no values.
        folder: to write to.
        layers, tensors, tied, orders, shards: as in `Manifest`.
        tokenizer: a transformers tokenizer, or None.
        kept: names of the tokenizer's files where none is given: those that an earlier save left.
    """
    names = kept if tokenizer is None else _save_tokenizer(tokenizer, folder)
    _save_configs(model, folder, layers)
    made = Manifest(
        architecture=type(model).__name__,
        builds_itself=_is_transformers_own(model),
        layers=dict(layers),
        tensors=tensors,
        tied=tied,
        orders=orders,
        buffers=buffer_dtypes(model),
        files={name: digest(folder / name) for name in (CONFIG, GENERATION) if (folder / name).exists()},
        tokenizer=names,
        shards=dict(shards or {}),
    )
    (folder / manifests.NAME).write_bytes(made.to_json())
    return made


def stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save` writes of a model, in the order of its modules, and what is tied to it; values are not needed."""
    return _untie(dict(_tensors(model)))


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every path it has."""
    return model.named_modules(remove_duplicate=False)


def _tensors(model: nn.Module, instead: dict[Packed, Packed] | None = None) -> Iterator[tuple[str, Tensor]]:
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
            if buffer is not None and buffer.is_floating_point() and not isinstance(module, Packed):
                yield _join(path, name), buffer


def _untie(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor in memory once, and the other names of those that have several."""
    first: dict[Any, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        key = place if tensor.numel() and not tensor.is_meta else id(tensor)
        if first.setdefault(key, name) != name:
            tied[name] = first[key]
    return {name: tensor for name, tensor in tensors.items() if name not in tied}, tied


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from slowest to fastest in memory; nothing for a row-major tensor, or one with gaps."""
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda i: -strides[i]))
    return order if tensor.permute(order).is_contiguous() and not tensor.is_contiguous() else ()


def _rounded_twin(layer: Packed, path: str, first: dict[int, Packed]) -> Packed:
    """The layer with rounded scales, sharing everything else; `first` holds those over one weight, which stay so."""
    twin = copy.copy(layer)
    twin._parameters, twin._buffers = dict(layer._parameters), dict(layer._buffers)
    store(twin, rounded(layer, path), first)
    return twin


def _refuse_extra_state(model: nn.Module) -> None:
    for path, module in _modules(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"{path or 'the model'} keeps extra state in a {type(module).__name__}; qft.save stores tensors alone"
            )


def _save_tokenizer(tokenizer: Any, folder: Path) -> tuple[str, ...]:
    before = set(folder.rglob("*"))
    tokenizer.save_pretrained(folder)
    new = set(folder.rglob("*")) - before
    return tuple(sorted(path.relative_to(folder).as_posix() for path in new if path.is_file()))


def _saved_in(directory: Path) -> Manifest | None:
    """What an earlier save left; None where that save cannot be read."""
    try:
        return Manifest.read(directory)
    except FormatError:  # this save replaces it
        return None


def buffer_dtypes(model: nn.Module) -> dict[str, str]:
    """`Manifest.buffers` of a model."""
    return {name: DTYPE_NAMES[buffer.dtype] for name, buffer in _rebuilt_buffers(model)}


def _is_transformers_own(model: nn.Module) -> bool:
    return type(model).__module__.startswith("transformers.") and transformers_class(type(model).__name__) is type(
        model
    )


def _save_configs(model: nn.Module, folder: Path, layers: Mapping[str, Layer]) -> None:
    config: Any = getattr(model, "config", None)
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(config, "to_json_file"):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        if isinstance(dtype := getattr(model, "dtype", None), torch.dtype):
            config.dtype = dtype
        if layers:
            config.quantization_config = manifests.quantization_config(layers, buffer_dtypes(model))
        elif hasattr(config, "quantization_config"):  # of an earlier life
            del config.quantization_config
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
    for name in made.by_file():
        if not (directory / name).is_file():
            raise FormatError(f"{directory / name} is missing; copy the directory again, or save it anew")
    if model is None:
        model = _build(directory, made)
    replacements = without_values(directory, made.layers, model)
    slots = _slots(model, replacements)
    _check(directory, made, slots)
    _refuse_meta_buffers(model)
    tensors: dict[str, Tensor] = {}
    for file, held in made.by_file().items():
        tensors |= tensor_file.read(directory / file, held)
    for path, layer in replacements.items():
        name = _join(path, "weight_format")
        spelling = bytes(tensors[made.tied.get(name, name)].tolist()).decode(errors="replace")
        if spelling != str(layer.format):
            raise FormatError(
                f"{name} in {directory / made.file_of(name)} spells {spelling!r}, {manifests.NAME} "
                f"'{layer.format}'; save it anew"
            )
    for name, order in made.orders.items():
        inverse = sorted(range(len(order)), key=order.__getitem__)
        tensors[name] = tensors[name].permute(order).contiguous().permute(inverse)
    _fill(slots, tensors, made.tied)
    for path, layer in replacements.items():
        put_face(layer, made.layers[path].faces)
    cast_buffers(model, made.buffers)
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


def _build(directory: Path, made: Manifest) -> nn.Module:
    """The model's own skeleton: Parameters without values, buffers as its code makes them."""
    if not (made.builds_itself and CONFIG in made.files):
        raise FormatError(
            f"{directory} holds a {made.architecture}, which its files cannot build; call load(directory, model)"
        )
    config = read_config(directory)
    config.pop("quantization_config", None)  # of the layers as they were saved: the manifest says the same
    return empty_model(
        directory,
        made.architecture,
        config,
        generation=GENERATION in made.files,
        dtype=torch.get_default_dtype(),  # Parameters have the files' dtypes, buffers those that the manifest says
        way_out="save the model again",
    )


def _slots(model: nn.Module, replacements: Mapping[str, Packed]) -> dict[str, _Slot]:
    """The place of every Parameter and persistent buffer, by path."""
    slots = {}
    for path, module in _modules(model):
        holder = replacements.get(path, module)
        weight = next((p for p in module._parameters.values() if p is not None), None)
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
        exact = isinstance(slot.module, Packed) and slot.name in (*slot.module.stored, "weight_format")
        wanted = DTYPE_NAMES.get(now.dtype) if exact or not now.is_floating_point() else None
        fits = stored.dtype == wanted if wanted else stored.dtype in DTYPES and DTYPES[stored.dtype].is_floating_point
        if stored.shape != tuple(now.shape) or not fits:
            raise FormatError(
                f"{name} in {directory / made.file_of(name)} is {stored}, the model needs {wanted or 'floating'} "
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


def cast_buffers(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Give the buffers that the model's own code made the dtype they had when it was saved."""
    for name, buffer in list(_rebuilt_buffers(model)):
        path, _, leaf = name.rpartition(".")
        if name in dtypes and DTYPES[dtypes[name]] != buffer.dtype:
            model.get_submodule(path)._buffers[leaf] = buffer.to(DTYPES[dtypes[name]])


def _put(model: nn.Module, replacements: Mapping[str, Packed]) -> nn.Module:
    for path, layer in replacements.items():
        parent, _, name = path.rpartition(".")
        if not path:
            return layer
        setattr(model.get_submodule(parent), name, layer)
    return model


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
