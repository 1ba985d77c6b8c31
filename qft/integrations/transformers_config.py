"""QftConfig: what `from_pretrained(..., quantization_config=...)` is told, and what config.json keeps of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import init as starts
from ..disk.manifest import METHOD, quantization_config
from ..format import Format
from ..model.surgery import check_start


class QftConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How transformers' `from_pretrained` is to quantize a model, one tensor at a time as it reads them.

        AutoModelForCausalLM.from_pretrained(path, quantization_config=qft.QftConfig("nf2 g64 dq"))

    The layers are those of `qft.quantize_model`, and so are the arguments, under the names that `from_pretrained` has
    for some. Starts that need the layers' activations cannot run while a model is being read: use
    `qft.quantize_model` and `qft.save`, whose directories `from_pretrained` opens without a config.

    Args:
        format: of every layer that `formats` does not name; None leaves them dense.
        init: where codes and adapters start: "plain", "search" or "loftq".
        rank: of the LoRA attached to each layer; 0 attaches none.
        alpha, dropout, rslora: as in `QuantLinear.add_lora`.
        formats: formats by pattern (a path, a last name, or a glob over paths); the first that matches wins.
        modules_to_not_convert: layers to leave dense, by such patterns or as transformers matches them: the beginning
            of a path up to a dot, its end, or a regular expression over its beginning.
        iters: turns of a start that has some.
        layers, buffers: what the layers of a saved model are, by path, and the dtypes of buffers that are not fp32:
            config.json's own entries, not for callers.

    Raises:
        FormatError: a spelling is no format.
        ValueError: the start is unknown, or needs activations, or has no turns and `iters` was given.
        TypeError: another argument was given, or a start that is no name.
    """

    def __init__(
        self,
        format: Format | str | None = None,
        init: str = "plain",
        rank: int = 0,
        alpha: float | None = None,
        formats: Mapping[str, Format | str] | None = None,
        modules_to_not_convert: Iterable[str] | None = None,
        iters: int | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        layers: Mapping[str, Any] | None = None,
        buffers: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        said = quantization_config({}, {})  # a sentence for who reads the file, and the version that wrote it
        if unknown := kwargs.keys() - said.keys():
            raise TypeError(
                f"QftConfig takes no {', '.join(sorted(unknown))}; it takes {', '.join(_ARGUMENTS)}, "
                'as in QftConfig("nf4 g64 dq")'
            )
        if not isinstance(init, str):
            raise TypeError(
                f"init={init!r} is no name, which is all that config.json can keep; call qft.quantize_model with it"
            )
        check_start(init, iters)
        if starts.NEEDS[init] != "none":
            raise ValueError(
                f"init={init!r} needs the layers' activations, which there are none of while a model is read; call "
                "qft.quantize_model(model, fmt, init, calibration=...) and qft.save, then from_pretrained on that"
            )
        self.quant_method: Any = METHOD  # transformers' own methods are an enumeration
        self.open_with, self.version = said["open_with"], said["version"]
        self.format = None if format is None else str(Format.parse(format))
        self.init, self.rank, self.alpha, self.iters = init, rank, alpha, iters
        self.dropout, self.rslora = dropout, rslora
        self.formats = {pattern: str(Format.parse(fmt)) for pattern, fmt in (formats or {}).items()}
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.layers, self.buffers = dict(layers or {}), dict(buffers or {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From config.json's entry; in that of a saved model, what a later qft has added is passed over."""
        if config_dict.get("layers"):
            config_dict = {name: value for name, value in config_dict.items() if name in _ARGUMENTS}
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def start(self) -> dict[str, Any]:
        """The arguments of `quantize_model` that say where each layer starts."""
        names = ("init", "rank", "alpha", "iters", "dropout", "rslora")
        return {name: getattr(self, name) for name in names}


_ARGUMENTS = [name for name in inspect.signature(QftConfig).parameters if name != "kwargs"]
