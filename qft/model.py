"""Whole models: which layers are quantized, what replaces them, what was left dense and why."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import init as starts
from .format import Format
from .nn import FloatFacingQuantLinear, QuantLinear
from .notices import say_once
from .tensor import QuantTensor, quantize

ANY_FORMAT = Format("nf4", 64)  # stands for the format of a layer that stays dense
StepCallback = Callable[[str, int, float], None]
Start = Callable[..., tuple[QuantTensor, Tensor, Tensor]]


@dataclass(frozen=True)
class LayerReport:
    """One layer of a model: quantized, or dense with the reason."""

    path: str
    format: Format | None
    shape: tuple[int, int]  # (out_features, in_features)
    nbytes: int  # of the stored weight, scales and padding included; adapters and bias not
    dense_nbytes: int  # of the weight as it was, or in bf16 where that is not known
    rank: int = 0
    errors: tuple[float, ...] = ()  # relative Frobenius error after each step of the start; the least is what is kept
    reason: str = ""  # why a layer was left dense

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Report:
    """What of a model is quantized. `layers` holds its linear layers; the bytes count every parameter once."""

    layers: tuple[LayerReport, ...]
    nbytes: int  # of all parameters and buffers as stored
    other_nbytes: int = field(
        default=0
    )  # of them, what belongs to no linear layer's weight: embeddings, norms, adapters

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The quantized layers."""
        return tuple(layer for layer in self.layers if layer.format is not None)

    @property
    def dense(self) -> tuple[LayerReport, ...]:
        """The linear layers left dense."""
        return tuple(layer for layer in self.layers if layer.format is None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, over all quantized layers; 0 without any."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.quantized)
        return 8 * sum(layer.nbytes for layer in self.quantized) / weights if weights else 0.0

    def __str__(self) -> str:
        lines = [
            f"{layer.path}: {layer.format or 'dense, ' + layer.reason}, {layer.shape[0]}x{layer.shape[1]}, "
            f"{layer.nbytes} bytes" + (f", error {min(layer.errors):.4f}" if layer.errors else "")
            for layer in self.layers
        ]
        quantized = f"{len(self.quantized)} layers quantized at {self.bits_per_weight:.3f} bits per weight"
        return "\n".join([*lines, f"{quantized}, {len(self.dense)} left dense; {self.nbytes} bytes in all"])


@dataclass(frozen=True)
class _Target:
    path: str
    module: Any  # nn.Linear or Conv1D
    fmt: Format
    places: tuple[tuple[nn.Module, str], ...]  # (parent, attribute): a module shared by several parents has several

    @property
    def weight(self) -> Tensor:
        """`[out, in]`."""
        return weight_of(self.module)


def quantize_model(
    model: nn.Module,
    fmt: Format | str | None,
    init: str | Start = "plain",
    rank: int = 0,
    alpha: float | None = None,
    *,
    iters: int | None = None,
    calibration: Mapping[str, Tensor] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    skip: Iterable[str] = (),
    formats: Mapping[str, Format | str] | None = None,
    progress: bool = False,
    on_step: StepCallback | None = None,
) -> nn.Module:
    """Replace the linear layers of a model by QuantLinear, in place, one at a time.

    nn.Linear and transformers' Conv1D are replaced. Left dense, with the reason in `report(model)`: the output head of
    a language model and the heads of tasks, such as a classifier's (unless `formats` names them), weights shared with
    an embedding, subclasses of nn.Linear, and layers whose parent reads `layer.weight` itself.

    Args:
        fmt: format of every layer that `formats` does not name; None leaves them dense.
        init: where codes and adapters start: a name of `qft.init.NEEDS`, such as "plain" (QLoRA: quantize, B = 0), or a
            function called as init(weight, fmt, rank, alpha=alpha), with second_moment=S where there is a calibration,
            that returns what those do.
        rank: of the attached LoRA; 0 attaches none. A layer with fewer features than that takes what it can hold.
        alpha, dropout, rslora: as in `QuantLinear.add_lora`.
        iters: turns of a start that has some ("loftq", "cloq", "lqlora"); None is its own default.
        calibration: E[x xᵀ] of each layer's inputs by path, as `qft.calibrate` measures it, for starts that use it.
        skip: layers to leave dense, each a path, a last name ("lm_head") or a glob over paths ("*.mlp.*").
        formats: formats by such a pattern; the first that matches wins.
        progress: draw a progress bar with the time left on stderr.
        on_step: called as on_step(path, step, relative error) after each step of a layer's start.

    Returns:
        The model itself.

    Raises:
        FormatError: a spelling is no format.
        ValueError: nothing is left to quantize, a pattern names no layer, a weight is not finite, or the start needs a
            calibration and there is none, or none of a layer; then no layer is replaced.
    """
    if not callable(init) and init not in starts.NEEDS:
        raise ValueError(f"init={init!r} is unknown; use one of {', '.join(starts.NEEDS)}, or a function like them")
    if not callable(init) and starts.NEEDS[init] != "none" and calibration is None:
        measure = "calibration=qft.calibrate(model, rows, collate)"
        raise ValueError(f"init={init!r} needs the layers' activations; pass {measure}")
    if iters is not None and (callable(init) or "iters" not in _options_of(init)):
        raise ValueError(
            f"init={init!r} has no turns, and iters={iters} was given; leave it out, or take loftq or cloq"
        )
    found = _find_targets(
        model,
        None if fmt is None else Format.parse(fmt),
        tuple(skip),
        {k: Format.parse(v) for k, v in (formats or {}).items()},
    )
    for target, reason in found:
        target.module.qft_reason = reason
    targets = [target for target, reason in found if not reason]
    if rank < 0:
        raise ValueError(f"rank={rank} is negative; 0 attaches no adapter")
    if not targets:
        raise ValueError(
            f"{type(model).__name__} holds no linear layer to quantize; see qft.report(model) for the reasons"
        )
    for target in targets:  # before the first layer is replaced, so that a refusal leaves the model as it was
        if not target.weight.isfinite().all():
            quantize(target.weight, target.fmt, name=f"{target.path}.weight")
        if calibration is not None and target.path not in calibration:
            raise ValueError(f"the calibration holds nothing of {target.path}; calibrate this model, or skip the layer")
    shared: dict[tuple[int, Format], QuantLinear] = {}
    with bar(progress, len(targets)) as advance:
        for target in targets:
            key = (id(target.module.weight), target.fmt)
            errors: list[float] = []

            def step(number: int, error: float, path: str = target.path, errors: list[float] = errors) -> None:
                errors.append(error)
                if on_step:
                    on_step(path, number, error)

            dense_dtype, dense_bytes = target.weight.dtype, target.weight.nbytes
            if key in shared:
                layer = _share(shared[key], target.module.bias)
            else:
                layer = _quantized(target, init, rank, alpha, iters, calibration, dropout, rslora, step)
                shared[key] = layer
            layer.init_errors, layer.dense_nbytes = tuple(errors), dense_bytes
            layer.train(target.module.training)
            if _reads(target, r"\.weight\.dtype\b"):
                FloatFacingQuantLinear.adopt(layer, dense_dtype)
            for parent, name in target.places:
                setattr(parent, name, layer)
            advance(target.path)
    if isinstance(output_head(model), QuantLinear):
        cast(
            Any, model
        ).config.tie_word_embeddings = False  # a packed head is a matrix of its own; tying again would undo it
    return model


def _quantized(
    target: _Target,
    init: str | Start,
    rank: int,
    alpha: float | None,
    iters: int | None,
    calibration: Mapping[str, Tensor] | None,
    dropout: float,
    rslora: bool,
    step: Any,
) -> QuantLinear:
    weight, name = target.weight, f"{target.path}.weight"
    held = min(rank, *weight.shape)
    if held < rank:
        say_once(
            f"{target.path} has {min(weight.shape)} features on one side: its adapter takes rank {held}, not {rank}"
        )
    alpha = float(rank if alpha is None else alpha)
    folded = alpha * held**0.5 if rslora else alpha  # a start folds alpha / rank: this makes it alpha / sqrt(rank)
    moment = {} if calibration is None else {"second_moment": calibration[target.path].to(weight.device)}
    if callable(init):
        q, a, b = init(weight, target.fmt, held, alpha=folded, **moment)
    else:
        offered: dict[str, Any] = {**moment, **({} if iters is None else {"iters": iters})}
        if init == "loftq":  # whose errors are the weight's, as a report's are
            offered["on_step"] = step
        options = {key: value for key, value in offered.items() if key in _options_of(init)}
        start: Start = getattr(starts, init)
        q, a, b = start(weight, target.fmt, held, alpha=folded if held else None, name=name, **options)
    layer = QuantLinear.from_quantized(q, target.module.bias)
    if held:
        layer.add_lora(held, alpha, dropout, rslora, a, b)
    if init != "loftq":
        step(0, _relative_error(weight, layer))
    return layer


def _options_of(init: str) -> Mapping[str, Any]:
    """What a start of `qft.init` takes, by name."""
    return inspect.signature(getattr(starts, init)).parameters


@torch.no_grad()
def _relative_error(weight: Tensor, layer: QuantLinear) -> float:
    """Frobenius norm of W - Q - scaling * B A, over that of W."""
    residual = weight.float() - layer.dequantize()
    if layer.lora_A is not None and layer.lora_B is not None:
        residual = torch.addmm(residual, layer.lora_B.float(), layer.lora_A.float(), alpha=-layer.lora_scaling)
    norm = weight.float().norm()
    return (residual.norm() / norm).item() if norm else 0.0


def _share(first: QuantLinear, bias: nn.Parameter | None) -> QuantLinear:
    """Another layer over the same stored weight, as the dense layers shared theirs."""
    layer = QuantLinear.from_quantized(first.quant_tensor, bias)
    for name, parameter in first._parameters.items():
        if name != "bias":
            layer._parameters[name] = parameter
    layer.lora_alpha, layer.lora_scaling, layer.lora_dropout = first.lora_alpha, first.lora_scaling, first.lora_dropout
    return layer


# ------------------------------------------------------------------------------------------------ which layers


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern names the layer at `path`: the path, its last name, or a glob over paths."""
    return path == pattern or path.rpartition(".")[2] == pattern or fnmatchcase(path, pattern)


def _is_conv1d(module: nn.Module) -> bool:
    loaded = sys.modules.get("transformers.pytorch_utils")  # a model that holds one has loaded it
    return loaded is not None and type(module) is loaded.Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether qft can replace this module: nn.Linear itself, or transformers' Conv1D."""
    return type(module) is nn.Linear or _is_conv1d(module)


def quantizable(model: nn.Module, skip: Iterable[str] = (), include: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The layers `quantize_model` would replace, by path; the model is only looked at.

    Args:
        skip: patterns as in `quantize_model`.
        include: patterns of layers that are left dense unless `formats` names them, such as the output head.

    Raises:
        ValueError: a pattern names no layer.
    """
    found = _find_targets(model, ANY_FORMAT, tuple(skip), dict.fromkeys(include, ANY_FORMAT))
    return {target.path: target.module for target, reason in found if not reason}


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear module as `[out, in]`; GPT-2's Conv1D stores the transpose."""
    weight = cast(Tensor, module.weight)
    return weight.T if _is_conv1d(module) else weight


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer of a language model that gives logits, or None."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _heads(model: nn.Module) -> set[int]:
    """Ids of a language model's output head and of all that a transformers model holds beside its base model: the
    heads of tasks, which are new when fine-tuning begins and train whole."""
    base = getattr(model, "base_model", model)
    inside = set(map(id, base.modules()))
    return {id(output_head(model)), *(id(module) for module in model.modules() if id(module) not in inside)}


def _find_targets(
    model: nn.Module, fmt: Format | None, skip: tuple[str, ...], formats: dict[str, Format]
) -> list[tuple[_Target, str]]:
    """Every linear layer that is not quantized yet, and why it is left dense; no reason where it is to be replaced."""
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for parent_path, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, name, f"{parent_path}.{name}".lstrip(".")))
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)

    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
    for pattern in (*skip, *formats):
        if not any(matches(path, pattern) for path in paths):
            raise ValueError(
                f"{pattern!r} names no linear layer of {type(model).__name__}; its layers are {_examples(paths)}"
            )

    heads, found = _heads(model), []
    for path, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or _is_conv1d(module)) or isinstance(module, QuantLinear):
            continue
        here = tuple((parent, name) for parent, name, _ in places.get(id(module), ()))
        named = next((f for pattern, f in formats.items() if matches(path, pattern)), None)
        target = _Target(path, module, named or fmt or ANY_FORMAT, here)
        reason = _reason_to_skip(target, id(module) in heads, named is not None, skip, owners, model)
        if not (reason or named or fmt):
            reason = "not named in formats"
        found.append((target, reason))
    return found


def _reason_to_skip(
    target: _Target,
    is_head: bool,
    named: bool,
    skip: tuple[str, ...],
    owners: dict[int, list[nn.Module]],
    model: nn.Module,
) -> str:
    if any(matches(target.path, pattern) for pattern in skip):
        return "skipped by name"
    if not is_linear(target.module):
        return f"a {type(target.module).__name__}, not nn.Linear itself"
    if not target.places:
        return "the model itself, which cannot be replaced in place; use QuantLinear.from_linear"
    if not target.module.weight.numel():
        return "empty"
    if target.module.weight.device.type == "meta":
        return "on the meta device, without values"
    if _reads(target, r"\.weight\b(?!\.(dtype|device)\b)"):
        return f"{type(target.places[0][0]).__name__} reads {target.places[0][1]}.weight itself"
    if named:
        return ""
    if is_head:
        return "the output head; name it in formats to quantize it"
    others = {type(owner).__name__ for owner in owners[id(target.module.weight)] if not is_linear(owner)}
    return (
        f"its weight is shared with {', '.join(sorted(others))}; name it in formats to quantize a copy"
        if others
        else ""
    )


def _reads(target: _Target, what: str) -> bool:
    """Whether a parent's forward mentions `self.<layer><what>`, as T5 does its `wo.weight.dtype`."""
    return any(
        re.search(rf"\bself\.{re.escape(name)}{what}", _forward_source(type(parent))) for parent, name in target.places
    )


def _forward_source(kind: type[nn.Module]) -> str:
    try:
        source = inspect.getsource(inspect.unwrap(kind.forward))
    except (OSError, TypeError):  # defined where no source is kept: an interactive session, a compiled module
        return ""
    return re.sub(r"isinstance\([^()]*\)", "", source)  # asking what a weight is does not read it


def _examples(paths: list[str]) -> str:
    return ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "") if paths else "none"


@contextmanager
def bar(wanted: bool, total: int, what: str = "quantizing") -> Iterator[Callable[[str], None]]:
    """A progress bar over layers; yields the function that moves it on and says where it is."""
    if not wanted:
        yield lambda path: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as drawn:
        task = drawn.add_task(what, total=total)
        yield lambda path: drawn.update(task, advance=1, description=path)


# ------------------------------------------------------------------------------------------------ reports


def report(model: nn.Module) -> Report:
    """What of a model is quantized, in which formats and bytes, and what is dense and why."""
    layers: list[LayerReport] = []
    counted: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            q = module.quant_tensor
            dense = module.dense_nbytes or 2 * q.shape[0] * q.shape[1]
            layers.append(LayerReport(path, q.format, q.shape, q.nbytes, dense, module.lora_rank, module.init_errors))
            counted.update(map(id, q.tensors().values()))
        elif isinstance(module, nn.Linear) or _is_conv1d(module):
            rows, columns = module.weight.shape
            shape = (columns, rows) if _is_conv1d(module) else (rows, columns)
            nbytes = module.weight.nbytes
            layers.append(
                LayerReport(path, None, shape, nbytes, nbytes, reason=getattr(module, "qft_reason", "not asked for"))
            )
            counted.add(id(module.weight))
    stored = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    other = sum(size for key, size in stored.items() if key not in counted)
    return Report(tuple(layers), sum(stored.values()), other)


# ------------------------------------------------------------------------------------------------ training


def prepare_for_training(model: nn.Module, gradient_checkpointing: bool = True) -> nn.Module:
    """Make a quantized model ready to train its adapters or scales; nothing is cast to fp32.

    Parameters that are neither a QuantLinear's adapter nor already-trainable scales or zeros are frozen. Gradient
    checkpointing is switched on (non-reentrant) where the model offers it, and inputs are made to require gradients.
    The first training forward checks that a gradient can flow; after the first backward, parameters that none reached
    are named once.

    Raises:
        ValueError: the model holds no QuantLinear; later, from its first training forward: nothing trains, or the
            output needs no gradient.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no quantized layer; call qft.quantize_model first")
    ours = {id(p) for layer in layers for name, p in layer._parameters.items() if p is not None and name != "bias"}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad_(False)
    offered: Any = model
    if gradient_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):  # transformers' newer name
            offered.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        elif hasattr(model, "gradient_checkpointing_enable"):
            offered.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            say_once(f"{type(model).__name__} offers no gradient checkpointing; activations are kept")
    if hasattr(model, "enable_input_require_grads"):
        offered.enable_input_require_grads()
    _GradientCheck(model)
    return model


class _GradientCheck:
    """Watches the first training step for gradients, then takes its hooks away."""

    def __init__(self, model: nn.Module) -> None:
        self.reached: set[int] = set()
        self.seen_forward = False
        self.hooks = [model.register_forward_hook(self._after_forward, with_kwargs=True)]

    def _after_forward(self, model: nn.Module, inputs: Any, given: Mapping[str, Any], output: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable and any(given.get(name) is not None for name in ("inputs_embeds", "past_key_values")):
            return  # a prompt or prefix of PEFT's, which trains outside the model
        if not trainable:
            raise ValueError(
                f"nothing in {type(model).__name__} trains; attach a LoRA or call qft.train_only(model, 'scales')"
            )
        if not self.seen_forward:
            if not any(tensor.requires_grad for tensor in _tensors(output)):
                raise ValueError(
                    f"the output of {type(model).__name__} needs no gradient though {len(trainable)} parameters train; "
                    "use non-reentrant checkpointing or model.enable_input_require_grads()"
                )
            self.seen_forward = True
            for parameter in trainable.values():
                self.hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: self.reached.add(id(p))))
            return
        if not self.reached:  # no backward yet: two forwards may share one
            return
        for hook in self.hooks:
            hook.remove()
        missed = [name for name, p in trainable.items() if id(p) not in self.reached]
        if missed:
            say_once(f"no gradient reached {len(missed)} of {len(trainable)} trainable parameters: {_examples(missed)}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
