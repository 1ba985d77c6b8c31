"""Bytes of tensors read ahead of whoever needs them, into buffers that are used again; nothing is mapped."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

from ..format import FormatError
from .tensor_file import Place

ALIGNMENT = 64  # bytes: at whose multiples tensors lie in a buffer
BUFFERS = 4  # two whose tensors are in use, one that is being read, one that waits for either
Span = tuple[Place, int, int]  # of a tensor: first byte, and the byte after the last
Loaded = tuple[list[Tensor], Callable[[], None]]


class TensorReader:
    """A context that reads bytes of tensors; files stay open inside it."""

    def __init__(self) -> None:
        self._files: dict[Path, io.FileIO] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, place: Place, start: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `start` on.

        Raises:
            FormatError: the file has become shorter than it was. OSError: it cannot be read.
        """
        if place.path not in self._files:
            self._files[place.path] = io.FileIO(place.path)
        file, at = self._files[place.path], 0
        file.seek(place.start + start)
        while at < len(into):
            got = file.readinto(into[at:])
            if not got:
                raise FormatError(f"{place.path} ends before its tensors do; copy the file again")
            at += got
        if hasattr(os, "posix_fadvise"):  # each byte is read once: the page cache is for others
            os.posix_fadvise(file.fileno(), place.start + start, at, os.POSIX_FADV_DONTNEED)


class ReadAhead:
    """Reads on a thread, in order, while the one before is in use.

    Iterating gives for each element of `reads` its tensors, in the files' dtypes, flat where a span is part of one; and
    what to call once nobody needs them. Errors are those of `TensorReader.read`.

    Args:
        reads: what is read together; memory is that of the longest, `BUFFERS` times.
    """

    def __init__(self, reads: Sequence[Sequence[Span]]) -> None:
        self._reads = reads
        longest = max((sum(map(_room, spans)) for spans in reads), default=0)
        self._free: SimpleQueue[Tensor | None] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(torch.empty(longest, dtype=torch.uint8))

    def __iter__(self) -> Generator[Loaded, None, None]:
        waiting: deque[Future[Loaded]] = deque()
        with TensorReader() as files, ThreadPoolExecutor(1, "qft-read") as pool:
            try:
                for spans in self._reads:
                    waiting.append(pool.submit(self._load, spans, files))
                    if len(waiting) == BUFFERS:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._free.put(None)  # for a read that waits for a buffer: nobody wants it any more

    def _load(self, spans: Sequence[Span], files: TensorReader) -> Loaded:
        if not spans:
            return [], lambda: None
        buffer = self._free.get()
        if buffer is None:
            return [], lambda: None
        tensors, at = [], 0
        for place, start, stop in spans:
            part = buffer[at : at + stop - start]
            files.read(place, start, part.numpy().data)
            flat = part.view(place.dtype)
            tensors.append(flat.view(place.shape) if stop - start == place.nbytes else flat)
            at += _room((place, start, stop))
        return tensors, lambda: self._free.put(buffer)


def _room(span: Span) -> int:
    """Bytes that a span takes in a buffer."""
    return -(-(span[2] - span[1]) // ALIGNMENT) * ALIGNMENT
