"""`python -m qft.compiler OUT --isa scalar avx2 cuda`: write the ahead-of-time set and the CMake list to build it."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

from .emit import CPU_FLAGS, CUDA_FLAGS, CUDA_TARGETS, FLAGS, OLDEST_CUDA, built_codes, emit, emit_registry, symbol


def write_if_changed(path: Path, text: str) -> None:
    """Leave an unchanged file's time alone, so that a rebuild compiles only what changed."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def cuda_targets() -> tuple[str, ...]:
    """What nvcc is to compile for: the GPUs of this machine, or `CUDA_TARGETS` where there is none."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return CUDA_TARGETS
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    asked = subprocess.run(query, capture_output=True, text=True, check=False)
    present = {line.strip().replace(".", "") for line in asked.stdout.splitlines() if line.strip()}
    if asked.returncode or not present or not all(name.isdigit() for name in present):
        return CUDA_TARGETS
    names = sorted("90a" if name == "90" else name for name in present)
    return tuple(f"arch=compute_{name},code=sm_{name}" for name in names)


def cuda_flags(nvcc: str) -> tuple[str, ...]:
    """`CUDA_FLAGS`, and what this release of nvcc calls packing machine code small: to a quarter.

    Raises:
        SystemExit: the release is older than `OLDEST_CUDA`.
    """
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    if version < OLDEST_CUDA:
        found, least = (".".join(map(str, number)) for number in (version, OLDEST_CUDA))
        raise SystemExit(f"{nvcc} is release {found}, qft needs {least}; install a newer CUDA, or take it off the PATH")
    return (*CUDA_FLAGS, "--compress-mode=size" if version >= (12, 8) else "-Xfatbin=-compress-all")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qft.compiler", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the emitted sources")
    parser.add_argument("--isa", nargs="+", choices=[*CPU_FLAGS, "cuda"], default=list(CPU_FLAGS))
    parser.add_argument("--nvcc", default="nvcc", help="the compiler that the flags for cuda are for")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lists = [f"set(QFT_FLAGS {' '.join(FLAGS)})"]
    for isa in arguments.isa:
        names = []
        for code in built_codes(isa):
            names.append(f"{symbol(code)}.{'cu' if isa == 'cuda' else 'cpp'}")
            write_if_changed(arguments.out / names[-1], emit(code, isa))
        lists.append(f"set(QFT_SOURCES_{isa} {' '.join(names)})")
        lists.append(
            f"set(QFT_FLAGS_{isa} {' '.join(cuda_flags(arguments.nvcc) if isa == 'cuda' else CPU_FLAGS[isa])})"
        )
    lists.append(f"set(QFT_CUDA_TARGETS {' '.join(cuda_targets())})")
    tables = [(code, isa) for isa in arguments.isa for code in built_codes(isa)]
    write_if_changed(arguments.out / "registry.cpp", emit_registry(tables))
    write_if_changed(arguments.out / "kernels.cmake", "\n".join(lists) + "\n")


if __name__ == "__main__":
    main()
