"""`python -m qft.compiler OUT --isa scalar avx2`: write the ahead-of-time set and the CMake list that builds it."""

from __future__ import annotations

import argparse
from pathlib import Path

from .emit import FLAGS, ISA_FLAGS, built_codes, emit, emit_registry, symbol


def write_if_changed(path: Path, text: str) -> None:
    """Leave an unchanged file's time alone, so that a rebuild compiles only what changed."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qft.compiler", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the emitted sources")
    parser.add_argument("--isa", nargs="+", choices=list(ISA_FLAGS), default=list(ISA_FLAGS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lists = [f"set(QFT_FLAGS {' '.join(FLAGS)})", f"set(QFT_ISAS {' '.join(arguments.isa)})"]
    for isa in arguments.isa:
        names = []
        for code in built_codes(isa):
            names.append(f"{symbol(code)}.cpp")
            write_if_changed(arguments.out / names[-1], emit(code))
        lists.append(f"set(QFT_SOURCES_{isa} {' '.join(names)})")
        lists.append(f"set(QFT_FLAGS_{isa} {' '.join(ISA_FLAGS[isa])})")
    tables = [(code, isa) for isa in arguments.isa for code in built_codes(isa)]
    write_if_changed(arguments.out / "registry.cpp", emit_registry(tables))
    write_if_changed(arguments.out / "kernels.cmake", "\n".join(lists) + "\n")


if __name__ == "__main__":
    main()
