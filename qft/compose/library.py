"""A folder of adapters to compose: one directory each, of one rank and the same targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..adapters.peft_format import CONFIG, Factors, LoraShape, describe_adapter, read_factors
from ..disk.files import settle
from ..format import FormatError


@dataclass(frozen=True)
class Library:
    """Adapters that can be added up factor by factor. Their values are read when `read` asks for them.

    Attributes:
        directory: the folder.
        adapters: by name (that of the directory, sorted), the shape of every adapted layer by path.
    """

    directory: Path
    adapters: dict[str, dict[str, LoraShape]]

    @classmethod
    def open(cls, directory: str | Path) -> Library:
        """Describe the adapters of a folder: every directory in it that holds an adapter_config.json.

        Raises:
            FormatError: an adapter is damaged or no plain LoRA, or two differ in targets, ranks or features.
            OSError: there is no such folder, or no adapter in it.
        """
        folder = Path(directory)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no directory; give a folder that holds adapters, one directory each")
        for place in folder.iterdir():
            settle(place)  # a save that was interrupted at its end
        places = sorted(place for place in folder.iterdir() if (place / CONFIG).is_file())
        if not places:
            raise FileNotFoundError(f"{folder} holds no adapters; write some with qft.save_adapter, one directory each")
        library = cls(folder, {place.name: describe_adapter(place) for place in places})
        library._refuse_differences()
        return library

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters, in the order of their weights."""
        return tuple(self.adapters)

    @property
    def layers(self) -> dict[str, LoraShape]:
        """The first adapter's layers: the others differ from them in alpha at most."""
        return next(iter(self.adapters.values()))

    def read(self, name: str) -> dict[str, Factors]:
        """One adapter's factors by path, on the CPU."""
        return read_factors(self.directory / name)

    def _refuse_differences(self) -> None:
        first, way_out = self.names[0], f"keep adapters of one kind in {self.directory}"
        for name, layers in self.adapters.items():
            if differing := sorted(layers.keys() ^ self.layers.keys()):
                has, lacks = (name, first) if differing[0] in layers else (first, name)
                raise FormatError(f"adapter {has!r} adapts {differing[0]} and adapter {lacks!r} does not; {way_out}")
            for path, shape in layers.items():
                here = self.layers[path]
                if shape.rank != here.rank:
                    raise FormatError(
                        f"adapter {name!r} has rank {shape.rank} at {path}, adapter {first!r} {here.rank}; {way_out}"
                    )
                theirs, ours = [shape.out_features, shape.in_features], [here.out_features, here.in_features]
                if theirs != ours:
                    raise FormatError(
                        f"adapter {name!r} has features {theirs} at {path}, adapter {first!r} {ours}; {way_out}"
                    )
