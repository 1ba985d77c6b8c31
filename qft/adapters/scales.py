"""PEQA (Kim et al. 2023, section 3): only the scales train, so a task is a small file and the codes serve every task.

While they train, scales are held in fp32 whatever the format stores: under Adam fp16 scales overflow to NaN and bf16
scales do not move at usual learning rates. A layer remembers what it stored before in its attribute `stored_scale`;
`round_scales` goes back to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__, double_quant, tensor_file
from ..files import replace_file
from ..format import ZERO_DTYPE, Format, FormatError
from ..nn import QuantLinear
from ..notices import say_once
from ..reference import TORCH_DTYPE
from ..tensor import STORED, QuantTensor
from ..tensor_file import Stored

_METADATA = "qft_task"
_REMEMBERED = "stored_scale"


@dataclass(frozen=True)
class TaskLayer:
    """One layer's scales in a task file.

    Attributes:
        format: of the base the scales were trained on.
        codes: SHA-256 of that base's codes and zero points.
        stored: the scales: fp32 `[out, groups]`.
    """

    format: Format
    codes: str
    stored: Stored


def train_only(model: nn.Module, what: str | Iterable[str]) -> nn.Module:
    """Let only the named parameters train, in place; everything else is frozen.

    Args:
        what: "scales" (of every QuantLinear; PEQA), "lora" (of every QuantLinear that has one), "bias" (every parameter
            of that name in the model; BitFit, Ben Zaken et al. 2022), or several of them.

    Codes and zero points keep their values; scales stored as f16, bf16 or dq are held in fp32 from here on.

    Returns:
        The model itself.

    Raises:
        ValueError: another word, or the model holds nothing of the kind; it is then left as it was.
    """
    words = (what,) if isinstance(what, str) else tuple(what)
    layers = quant_layers(model)
    kinds: dict[str, list[tuple[nn.Module, str]]] = {
        "scales": [(layer, "weight_scales") for layer in layers.values()],
        "lora": [(layer, name) for layer in layers.values() if layer.lora_rank for name in ("lora_A", "lora_B")],
        "bias": [(module, "bias") for module in model.modules() if module._parameters.get("bias") is not None],
    }
    for word in words:
        if word not in kinds:
            raise ValueError(f"train_only does not know {word!r}; name one or several of {', '.join(kinds)}")
        if not kinds[word]:
            way_out = {"lora": "call add_lora(rank) or quantize with rank=16", "bias": "train scales or lora"}[word]
            raise ValueError(f"{type(model).__name__} holds no {word} to train; {way_out}")
    if not words:
        raise ValueError(f"train_only was given nothing to train; name one or several of {', '.join(kinds)}")
    if "scales" in words:
        _hold_in_fp32(list(layers.values()))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for word in words:
        for module, name in kinds[word]:
            module._parameters[name].requires_grad_(True)  # type: ignore[union-attr]
    return model


def scales_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every QuantLinear's scales, decoded to fp32 `[out, groups]`, by module path.

    Raises:
        ValueError: the model holds no QuantLinear.
    """
    return {path: layer.quant_tensor.scales.detach().clone() for path, layer in quant_layers(model).items()}


def load_scales(model: nn.Module, state: Mapping[str, Tensor] | str | Path) -> None:
    """Swap a model to another task: its scales become `state`, bit for bit.

    A layer whose stored type is not fp32 turns to fp32 scales unless it holds these values already.

    Args:
        state: what `scales_state` returned for this base, or a file of `save_scales`.

    Raises:
        FormatError: the file is damaged or belongs to another base, a layer is missing or unknown, a shape differs, or
            a scale is not finite; the layer is named, and the model is left as it was.
        ValueError: the model holds no QuantLinear.
        OSError: the file cannot be opened.
    """
    layers = quant_layers(model)
    if isinstance(state, Mapping):
        source = "the state"
    else:
        source, state = str(state), _read_task(Path(state), layers)
    _check(source, state, layers)
    changed = {path: layer for path, layer in layers.items() if not _same_bits(layer.quant_tensor.scales, state[path])}
    _hold_in_fp32(list(changed.values()))
    with torch.no_grad():
        for path, layer in changed.items():
            layer._parameters["weight_scales"].copy_(state[path])  # type: ignore[union-attr]


def save_scales(model: nn.Module, path: str | Path) -> None:
    """Write a task: the scales alone, as fp32, with what it takes to refuse them on another base.

    Raises:
        ValueError: the model holds no QuantLinear. OSError: the file cannot be written; an older one is then intact.
    """
    layers, scales = quant_layers(model), scales_state(model)
    entries = {
        name: {
            "format": str(replace(layer.format, scale=remembered_scale(layer))),
            "codes": _codes_digest(layer),
            "shape": list(scales[name].shape),
            "sha256": Stored.of(scales[name]).sha256,
        }
        for name, layer in layers.items()
    }
    metadata = {_METADATA: json.dumps({"qft": __version__, "layers": entries})}
    with replace_file(Path(path)) as temporary:
        tensor_file.write(temporary, scales, metadata)


def read_task(path: str | Path) -> dict[str, TaskLayer]:
    """What a task file says it holds, by module path, without reading the scales.

    Raises:
        FormatError: it is no task file, or damaged. OSError: it cannot be opened.
    """
    text = tensor_file.read_metadata(Path(path)).get(_METADATA)
    if text is None:
        raise FormatError(f"{path} is no task file; give one written by qft.save_scales")
    try:
        entries = json.loads(text)["layers"]
        return {
            name: TaskLayer(
                Format.parse(entry["format"]),
                str(entry["codes"]),
                Stored("F32", tuple(map(int, entry["shape"])), str(entry["sha256"])),
            )
            for name, entry in entries.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise FormatError(
            f"{path} is damaged: its description of the layers cannot be read; copy the file again"
        ) from None


def round_scales(model: nn.Module) -> dict[str, float]:
    """Store scales again as each layer's format did before they trained; they no longer train then.

    Returns:
        By module path, ||rounded - fp32|| / ||fp32|| of the scales; 0 where the layer always stored fp32.

    Raises:
        FormatError: a scale does not fit the stored type, or is not finite; the layer is named, and nothing is rounded.
        ValueError: the model holds no QuantLinear.
    """
    layers = quant_layers(model)
    stored = {path: rounded(layer, path) for path, layer in layers.items()}
    errors = {path: rounding_error(layer.quant_tensor, stored[path]) for path, layer in layers.items()}
    first: dict[int, QuantLinear] = {}
    for path, q in stored.items():
        if q.format != layers[path].format:
            _store(layers[path], q, first)
        layers[path].weight_scales.requires_grad_(False)
    return errors


def rounded(layer: QuantLinear, path: str) -> QuantTensor:
    """A layer's stored tensors with scales of the type it had before they trained; as they are if it has that type.

    Raises:
        FormatError: a scale does not fit that type, or is not finite.
    """
    q, scale = layer.quant_tensor, remembered_scale(layer)
    if q.format.scale == scale:
        return q
    if not q.scales.isfinite().all():
        raise FormatError(
            f"{path} holds scales that are not finite, so {scale} cannot store them; load an earlier task"
        )
    if scale == "dq":
        zeros = None if q.weight_zeros is None else q.weight_zeros.detach().to(TORCH_DTYPE[ZERO_DTYPE[scale]])
        codes, absmax, offset = double_quant.encode(q.scales.detach())
        return QuantTensor(replace(q.format, scale=scale), q.shape, q.weight, codes, zeros, absmax, offset)
    try:
        return q.with_scales(q.scales, scale)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def rounding_error(before: QuantTensor, after: QuantTensor) -> float:
    """||after - before|| / ||before|| of the scales; 0 for scales of zeros."""
    norm = before.scales.norm().item()
    return (after.scales - before.scales).norm().item() / norm if norm else 0.0


def remembered_scale(layer: QuantLinear) -> str:
    """The scale type the layer's format had before its scales were held in fp32."""
    return getattr(layer, _REMEMBERED, layer.format.scale)


def remember_scale(layer: QuantLinear, scale: str) -> None:
    """Make `round_scales` go back to this scale type: f32, f16, bf16 or dq."""
    setattr(layer, _REMEMBERED, replace(layer.format, scale=scale).scale)


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The QuantLinear layers of a model by path, each once.

    Raises:
        ValueError: there are none.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no QuantLinear; call qft.quantize_model first")
    return layers


def _hold_in_fp32(layers: Iterable[QuantLinear]) -> None:
    """Decode scales that are not fp32, and say what that costs."""
    first: dict[int, QuantLinear] = {}
    kinds, before, after, weights = set(), 0, 0, 0
    for layer in layers:
        q = layer.quant_tensor
        if q.format.scale == "f32":
            continue
        wide = q.with_scales(q.scales)
        _store(layer, wide, first)
        remember_scale(layer, q.format.scale)
        kinds.add(q.format.scale)
        before, after, weights = before + q.nbytes, after + wide.nbytes, weights + q.shape[0] * q.shape[1]
    if kinds:
        say_once(
            f"scales stored as {', '.join(sorted(kinds))} are held in fp32 to train or swap them: "
            f"{8 * before / weights:.3f} -> {8 * after / weights:.3f} bits per weight; "
            "qft.round_scales stores them as before"
        )


def _store(layer: QuantLinear, q: QuantTensor, first: dict[int, QuantLinear]) -> None:
    """Give a layer other stored tensors; layers over one weight stay over one. `first` holds those served already."""
    key = id(layer._parameters["weight_scales"])
    layer.set_quantized(q)
    for name in STORED if key in first else ():
        layer.register_parameter(name, first[key]._parameters[name])
    first.setdefault(key, layer)


def _read_task(path: Path, layers: Mapping[str, QuantLinear]) -> dict[str, Tensor]:
    entries = read_task(path)
    _refuse_other_layers(str(path), entries, layers)
    for name, entry in entries.items():
        mine = layers[name].format
        if entry.format != replace(mine, scale=entry.format.scale):
            raise FormatError(
                f"{path} was trained on another base: {name} has {entry.format} there and {mine} here; load that base"
            )
        if entry.codes != _codes_digest(layers[name]):
            raise FormatError(
                f"{path} was trained on another base: the codes of {name} differ; load the base it was trained on"
            )
    return tensor_file.read(path, {name: entry.stored for name, entry in entries.items()})


def _check(source: str, state: Mapping[str, Tensor], layers: Mapping[str, QuantLinear]) -> None:
    _refuse_other_layers(source, state, layers)
    for name, layer in layers.items():
        expected = (layer.out_features, layer.format.groups(layer.in_features))
        if tuple(state[name].shape) != expected:
            raise FormatError(
                f"{source} holds scales {tuple(state[name].shape)} for {name}, which needs {expected}; load its base"
            )
        if not state[name].is_floating_point() or not state[name].isfinite().all():
            raise FormatError(f"{source} holds scales of {name} that are not finite numbers; save the task again")


def _refuse_other_layers(source: str, theirs: Iterable[str], layers: Iterable[str]) -> None:
    held, wanted = set(theirs), set(layers)
    if missing := sorted(wanted - held):
        raise FormatError(f"{source} holds no scales for {missing[0]}; load a task of this model")
    if unknown := sorted(held - wanted):
        raise FormatError(
            f"{source} holds scales for {unknown[0]}, which is no QuantLinear of this model; load its base"
        )


def _codes_digest(layer: QuantLinear) -> str:
    """SHA-256 of what the scales were trained on: shape, codes, and zero points whatever their type."""
    q = layer.quant_tensor
    parts = [repr(q.shape), Stored.of(q.codes).sha256, *([] if q.zeros is None else [Stored.of(q.zeros).sha256])]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as fp32 bits: 0 and -0 differ."""
    return torch.equal(a.detach().view(torch.int32), b.detach().float().to(a.device).contiguous().view(torch.int32))
