"""safetensors files whose every tensor is known by dtype, shape and SHA-256.

Written one tensor at a time, so that saving needs no second copy of a model, and a full disk is the OSError it is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import native
from ..format import FormatError

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
        return cls(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), hashlib.sha256(content_of(tensor)).hexdigest())

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a file, and in it bytes that follow each other, row-major.

    Attributes:
        path: of the file.
        dtype, shape: of the tensor.
        start: its first byte, counted from the beginning of the file.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def refuse_unstorable(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a tensor has no values (meta) or not all (sharded), or a dtype or layout that no file can
    hold; it is named."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):  # torch's DTensor, whose module is slow to import
            raise ValueError(f"{name} is sharded over ranks; save what qft.gather_model(model) gives")
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
    written = {}
    with open(path, "wb") as file:
        file.write(header({name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in order}, metadata))
        for name in order:
            content = content_of(tensors[name])
            file.write(content)
            sha256 = hashlib.sha256(content).hexdigest()
            written[name] = Stored(DTYPE_NAMES[tensors[name].dtype], tuple(tensors[name].shape), sha256)
    return written


def header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the data of a file whose tensors, by dtype and shape, follow each other in the order given.

    Its length is a multiple of 8. Whoever reads the file needs each tensor at a multiple of its element's size.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def places(path: Path) -> dict[str, Place]:
    """Where a file holds its tensors; no tensor is read.

    Raises:
        FormatError: it is no safetensors file, or damaged, or a tensor has a dtype that torch lacks.
        OSError: it cannot be opened.
    """
    try:
        with safe_open(path, "pt"):  # the library checks the header, and that the file holds what it promises
            pass
    except SafetensorError as error:
        raise _damaged(path, error) from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    found = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            if entry["dtype"] not in DTYPES:
                raise FormatError(f"{name} in {path} is {entry['dtype']}, which qft cannot read; convert it to BF16")
            start = 8 + length + entry["data_offsets"][0]
            found[name] = Place(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return found


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
                mapped = file.get_tensor(name)
                tensors[name] = native.empty(*mapped.shape, dtype=mapped.dtype, device=mapped.device).copy_(mapped)
                if hashlib.sha256(content_of(tensors[name])).hexdigest() != wanted.sha256:
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


def content_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order; a view of them where it lies so on the CPU."""
    # a tensor of one or no element counts as contiguous whatever its strides; a view of its bytes asks for 1
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
