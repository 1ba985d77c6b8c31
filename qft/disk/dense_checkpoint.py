"""A transformers directory of safetensors, read one tensor at a time: its model without values, and where they are.

Which tensors of the files make which of the model's is transformers' own mapping, renamed keys and merged experts
included. Bytes are read into memory of the caller's, never mapped: mapped pages would count as resident.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..format import FormatError
from ..notices import say_once
from .read_ahead import TensorReader
from .skeleton import empty_model, read_config
from .tensor_file import Place, places

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHOICES = ("auto", "float32", "bfloat16", "float16")
COMPARED = 1 << 24  # bytes of two tensors that are held side by side


@dataclass(frozen=True)
class Entry:
    """One tensor of a model, or several, and the tensors of the files that they are made of.

    Attributes:
        name: the model's first tensor that it makes.
        parts: name in the files, the pattern that it matched (None where it is but renamed), and where it is.
        converter: transformers' WeightConverter; None where the tensor is taken as it is.
    """

    name: str
    parts: tuple[tuple[str, str | None, Place], ...]
    converter: Any = None

    def made(self, model: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The model's tensors by name, of the parts in their order."""
        if self.converter is None:
            return {self.name: tensors[0]}
        converter = copy.deepcopy(self.converter)
        for (key, pattern, _), tensor in zip(self.parts, tensors, strict=True):
            converter.add_tensor(self.name, key, pattern, lambda tensor=tensor: tensor)
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class DenseCheckpoint:
    """A causal language model in a directory, as transformers' from_pretrained would open it, without its values.

    Attributes:
        model: in eval mode; its Parameters on the meta device in the dtype they are to have, tied as they will be.
            Buffers are as its code makes them.
        entries: where the values of each of its Parameters and persistent buffers are, by name, those that the files
            leave out excepted: of tied Parameters one name, of buffers those that its code makes.
        files: the files of tensors, with their sizes in bytes and times in nanoseconds.

    Args:
        directory: written by save_pretrained.
        dtype: one of `CHOICES`; auto is what config.json says.

    Raises:
        OSError: there is no model in the directory.
        ValueError: the dtype is none of `CHOICES`.
        FormatError: a file is missing or damaged, the model is no causal language model or quantized already, or its
            tensors are not those of config.json; the tensor is named.
    """

    def __init__(self, directory: Path, dtype: str = "auto") -> None:
        if dtype not in CHOICES:
            raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(CHOICES)}")
        if not directory.is_dir():
            raise FileNotFoundError(
                f"{directory} is no directory; give one written by save_pretrained or by qft quantize"
            )
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(
                f"{directory} holds no config.json; give a directory written by save_pretrained or qft"
            )
        paths = _weight_files(directory)
        self.files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
        stored = {name: place for path in paths for name, place in places(path).items()}
        self.model: Any = _skeleton(directory, dtype, stored)
        self.entries = _entries(self.model, stored, directory)
        self._untie_different()
        self._refuse_missing(directory)

    def _untie_different(self) -> None:
        """Take apart what config.json ties and the files hold twice, with different values, as transformers does."""
        state = self.model.state_dict(keep_vars=True)
        first: dict[int, str] = {}
        for name, tensor in state.items():
            if name in self.entries and isinstance(tensor, nn.Parameter):
                other = first.setdefault(id(tensor), name)
                if other != name and not self._same(self.entries[other], self.entries[name]):
                    parent, _, leaf = name.rpartition(".")
                    fresh = nn.Parameter(torch.empty_like(tensor), requires_grad=tensor.requires_grad)
                    setattr(self.model.get_submodule(parent), leaf, fresh)
                    self.model.all_tied_weights_keys.pop(name, None)

    def _same(self, one: Entry, other: Entry) -> bool:
        """Whether two entries hold equal values; those that are converted never count as such."""
        (_, _, a), (_, _, b) = one.parts[0], other.parts[0]
        if one.converter or other.converter or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        left, right = bytearray(min(COMPARED, a.nbytes)), bytearray(min(COMPARED, a.nbytes))
        with TensorReader() as reader:
            for start in range(0, a.nbytes, COMPARED):
                stop = min(start + COMPARED, a.nbytes)
                reader.read(a, start, memoryview(left)[: stop - start])
                reader.read(b, start, memoryview(right)[: stop - start])
                if left[: stop - start] != right[: stop - start]:
                    return False
        return True

    def _refuse_missing(self, directory: Path) -> None:
        state = self.model.state_dict(keep_vars=True)
        held = {id(tensor) for name, tensor in state.items() if name in self.entries}
        for name, tensor in state.items():
            if tensor.is_meta and id(tensor) not in held:
                raise FormatError(
                    f"{directory} holds no {name}, which {type(self.model).__name__} needs; copy the directory again"
                )


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        if (directory / ONE).is_file():
            return [directory / ONE]
        old = "; pickled weights are not read, save them with save_pretrained first" * any(directory.glob("*.bin"))
        raise FileNotFoundError(f"{directory} holds neither {ONE} nor {INDEX}{old or '; copy the directory again'}")
    try:
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = []
    if not names or any(Path(name).name != name for name in names):  # a path could lead out of the directory
        raise FormatError(f"{index} is damaged; copy the directory again")
    for name in names:
        if not (directory / name).is_file():
            raise FormatError(f"{directory / name} is missing, which {INDEX} names; copy the directory again")
    return [directory / name for name in names]


def _skeleton(directory: Path, dtype: str, stored: Mapping[str, Place]) -> nn.Module:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    said = read_config(directory)
    if "quantization_config" in said:
        by = said["quantization_config"].get("quant_method", "another library")
        raise FormatError(f"{directory} is quantized already, by {by}; name the dense model")
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    if config.is_encoder_decoder:
        raise FormatError(f"{directory} holds a {config.model_type} encoder-decoder; this command needs a causal model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise FormatError(f"{directory} holds a {config.model_type}, which transformers knows as no causal model")
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    floating = (place.dtype for place in stored.values() if place.dtype.is_floating_point)
    wanted = (config.dtype or next(floating, torch.float32)) if dtype == "auto" else getattr(torch, dtype)
    model: Any = empty_model(directory, kind.__name__, {**said, "dtype": str(wanted).removeprefix("torch.")})
    for pattern, kept in model._get_dtype_plan(wanted).items():
        _keep_dtype(model, pattern, kept)
    model.tie_weights()  # undone while Parameters were taken to the meta device one by one
    return model.eval()  # type: ignore[no-any-return]


def _keep_dtype(model: nn.Module, pattern: str, dtype: torch.dtype) -> None:
    """Give the Parameters that a family keeps in another dtype than its rest that dtype, as transformers does."""
    from transformers.core_model_loading import build_glob_alternation

    named, _, _ = build_glob_alternation([pattern])
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and named.search(f"{path}.{name}"):
                module._parameters[name] = nn.Parameter(parameter.to(dtype), parameter.requires_grad)


def _entries(model: Any, stored: Mapping[str, Place], directory: Path) -> dict[str, Entry]:
    """As transformers' loader does it: rename, then collect what one converter takes together."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state, prefix = model.state_dict(), model.base_model_prefix
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parts: dict[str, list[tuple[str, str | None, Place]]] = {}
    strays = []
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name in state:
            parts.setdefault(name, []).append((key, pattern, stored[key]))
        else:
            strays.append(key)
    entries: dict[str, Entry] = {}
    for name, found in parts.items():
        pattern = found[0][1]
        entry = Entry(name, tuple(found), None if pattern is None else by_pattern[pattern])
        for made, shape in _shapes(entry, model, directory).items():
            if made in state:
                if shape != state[made].shape:
                    raise FormatError(
                        f"{made} in {directory} is {list(shape)}, and {type(model).__name__} as config.json describes "
                        f"it needs {list(state[made].shape)}; copy the directory again"
                    )
                entries[made] = entry
    _say_strays(model, strays, directory)
    return entries


def _shapes(entry: Entry, model: Any, directory: Path) -> dict[str, torch.Size]:
    """What an entry makes, by name."""
    parts = [torch.empty(place.shape, dtype=place.dtype, device="meta") for _, _, place in entry.parts]
    try:
        return {name: tensor.shape for name, tensor in entry.made(model, parts).items()}
    except Exception as error:  # a converter of another package raises what it likes
        raise FormatError(f"{entry.parts[0][0]} in {directory} does not convert to {entry.name} ({error})") from error


def _say_strays(model: Any, strays: Iterable[str], directory: Path) -> None:
    """Name tensors that the model has no place for, those excepted that its family is known to leave behind."""
    known = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    left = [name for name in strays if not any(re.search(pattern, name) for pattern in known)]
    if left:
        more = f" and {len(left) - 1} more tensors" if len(left) > 1 else ""
        say_once(f"{directory} holds {left[0]}{more}, for which {type(model).__name__} has no place: left out")
