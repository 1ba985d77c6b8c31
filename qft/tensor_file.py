"""safetensors files whose every tensor is known by dtype, shape and SHA-256.

Written one tensor at a time, so that saving needs no second copy of a model, and a full disk is the OSError it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .format import FormatError

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_ALIGNMENT = 8  # bytes: where safetensors starts the data
_AGAIN = "copy the file again, or save it anew"


@dataclass(frozen=True)
class Stored:
    """What a tensor in a file must be: dtype as safetensors names it, shape, SHA-256 of its bytes in hex."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """The description of a tensor as it is now."""
        return cls(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), hashlib.sha256(_bytes(tensor)).hexdigest())

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def refuse_unstorable(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a tensor has no values (meta), or a dtype or layout that no file can hold; it is named."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device, which holds no values; load or initialise it before saving"
            )
        if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided:
            kind = f"{tensor.dtype}, {tensor.layout}"
            raise ValueError(f"{name} is {kind}; a file holds dense tensors of {', '.join(DTYPES)}, convert it first")


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Stored]:
    """Write a safetensors file; what it holds, by name.

    Raises:
        ValueError: as `refuse_unstorable`.
        OSError: the disk is full, or the place cannot be written.
    """
    refuse_unstorable(tensors)
    # widest elements first, so that each tensor starts at a multiple of its element's size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        kind, shape = DTYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    written = {}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            content = _bytes(tensors[name])
            file.write(content)
            sha256 = hashlib.sha256(content).hexdigest()
            written[name] = Stored(DTYPE_NAMES[tensors[name].dtype], tuple(tensors[name].shape), sha256)
    return written


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header.

    Raises:
        FormatError: it is no safetensors file, or damaged. OSError: it cannot be opened.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from None


def read(path: Path, expected: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The tensors of a file, which must be the expected ones and no others; in memory of their own, on the CPU.

    Raises:
        FormatError: the file is damaged, or a tensor is missing, unknown, or not what it should be; both are named.
        OSError: the file cannot be opened.
    """
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            _refuse_difference(path, file.keys(), expected)
            for name, wanted in expected.items():
                view = file.get_slice(name)
                kind, shape = view.get_dtype(), tuple(view.get_shape())
                if (kind, shape) != (wanted.dtype, wanted.shape):
                    raise FormatError(f"{name} in {path} is {kind} {list(shape)} and must be {wanted}; {_AGAIN}")
            for name, wanted in expected.items():
                # a copy: the library maps the file, and an aligned tensor of our own outlives what becomes of it
                tensors[name] = file.get_tensor(name).clone()
                if hashlib.sha256(_bytes(tensors[name])).hexdigest() != wanted.sha256:
                    raise FormatError(f"{name} in {path} has changed since it was written; {_AGAIN}")
    except SafetensorError as error:
        raise _damaged(path, error) from None
    return tensors


def _refuse_difference(path: Path, names: Iterable[str], expected: Iterable[str]) -> None:
    held, wanted = set(names), set(expected)
    if missing := sorted(wanted - held):
        raise FormatError(f"{path} lacks {_some(missing)}; {_AGAIN}")
    if unknown := sorted(held - wanted):
        raise FormatError(f"{path} holds {_some(unknown)}, which does not belong there; {_AGAIN}")


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def _damaged(path: Path, error: SafetensorError) -> FormatError:
    return FormatError(f"{path} is damaged ({error}); {_AGAIN}")


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order."""
    # a tensor of one or no element counts as contiguous whatever its strides; a view of its bytes asks for 1
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
