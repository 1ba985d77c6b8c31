"""Kernels built at run time by the system's C++ compiler, kept in a cache by content.

A library's name is the hash of everything that decides its bytes: emitted source, templates, flags, compiler version.
It is written under a temporary name and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from .emit import FLAGS, ISA_FLAGS, emit_loadable, symbol

COMPILERS = ("c++", "g++", "clang++")


class CompilerMissing(OSError):
    """No C++ compiler was found, or the one found failed."""


def cache_folder() -> Path:
    """Where built kernels are kept: `QFT_CACHE`, or ~/.cache/qft."""
    chosen = os.environ.get("QFT_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "qft"


def template_folder() -> Path:
    """The folder of the kernel templates: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "qft" / "cpu" / "verbs.h").is_file():
            return folder
    raise CompilerMissing(f"the kernel templates are missing beside {package}; reinstall qft")


@lru_cache(maxsize=1)
def _compiler() -> tuple[str, str]:
    """Path and version text of the compiler."""
    for name in COMPILERS:
        if path := shutil.which(name):
            version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            return path, version
    raise CompilerMissing(f"no C++ compiler is on the path ({', '.join(COMPILERS)}); install one to compile formats of your own")


@lru_cache(maxsize=1)
def _templates_hash() -> str:
    folder = template_folder()
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.h")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build(code: str, isas: list[str]) -> list[Path]:
    """Shared libraries of a code's kernels, one per instruction set, compiled side by side where the cache has none.

    Raises:
        CompilerMissing: there is no compiler, or it failed; the message carries its first error line.
    """
    compiler, version = _compiler()
    source = emit_loadable(code)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    running: list[tuple[Path, Path, subprocess.Popen[str]]] = []
    libraries = []
    for isa in isas:
        command = [compiler, *FLAGS, *ISA_FLAGS[isa], f"-DQFT_ISA={isa}", "-I", str(template_folder()), "-shared", "-x", "c++", "-"]
        key = "\0".join((source, _templates_hash(), version, platform.machine(), *command[1:-2]))
        library = folder / f"{symbol(code)}-{isa}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
        libraries.append(library)
        if library.exists():
            continue
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(handle)
        process = subprocess.Popen(
            [*command, "-o", temporary], stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        if process.stdin:
            process.stdin.write(source)
            process.stdin.close()
            process.stdin = None
        running.append((library, Path(temporary), process))
    for library, temporary_path, process in running:
        _, errors = process.communicate()
        if process.returncode:
            temporary_path.unlink(missing_ok=True)
            first = next((line for line in errors.splitlines() if "error" in line), errors[:200])
            raise CompilerMissing(f"{compiler} could not compile {code}: {first}")
        os.replace(temporary_path, library)  # atomic: two processes that build the same kernels both end with a whole file
    return libraries
