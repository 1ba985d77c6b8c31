"""A compiled program, read back by objdump: its functions, what their instructions do, and their innermost loops."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PRODUCT = re.compile(r"vfn?m(add|sub)|vmulp|vdpbf16|vpdp|vpmadd")  # of vectors, fused with a sum or not
SHUFFLE = re.compile(r"vperm|vpshuf|vshuf|vp?unpck|vpack|vinsert|vextract|vp?align|vpmov[szdqw]|vp?broadcast")
VECTOR = re.compile(r"\b[xyz]mm\d")
ADDRESS_ONLY = re.compile(r"lea|nop|prefetch")  # what an operand in brackets points to is not read
WRITES = re.compile(r"v?mov|vextract|vcvtps2ph|vpmov|set|sub|add|and|or|xor|inc|dec")  # its first operand
KINDS = ("products", "shuffles", "loads", "stores", "stack", "calls")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction in Intel's spelling.

    Attributes:
        address: where it lies.
        name, operands: as objdump prints them.
        stack: an operand lies on the stack.
    """

    address: int
    name: str
    operands: str
    stack: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of `KINDS` that it is of. Stack: a vector moved there or back, as where registers did not suffice."""
        memory = "[" in self.operands and not ADDRESS_ONLY.match(self.name)
        store = memory and "[" in self.operands.partition(",")[0] and WRITES.match(self.name) is not None
        found = {
            "products": PRODUCT.match(self.name),
            "shuffles": SHUFFLE.match(self.name) and "[" not in self.operands,
            "loads": memory and not store,
            "stores": store,
            "stack": memory and self.stack and VECTOR.search(self.operands),
            "calls": self.name.startswith("call"),
        }
        return tuple(kind for kind, yes in found.items() if yes)


@dataclass(frozen=True)
class Loop:
    """A loop with no other inside, of a function of that name."""

    function: str
    body: tuple[Instruction, ...]

    def count(self, kind: str) -> int:
        """Its instructions of a kind."""
        return sum(kind in instruction.kinds for instruction in self.body)


PREFIXES = r"(?:(?:rep\w*|lock|bnd|notrack|data16|cs|\{\w+\}) )*"
LINE = re.compile(rf"^\s*([0-9a-f]+):\s+{PREFIXES}(\S+)\s*([^<#\n]*)", re.MULTILINE)


def disassemble(program: Path) -> dict[str, list[Instruction]]:
    """The instructions of every function, by its name as in the source."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", "-M", "intel", str(program)]
    return read(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read(text: str) -> dict[str, list[Instruction]]:
    """What objdump printed."""
    found: dict[str, list[Instruction]] = {}
    for part in re.split(r"^[0-9a-f]+ <", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(">:\n")
        # rbp points to the stack only in functions that say so
        stack = re.compile(r"\[r[sb]p\b" if re.search(r"\bmov +rbp,rsp", body) else r"\[rsp\b")
        found.setdefault(name, []).extend(
            Instruction(int(at, 16), word, operands.strip(), stack.search(operands) is not None)
            for at, word, operands in LINE.findall(body)
        )
    return found


def innermost_loops(function: str, code: list[Instruction]) -> list[Loop]:
    """Stretches that end with a jump back to their beginning and hold no other such stretch."""
    at = {instruction.address: index for index, instruction in enumerate(code)}
    ends: dict[int, int] = {}  # last instruction by first
    for index, instruction in enumerate(code):
        if instruction.name.startswith("j") and re.fullmatch(r"[0-9a-f]+", instruction.operands):
            first = at.get(int(instruction.operands, 16), index + 1)
            if first <= index:
                ends[first] = index
    return [
        Loop(function, tuple(code[first : last + 1]))
        for first, last in sorted(ends.items())
        if not any(first <= start and end <= last and start != first for start, end in ends.items())
    ]


def short_name(function: str) -> str:
    """A function's name without namespace, return type, parameters and what the compiler appended."""
    plain = re.sub(r" \[clone [^\]]*\]|\bqft::(\w+::)?|^(static )?void ", "", function)
    depth = 0
    for at, letter in enumerate(plain):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and not plain[:at].endswith("operator"):
            return plain[:at]
    return plain


LEAST_PRODUCTS = 8  # at each turn of a loop that is unrolled over a block of codes


def decoding_loops(functions: dict[str, list[Instruction]], isa: str) -> Iterable[Loop]:
    """Innermost loops of an instruction set's kernels that multiply a block of codes at each turn."""
    for name, code in functions.items():
        if f"qft::{isa}::" in name:
            for loop in innermost_loops(name, code):
                if loop.count("products") >= LEAST_PRODUCTS:
                    yield loop
