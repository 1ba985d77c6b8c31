"""A directory that PEFT wrote, merged into a packed model: quantized again, with the error of each layer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn

from ..adapters.peft_format import CONFIG, WEIGHTS
from ..disk.files import settle
from ..format import FormatError
from ..nn.linear import QuantLinear


def merge_adapter(model: nn.Module, directory: str | Path) -> tuple[nn.Module, dict[str, float]]:
    """Merge an adapter of any of PEFT's methods that have a merge into the weights it changes.

    A packed layer is quantized again in its own format, a dense one gets the sum. A LoRA that a layer has of its own
    goes with the adapter where that began from it (`integrations.peft`), and stays beside it otherwise.

    Args:
        model: with QuantLinears; changed in place.
        directory: `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The model, and ||merged - stored|| / ||merged|| (Frobenius) of each packed layer that was merged, by path.

    Raises:
        FormatError: the adapter is damaged, does not fit the model, or cannot be merged; or a format cannot hold what
            was merged. The model is then no longer the one that was given: load it again.
        OSError: there is no adapter in the directory.
    """
    directory = Path(directory)
    tuned: Any = _attached(model, directory)
    _refuse_tied(tuned, directory)
    changed = {path: layer for path, layer in _tuner_layers(tuned).items() if isinstance(layer, QuantLinear)}
    try:
        merged = tuned.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        path = next(iter(_tuner_layers(tuned)), "the model")  # PEFT takes layers off in their order as it merges them
        raise FormatError(f"{directory} cannot be merged into {path}: {_first_line(error)}") from None
    return merged, {path: layer.init_errors[-1] for path, layer in changed.items()}


def _attached(model: nn.Module, directory: Path) -> PeftModel:
    """The model with the adapter, every tensor of the file in its place and every place filled."""
    config = _config(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT only warns of is an error below
            tuned: Any = get_peft_model(model, config)
            mapping = getattr(model, "_checkpoint_conversion_mapping", {})  # of files older than the architecture
            found = tuned.load_adapter(directory, "default", key_mapping=mapping)
    except SafetensorError as error:
        raise FormatError(f"{directory / WEIGHTS} is damaged ({error}); copy it again, or save it anew") from None
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise FormatError(f"{directory} does not fit this model: {_first_line(error)}") from None
    for name in found.unexpected_keys:
        raise FormatError(f"{directory / WEIGHTS} holds {name}, for which this model has no place; give its own base")
    for name in found.missing_keys:
        raise FormatError(f"{directory / WEIGHTS} holds no {name.replace('.default', '')}; save the adapter anew")
    return tuned  # type: ignore[no-any-return]


def _config(directory: Path) -> PeftConfig:
    settle(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():  # PEFT would look for it on the net
            raise FileNotFoundError(f"{directory} holds no {name}; give an adapter that PEFT saved as safetensors")
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise FormatError(f"{directory / CONFIG} is damaged, or of a newer PEFT; save the adapter anew") from None
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise FormatError(
            f"{directory / CONFIG} describes a {config.peft_type}, which no weight can hold; use it in PEFT"
        )
    return config


def _refuse_tied(tuned: PeftModel, directory: Path) -> None:
    """A dense weight that two modules share must not be merged into: the other's would change with it."""
    for path, layer in _tuner_layers(tuned).items():
        weight = layer._parameters.get("weight")
        owners = [m for m in tuned.modules() if weight is not None and m._parameters.get("weight") is weight]
        if len(owners) > 1:
            raise FormatError(
                f"{directory} changes {path}, whose weight an embedding shares; quantize it (--formats {path}=...), "
                "which makes it a weight of its own, and train on that"
            )


def _tuner_layers(tuned: PeftModel) -> dict[str, nn.Module]:
    """What PEFT's layers are around, by the path it has without them."""
    base = tuned.get_base_model()
    return {path: m.get_base_layer() for path, m in base.named_modules() if isinstance(m, BaseTunerLayer)}


def _first_line(error: Exception) -> str:
    """PEFT's and torch's messages go on for lines; of a list of errors under a title, the first."""
    title, *lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if title.endswith(":") and lines else title
