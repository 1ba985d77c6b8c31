"""Safetensors files that are written tensor by tensor, front to back, by a process that may be killed at any moment.

What each file will hold is laid out first: names, shapes and places, so that the header can be written before the data
and the space needed is known. Of each tensor and of each file a SHA-256 is taken on the way, on threads of their own.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from . import tensor_file
from .manifest import WEIGHTS, Shard

ALIGNMENT = 8  # bytes: at whose multiples the tensors lie that are written in order
SMALL = 1 << 20  # bytes: below this a thread costs more than it saves
BLOCK = 1 << 24  # bytes that are read at a time
UNWRITTEN = 1 << 26  # bytes that may wait in memory for the disk
Described = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """One file to be written.

    Attributes:
        name: of the file.
        head: its first bytes.
        spans: first byte and the byte after the last of each tensor, in the order of the file.
        ordered: the byte after the last tensor that is written in the order of the file; those behind it are small and
            may come at any time.
        size: bytes of the file.
    """

    name: str
    head: bytes
    spans: dict[str, tuple[int, int]]
    ordered: int
    size: int


def lay_out(groups: Iterable[Mapping[str, Described]], shard_bytes: int) -> list[Layout]:
    """Files of at most `shard_bytes` bytes of tensors, or of one group where that alone is larger.

    Args:
        groups: tensors by name, each group in one file; they will be written in this order.
    """
    files: list[dict[str, Described]] = [{}]
    room = shard_bytes
    for group in groups:
        size = sum(_nbytes(described) for described in group.values())
        if size > room and files[-1]:
            files.append({})
            room = shard_bytes
        files[-1] |= group
        room -= size
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    return [_layout(name, file) for name, file in zip(names if len(files) > 1 else [WEIGHTS], files, strict=True)]


def _nbytes(described: Described) -> int:
    return math.prod(described[1]) * described[0].itemsize


def _layout(name: str, tensors: Mapping[str, Described]) -> Layout:
    # tensors of whole multiples of 8 bytes leave each other aligned; the rest goes behind them, widest elements first
    ordered = [one for one, described in tensors.items() if not _nbytes(described) % ALIGNMENT]
    rest = sorted(tensors.keys() - set(ordered), key=lambda one: (-tensors[one][0].itemsize, one))
    head = tensor_file.header({one: tensors[one] for one in (*ordered, *rest)}, {"format": "pt"})
    spans, end = {}, len(head)
    for one in (*ordered, *rest):
        start, end = end, end + _nbytes(tensors[one])
        spans[one] = start, end
    return Layout(name, head, spans, max((spans[one][1] for one in ordered), default=len(head)), end)


class ShardWriter:
    """A context that writes the files of a layout in a folder, where some may stand in part.

    Tensors come in the order of the layout, a piece at a time.

    Args:
        folder: there already.
        layouts: of the files.
    """

    def __init__(self, folder: Path, layouts: Iterable[Layout]) -> None:
        self.folder = folder
        self._homes = {name: layout for layout in layouts for name in layout.spans}
        self._left = {layout.name: len(layout.spans) for layout in self._homes.values()}
        self._at = {name: layout.spans[name][0] for name, layout in self._homes.items()}
        self._tensor: Any = hashlib.sha256()
        self._file: int | None = None
        self._now: Layout | None = None
        self._whole: Any = hashlib.sha256()
        self._unsynced = 0
        self._digests: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(2, "qft-sha256")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def write(self, name: str, piece: memoryview) -> str:
        """Write the next bytes of a tensor; its SHA-256 in hex with the last of them, nothing before.

        Raises:
            ValueError: there are more bytes than the layout has room for.
            OSError: the disk is full, or the place cannot be written.
        """
        layout = self._homes[name]
        if self._at[name] + len(piece) > layout.spans[name][1]:
            raise ValueError(f"{name} is longer than the {_length(layout, name)} bytes laid out for it")
        file = self._opened(layout)
        hashing = self._hashed(layout, name, piece)
        self._write_at(file, self._at[name], piece)
        for update in hashing:
            update.result()
        return self._advanced(layout, name, len(piece))

    def recovered(self, sha256: Mapping[str, str]) -> bool:
        """Take tensors that an earlier writer wrote as they are in the file, if they are what they were.

        Args:
            sha256: of the tensors, in hex, by name; the next in the order of the layout.

        Returns:
            Whether all of them are; otherwise they are to be written again.
        """
        for name, wanted in sha256.items():
            if name not in self._homes or not self._is_there(name, wanted):
                return False
        for name in sha256:
            layout = self._homes[name]
            for block in self._blocks(layout, *layout.spans[name]):
                self._hashed(layout, name, block, now=True)
                self._advanced(layout, name, len(block))
            if not _length(layout, name):
                self._advanced(layout, name, 0)
        return True

    def shards(self) -> dict[str, Shard]:
        """The files, all of them written."""
        names: dict[str, list[str]] = {}
        for name, layout in self._homes.items():
            names.setdefault(layout.name, []).append(name)
        return {file: Shard(self._digests[file], tuple(held)) for file, held in names.items()}

    def _opened(self, layout: Layout) -> int:
        if self._now is not layout or self._file is None:
            self._now = layout
            self._file = os.open(self.folder / layout.name, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            os.truncate(self._file, layout.size)
            self._write_at(self._file, 0, memoryview(layout.head))
            self._whole = hashlib.sha256(layout.head)
        return self._file

    def _is_there(self, name: str, sha256: str) -> bool:
        layout = self._homes[name]
        path = self.folder / layout.name
        if not path.is_file() or path.stat().st_size != layout.size:
            return False
        found = hashlib.sha256()
        self._opened(layout)
        for block in self._blocks(layout, *layout.spans[name]):
            found.update(block)
        return found.hexdigest() == sha256

    def _hashed(self, layout: Layout, name: str, piece: memoryview, now: bool = False) -> list[Any]:
        """Begin to take a piece into the checksums."""
        if self._at[name] == layout.spans[name][0]:
            self._tensor = hashlib.sha256()
        sums = [self._tensor, *([self._whole] if layout.spans[name][1] <= layout.ordered else [])]
        if not now and len(piece) >= SMALL:
            return [self._pool.submit(one.update, piece) for one in sums]
        for one in sums:
            one.update(piece)
        return []

    def _advanced(self, layout: Layout, name: str, length: int) -> str:
        self._at[name] += length
        self._unsynced += length
        if self._at[name] < layout.spans[name][1]:
            return ""
        sha256 = str(self._tensor.hexdigest())
        self._left[layout.name] -= 1
        if self._unsynced >= UNWRITTEN or not self._left[layout.name]:
            self._settle()
        if not self._left[layout.name]:
            self._end(layout)
        return sha256

    def _settle(self) -> None:
        """Wait for the disk: bytes that pile up in memory would all be waited for at the end."""
        if self._file is not None:
            getattr(os, "fdatasync", os.fsync)(self._file)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        self._unsynced = 0

    def _end(self, layout: Layout) -> None:
        for block in self._blocks(layout, layout.ordered, layout.size):
            self._whole.update(block)
        self._digests[layout.name] = self._whole.hexdigest()
        if self._file is not None:
            os.close(self._file)
        self._file = self._now = None

    def _blocks(self, layout: Layout, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes of a file that is open."""
        with open(self.folder / layout.name, "rb") as file:
            file.seek(start)
            for at in range(start, stop, BLOCK):
                yield memoryview(file.read(min(BLOCK, stop - at)))

    def _write_at(self, file: int, at: int, piece: memoryview) -> None:
        os.lseek(file, at, os.SEEK_SET)
        while len(piece):
            written = os.write(file, piece)
            piece = piece[written:]


def _length(layout: Layout, name: str) -> int:
    return layout.spans[name][1] - layout.spans[name][0]
