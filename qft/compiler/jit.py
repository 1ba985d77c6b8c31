"""Kernels built at run time by the system's C++ compiler, or by nvcc, kept in a cache by content.

A library's name is the hash of what it was made from: emitted source, templates, flags, processor family; for CUDA the
GPU's architecture and the compiler's version too. It is built
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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .emit import CPU_FLAGS, CUDA_FLAGS, FLAGS, emit_loadable, symbol

COMPILERS = {"C++": ("c++", "g++", "clang++"), "CUDA": ("nvcc",)}


class CompilerError(OSError):
    """No compiler was found, or the one found failed."""


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


def find_compiler(language: str) -> str:
    """Path of the compiler for C++ or CUDA.

    Raises:
        CompilerError: there is none on the path.
    """
    for name in COMPILERS[language]:
        if path := shutil.which(name):
            return path
    names = ", ".join(COMPILERS[language])
    raise CompilerError(f"no {language} compiler is on the path ({names}); install one to compile formats of your own")


@lru_cache(maxsize=1)
def _templates_hash() -> str:
    folder = template_folder()
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.*h")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Job:
    """One library to build."""

    code: str
    isa: str
    flags: tuple[str, ...]
    key: str  # whatever else its content hangs on

    @property
    def language(self) -> str:
        return "CUDA" if self.isa == "cuda" else "C++"

    @property
    def library(self) -> Path:
        parts = (emit_loadable(self.code, self.isa), _templates_hash(), *self.flags, self.key)
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        return cache_folder() / f"{symbol(self.code)}-{self.isa}-{digest}.so"


def _job(code: str, isa: str, architecture: str) -> _Job:
    if isa == "cuda":
        asked = [find_compiler("CUDA"), "--version"]
        version = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
        return _Job(code, isa, (*CUDA_FLAGS, f"-arch=sm_{architecture}", f"-DQFT_ISA={isa}", "-x=cu"), version)
    return _Job(code, isa, (*FLAGS, *CPU_FLAGS[isa], f"-DQFT_ISA={isa}"), platform.machine())


def build(codes: dict[str, str], architecture: str = "") -> list[Path]:
    """Shared libraries of kernels, compiled side by side where the cache has none.

    Args:
        codes: by instruction set, the code whose kernels are wanted for it.
        architecture: of the GPU, as in "90a", where "cuda" is among them.

    Raises:
        CompilerError: there is no compiler, or it failed; the message carries its first error line.
        OSError: the cache cannot be written.
    """
    jobs = [_job(code, isa, architecture) for isa, code in codes.items()]
    if missing := [job for job in jobs if not _is_whole(job.library)]:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            for job, built in _compile(missing, Path(folder)).items():
                _seal(built)
                os.replace(built, job.library)  # atomic: processes that build the same one all end with a whole file
    return [job.library for job in jobs]


def _compile(jobs: list[_Job], folder: Path) -> dict[_Job, Path]:
    """One library per job in `folder`, all compilers running at once."""
    built = {job: folder / f"{job.isa}.so" for job in jobs}
    running = []
    for job in jobs:
        source = folder / f"{job.isa}.cpp"
        source.write_text(emit_loadable(job.code, job.isa))
        compiler = find_compiler(job.language)
        command = [compiler, *job.flags, "-I", str(template_folder()), "-shared", str(source), "-o", str(built[job])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append((job, compiler, process))
    outputs = [process.communicate()[0] for _, _, process in running]
    for (job, compiler, process), output in zip(running, outputs, strict=True):
        if process.returncode:
            first = next((line for line in output.splitlines() if "error" in line), output[:200].strip())
            raise CompilerError(f"{compiler} could not compile {job.code}: {first}")
    return built


def _seal(library: Path) -> None:
    """Append the hash of the library's bytes; the loader ignores what follows them."""
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())


def _is_whole(library: Path) -> bool:
    content = library.read_bytes() if library.is_file() else b""
    return content[-32:] == hashlib.sha256(content[:-32]).digest()
