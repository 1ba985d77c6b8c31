"""Programs made of the kernels of one instruction set, and how many instructions their calls take.

Valgrind's callgrind counts what it can run, which leaves out AVX-512. There the processor's trap flag is set during the
call: a signal handler then sees every instruction, 13 microseconds each, and what each of them does can be told.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qft.compiler.emit import CPU_FLAGS, FLAGS, emit, emit_registry, symbol, table_code
from qft.compiler.jit import find_compiler
from qft.format import Format

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "csrc"
DRIVER = ROOT / "bench" / "instructions.cpp"
TRAPPED = ("avx512", "avx512_bf16")  # instruction sets that valgrind cannot run
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c", "bmi2"}
NEEDED = {
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "avx512": AVX512,
    "avx512_bf16": {*AVX512, "avx512_bf16"},
}


class MissingError(OSError):
    """This machine cannot do that; the message says why."""


def require(*tools: str) -> None:
    """Raise `MissingError` unless this is Linux on x86-64 with a C++ compiler and those tools."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise MissingError(f"instructions are counted on Linux on x86-64; this is {system} on {machine}")
    find_compiler("C++")
    for tool in tools:
        if shutil.which(tool) is None:
            raise MissingError(f"{tool} is not on the PATH; install it to count instructions")


def require_counter(isa: str) -> None:
    """Raise `MissingError` unless kernels of that instruction set can be run and counted here."""
    require("objdump" if isa in TRAPPED else "valgrind")
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if missing := NEEDED.get(isa, set()) - set(flags[1].split() if flags else ()):
        raise MissingError(f"this processor has no {', '.join(sorted(missing))}, so its {isa} kernels cannot run")


def compiler() -> str:
    """Name and major release of the C++ compiler, on which every count hangs."""
    command = [find_compiler("C++"), "--version"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    release = re.search(r"\b(\d+)\.\d+\.\d+", told)
    return f"{'clang' if 'clang' in told else 'gcc'} {release[1] if release else 'of unknown release'}"


def _compile(source: Path, target: Path, templates: Path, flags: Sequence[str] = ()) -> Path:
    command = [find_compiler("C++"), *FLAGS, *flags, "-I", str(templates), "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise OSError(f"{source.name} could not be compiled: {first}")
    return target


def built_object(code: str, isa: str) -> Path | None:
    """What the last build of the extension made of a code, unless a source has changed since."""
    sources = [*TEMPLATES.rglob("*.h"), ROOT / "qft" / "compiler" / "emit.py", ROOT / "qft" / "format.py"]
    newest = max(path.stat().st_mtime for path in sources)
    found = (ROOT / "build").glob(f"*/CMakeFiles/kernels_{isa}.dir/emitted/{symbol(code)}.cpp.o")
    return next((path for path in found if path.stat().st_mtime > newest), None)


def build(isa: str, codes: Sequence[str], folder: Path, templates: Path = TEMPLATES) -> Path:
    """The driver, linked with the kernels of `codes` in that order; they are compiled where no build has them.

    Raises:
        OSError: the compiler fails; the message carries its first error line.
    """
    tables = [table_code(Format(code, 64), isa) for code in codes]
    objects = []
    for code in dict.fromkeys(tables):
        built = built_object(code, isa) if templates == TEMPLATES else None
        if built is None:
            source = folder / f"{symbol(code)}.cpp"
            source.write_text(emit(code, isa))
            flags = (*CPU_FLAGS[isa], f"-DQFT_ISA={isa}")
            built = _compile(source, folder / f"{symbol(code)}-{isa}.o", templates, flags)
        objects.append(str(built))
    registry = folder / f"registry-{isa}.cpp"
    registry.write_text(emit_registry([(code, isa) for code in tables]))
    for source in (registry, DRIVER):
        objects.append(str(_compile(source, folder / f"{source.stem}.o", templates)))
    program = folder / f"instructions-{isa}"
    # at fixed addresses, those that objdump shows
    subprocess.run([find_compiler("C++"), "-fopenmp", "-no-pie", *objects, "-o", str(program)], check=True)
    return program


def callgrind(program: Path, calls: Sequence[str], folder: Path) -> list[int]:
    """Instructions of each call, which is a line of the driver's input; `folder` takes what callgrind writes."""
    output = folder / "callgrind.out"
    command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=counted"]
    command += ["--dump-after=counted", f"--callgrind-out-file={output}", str(program)]
    done = subprocess.run(command, input="\n".join(calls), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"valgrind could not run {program.name}: {done.stderr.strip()[-200:]}")
    parts = [output.with_name(f"{output.name}.{number}") for number in range(1, len(calls) + 1)]
    return [int(re.findall(r"^(?:totals|summary): (\d+)", part.read_text(), re.MULTILINE)[-1]) for part in parts]


def trap(program: Path, calls: Sequence[str]) -> list[Counter[int]]:
    """How often each instruction of each call ran, by address; those of shared libraries together under 0."""
    command = [program, "trap"]
    done = subprocess.run(command, input="\n".join(calls), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{program.name} ended with code {done.returncode}")
    found: list[Counter[int]] = []
    for line in done.stdout.splitlines():
        at, _, times = line.partition(" ")
        if at == "call":
            found.append(Counter())
        else:
            found[-1][0 if at == "outside" else int(at, 16)] += int(times)
    return found
