"""A checkpoint's dense tensors into a model part of which is packed already, by transformers' own loading.

Names of older checkpoints, fused experts, tied weights and dtypes are as in from_pretrained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..disk.skeleton import CONFIG
from ..format import FormatError
from ..nn.packed import Packed
from ..notices import say_once
from .checkpoint_files import CheckpointFiles

_FLOATS = ("F64", "F32", "F16", "BF16")


class Loader:
    """
    Args:
        model: a transformers model whose Parameters are on the meta device, before any layer of it is replaced.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model = model
        self._mapping: list[Any] = get_model_conversion_mapping(model)
        self._places = model.state_dict()

    def place(self, name: str) -> tuple[str, str | None]:
        """The name in the model of what a tensor of the checkpoint goes to, and the pattern of the converter that makes
        it of several; None where it is taken as it is."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        if name in self._places:
            return name, None
        renamings = [rule for rule in self._mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._mapping if isinstance(rule, WeightConverter)]
        prefix = self.model.base_model_prefix
        return rename_source_key(name, renamings, converters, prefix, self._places)

    def fuse(self, files: CheckpointFiles, parts: Mapping[str, Tensor]) -> Tensor:
        """What a converter makes of tensors that go to one place, by their names in the checkpoint.

        Raises:
            FormatError: it makes nothing of them.
        """
        from transformers.core_model_loading import WeightConverter, dot_natural_key

        names = sorted(parts, key=dot_natural_key)
        place, first = self.place(names[0])
        converters = (rule for rule in reversed(self._mapping) if isinstance(rule, WeightConverter))
        converter: Any = copy.deepcopy(next(rule for rule in converters if first in rule.source_patterns))
        try:
            for name in names:
                converter.add_tensor(place, name, self.place(name)[1], lambda tensor=parts[name]: tensor)
            made = converter.convert(place, model=self.model, config=self.model.config)[place]
        except Exception as error:  # a converter of another package raises what it likes
            where = files.where(names[0])
            raise FormatError(f"{where} and its like make no {place} ({error}); copy the directory again") from error
        return made[0] if isinstance(made, list) else made

    def fill(self, files: CheckpointFiles, names: list[str]) -> None:
        """Give the model's dense tensors their values.

        Raises:
            FormatError: one is missing, of another shape, or holds no floating numbers where the model does.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        for name in names:
            kind, place = files.kind(name)[0], self._places.get(self.place(name)[0])
            if kind not in _FLOATS and (place is None or place.is_floating_point()):
                raise FormatError(
                    f"{files.where(name)} is {kind}, and the model holds floating numbers there; copy the file again"
                )
        dtype = self.model.config.dtype or torch.float32
        plan = self.model._get_dtype_plan(dtype)
        config = LoadStateDictConfig(dtype=dtype, dtype_plan=plan, weight_mapping=self._mapping)
        tensors = {name: files.read(name) for name in names}
        info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        packed = self._packed()
        for name in sorted(packed - info.missing_keys):
            raise FormatError(f"{files.directory} holds {name} beside the weight it would replace; copy it again")
        info.missing_keys -= packed
        self._refuse_misfits(files, info)
        self.model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=True)
        self.model._adjust_missing_and_unexpected_keys(info)
        if info.missing_keys:
            raise FormatError(
                f"{files.directory} holds no {min(info.missing_keys)}, which the model needs; copy the directory again"
            )
        if info.unexpected_keys:
            some = sorted(info.unexpected_keys)
            say_once(f"{files.directory} holds {len(some)} tensors that the model has no place for, such as {some[0]}")

    def _packed(self) -> set[str]:
        """Names of the tensors of packed weights: they have their values."""
        return {
            f"{path}.{name}"
            for path, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, Packed)
            for name in (*module.stored, "weight_format")
            if getattr(module, name, None) is not None
        }

    def _refuse_misfits(self, files: CheckpointFiles, info: Any) -> None:
        if info.mismatched_keys:
            name, theirs, ours = sorted(info.mismatched_keys, key=str)[0]
            raise FormatError(
                f"{name} in {files.directory} is {list(theirs)}, and {CONFIG} gives the model {list(ours)}; "
                "copy both again"
            )
        if info.conversion_errors:
            name, error = next(iter(info.conversion_errors.items()))
            raise FormatError(f"{name} in {files.directory} cannot be made ({error}); copy the directory again")
