"""A transformers model without values, as its config.json describes it.

Built by the name of its class, never through Auto classes: those may run code that a config names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..format import FormatError

CONFIG = "config.json"
GENERATION = "generation_config.json"


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
        FormatError: there is none, or it is damaged.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FormatError(f"{directory} holds no {CONFIG}; give a directory written by save_pretrained or qft.save")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise FormatError(f"{path} is damaged; copy the directory again")
    return config


def architecture_of(directory: Path, config: dict[str, Any]) -> str:
    """The class that config.json says the model is of, by name. Raises FormatError where it says none."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise FormatError(f"{directory / CONFIG} does not say of which class the model is; copy the directory again")
    return names[0]


def transformers_class(name: str) -> Any:
    """The model class of that name in transformers, or None."""
    import transformers

    kind = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def empty_model(
    directory: Path,
    architecture: str,
    config: dict[str, Any],
    *,
    generation: bool = True,
    dtype: torch.dtype | None = None,
    way_out: str = "copy the directory again",
) -> nn.Module:
    """A model whose Parameters are on the meta device; buffers are as its code makes them.

    Args:
        directory: holds the files, as messages name it.
        architecture: the class, as config.json names it.
        config: what config.json holds.
        generation: read generation_config.json too, if it is there.
        dtype: of Parameters, and of the buffers that the model's code gives none of their own; None is the config's,
            or torch's default where it names none.

    Raises:
        FormatError: transformers has no such class, or the files do not build it.
    """
    import transformers
    from accelerate import init_empty_weights

    kind = transformers_class(architecture)
    if kind is None:
        raise FormatError(
            f"{directory} holds a {architecture}, which transformers {transformers.__version__} does not have; "
            "update transformers, or call load(directory, model)"
        )
    default = torch.get_default_dtype()
    try:
        made = kind.config_class.from_dict(config)
        torch.set_default_dtype(dtype or made.dtype or default)
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            model = kind(made)
        if generation and (directory / GENERATION).is_file():
            entries = json.loads((directory / GENERATION).read_bytes())
            model.generation_config = transformers.GenerationConfig.from_dict(entries)
    except Exception as error:  # a constructor of another package raises what it likes
        raise FormatError(f"{directory / CONFIG} builds no {architecture} ({error}); {way_out}") from error
    finally:
        torch.set_default_dtype(default)
    return model
