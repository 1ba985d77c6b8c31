"""What qft finds on this machine, in one line, and what keeps it from running at its best."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__, native
from .compiler.jit import COMPILERS, CompilerError, cache_folder, find_compiler
from .kernels import OLDEST_GPU

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes")


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees; `served`: whether qft was built for it."""

    name: str
    capability: tuple[int, int]
    served: bool


@dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        versions: of the libraries that are installed, by name.
        processor: its architecture.
        cores: that this process may run on.
        threads: that kernels use: torch's own budget.
        instruction_sets: that the processor runs and qft has kernels for, plainest first.
        compiled: codes with CPU kernels of their own.
        compiler, nvcc: path and version, or nothing.
        torch_cuda: version that torch was built for, or nothing.
        driver: whether an NVIDIA driver is installed.
        cuda_targets: what the CUDA kernels were built for, as nvcc names it.
        gpus: that torch sees.
        cache: folder of kernels that are compiled at first use.
        cache_writable: whether it can be written, or made.
    """

    versions: dict[str, str]
    processor: str
    cores: int
    threads: int
    instruction_sets: tuple[str, ...]
    compiled: tuple[str, ...]
    compiler: str
    nvcc: str
    torch_cuda: str
    driver: bool
    cuda_targets: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    cache: Path
    cache_writable: bool

    @property
    def line(self) -> str:
        """All of it in one line, to read or to quote in a report of a bug."""
        names = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        kernels = f"{self.processor} {self.instruction_sets[-1]}, {self.threads} of {self.cores} cores"
        gpus = ", ".join(f"{gpu.name} sm_{gpu.capability[0]}{gpu.capability[1]}" for gpu in self.gpus)
        cuda = f"CUDA {self.torch_cuda}, {gpus or 'no GPU'}" if self.torch_cuda else "torch without CUDA"
        compilers = f"{self.compiler or 'no C++ compiler'}, {self.nvcc or 'no nvcc'}"
        verdict = f"troubles: {len(self.troubles)}" if self.troubles else "no trouble"
        return f"{names} | {kernels} | {compilers} | {cuda} | {verdict}"

    @property
    def troubles(self) -> list[str]:
        """A sentence with the way out for each thing that is missing or runs slower than it could."""
        found = []
        if self.instruction_sets[-1] == "scalar" and self.processor.lower() in ("x86_64", "amd64"):
            found.append(
                "this processor has neither AVX2 nor AVX-512: kernels are scalar; use a newer machine for speed"
            )
        if self.threads == 1 < self.cores:
            found.append(
                f"1 of {self.cores} cores is used; unset OMP_NUM_THREADS, or call torch.set_num_threads({self.cores})"
            )
        if not self.compiler:
            found.append(
                f"no C++ compiler is on the path ({', '.join(COMPILERS['C++'])}): levels of your own run on a slower "
                "generic kernel; install one"
            )
        if not self.cache_writable:
            found.append(
                f"{self.cache} cannot be written, so no format is compiled; set QFT_CACHE to a folder of yours"
            )
        return found + self._troubles_of_gpus()

    def _troubles_of_gpus(self) -> list[str]:
        if not self.torch_cuda:
            return ["there is an NVIDIA driver, but torch is built without CUDA; install torch for CUDA"] * self.driver
        if not self.gpus:
            return [f"torch is built for CUDA {self.torch_cuda} and sees no GPU; see whether nvidia-smi does"]
        found = []
        for gpu in self.gpus:
            if gpu.capability < OLDEST_GPU:
                found.append(
                    f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}; qft needs 8.0"
                )
            elif not gpu.served and not self.nvcc:
                built = ", ".join(self.cuda_targets) or "no GPU"
                found.append(
                    f"qft was built for {built}, not for {gpu.name}; install it again where nvcc is on the path"
                )
        return found


def look() -> Machine:
    """Look at this machine; nothing is compiled or written."""
    built = tuple(sorted({name for names in native.cuda_targets().values() for name in names}))
    gpus = []
    for at in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(at)
        served = any(native.serves(code, capability) for code in native.cuda_targets())
        gpus.append(Gpu(torch.cuda.get_device_name(at), capability, served))
    return Machine(
        versions={"qft": __version__, "Python": platform.python_version(), **_installed()},
        processor=platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=native.threads(),
        instruction_sets=native.instruction_sets(),
        compiled=tuple(sorted({code for code, isa in native.tables() if isa != "cuda"})),
        compiler=_found("C++"),
        nvcc=_found("CUDA"),
        torch_cuda=torch.version.cuda or "",
        driver=bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia/version").exists(),
        cuda_targets=built,
        gpus=tuple(gpus),
        cache=cache_folder(),
        cache_writable=_writable(cache_folder()),
    )


def _installed() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _found(language: str) -> str:
    """A compiler's path and the version it gives itself."""
    try:
        path = find_compiler(language)
    except CompilerError:
        return ""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    release = next((line for line in said if "release" in line), said[0] if said else "")
    number = next((word.strip(",V") for word in release.split()[::-1] if word.strip(",V")[:1].isdigit()), "")
    return f"{path} {number}".strip()


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself where it is not there yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
