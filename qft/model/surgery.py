"""Whole models: what replaces the layers that are quantized."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import init as starts
from ..format import Format
from ..nn.embedding import QuantEmbedding
from ..nn.experts import QuantExperts, oriented
from ..nn.linear import FloatFacingQuantLinear, QuantLinear
from ..nn.packed import Packed
from ..notices import say_once
from ..tensor import STORED, QuantTensor, quantize
from .progress import bar
from .targets import Target, find_targets, is_linear, output_head, reads

BLOCK = 1 << 20  # weights that are compared at a time
StepCallback = Callable[[str, int, float], None]
Start = Callable[..., tuple[QuantTensor, Tensor, Tensor]]
T = TypeVar("T", bound=QuantLinear | QuantEmbedding)


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
    """Replace the linear layers of a model by QuantLinear, in place, one at a time, and its experts by QuantExperts.

    nn.Linear, transformers' Conv1D, and experts of families that qft knows are replaced; embeddings, by QuantEmbedding,
    where `formats` names them. Left dense, with the reason in `report(model)`: the output head of a language model and
    the heads of tasks, such as a classifier's (unless `formats` names them), weights shared with an embedding,
    subclasses of nn.Linear and nn.Embedding that do something of their own, experts of other families, and layers
    whose parent reads `layer.weight` itself.

    An embedding and an output head that share their weight share the packed one if `formats` gives both one format;
    otherwise each has its own. Embeddings and experts take no LoRA: they begin with the codes that the start finds for
    a rank of 0, or those of "search" where it needs activations.

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
    targets = choose_targets(model, fmt, init, rank, iters, calibration, skip, formats)
    for target in targets:  # before the first layer is replaced, so that a refusal leaves the model as it was
        for name, weight in target.matrices():
            if not weight.isfinite().all():
                quantize(weight, target.fmt, name=name)
    shared: dict[tuple[int, Format], Packed] = {}
    with bar(progress, len(targets)) as advance:
        for target in targets:
            replace_target(target, init, rank, alpha, iters, calibration, dropout, rslora, on_step, shared)
            advance(target.path)
    settle_tie(model)
    return model


def choose_targets(
    model: nn.Module,
    fmt: Format | str | None,
    init: str | Start,
    rank: int,
    iters: int | None,
    calibration: Mapping[str, Tensor] | None,
    skip: Iterable[str],
    formats: Mapping[str, Format | str] | None,
    values: bool = True,
) -> list[Target]:
    """The layers that `quantize_model` replaces, in its order, and a reason noted on each that it leaves dense.

    The arguments, and what is raised for them, are those of `quantize_model`. With `values=False` the model may be on
    the meta device: its weights are yet to be read.
    """
    check_start(init, iters)
    if not callable(init) and starts.NEEDS[init] != "none" and calibration is None:
        measure = "calibration=qft.calibrate(model, rows, collate)"
        raise ValueError(f"init={init!r} needs the layers' activations; pass {measure}")
    found = find_targets(
        model,
        None if fmt is None else Format.parse(fmt),
        tuple(skip),
        {k: Format.parse(v) for k, v in (formats or {}).items()},
        values,
    )
    for target, reason in found:
        target.module.qft_reason = reason
    targets = [target for target, reason in found if not reason]
    if rank < 0:
        raise ValueError(f"rank={rank} is negative; 0 attaches no adapter")
    if not targets:
        raise ValueError(f"{type(model).__name__} holds no layer to quantize; see qft.report(model) for the reasons")
    for target in targets:
        if calibration is not None and is_linear(target.module) and target.path not in calibration:
            raise ValueError(f"the calibration holds nothing of {target.path}; calibrate this model, or skip the layer")
    # a tied head shares the embedding
    return sorted(targets, key=lambda target: not isinstance(target.module, nn.Embedding))


def check_start(init: str | Start, iters: int | None) -> None:
    """Refuse a start that there is not, or turns of one that has none, with a ValueError."""
    if not callable(init) and init not in starts.NEEDS:
        raise ValueError(f"init={init!r} is unknown; use one of {', '.join(starts.NEEDS)}, or a function like them")
    if iters is not None and (callable(init) or "iters" not in _options_of(init)):
        raise ValueError(
            f"init={init!r} has no turns, and iters={iters} was given; leave it out, or take loftq or cloq"
        )


def replace_target(
    target: Target,
    init: str | Start = "plain",
    rank: int = 0,
    alpha: float | None = None,
    iters: int | None = None,
    calibration: Mapping[str, Tensor] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    on_step: StepCallback | None = None,
    shared: dict[tuple[int, Format], Packed] | None = None,
) -> Packed:
    """Quantize one layer and put it where the dense one was; the arguments are those of `quantize_model`.

    `shared` holds the layers made so far by weight and format, for those that share a weight.
    """
    shared = {} if shared is None else shared
    key = (id(getattr(target.module, target.weights[0])), target.fmt)

    def step(number: int, error: float, path: str = target.path) -> None:
        if on_step:
            on_step(path, number, error)

    layer: Packed
    if isinstance(target.module, nn.Embedding):
        layer = _embedding(target, init, iters, step, shared.get(key))
    elif is_linear(target.module):
        layer = _linear(target, init, rank, alpha, iters, calibration, dropout, rslora, step, shared.get(key))
    else:
        layer = _experts(target, init, iters, step)
        if rank:
            say_once("experts take no LoRA; their scales can train")
    shared.setdefault(key, layer)
    layer.dense_nbytes = sum(getattr(target.module, name).nbytes for name in target.weights)
    layer.train(target.module.training)
    if isinstance(layer, QuantLinear) and reads(target, r"\.weight\.dtype\b"):
        FloatFacingQuantLinear.adopt(layer, target.weight.dtype)
    for parent, name in target.places:
        setattr(parent, name, layer)
    return layer


def _linear(
    target: Target,
    init: str | Start,
    rank: int,
    alpha: float | None,
    iters: int | None,
    calibration: Mapping[str, Tensor] | None,
    dropout: float,
    rslora: bool,
    step: Any,
    first: Packed | None,
) -> QuantLinear:
    weight, name = target.weight, f"{target.path}.weight"
    held = min(rank, *weight.shape)
    if held < rank:
        say_once(
            f"{target.path} has {min(weight.shape)} features on one side: its adapter takes rank {held}, not {rank}"
        )
    if isinstance(first, QuantLinear):
        return _share(first, QuantLinear.from_quantized(first.quant_tensor, target.module.bias))
    alpha = float(rank if alpha is None else alpha)
    if isinstance(first, QuantEmbedding):  # whose codes stand alone, so that the adapter begins as nothing
        layer = _share(first, QuantLinear.from_quantized(first.quant_tensor, target.module.bias))
        if held:
            layer.add_lora(held, alpha, dropout, rslora)
        return layer
    errors: list[float] = []

    def note(number: int, error: float) -> None:
        errors.append(error)
        step(number, error)

    folded = alpha * held**0.5 if rslora else alpha  # a start folds alpha / rank: this makes it alpha / sqrt(rank)
    moment = {} if calibration is None else {"second_moment": calibration[target.path].to(weight.device)}
    if callable(init):
        q, a, b = init(weight, target.fmt, held, alpha=folded, **moment)
    else:
        offered: dict[str, Any] = {**moment, **({} if iters is None else {"iters": iters})}
        if init == "loftq":  # whose errors are the weight's, as a report's are
            offered["on_step"] = note
        options = {key: value for key, value in offered.items() if key in _options_of(init)}
        start: Start = getattr(starts, init)
        q, a, b = start(weight, target.fmt, held, alpha=folded if held else None, name=name, **options)
    layer = QuantLinear.from_quantized(q, target.module.bias)
    if held:
        layer.add_lora(held, alpha, dropout, rslora, a, b)
    if init != "loftq":
        note(0, _relative_error([weight], [q], layer))
    layer.init_errors = tuple(errors)
    return layer


def _embedding(target: Target, init: str | Start, iters: int | None, step: Any, first: Packed | None) -> QuantEmbedding:
    if isinstance(first, (QuantEmbedding, QuantLinear)):
        return _share(first, QuantEmbedding.from_quantized(first.quant_tensor, target.module))
    q = _codes_alone(init, iters)(target.weight, target.fmt, f"{target.path}.weight")
    layer = QuantEmbedding.from_quantized(q, target.module)
    layer.init_errors = (_relative_error([target.weight], [q]),)
    step(0, *layer.init_errors)
    return layer


def _experts(target: Target, init: str | Start, iters: int | None, step: Any) -> QuantExperts:
    layer = QuantExperts.start(target.module, target.fmt, _codes_alone(init, iters), name=target.path)
    for name in layer.code_names:
        error = _relative_error(oriented(target.module, name), layer.stack(name).matrices())
        layer.start_errors[name] = (error,)
        step(0, error, f"{target.path}.{name}")
    return layer


def _codes_alone(init: str | Start, iters: int | None) -> Callable[[Tensor, Format, str], QuantTensor]:
    """A start's weight without factors and without activations, for what takes no LoRA and is not calibrated."""
    if callable(init):
        own = init
        return lambda weight, fmt, name: own(weight, fmt, 0, alpha=0.0)[0]
    if starts.NEEDS[init] != "none":
        say_once(f"embeddings and experts are not calibrated: they start as init='search' does, not {init!r}")
        init = "search"
    start: Start = getattr(starts, init)
    options = {} if iters is None or "iters" not in _options_of(init) else {"iters": iters}
    return lambda weight, fmt, name: start(weight, fmt, 0, name=name, **options)[0]


def _options_of(init: str) -> Mapping[str, Any]:
    """What a start of `qft.init` takes, by name."""
    return inspect.signature(getattr(starts, init)).parameters


@torch.no_grad()
def _relative_error(
    weights: Iterable[Tensor], packed: Iterable[QuantTensor], layer: QuantLinear | None = None
) -> float:
    """Frobenius norm of W - Q over that of W, of all the weights together; of W - Q - scaling * B A with a layer."""
    lost = whole = 0.0
    for weight, q in zip(weights, packed, strict=True):
        if weight.is_meta:  # a layer that is yet to be given values
            return 0.0
        for rows, values in _dequantized(q):
            dense = weight[rows].float()
            residual = torch.sub(dense, values, out=values)
            if layer is not None and layer.lora_A is not None and layer.lora_B is not None:
                residual.addmm_(layer.lora_B[rows].float(), layer.lora_A.float(), alpha=-layer.lora_scaling)
            lost, whole = lost + residual.norm().item() ** 2, whole + dense.norm().item() ** 2
    return (lost / whole) ** 0.5 if whole else 0.0


def _dequantized(q: QuantTensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows that fit into a cache, and their fp32 values: memory for all of them would cost more than the sum does."""
    out, in_features = q.shape
    fmt, scales, zeros = Format(q.format.code, q.format.group, "f32", q.format.zero), q.scales, q.zeros
    step = max(1, BLOCK // in_features)
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        shape = (rows.stop - start, in_features)
        part = QuantTensor(fmt, shape, q.weight[rows], scales[rows], None if zeros is None else zeros[rows])
        yield rows, part.dequantize()


def _share(first: QuantLinear | QuantEmbedding, layer: T) -> T:
    """Make a layer one over the Parameters of another, as the dense layers shared theirs."""
    names = [name for name in first._parameters if name != "bias"]
    if not (isinstance(first, QuantLinear) and isinstance(layer, QuantLinear)):
        names = list(STORED)
    else:
        layer.lora_alpha, layer.lora_scaling = first.lora_alpha, first.lora_scaling
        layer.lora_dropout = first.lora_dropout
    for name in names:
        layer._parameters[name] = first._parameters[name]
    return layer


def settle_tie(model: Any) -> None:
    """Keep `tie_word_embeddings` true to what is: tying again must not undo a packed head or embedding."""
    head = output_head(model)
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) and head is not None else None
    if not (isinstance(head, Packed) or isinstance(embedding, Packed)) or not hasattr(model, "config"):
        return
    weights = [layer._parameters.get("weight") for layer in (head, embedding) if layer is not None]
    if len({id(weight) for weight in weights}) > 1:
        model.config.tie_word_embeddings = False
