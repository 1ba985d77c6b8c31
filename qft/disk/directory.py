"""Which kind of model a directory holds, and who reads it.

qft.json                                     what `qft.save` wrote: qft/disk/io.py
config.json, quant_method "qft"              what save_pretrained wrote of a qft model: transformers
config.json, quant_method "bitsandbytes"     a 4-bit model of bitsandbytes: qft/exchange/bitsandbytes.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from torch import nn

from ..exchange import bitsandbytes
from ..format import Format, FormatError
from . import io, manifest
from .files import settle
from .skeleton import CONFIG, architecture_of, read_config, transformers_class

Kind = Literal["qft", "transformers", "bitsandbytes"]


def kind_of(directory: str | Path) -> Kind | None:
    """Who wrote the quantized model in a directory; None where there is none. A save that was interrupted is completed.

    Raises:
        FormatError: config.json is damaged.
    """
    directory = Path(directory)
    settle(directory)
    if (directory / manifest.NAME).is_file():
        return "qft"
    if not (directory / CONFIG).is_file():
        return None
    config = read_config(directory)
    said = config.get("quantization_config")
    if isinstance(said, dict) and said.get("quant_method") == manifest.METHOD:
        return "transformers"
    return "bitsandbytes" if bitsandbytes.quantization_of(config) is not None else None


def is_quantized(directory: str | Path) -> bool:
    """Whether `load` opens the model in this directory."""
    return kind_of(directory) is not None


def load(directory: str | Path, model: nn.Module | None = None, requantize: Format | str | None = None) -> nn.Module:
    """Read a quantized model, in eval mode.

    Args:
        directory: written by `qft.save`, by transformers' save_pretrained of a qft model, or by transformers with
            bitsandbytes in 4 bits, which need not be installed.
        model: the skeleton, as in `qft.disk.io.load`, for what `qft.save` wrote of a model that is not transformers'
            own.
        requantize: format for layers of a bitsandbytes model whose blocks straddle rows, as in
            `qft.exchange.bitsandbytes.read`; without it they are refused.

    Returns:
        The model, or the skeleton filled.

    Raises:
        FormatError: a file is missing, damaged or tampered with, holds a dense model, or does not fit the skeleton;
            file and tensor are named.
        ValueError: a skeleton or a format to requantize to for a directory that takes none.
        OSError: there is no such directory, or it cannot be read.
    """
    directory = Path(directory)
    kind = kind_of(directory)
    if requantize is not None and kind != "bitsandbytes":
        raise ValueError(f"requantize={str(requantize)!r} is for bitsandbytes' files, which {directory} does not hold")
    if kind is None or kind == "qft":
        return io.load(directory, model)
    if model is not None:
        raise ValueError(f"{directory} is built from its {CONFIG} alone; leave the model out")
    return bitsandbytes.read(directory, requantize) if kind == "bitsandbytes" else _from_pretrained(directory)


def _from_pretrained(directory: Path) -> nn.Module:
    """What transformers opens by the quantizer that qft registers with it."""
    architecture = architecture_of(directory, read_config(directory))
    kind = transformers_class(architecture)
    if kind is None:
        raise FormatError(f"{directory} holds a {architecture}, which transformers does not have; update transformers")
    try:
        return kind.from_pretrained(directory, local_files_only=True).eval()
    except SafetensorError as error:
        raise FormatError(f"{directory} holds damaged weights ({error}); copy the model again") from None
