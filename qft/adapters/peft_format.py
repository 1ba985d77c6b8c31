"""A model's LoRA on its own: a directory in PEFT's adapter format, which PEFT reads and writes too.

    adapter_model.safetensors   base_model.model.PATH.lora_A.weight [r, in] and .lora_B.weight [out, r] of every layer
    adapter_config.json         rank, alpha and target modules, as PEFT's LoraConfig names them

The product of a layer is scaled by alpha / r, or alpha / sqrt(r) under rsLoRA (Kalajdzievski 2023). The base is not in
the directory: an adapter belongs to the codes it was trained on.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..disk import tensor_file
from ..disk.files import replace_files, settle
from ..format import FormatError
from ..nn.linear import QuantLinear
from ..notices import say_once

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
# What PEFT can switch on so that A and B, under the same names, no longer mean alpha / r * B A beside each base layer.
_OTHER_MEANINGS = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


@dataclass(frozen=True)
class LoraShape:
    """One layer's LoRA without its values."""

    rank: int
    in_features: int
    out_features: int
    alpha: float
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, eq=False)
class Factors:
    """One layer's LoRA: the layer adds scaling * B A to its weight.

    Attributes:
        A: `[rank, in]`.
        B: `[out, rank]`.
        alpha: positive.
        rslora: whether the scaling is alpha / sqrt(rank) instead of alpha / rank.
    """

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool = False

    @property
    def shape(self) -> LoraShape:
        """Everything but the values."""
        return LoraShape(self.A.shape[0], self.A.shape[1], self.B.shape[0], self.alpha, self.rslora)

    def unscaled(self) -> tuple[Tensor, Tensor]:
        """A and B in fp32 with the scaling folded in, its square root into each: B A is what the layer adds."""
        root = math.sqrt(self.shape.scaling)
        return self.A.detach().float() * root, self.B.detach().float() * root


# ------------------------------------------------------------------------------------------------------------ models


def lora_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The QuantLinear layers that carry a LoRA, by path.

    Raises:
        ValueError: there are none, or one is pooled (QA-LoRA), so that its A reads sums over groups of the input.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear) and m.lora_rank}
    if not layers:
        raise ValueError(f"no QuantLinear of {type(model).__name__} carries a LoRA; call add_lora or qft.load_adapter")
    if pooled := [path for path, layer in layers.items() if layer.lora_pooled]:
        raise ValueError(f"the LoRA of {pooled[0]} is pooled, so it is no update B A; merge it with qft.merge_pooled")
    return layers


def lora_factors(model: nn.Module) -> dict[str, Factors]:
    """The LoRA of every layer that carries one, by path; the tensors are the model's own.

    Raises:
        ValueError: no layer carries one.
    """
    return {path: _factors_of(layer) for path, layer in lora_layers(model).items()}


def attach(model: nn.Module, factors: Mapping[str, Factors], dropout: float = 0.0, source: str = "the adapter") -> None:
    """Make `factors`, copied in fp32, the only LoRA of a model, in place; whatever LoRA it carried is detached.

    Raises:
        FormatError: a path names no QuantLinear of the model, or a factor does not fit its layer; the model is then
            left as it was. `source` is what the message calls the adapter.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    check_fit(layers, {path: entry.shape for path, entry in factors.items()}, source)
    for layer in layers.values():
        layer.remove_lora()
    for path, entry in factors.items():
        layers[path].add_lora(entry.A.shape[0], entry.alpha, dropout, entry.rslora, entry.A, entry.B)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Let an exception in the block put back the LoRA that every QuantLinear carried, the same Parameters."""
    names = ("lora_A", "lora_B", "lora_alpha", "lora_scaling", "lora_dropout", "lora_pooled")
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    kept = [(layer, {name: getattr(layer, name) for name in names}) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, values in kept:
            for name, value in values.items():
                setattr(layer, name, value)
        raise


def check_fit(layers: Mapping[str, QuantLinear], shapes: Mapping[str, LoraShape], source: str) -> None:
    """Raise FormatError where an adapter names a layer that is not among `layers`, or has other features than it."""
    for path, shape in shapes.items():
        if path not in layers:
            raise FormatError(
                f"{source} adapts {path}, which is no quantized layer of this model; load it on the base it was "
                "trained on, quantized with that layer"
            )
        layer = layers[path]
        theirs, ours = (shape.out_features, shape.in_features), (layer.out_features, layer.in_features)
        if theirs != ours:
            raise FormatError(
                f"{source} adapts {path} as {list(theirs)}, which is {list(ours)} here; load it on its base"
            )
        if shape.rank > min(ours):
            raise FormatError(
                f"{source} has rank {shape.rank} at {path}, which holds {min(ours)} at most; lower its rank"
            )


def _factors_of(layer: QuantLinear) -> Factors:
    a: Any = layer.lora_A
    b: Any = layer.lora_B
    rank, alpha, scaling = layer.lora_rank, float(layer.lora_alpha), float(layer.lora_scaling)
    if math.isclose(scaling, alpha / rank):
        return Factors(a, b, alpha)
    if math.isclose(scaling, alpha / math.sqrt(rank)):
        return Factors(a, b, alpha, rslora=True)
    return Factors(a, b, scaling * rank)  # scaled in some other way: the alpha that gives the same product


# ------------------------------------------------------------------------------------------------------------ files


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the LoRA of a model's QuantLinear layers in PEFT's adapter format, whole or not at all.

    `peft.PeftModel.from_pretrained(dense, directory)` gives the dense model the same update. Other files in the
    directory are left alone.

    Args:
        model: holds QuantLinear layers with LoRA; nothing else of it is written.
        directory: made if absent.

    Raises:
        ValueError: no layer carries a LoRA, or a factor has no values (meta).
        OSError: the disk is full or the directory cannot be written; what was there before then stays.
    """
    factors = lora_factors(model)
    config = _config(model, factors)
    tensors = {}
    for path, entry in factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = entry.A
        tensors[f"base_model.model.{path}.lora_B.weight"] = entry.B
    tensor_file.refuse_unstorable(tensors)
    with replace_files(Path(directory)) as folder:
        tensor_file.write(folder / WEIGHTS, tensors, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Attach an adapter to a quantized model in place of whatever LoRA it carries; codes and scales stay as they are.

    Args:
        model: holds QuantLinear layers.
        directory: a LoRA written by `save_adapter` or by PEFT. Factors of any floating dtype become fp32.

    Returns:
        The model itself.

    Raises:
        FormatError: the adapter is damaged, is no plain LoRA, or does not fit the model, which is then left as it was.
        OSError: there is no adapter in the directory.
    """
    config = _read_config(Path(directory))
    attach(model, read_factors(directory), float(config.get("lora_dropout") or 0.0), str(directory))
    return model


def describe_adapter(directory: str | Path) -> dict[str, LoraShape]:
    """Rank, features and alpha of every layer of an adapter, by path, without reading its values.

    Raises:
        FormatError: the adapter is damaged, or no plain LoRA. OSError: there is none in the directory.
    """
    directory = Path(directory)
    config = _read_config(directory)
    try:
        with safe_open(directory / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise FormatError(f"{directory / WEIGHTS} is damaged ({error}); copy it again, or save it anew") from None
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        key = _KEY.fullmatch(name)
        if key is None:
            raise FormatError(
                f"{directory / WEIGHTS} holds {name}, which is no A or B of a linear layer's LoRA; qft composes and "
                "fuses plain LoRA, load this adapter with PEFT"
            )
        pairs.setdefault(key["path"], {})[key["factor"]] = shape
    if not pairs:
        raise FormatError(f"{directory / WEIGHTS} holds no tensors; save the adapter anew")
    return {path: _shape(directory, config, path, pairs[path]) for path in sorted(pairs)}


def read_factors(directory: str | Path) -> dict[str, Factors]:
    """The LoRA of every layer of an adapter, by path, on the CPU, in the dtype of the file.

    Raises:
        FormatError: as `describe_adapter`, or a value is not finite. OSError: there is no adapter in the directory.
    """
    directory = Path(directory)
    factors = {}
    shapes = describe_adapter(directory)
    with safe_open(directory / WEIGHTS, "pt") as file:
        for path, shape in shapes.items():
            # copies: the library maps the file, and tensors of our own outlive what becomes of it
            a, b = (file.get_tensor(f"base_model.model.{path}.lora_{factor}.weight").clone() for factor in "AB")
            if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in (a, b)):
                raise FormatError(f"{directory / WEIGHTS} holds a LoRA of {path} that is not finite; save it anew")
            factors[path] = Factors(a, b, shape.alpha, shape.rslora)
    return factors


def _shape(directory: Path, config: Mapping[str, Any], path: str, pair: Mapping[str, tuple[int, ...]]) -> LoraShape:
    a, b = pair.get("A", ()), pair.get("B", ())
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise FormatError(
            f"{directory / WEIGHTS} holds A {list(a)} and B {list(b)} for {path}, which are no [r, in] and [out, r]; "
            "save it anew"
        )
    rank = _of_pattern(config.get("rank_pattern") or {}, path, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    if rank != a[0]:
        raise FormatError(
            f"{directory} has rank {a[0]} at {path} in {WEIGHTS} and {rank} in {CONFIG}; copy both files again"
        )
    return LoraShape(rank, a[1], b[0], float(alpha), bool(config.get("use_rslora")))


def _of_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the path or ends it at a dot, as a regular expression."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _read_config(directory: Path) -> dict[str, Any]:
    settle(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} holds no {name}; give a LoRA written by qft.save_adapter, or by PEFT as safetensors"
            )
    path = directory / CONFIG
    try:
        config = json.loads(path.read_bytes())
        kind = config["peft_type"]
        numbers = [config["r"], config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        sound = all(type(number) in (int, float) and 0 < number < math.inf for number in numbers)
        sound = sound and 0 <= float(config.get("lora_dropout") or 0) < 1
        for pattern in (*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})):
            re.compile(pattern)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, re.error):
        raise FormatError(f"{path} is damaged; copy it again, or save the adapter anew") from None
    if kind != "LORA":
        raise FormatError(f"{path} describes a {kind}, not a LoRA; load it with PEFT")
    if not sound:
        raise FormatError(f"{path} gives a rank, alpha or dropout out of its range; save the adapter anew")
    if used := [name for name in _OTHER_MEANINGS if config.get(name)]:
        raise FormatError(f"{path} uses {used[0]}, so it is no plain LoRA; load it with PEFT")
    return config  # type: ignore[no-any-return]


def _config(model: Any, factors: Mapping[str, Factors]) -> dict[str, Any]:
    """What PEFT's LoraConfig would say of these factors; what it leaves out has LoraConfig's default."""
    rslora = any(f.rslora for f in factors.values()) and all(f.rslora or f.shape.rank == 1 for f in factors.values())
    ranks = {path: entry.shape.rank for path, entry in factors.items()}
    alphas = {path: entry.shape.scaling * (ranks[path] ** (0.5 if rslora else 1.0)) for path, entry in factors.items()}
    for path, entry in factors.items():
        if entry.rslora == rslora or ranks[path] == 1:
            alphas[path] = entry.alpha  # as given: the detour through the scaling would round it
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}": value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(path)}": value for path, value in alphas.items() if value != alpha},
        "use_rslora": rslora,
        "lora_dropout": _dropout(model, factors),
        "target_modules": _targets(model, factors),
        "bias": "none",
        "inference_mode": True,
    }


def _task(model: Any) -> str | None:
    """PEFT's word for the kind of model, which decides the class that wraps it."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None


def _dropout(model: nn.Module, paths: Iterable[str]) -> float:
    found = Counter(float(getattr(model.get_submodule(path).lora_dropout, "p", 0.0)) for path in paths)
    common = found.most_common(1)[0][0]
    if len(found) > 1:
        say_once(f"an adapter's file holds one dropout for all layers: {common}, of {sorted(found)} in the model")
    return common


def _targets(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The adapted layers as PEFT matches them: by last name where that names no other module, else by path."""
    chosen = set(paths)
    all_paths = [path for path, _ in model.named_modules()]
    targets = set()
    for path in chosen:
        name = path.rpartition(".")[2]
        alike = {other for other in all_paths if other == name or other.endswith(f".{name}")}
        targets.add(name if alike <= chosen else path)
    return sorted(targets)
