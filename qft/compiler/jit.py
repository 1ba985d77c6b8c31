"""Kernels built at run time by the system's C++ compiler, kept in a cache by content.

A library's name is the hash of what it was made from: emitted source, templates, flags, processor family. It is built
under a temporary name, sealed with the hash of its bytes and renamed: a reader sees a whole one or none, and a damaged
one is built again. Once it is there no compiler is needed.
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


class CompilerError(OSError):
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
    raise CompilerError(f"the kernel templates are missing beside {package}; reinstall qft")


def _compiler() -> str:
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    names = ", ".join(COMPILERS)
    raise CompilerError(f"no C++ compiler is on the path ({names}); install one to compile formats of your own")


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
        CompilerError: there is no compiler, or it failed; the message carries its first error line.
        OSError: the cache cannot be written.
    """
    source = emit_loadable(code)
    flags = {isa: (*FLAGS, *ISA_FLAGS[isa], f"-DQFT_ISA={isa}") for isa in isas}
    libraries = {}
    for isa in isas:
        key = "\0".join((source, _templates_hash(), platform.machine(), *flags[isa]))
        libraries[isa] = cache_folder() / f"{symbol(code)}-{isa}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    missing = {isa: flags[isa] for isa in isas if not _is_whole(libraries[isa])}
    if missing:
        compiler = _compiler()
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            for isa, built in _compile(compiler, code, source, missing, Path(folder)).items():
                _seal(built)
                os.replace(built, libraries[isa])  # atomic: processes that build the same one all end with a whole file
    return list(libraries.values())


def _compile(compiler: str, code: str, source: str, flags: dict[str, tuple[str, ...]], folder: Path) -> dict[str, Path]:
    """One library per instruction set in `folder`, all compilers running at once."""
    text = folder / "kernels.cpp"
    text.write_text(source)
    built = {isa: folder / f"{isa}.so" for isa in flags}
    running = []
    for isa, options in flags.items():
        command = [compiler, *options, "-I", str(template_folder()), "-shared", str(text), "-o", str(built[isa])]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        if process.returncode:
            first = next((line for line in output.splitlines() if "error" in line), output[:200].strip())
            raise CompilerError(f"{compiler} could not compile {code}: {first}")
    return built


def _seal(library: Path) -> None:
    """Append the hash of the library's bytes; the loader ignores what follows them."""
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())


def _is_whole(library: Path) -> bool:
    content = library.read_bytes() if library.is_file() else b""
    return content[-32:] == hashlib.sha256(content[:-32]).digest()
