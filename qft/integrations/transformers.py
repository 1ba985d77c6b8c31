"""What transformers is told of packed layers: `from_pretrained`, `save_pretrained`, `dequantize`, Trainer, device maps.

`import qft` has this module imported once transformers' quantizers are, in either order of imports, and loads neither.

A model is quantized while it is read: transformers hands over one dense tensor at a time, and `Quantize` puts the
packed layer in the place of the dense one, as `qft.quantize_model` does. What a checkpoint does not hold under the
layer's own name, such as a head tied to the embedding, is quantized when all has been read.

A saved model says in config.json what each packed layer is (`layers`, the entries of qft.json), so that nothing is
matched or chosen again when it is opened.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..disk import io
from ..disk.described import describe, put_face, without_values
from ..disk.manifest import METHOD, Layer, layers_from_json, quantization_config
from ..format import Format, FormatError
from ..model.surgery import choose_targets, quantize_model, replace_target
from ..model.targets import Target, find_targets, matches
from ..nn.embedding import QuantEmbedding
from ..nn.experts import QuantExperts
from ..nn.linear import QuantLinear
from ..nn.packed import Packed, stored_names
from .peft_weight import effective_weight
from .transformers_config import QftConfig


class Quantize(ConversionOps):  # type: ignore[misc]
    """Packs the tensors of one entry of a checkpoint as transformers hands them over."""

    def __init__(self, quantizer: QftQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`{name: dense}` to `{name: codes}`; scales are in the layer by then."""
        dense = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        return {name: self.quantizer.pack(name, value) for name, value in dense.items()}


class QftQuantizer(HfQuantizer):  # type: ignore[misc]
    """One model's `hf_quantizer`."""

    requires_calibration = False
    quantization_config: QftConfig

    def __init__(self, quantization_config: QftConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # the caller's may serve another model
        self.targets: dict[str, Target] = {}  # layers yet to be quantized, by the names of their weights
        self.skip: list[str] = []
        self.stored: dict[str, torch.Size] = {}  # what is read as the file has it, by name
        self.read: set[str] = set()  # names of what the checkpoint held
        self.merged = False  # whether it held experts one by one

    # -------------------------------------------------------------------------------------------------- reading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot be done before anything is read."""
        config = self.quantization_config
        if not self.pre_quantized and config.format is None and not config.formats:
            raise ValueError('QftConfig names no format; write one, as in QftConfig("nf4 g64 dq"), or formats={...}')
        if self.pre_quantized and not config.layers:
            raise FormatError("config.json names no quantized layer of this model; save it anew with save_pretrained")
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "the device map leaves layers on disk, from where packed layers cannot be run; give more max_memory, "
                "or take a format of fewer bits"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """As bitsandbytes' users are used to: where none is given, the GPU if there is one."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            self.stored = _put_saved(model, layers_from_json(self.quantization_config.layers, "config.json"))
            _tie_companions(model)
            return model
        config = self.quantization_config
        self.skip = _names_to_skip(model, config.modules_to_not_convert)
        fmt, skip, formats = self._formats()
        chosen = choose_targets(model, fmt, config.init, config.rank, config.iters, None, skip, formats, values=False)
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        names = _names_by_module(model)
        for target in chosen:
            weights = [f"{path}.{name}" for path in names[target.module] for name in target.weights]
            if tied.isdisjoint(weights):
                self.targets |= dict.fromkeys(weights, target)
        return model

    def _formats(self) -> tuple[Format | None, tuple[str, ...], dict[str, Format]]:
        """The arguments of `find_targets` after the model."""
        config = self.quantization_config
        fmt = None if config.format is None else Format.parse(config.format)
        return fmt, tuple(self.skip), {pattern: Format.parse(spelled) for pattern, spelled in config.formats.items()}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether the checkpoint's tensor of that name is to be packed, or is; transformers then looks at no shape."""
        return param_name in self.targets or param_name in self.stored

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def pack(self, name: str, dense: Tensor) -> Tensor:
        """Put the packed layer in the model. Returns its codes, or `dense` where that is not packed, or not yet."""
        target, leaf = self.targets.get(name), name.rpartition(".")[2]
        if target is None:
            return dense
        if isinstance(_now(target), Packed):  # under another name of the same module
            return _now(target)._parameters[leaf]  # type: ignore[return-value]
        target.module._parameters[leaf] = nn.Parameter(dense, requires_grad=False)
        if any(target.module._parameters[other].is_meta for other in target.weights):
            return dense  # experts have two weights, and are packed when both are there
        try:
            replace_target(target, **self.quantization_config.start())
        except ValueError:  # transformers would bury the sentence in a table: said when all has been read
            return dense
        layer: Any = _now(target)
        for parameter in layer.parameters():
            parameter._is_hf_initialized = not parameter.is_meta
        target.module._parameters.update(dict.fromkeys(target.weights))  # the dense weight goes, the target stays
        return layer._parameters[leaf]  # type: ignore[no-any-return]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Stored scales and adapters keep the file's dtype, whatever dtype the rest of the model is asked for in."""
        name = converter.target_patterns[0]
        self.read.add(name)
        self.merged = self.merged or isinstance(converter, WeightConverter)
        return None if name in self.stored else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            self._refuse_unread(model)
            io.cast_buffers(model, self.quantization_config.buffers)
        elif any(not reason for _, reason in find_targets(model, *self._formats())):
            fmt, skip, formats = self._formats()
            hooks = _hooks(model)
            quantize_model(model, fmt, **self.quantization_config.start(), skip=skip, formats=formats)
            _hook_again(model, hooks)
        self.targets, self.stored, self.read = {}, {}, set()
        for module in model.modules():
            if isinstance(module, Packed):  # transformers lets everything train that it reads as a floating tensor
                for name in module.stored:
                    if (parameter := module._parameters[name]) is not None:
                        parameter.requires_grad_(False)
        self._describe(model)
        return model

    def _refuse_unread(self, model: nn.Module) -> None:
        """Raise FormatError for a packed layer whose tensors are not those that config.json promises.

        What was read is known by name: accelerate may have moved the tensors since, and taken offloaded ones away.
        """
        tied = cast(Any, model).all_tied_weights_keys
        for module, paths in _names_by_module(model).items():
            if not isinstance(module, Packed):
                continue
            for name, tensor in module.state_dict().items():
                names = [f"{path}.{name}" for path in paths]
                merged = self.merged and isinstance(module, QuantExperts) and name in module.code_names
                if not merged and not any(full in self.read or full in tied for full in names):
                    raise FormatError(f"the checkpoint holds no {names[0]}, which config.json promises; save it anew")
                if tensor.shape != (shape := self.stored.get(names[0], tensor.shape)):
                    raise FormatError(
                        f"{names[0]} is {list(tensor.shape)}, config.json promises {list(shape)}; save it anew"
                    )
            spelled = b"" if module.weight_format.is_meta else bytes(module.weight_format.tolist())
            if spelled and spelled.decode(errors="replace") != str(module.format):
                raise FormatError(
                    f"{paths[0]}.weight_format spells {spelled.decode(errors='replace')!r}, "
                    f"config.json '{module.format}'; save the model anew"
                )

    # -------------------------------------------------------------------------------------------------- afterwards

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes per weight in the format that most layers have; `param_element_size` knows each layer's."""
        fmt = self.quantization_config.format
        return None if self.pre_quantized or fmt is None else Format.parse(fmt).bits_per_weight / 8

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element of a parameter as it will be stored."""
        target = self.targets.get(param_name)
        return param.element_size() if target is None else target.fmt.bits_per_weight / 8

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called by `save_pretrained` before it writes config.json: layers may have changed since they were read.

        Raises:
            ValueError: adapters of PEFT's are on the layers, and it is not the adapter alone that is written.
        """
        if not getattr(model, "_hf_peft_config_loaded", False):
            _refuse_adapters(model)
            self._describe(model)
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """The dense model that computes the same, the layers' own LoRA in their weights; `model.dequantize()`.

        Raises:
            ValueError: adapters of PEFT's are attached.
        """
        _refuse_adapters(model)
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            skeleton = type(model)(model.config)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # save_pretrained leaves config.dtype a name
        made: dict[nn.Module, nn.Module] = {}
        hooks = _hooks(model)
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, Packed):
                if module not in made:
                    made[module] = _dense(module, skeleton.get_submodule(path), dtype or torch.float32)
                model.set_submodule(path, made[module])
        model.tie_weights()
        _hook_again(model, hooks)
        return model

    def _describe(self, model: Any) -> None:
        now = quantization_config(describe(model), io.buffer_dtypes(model))
        self.quantization_config.layers, self.quantization_config.buffers = now["layers"], now["buffers"]
        model.config.quantization_config = self.quantization_config

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer may train the model without an adapter: its scales, or the LoRA of its layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _now(target: Target) -> nn.Module:
    """What is at a target's place."""
    parent, name = target.places[0]
    return parent._modules[name]  # type: ignore[return-value]


def _refuse_adapters(model: nn.Module) -> None:
    """Raise ValueError where PEFT has put its layers around packed ones."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("PEFT's adapters are attached to the packed layers; call merge_and_unload() or unload() first")


def _hooks(model: nn.Module) -> dict[str, Any]:
    """What accelerate has hung on modules to bring inputs and weights to one device, by path."""
    return {path: module._hf_hook for path, module in model.named_modules() if hasattr(module, "_hf_hook")}


def _hook_again(model: nn.Module, hooks: Mapping[str, Any]) -> None:
    """Hang accelerate's hooks on the modules that have taken others' places."""
    from accelerate.hooks import add_hook_to_module

    for path, hook in hooks.items():
        if not hasattr(module := model.get_submodule(path), "_hf_hook"):
            add_hook_to_module(module, hook)


def _names_by_module(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every path of every module."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(path)
    return names


def _names_to_skip(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The layers that a pattern names, in qft's way or in transformers'; the pattern itself where none."""
    paths = [target.path for target, _ in find_targets(model, None, (), {}, values=False)]
    names = []
    for pattern in patterns:
        named = [path for path in paths if matches(path, pattern) or _starts_or_ends(path, pattern)]
        names += named or [pattern]
    return names


def _starts_or_ends(path: str, pattern: str) -> bool:
    """Whether transformers takes a pattern to name a module."""
    try:
        return not should_convert_module(path, [pattern])
    except re.error:  # a glob, which is no regular expression
        return False


def _put_saved(model: Any, layers: Mapping[str, Layer]) -> dict[str, torch.Size]:
    """Put packed layers without values where config.json says there are some; returns their tensors' shapes by name.

    The model may be the base of the one that was saved, or a larger one around the same base.
    """
    prefix, here = f"{model.base_model_prefix}.", {path for path, _ in model.named_modules()}
    found: dict[str, Layer] = {}
    for path, layer in layers.items():
        candidates = (path, path.removeprefix(prefix), prefix + path)
        if place := next((candidate for candidate in candidates if candidate in here), None):
            found[place] = layer  # else of a part that this class does not have, such as the output head
    made = without_values("config.json", found, model, way_out="save the model anew")
    once: dict[nn.Module, Any] = {}
    shapes: dict[str, torch.Size] = {}
    for path, new in made.items():
        layer = once.setdefault(model.get_submodule(path), new)
        if not isinstance(layer, QuantEmbedding):  # which returns the dtype asked for
            put_face(layer, found[path].faces)
        layer._is_hf_initialized = True  # or transformers would draw what the checkpoint lacks
        model.set_submodule(path, layer)
        own = {name: tensor.shape for name, tensor in layer.state_dict().items() if not name.endswith("bias")}
        shapes |= {f"{path}.{name}": shape for name, shape in own.items()}
    return shapes


def _tie_companions(model: Any) -> None:
    """Tie scales and zero points wherever transformers ties codes: a head to its embedding."""
    for target, source in list(model.all_tied_weights_keys.items()):
        (to, name), (of, _) = target.rsplit(".", 1), source.rsplit(".", 1)
        layer = model.get_submodule(to)
        if isinstance(layer, Packed) and isinstance(model.get_submodule(of), Packed):
            companions = [stored for stored in stored_names(name)[1:] if layer._parameters[stored] is not None]
            model.all_tied_weights_keys |= {f"{to}.{stored}": f"{of}.{stored}" for stored in companions}


@torch.no_grad()
def _dense(layer: Packed, like: Any, dtype: torch.dtype) -> nn.Module:
    """What a packed layer stands in for; `like` is that in a model without values, and is given them."""
    if isinstance(layer, QuantExperts):
        return layer.to_dense(dtype)
    weight: Tensor
    if isinstance(layer, QuantEmbedding):
        weight = layer.dequantize(dtype)
    else:
        linear = cast(QuantLinear, layer)
        weight = effective_weight(linear).to(dtype)
        like.bias = None if linear.bias is None else nn.Parameter(linear.bias.to(dtype))
    is_conv1d = not isinstance(like, (nn.Linear, nn.Embedding))  # GPT-2's, which holds the transpose
    like.weight = nn.Parameter(weight.T.contiguous() if is_conv1d else weight)
    return like.to(layer.device).train(layer.training)  # type: ignore[no-any-return]


def install() -> None:
    """Register with the transformers that is imported. Calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(QftConfig)
        register_quantizer(METHOD)(QftQuantizer)


install()
