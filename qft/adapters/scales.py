"""PEQA (Kim et al. 2023, section 3): only the scales train, so a task is a small file and the codes serve every task.

While they train, scales are held in fp32 whatever the format stores: under Adam fp16 scales overflow to NaN and bf16
scales do not move at usual learning rates. A layer remembers what it stored before in its attribute `stored_scale`;
`round_scales` goes back to it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..disk import tensor_file
from ..disk.files import replace_file
from ..disk.tensor_file import Stored
from ..format import Format, FormatError
from ..nn.linear import QuantLinear
from ..nn.packed import Packed, PackedWeight, packed_weights, weights_of
from ..notices import say_once
from ..stack import QuantStack
from ..tensor import QuantTensor

_METADATA = "qft_task"
_REMEMBERED = "stored_scale"


@dataclass(frozen=True)
class TaskLayer:
    """One weight's scales in a task file.

    Attributes:
        format: of the base the scales were trained on.
        codes: SHA-256 of that base's codes and zero points.
        stored: the scales: fp32 `[out, groups]`, `[experts, out, groups]` of experts.
    """

    format: Format
    codes: str
    stored: Stored


def train_only(model: nn.Module, what: str | Iterable[str]) -> nn.Module:
    """Let only the named parameters train, in place; everything else is frozen.

    Args:
        what: "scales" (of every quantized layer, embeddings and experts included; PEQA), "lora" (of every QuantLinear
            that has one), "bias" (every parameter of that name in the model; BitFit, Ben Zaken et al. 2022), or several
            of them.

    Codes and zero points keep their values; scales stored as f16, bf16 or dq are held in fp32 from here on.

    Returns:
        The model itself.

    Raises:
        ValueError: another word, or the model holds nothing of the kind; it is then left as it was.
    """
    words = (what,) if isinstance(what, str) else tuple(what)
    weights = packed_weights(model)
    linear = [weight.module for weight in weights.values() if isinstance(weight.module, QuantLinear)]
    kinds: dict[str, list[tuple[nn.Module, str]]] = {
        "scales": [(weight.module, f"{weight.name}_scales") for weight in weights.values()],
        "lora": [(layer, name) for layer in linear if layer.lora_rank for name in ("lora_A", "lora_B")],
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
        _hold_in_fp32(weight.module for weight in weights.values())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for word in words:
        for module, name in kinds[word]:
            module._parameters[name].requires_grad_(True)  # type: ignore[union-attr]
    return model


def scales_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight's scales, decoded to fp32 `[out, groups]` (`[experts, out, groups]`), by path.

    The path is the layer's, or that of an experts' projection.

    Raises:
        ValueError: the model holds no quantized layer.
    """
    return {path: weight.value.scales.detach().clone() for path, weight in packed_weights(model).items()}


def load_scales(model: nn.Module, state: Mapping[str, Tensor] | str | Path) -> None:
    """Swap a model to another task: its scales become `state`, bit for bit.

    A layer whose stored type is not fp32 turns to fp32 scales unless it holds these values already.

    Args:
        state: what `scales_state` returned for this base, or a file of `save_scales`.

    Raises:
        FormatError: the file is damaged or belongs to another base, a layer is missing or unknown, a shape differs, or
            a scale is not finite; the layer is named, and the model is left as it was.
        ValueError: the model holds no quantized layer.
        OSError: the file cannot be opened.
    """
    weights = packed_weights(model)
    if isinstance(state, Mapping):
        source = "the state"
    else:
        source, state = str(state), _read_task(Path(state), weights)
    _check(source, state, weights)
    changed = {path: weight for path, weight in weights.items() if not _same_bits(weight.value.scales, state[path])}
    _hold_in_fp32(weight.module for weight in changed.values())
    with torch.no_grad():
        for path, weight in changed.items():
            weight.scales.copy_(state[path])


def save_scales(model: nn.Module, path: str | Path) -> None:
    """Write a task: the scales alone, as fp32, with what it takes to refuse them on another base.

    Raises:
        ValueError: the model holds no quantized layer. OSError: the file cannot be written; an older one then stays.
    """
    scales = scales_state(model)
    entries = {
        path: {
            "format": str(replace(weight.module.format, scale=remembered_scale(weight.module))),
            "codes": _codes_digest(weight),
            "shape": list(scales[path].shape),
            "sha256": Stored.of(scales[path]).sha256,
        }
        for path, weight in packed_weights(model).items()
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
        ValueError: the model holds no quantized layer.
    """
    weights = packed_weights(model)
    modules = {module: path for path, module in model.named_modules() if isinstance(module, Packed)}
    stored = {module: rounded(module, path) for module, path in modules.items()}
    errors = {
        path: rounding_error(weight.value, stored[weight.module][weight.name]) for path, weight in weights.items()
    }
    first: dict[int, Packed] = {}
    for module, values in stored.items():
        if next(iter(values.values())).format != module.format:
            store(module, values, first)
    for weight in weights.values():
        weight.scales.requires_grad_(False)
    return errors


def rounded(module: Packed, path: str) -> dict[str, QuantTensor | QuantStack]:
    """A module's weights with scales of the type it had before they trained; as they are if it has that type.

    Raises:
        FormatError: a scale does not fit that type, or is not finite.
    """
    scale, made = remembered_scale(module), {}
    for weight in weights_of(path, module):
        q = weight.value
        if q.format.scale != scale and not q.scales.isfinite().all():
            raise FormatError(
                f"{weight.path} holds scales that are not finite, so {scale} cannot store them; load an earlier task"
            )
        try:
            made[weight.name] = q if q.format.scale == scale else q.with_scales(q.scales, scale)
        except FormatError as error:
            raise FormatError(f"{weight.path}: {error}") from None
    return made


def rounding_error(before: QuantTensor | QuantStack, after: QuantTensor | QuantStack) -> float:
    """||after - before|| / ||before|| of the scales; 0 for scales of zeros."""
    norm = before.scales.norm().item()
    return (after.scales - before.scales).norm().item() / norm if norm else 0.0


def remembered_scale(layer: Packed) -> str:
    """The scale type the layer's format had before its scales were held in fp32."""
    return getattr(layer, _REMEMBERED, layer.format.scale)


def remember_scale(layer: Packed, scale: str) -> None:
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


def _hold_in_fp32(modules: Iterable[Packed]) -> None:
    """Decode scales that are not fp32, and say what that costs."""
    first: dict[int, Packed] = {}
    kinds, before, after, count = set(), 0, 0, 0
    for module in dict.fromkeys(modules):
        if module.format.scale == "f32":
            continue
        kept = module.format.scale
        narrow = {name: module.packed(name) for name in module.code_names}
        wide = {name: q.with_scales(q.scales) for name, q in narrow.items()}
        store(module, wide, first)
        remember_scale(module, kept)
        kinds.add(kept)
        before, after = before + _nbytes(narrow), after + _nbytes(wide)
        count += sum(math.prod(q.shape) for q in narrow.values())
    if kinds:
        say_once(
            f"scales stored as {', '.join(sorted(kinds))} are held in fp32 to train or swap them: "
            f"{8 * before / count:.3f} -> {8 * after / count:.3f} bits per weight; "
            "qft.round_scales stores them as before"
        )


def _nbytes(weights: Mapping[str, QuantTensor | QuantStack]) -> int:
    return sum(q.nbytes for q in weights.values())


def store(module: Packed, weights: dict[str, QuantTensor | QuantStack], first: dict[int, Packed]) -> None:
    """Give a module other stored weights; modules over one weight stay over one. `first` holds those served already."""
    key = id(module._parameters[f"{module.code_names[0]}_scales"])
    module.set_packed(weights)
    for name in module.stored if key in first else ():
        module.register_parameter(name, first[key]._parameters[name])
    first.setdefault(key, module)


def _read_task(path: Path, weights: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    entries = read_task(path)
    _refuse_other_layers(str(path), entries, weights)
    for name, entry in entries.items():
        mine = weights[name].module.format
        if entry.format != replace(mine, scale=entry.format.scale):
            raise FormatError(
                f"{path} was trained on another base: {name} has {entry.format} there and {mine} here; load that base"
            )
        if entry.codes != _codes_digest(weights[name]):
            raise FormatError(
                f"{path} was trained on another base: the codes of {name} differ; load the base it was trained on"
            )
    return tensor_file.read(path, {name: entry.stored for name, entry in entries.items()})


def _check(source: str, state: Mapping[str, Tensor], weights: Mapping[str, PackedWeight]) -> None:
    _refuse_other_layers(source, state, weights)
    for name, weight in weights.items():
        *lead, in_features = weight.value.shape
        expected = (*lead, weight.module.format.groups(in_features))
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
            f"{source} holds scales for {unknown[0]}, which is no quantized layer of this model; load its base"
        )


def _codes_digest(weight: PackedWeight) -> str:
    """SHA-256 of what the scales were trained on: shape, codes, and zero points whatever their type."""
    q = weight.value
    parts = [repr(q.shape), Stored.of(q.codes).sha256, *([] if q.zeros is None else [Stored.of(q.zeros).sha256])]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as fp32 bits: 0 and -0 differ."""
    return torch.equal(a.detach().view(torch.int32), b.detach().float().to(a.device).contiguous().view(torch.int32))
