"""4-bit checkpoints of transformers and bitsandbytes, read and written without bitsandbytes.

What is read keeps its codes, levels and scales: `layer.dequantize(dtype)` is bitsandbytes' own
`dequantize_4bit`, bit for bit, where dtype is the one that the file says bitsandbytes dequantizes to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..disk.files import settle
from ..disk.skeleton import CONFIG, architecture_of, empty_model, read_config
from ..format import Format, FormatError
from ..model.targets import ANY_FORMAT, Target, find_targets, is_linear, matches, output_head, reads
from ..nn.experts import layout_of
from ..nn.linear import FloatFacingQuantLinear, QuantLinear
from ..nn.packed import Packed
from ..notices import say_once
from . import bitsandbytes_weight as weights
from .bitsandbytes_experts import read_experts
from .checkpoint_files import CheckpointFiles
from .checkpoint_tensors import CheckpointTensors, Rows
from .directory_writer import write_directory
from .loader import Loader

METHOD = "bitsandbytes"  # transformers' quant_method
_FROM_8BIT = "open the model with transformers, call model.dequantize(), save that and quantize it"


# ------------------------------------------------------------------------------------------------------------ read


def read(directory: str | Path, requantize: Format | str | None = None) -> nn.Module:
    """The model in a directory that transformers wrote with `load_in_4bit=True`, in eval mode, on the CPU.

    Args:
        directory: holds config.json and safetensors files.
        requantize: format for the layers whose blocks straddle rows, which qft has no format for: their weight is
            decoded and quantized again, and `qft.report(model)` has the error of each. All other layers stay as stored.

    Returns:
        The transformers model, with a QuantLinear for each quantized layer and QuantExperts for experts that were
        quantized one by one. Formats are nf4 or fp4 with the file's blocksize as group, and f32 (f16, bf16) or dq
        scales as stored. What is dense has the config's dtype, as in `from_pretrained`.

    Raises:
        FormatError: a file is missing or damaged; it holds an 8-bit model, or layers whose blocks straddle rows and
            `requantize` is None; `requantize` spells no format. File and tensor are named.
        OSError: there is no such directory, or it cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no directory; give one written by save_pretrained")
    settle(directory)
    wanted = None if requantize is None else Format.parse(requantize)
    config = read_config(directory)
    _refuse_other_methods(directory, config)
    model = empty_model(directory, architecture_of(directory, config), _dense(config))
    with CheckpointFiles(directory) as files:
        loader = Loader(model)
        quantized = _quantized_weights(directory, files)
        targets = {target.path: target for target, _ in find_targets(model, ANY_FORMAT, (), {}, values=False)}
        widened = _replace(targets, quantized, files, loader, wanted)
        if isinstance(output_head(model), QuantLinear):
            cast(Any, model).config.tie_word_embeddings = False  # tying it to the embedding would undo it
        companions = {name + suffix for name, kind in quantized.items() for suffix in _suffixes(kind)}
        loader.fill(files, [name for name in files if name not in companions])
    for target in targets.values():
        target.module.qft_reason = "not quantized in the file"
    if widened:
        say_once(
            f"{len(widened)} weights of {directory} have double-quantized scales that dq cannot hold; they are kept as "
            f"fp32, {sum(widened) / len(widened):.2f} bits per weight more"
        )
    return model.eval()


def _refuse_other_methods(directory: Path, config: Mapping[str, Any]) -> None:
    said = quantization_of(config)
    if said is None:
        raise FormatError(f"{directory / CONFIG} names no bitsandbytes model; open it with qft.load")
    if said.get("load_in_8bit") or said.get("_load_in_8bit"):
        raise FormatError(
            f"{directory} holds bitsandbytes' 8-bit weights (load_in_8bit), and qft reads 4-bit ones; {_FROM_8BIT}"
        )


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a bitsandbytes model's config.json; None for other models."""
    said = config.get("quantization_config")
    if not isinstance(said, dict):
        return None
    named = said.get("quant_method")  # which the first of these checkpoints leave out
    unnamed = named is None and any(said.get(f"load_in_{bits}bit") for bits in (4, 8))
    return said if named == METHOD or unnamed else None


def _dense(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without its quantization: what is made of it is no bitsandbytes model."""
    return {name: value for name, value in config.items() if name != "quantization_config"}


def _suffixes(quant_type: str) -> tuple[str, ...]:
    return ("", *(f".{name}" for name in weights.COMPANIONS), f".{weights.STATE}{quant_type}")


def _quantized_weights(directory: Path, files: CheckpointFiles) -> dict[str, str]:
    """nf4 or fp4 of each quantized weight by name."""
    found: dict[str, str] = {}
    for quant_type in weights.TYPES:
        ending = f".weight.{weights.STATE}{quant_type}"
        for key in files:
            if key.endswith(ending):
                name = key.removesuffix(ending) + ".weight"
                if name in found:
                    raise FormatError(f"{files.where(name)} is said to be both nf4 and fp4; copy the file again")
                found[name] = quant_type
    for key in files:
        name, _, ending = key.partition(".weight.")
        theirs = ending in weights.COMPANIONS or ending.startswith(weights.STATE)
        if theirs and f"{name}.weight" not in found:
            raise FormatError(f"{files.where(key)} belongs to no 4-bit weight; copy the file again")
        if key.endswith(".SCB"):
            raise FormatError(f"{files.where(key)} is of an 8-bit weight, and qft reads 4-bit ones; {_FROM_8BIT}")
    if not found:
        raise FormatError(
            f"{directory} says that it is quantized with bitsandbytes and holds no 4-bit weight; take the "
            f"quantization_config out of {CONFIG} and quantize the dense model"
        )
    return found


def _replace(
    targets: Mapping[str, Target],
    quantized: Mapping[str, str],
    files: CheckpointFiles,
    loader: Loader,
    requantize: Format | None,
) -> list[float]:
    """Put packed layers where the model's dense ones are.

    Returns:
        Of each weight whose nested scales become fp32, how many bits per weight more it takes.
    """
    fused: dict[str, dict[str, dict[str, weights.State]]] = {}  # by experts, projection and name
    widened: list[float] = []
    for name, quant_type in quantized.items():
        place, pattern = loader.place(name)
        path, _, leaf = place.rpartition(".")
        state, target = weights.read_state(files, name, quant_type), targets.get(path)
        if target is not None and pattern is None and is_linear(target.module):
            layer = _linear(files, name, state, target, requantize)
            _put(layer, target)
            widened += _widening(state, layer)
        elif target is not None and pattern is not None and layout_of(target.module) and leaf in target.weights:
            fused.setdefault(path, {}).setdefault(leaf, {})[name] = state
        else:
            raise FormatError(
                f"{files.where(name)} is a quantized weight, for which {type(loader.model).__name__} has no layer; "
                "dequantize it with the transformers that wrote it, and quantize the dense model"
            )
    for path, parts in fused.items():
        experts = read_experts(files, targets[path], parts, loader, requantize)
        _put(experts, targets[path])
        for states in parts.values():
            widened += [bits for state in states.values() for bits in _widening(state, experts)]
    return widened


def _linear(
    files: CheckpointFiles, name: str, state: weights.State, target: Target, requantize: Format | None
) -> QuantLinear:
    """The layer in place of a dense one, whose bias, which has no values yet, it keeps."""
    shape = tuple(target.weight.shape)
    if shape != state.shape:
        raise FormatError(
            f"{files.where(name)} is {list(state.shape)}, and {CONFIG} gives the layer {list(shape)}; copy both again"
        )
    q, error, _ = weights.read(files, name, state, requantize)
    layer = QuantLinear.from_quantized(q, target.module.bias)
    layer.init_errors = (error,) if state.straddles else ()
    layer.dense_nbytes = state.shape[0] * state.shape[1] * state.dtype.itemsize
    if reads(target, r"\.weight\.dtype\b"):
        FloatFacingQuantLinear.adopt(layer, target.weight.dtype)
    return layer


def _put(layer: nn.Module, target: Target) -> None:
    for parent, attribute in target.places:
        setattr(parent, attribute, layer)


def _widening(state: weights.State, layer: Packed) -> list[float]:
    """Bits per weight that fp32 scales take beyond the nested ones they come from; nothing where they do not."""
    kept = layer.format.scale == "dq" or not state.nested_blocksize or state.straddles
    return [] if kept else [(32 - 8 - 32 / state.nested_blocksize) / state.blocksize]


# ----------------------------------------------------------------------------------------------------------- write


def write(model: nn.Module, directory: str | Path, tokenizer: Any = None, *, dense: Iterable[str] = ()) -> None:
    """Write a model whose layers are nf4 or fp4 as transformers with bitsandbytes saves it.

    Codes and scales are the layers' own: dq stays double-quantized, fp16 and bf16 scales become fp32 of the same value.

    Args:
        model: a transformers model; it stays as it is.
        directory: new, or empty.
        tokenizer: a transformers tokenizer to save beside it.
        dense: quantized layers to write dequantized instead: each a path, a last name or a glob over paths.

    Raises:
        FormatError: a layer has other levels, a group that is no block of bitsandbytes', an attached LoRA, or a name
            by which transformers would take it for another; it is named, with the way out, and nothing is written.
        ValueError: no layer is left to pack, `dense` names none, or it is no transformers model.
        FileExistsError: the directory holds something already.
        OSError: the disk is full or the directory cannot be written.
    """
    checkpoint = CheckpointTensors(model)
    packed = {name: value for name, value in checkpoint.tensors.items() if isinstance(value, Rows)}
    patterns = tuple(dense)
    for pattern in patterns:
        if not any(matches(rows.source.path, pattern) for rows in packed.values()):
            raise ValueError(f"{pattern!r} names no quantized layer of {type(model).__name__}")
    kept = {
        name: rows
        for name, rows in packed.items()
        if not any(matches(rows.source.path, pattern) for pattern in patterns)
    }
    if not kept:
        raise ValueError(f"{type(model).__name__} holds no quantized layer to pack; use qft.exchange.dense")
    for rows in kept.values():
        _refuse_layer(rows)
    paths = {rows.source.path for rows in kept.values()}
    left = sorted({*checkpoint.linears} - paths)
    _refuse_skipped(model, paths, left)
    own = (value.dtype for value in checkpoint.tensors.values() if isinstance(value, Tensor))
    dtype = next((each for each in own if each in weights.DTYPES.values()), torch.float32)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, value in checkpoint.tensors.items():
            if name in kept:
                for suffix, tensor in weights.stored(kept[name].source.weight, dtype).items():
                    yield name + suffix, tensor.detach()
            else:
                yield name, value.dequantize(dtype) if isinstance(value, Rows) else value.detach()

    first = next(iter(kept.values())).source.weight.format
    write_directory(model, directory, tokenizer, tensors(), _quantization(first, dtype, left), dtype=dtype)


def _quantization(fmt: Format, dtype: torch.dtype, left: list[str]) -> dict[str, Any]:
    """transformers' BitsAndBytesConfig. Blocksize, levels and nesting are each weight's own; `fmt` stands for them."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": weights.type_of(fmt),
        "bnb_4bit_use_double_quant": fmt.scale == "dq",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": left,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": METHOD,
    }


def _refuse_layer(rows: Rows) -> None:
    """Raise FormatError where bitsandbytes' files have no place for a layer."""
    path, q = rows.source.path, rows.source.weight
    dense = "name it in dense to write it dequantized"
    if rows.source.kind not in ("linear", "conv1d") or rows.rows.flatten().tolist() != list(range(q.shape[0])):
        raise FormatError(f"{path} is no linear layer in the checkpoint, all that bitsandbytes packs; {dense}")
    if rows.has_adapter:
        raise FormatError(
            f"{path} carries a LoRA, which bitsandbytes' files do not hold; export it with qft.save_adapter and call "
            f"remove_lora(), or {dense} with it merged"
        )
    if weights.type_of(q.format) is None:
        raise FormatError(
            f"{path} stores {q.format}, and bitsandbytes has nf4 and fp4 alone; quantize to one, or {dense}"
        )
    if not weights.blocksize_of(q):
        sizes = ", ".join(map(str, weights.BLOCKSIZES))
        raise FormatError(
            f"{path} stores {q.format} over in_features={q.shape[1]}, and bitsandbytes' blocks are {sizes} weights, "
            f"counted on from row to row; quantize it in groups of one of these that divides in_features, or {dense}"
        )


def _refuse_skipped(model: Any, packed: set[str], dense: list[str]) -> None:
    """Raise FormatError for a packed layer that transformers, told of the dense ones, would leave dense."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    own = [*(model._keep_in_fp32_modules or ())]
    for path in sorted(packed):
        for pattern in (*own, *dense):
            if not should_convert_module(path, [pattern]):
                reason = "keeps in fp32" if pattern in own else "must leave dense"
                raise FormatError(
                    f"{path} is taken by the name {pattern}, which transformers {reason} beside bitsandbytes' layers; "
                    "name it in dense to write it dequantized"
                )
