"""Which layers of a model are quantized, and why the others stay dense."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn

from ..format import Format
from ..nn import embedding, experts
from ..nn.packed import Packed

ANY_FORMAT = Format("nf4", 64)  # stands for the format of a layer that stays dense


_ITSELF = "the model itself, which cannot be replaced in place; use {0}.from_..."


@dataclass(frozen=True)
class Target:
    """A layer, the format it is to have, and where it sits in the model."""

    path: str
    module: Any  # nn.Linear, Conv1D, nn.Embedding, or experts of a family that qft knows
    fmt: Format
    places: tuple[tuple[nn.Module, str], ...]  # (parent, attribute): a module shared by several parents has several

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the Parameters that are packed: `weight`, or the projections of experts."""
        layout = experts.layout_of(self.module)
        return layout.projections if layout else ("weight",)

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, of a layer that has one weight."""
        return weight_of(self.module)

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight `[out, in]`, each expert's its own, with what messages call it."""
        if experts.layout_of(self.module) is None:
            yield f"{self.path}.weight", self.weight
            return
        for name in self.weights:
            for at, weight in enumerate(experts.oriented(self.module, name)):
                yield f"{self.path}.{name}[{at}]", weight


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
    """The linear layers `quantize_model` would replace, by path; the model is only looked at.

    Args:
        skip: patterns as in `quantize_model`.
        include: patterns of layers that are left dense unless `formats` names them, such as the output head.

    Raises:
        ValueError: a pattern names no layer.
    """
    found = find_targets(model, ANY_FORMAT, tuple(skip), dict.fromkeys(include, ANY_FORMAT))
    return {target.path: target.module for target, reason in found if not reason and is_linear(target.module)}


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


def find_targets(
    model: nn.Module, fmt: Format | None, skip: tuple[str, ...], formats: dict[str, Format], values: bool = True
) -> list[tuple[Target, str]]:
    """Every layer that is not quantized yet, and why it is left dense; no reason where it is to be replaced.

    Layers are linear ones, embeddings, and experts of a family that qft knows.

    With `values=False` a layer on the meta device is one to replace too: its weight is yet to be read.
    """
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

    layers = {path: module for path, module in model.named_modules() if _is_layer(module)}
    for pattern in (*skip, *formats):
        if not any(matches(path, pattern) for path in layers):
            raise ValueError(
                f"{pattern!r} names no layer of {type(model).__name__}; its layers are {examples(list(layers))}"
            )

    heads, found = _heads(model), []
    looked_up = {  # embeddings over one weight are one, such as those of an encoder and its decoder
        id(module.weight): named
        for path, module in layers.items()
        if isinstance(module, nn.Embedding) and (named := _named(path, formats))
    }
    for path, module in layers.items():
        if isinstance(module, Packed):
            continue
        here = tuple((parent, name) for parent, name, _ in places.get(id(module), ()))
        named = _named(path, formats)
        if isinstance(module, nn.Embedding):
            named = named or looked_up.get(id(module.weight))
        target = Target(path, module, named or fmt or ANY_FORMAT, here)
        reason = _reason_to_skip(target, id(module) in heads, named is not None, skip, owners, model)
        if values and not reason and any(getattr(module, name).is_meta for name in target.weights):
            reason = "on the meta device, without values"
        if not (reason or named or fmt):
            reason = "not named in formats"
        found.append((target, reason))
    return found


def _is_layer(module: nn.Module) -> bool:
    linear = isinstance(module, nn.Linear) or _is_conv1d(module)
    return linear or isinstance(module, nn.Embedding) or experts.layout_of(module) is not None


def _named(path: str, formats: dict[str, Format]) -> Format | None:
    return next((fmt for pattern, fmt in formats.items() if matches(path, pattern)), None)


def _reason_to_skip(
    target: Target,
    is_head: bool,
    named: bool,
    skip: tuple[str, ...],
    owners: dict[int, list[nn.Module]],
    model: nn.Module,
) -> str:
    if any(matches(target.path, pattern) for pattern in skip):
        return "skipped by name"
    if experts.layout_of(target.module):
        return experts.reason_against(target.module) or ("" if target.places else _ITSELF.format("QuantExperts"))
    if isinstance(target.module, nn.Embedding):
        return _reason_to_skip_embedding(target, named)
    if not is_linear(target.module):
        return f"a {type(target.module).__name__}, not nn.Linear itself"
    if not target.places:
        return _ITSELF.format("QuantLinear")
    if not target.module.weight.numel():
        return "empty"
    if reads(target, r"\.weight\b(?!\.(dtype|device)\b)"):
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


def _reason_to_skip_embedding(target: Target, named: bool) -> str:
    if reason := embedding.reason_against(target.module):
        return reason
    if not target.places:
        return _ITSELF.format("QuantEmbedding")
    if not target.module.weight.numel():
        return "empty"
    if reads(target, r"\.weight\b(?!\.device\b)"):
        return f"{type(target.places[0][0]).__name__} reads {target.places[0][1]}.weight itself"
    return "" if named else "an embedding; name it in formats to quantize it"


def reads(target: Target, what: str) -> bool:
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


def examples(paths: list[str]) -> str:
    return ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "") if paths else "none"
