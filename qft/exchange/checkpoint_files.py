"""The tensors of a transformers checkpoint, in one safetensors file or several, each read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..format import FormatError

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class CheckpointFiles:
    """A context: inside it the files are open.

    Raises:
        FormatError: a file is missing or damaged, or lacks what the index says it holds. OSError: one cannot be opened.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open = ExitStack()
        self._homes: dict[str, tuple[Path, Any]] = {}

    def __enter__(self) -> CheckpointFiles:
        with ExitStack() as stack:
            for path, listed in self._files().items():
                try:
                    file = stack.enter_context(safe_open(path, "pt"))
                except SafetensorError as error:
                    raise FormatError(f"{path} is damaged ({error}); copy the file again") from None
                held = set(file.keys())
                for name in sorted(held if listed is None else listed):
                    if name not in held:
                        raise FormatError(f"{path} lacks {name}, which {INDEX} says it holds; copy the file again")
                    self._homes[name] = path, file
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def where(self, name: str) -> str:
        """`name in file`, for a message."""
        return f"{name} in {self._homes[name][0]}" if name in self else f"{name} in {self.directory}"

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """dtype as safetensors names it, and shape; nothing is read."""
        view = self._homes[name][1].get_slice(name)
        return view.get_dtype(), tuple(view.get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in memory of its own: the library maps the file, which may change later."""
        try:
            return self._homes[name][1].get_tensor(name).clone()
        except (SafetensorError, ValueError, TypeError, AttributeError) as error:  # such as a dtype that torch has not
            raise FormatError(f"{self.where(name)} cannot be read ({error}); copy the file again") from None

    def _files(self) -> dict[Path, list[str] | None]:
        """The files and what an index says of each; None is all that is there."""
        index = self.directory / INDEX
        if not index.is_file():
            if (self.directory / ONE).is_file():
                return {self.directory / ONE: None}
            pickled = any(self.directory.glob("*.bin"))
            way_out = "save the model anew, for pickles are not read" if pickled else "copy the directory again"
            raise FormatError(f"{self.directory} holds neither {ONE} nor {INDEX}; {way_out}")
        try:
            listing = json.loads(index.read_bytes())["weight_map"].items()
            names = [(name, home) for name, home in listing if type(home) is str and Path(home).name == home]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            names = listing = []
        if not names or len(names) < len(listing):  # a path could lead out of the directory
            raise FormatError(f"{index} is damaged; copy the directory again")
        files: dict[Path, list[str] | None] = {}
        for name, home in names:
            path = self.directory / home
            if not path.is_file():
                raise FormatError(f"{path} is missing, which {INDEX} names; copy the directory again")
            held = files.setdefault(path, [])
            if held is not None:
                held.append(name)
        return files
