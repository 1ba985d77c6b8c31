"""What nvcc made of every CUDA kernel: registers, stack, spills, shared memory, and SASS instructions per code.

    make cuda                             builds the kernels and prints the table
    python bench/cuda_resources.py [BUILD]     of a build folder that is there already

The build keeps what `ptxas -v` says, and the machine code, beside each object; nothing here needs a GPU. Instructions
are counted where nvdisasm is found: on the PATH, or as the package nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        name: as in the source, template arguments included.
        architecture: sm_80, sm_90a, ...
        registers: of a thread.
        stack, spills: bytes of a thread; spills are stores and loads together.
        shared: bytes of a block, static.
    """

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int

    @property
    def family(self) -> str:
        """The name without template arguments."""
        return self.name.partition("<")[0].rpartition("::")[2]


@dataclass(frozen=True)
class Loop:
    """The main loop of a tensor-core kernel, in machine instructions."""

    instructions: int
    products: int  # of 16 x 8 x 16, mma.sync

    def per_code(self, tiles: int) -> float:
        """Instructions per code and lane: a product takes 16 x 16 codes over 32 lanes, once for each tile of tokens."""
        return self.instructions / (8 * self.products / tiles)


def build_folder() -> Path:
    """Of the newest build. OSError: nothing was built with nvcc."""
    found = sorted((ROOT / "build").glob("*/cuda"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise OSError("no CUDA build was found under build/; install qft where nvcc is on the PATH first")
    return found[-1]


def demangle(names: Iterable[str]) -> list[str]:
    """C++ names as they are written, the namespace and the parameter list left out."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = re.compile(r"\(anonymous namespace\)::|qft::\w+::|\((bool|int)\)")
    return [_without_parameters(plain.sub("", line).removeprefix("void ")) for line in done.stdout.splitlines()]


def _without_parameters(name: str) -> str:
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name


ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def kernels(folder: Path) -> list[Kernel]:
    """Every kernel of a build, by what `ptxas -v` said of it."""
    found = [match for log in sorted(folder.glob("*.log")) for match in ENTRY.finditer(log.read_text())]
    return [
        Kernel(
            name,
            match["architecture"],
            int(match["registers"]),
            int(match["stack"]),
            int(match["stores"]) + int(match["loads"]),
            int((re.search(r"(\d+) bytes smem", match["rest"]) or [0, 0])[1]),
        )
        for match, name in zip(found, demangle(match["name"] for match in found), strict=True)
    ]


def disassembler() -> Path | None:
    """nvdisasm, or None where this machine has none."""
    if path := shutil.which("nvdisasm"):
        return Path(path)
    return next((path for folder in sys.path for path in Path(folder or ".").glob("nvidia/*/bin/nvdisasm")), None)


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\d+):")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


def functions(cubin: Path, nvdisasm: Path) -> Iterator[tuple[str, list[str]]]:
    """Mangled name and lines (instructions and labels) of every function of a cubin."""
    text = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        yield part.partition(":")[0], part.splitlines()


def main_loop(lines: list[str]) -> Loop | None:
    """The shortest loop with the most tensor-core products; None where there is no product."""
    at: dict[str, int] = {}
    code: list[str] = []
    loops = []
    for line in lines:
        if label := LABEL.match(line):
            at[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            code.append(instruction[1])
            if (branch := BRANCH.search(instruction[1])) and branch[1] in at:
                body = [word for word in code[at[branch[1]] :] if not word.startswith("NOP")]
                loops.append(Loop(len(body), sum("HMMA" in word for word in body)))
    loops = [loop for loop in loops if loop.products]
    return min(loops, key=lambda loop: (-loop.products, loop.instructions), default=None)


def main_loops(folder: Path, architecture: str, source: str) -> dict[str, Loop]:
    """Main loops by kernel name, of one source's machine code. OSError: there is no nvdisasm."""
    nvdisasm = disassembler()
    if nvdisasm is None:
        raise OSError("nvdisasm was not found; install the package nvidia-cuda-nvdisasm to count instructions")
    (cubin,) = (folder / f"{source}.keep").glob(f"*{architecture.removeprefix('sm_')}.cubin")
    found = {name: loop for name, lines in functions(cubin, nvdisasm) if (loop := main_loop(lines))}
    return dict(zip(demangle(found), found.values(), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, nargs="?", help="folder with the logs of nvcc (default: the newest build)")
    folder = parser.parse_args().build or build_folder()
    print(f"{'kernel':78} {'target':8} {'registers':>9} {'stack':>6} {'spills':>6} {'shared':>6}")
    for kernel in sorted(kernels(folder), key=lambda kernel: (kernel.name, kernel.architecture)):
        figures = f"{kernel.registers:9} {kernel.stack:6} {kernel.spills:6} {kernel.shared:6}"
        print(f"{kernel.name:78} {kernel.architecture:8} {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
