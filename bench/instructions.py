"""Instructions per code of the CPU kernels, counted: what a timing on a busy machine cannot tell, a count can.

    python bench/instructions.py                         counts everything, prints it, and writes it to bench/results
    python bench/instructions.py --isa avx2 --codes nf4 int4 --output /dev/null
    python bench/instructions.py --loops --isa avx512    the innermost loops that decode, as objdump shows them
    python bench/instructions.py --names dequantize --isa avx512 --codes nf4    what the instructions are
    python bench/instructions.py --budgets               prints tests/instructions.toml anew

Every verb runs on one thread on a few rows of W and on twice as many: the difference over the codes between them is
free of start-up. A count hangs on the sources and the compiler alone, neither on the machine nor on what else runs
there. One core counts everything in a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cases import OWN
from instruction_counters import TEMPLATES, TRAPPED, build, callgrind, compiler, require, require_counter, trap
from machine_code import KINDS, Loop, decoding_loops, disassemble, short_name

from qft.compiler.emit import CPU_FLAGS
from qft.format import INTEGERS, Format

RESULT = Path(__file__).resolve().parent / "results" / "cpu-instructions.json"
ISAS = tuple(CPU_FLAGS)
BUILT = ("nf4", "nf3", "nf2", "int4", "int3", "int2", "int8")
CODES = (*BUILT, Format.parse(OWN).code)
ALLOWANCE = 1.05  # a budget over the count that it was made from


@dataclass(frozen=True)
class Work:
    """One call whose instructions are counted: scales per 64 weights, x and W in bf16.

    Attributes:
        verb: as everywhere.
        rows: of x or dy.
        columns: of W.
        outputs: rows of W in the shorter run; some verbs take them in tiles.
        dq: scales are double-quantized; else they are fp32.
        zero: with zero points, which integers alone have.
        factors: that a scale search tries.
    """

    verb: str
    rows: int = 0
    columns: int = 1024
    outputs: int = 1
    dq: bool = False
    zero: bool = False
    factors: int = 0

    @property
    def name(self) -> str:
        rows = f" M={self.rows}" if self.rows else ""
        return self.verb + rows + " dq" * self.dq + " zero" * self.zero + " searched" * bool(self.factors)

    @property
    def codes(self) -> int:
        """That the longer run has and the shorter one has not."""
        return self.outputs * self.columns

    def calls(self, index: int, code: str) -> list[str]:
        """Both runs, as the driver reads them."""
        bits = Format(code, 64).bits
        return [
            f"{index} {self.verb} {bits} {self.columns} {outputs} {self.rows} {self.dq:d} {self.zero:d} {self.factors}"
            for outputs in (self.outputs, 2 * self.outputs)
        ]


WORKS = (
    Work("matmul", rows=1, outputs=8),
    Work("matmul", rows=1, outputs=8, dq=True),
    Work("matmul", rows=1, outputs=8, zero=True),
    Work("matmul", rows=8, outputs=16),
    Work("matmul_t", rows=1, outputs=8),
    Work("matmul_t", rows=8, columns=256, outputs=8),
    Work("dequantize"),
    Work("quantize"),
    Work("quantize", columns=128, factors=9),
    Work("scale_grad"),
)


@dataclass(frozen=True)
class Count:
    """Instructions per code of one work; `kinds` among them where each was seen, those of libraries included."""

    isa: str
    code: str
    work: str
    per_code: float
    kinds: dict[str, float] | None = None


def spoken(code: str) -> str:
    """A code as tables name it."""
    return code if code in BUILT else "own levels"


def count(isa: str, program: Path, codes: Sequence[str], works: Sequence[Work] = WORKS, how: str = "") -> list[Count]:
    """Every work on every code that has it.

    Args:
        program: built from `codes`.
        how: "callgrind" or "trap"; chosen by `isa` where it is empty.
    """
    pairs = [(code, work) for code in codes for work in works if code in INTEGERS or not work.zero]
    calls = [call for code, work in pairs for call in work.calls(codes.index(code), code)]
    if (how or ("trap" if isa in TRAPPED else "callgrind")) == "callgrind":
        with tempfile.TemporaryDirectory() as folder:
            totals = callgrind(program, calls, Path(folder))
        return [
            Count(isa, code, work.name, (longer - shorter) / work.codes)
            for (code, work), shorter, longer in zip(pairs, totals[::2], totals[1::2], strict=True)
        ]
    ran = trap(program, calls)
    kinds_at = {one.address: one.kinds for part in disassemble(program).values() for one in part}
    found = []
    for (code, work), shorter, longer in zip(pairs, ran[::2], ran[1::2], strict=True):
        longer.subtract(shorter)
        kinds = Counter(dict.fromkeys(KINDS, 0)) | Counter(libraries=longer[0])
        for at, times in longer.items():
            for kind in kinds_at.get(at, ()):
                kinds[kind] += times
        per_code = {kind: kinds[kind] / work.codes for kind in (*KINDS, "libraries")}
        found.append(Count(isa, code, work.name, longer.total() / work.codes, per_code))
    return found


def loop_name(loop: Loop) -> str:
    """What a loop is known by: its function, and the products that tell it from the others there."""
    return f"{short_name(loop.function)}, {loop.count('products')} products"


def most(loops: Iterable[Loop], kind: str = "") -> dict[str, int]:
    """Instructions of the loops by name, all or those of a kind; the most where several loops share a name."""
    found: dict[str, int] = {}
    for loop in loops:
        number = loop.count(kind) if kind else len(loop.body)
        found[loop_name(loop)] = max(number, found.get(loop_name(loop), 0))
    return found


def allowed(number: float) -> float:
    """A budget made from a count, rounded up in its fourth digit."""
    budget = ALLOWANCE * number
    digits = 3 - math.floor(math.log10(budget))
    return math.ceil(budget * 10**digits) / 10**digits


def budgets(counts: Iterable[Count], loops: dict[str, list[Loop]], by: str) -> str:
    """tests/instructions.toml."""
    parts = [
        "# What tests/test_instructions.py holds the CPU kernels to: counted, with 5 per cent added. Written by",
        "# `python bench/instructions.py --budgets`; say in the commit why a number grows.",
        f'compiler = "{by}"',
        "",
        "# Instructions of the innermost loops of kernels with AVX-512, at a turn.",
    ]
    for isa in TRAPPED:
        numbers = sorted(most(loops.get(isa, [])).items())
        parts += [f"[loops.{isa}]", *(f'"{name}" = {math.floor(ALLOWANCE * number)}' for name, number in numbers)]
    said = {
        "stack": "# Vectors that those loops move to or from the stack, at a turn; a loop not named here moves none.",
        "calls": "# Calls in those loops, for what comes once a row: a last block cut short. Others hold none.",
    }
    for kind, comment in said.items():
        parts += ["", comment]
        for isa in TRAPPED:
            numbers = sorted(most(loops.get(isa, []), kind).items())
            parts += [f"[{kind}.{isa}]", *(f'"{name}" = {number}' for name, number in numbers if number)]
    parts += ["", "# Instructions per code."]
    tables: dict[str, dict[str, list[str]]] = {}
    for one in counts:
        tables.setdefault(one.isa, {}).setdefault(one.work, []).append(f"{one.code} = {allowed(one.per_code):g}")
    for isa, works in tables.items():
        parts += [f"[{isa}]", *(f'"{work}" = {{{", ".join(row)}}}' for work, row in works.items())]
    return "\n".join(parts) + "\n"


def report(counts: Iterable[Count], skipped: dict[str, str], loops: dict[str, list[Loop]]) -> dict[str, Any]:
    """What cpu-instructions.json holds."""
    import machine

    def rounded(one: Count) -> dict[str, Any]:
        kinds = one.kinds and {kind: round(number, 4) for kind, number in one.kinds.items()}
        return {**asdict(one), "code": spoken(one.code), "per_code": round(one.per_code, 4), "kinds": kinds}

    return {
        "kind": "cpu instructions",
        "command": " ".join(["python", "bench/instructions.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "compiler": compiler(),
        "skipped": skipped,
        "counts": [rounded(one) for one in counts],
        "loops": {
            isa: [
                {"function": short_name(loop.function), "instructions": len(loop.body)}
                | {kind: loop.count(kind) for kind in KINDS}
                for loop in found
            ]
            for isa, found in loops.items()
        },
    }


def spelled(run: dict[str, Any]) -> str:
    """JSON with a line for each count and each loop, so that a change of one is a change of one line."""
    listed = {**run, "counts": [], "loops": {key: [] for key in run["loops"]}}
    text = json.dumps(listed, indent=1)
    for key, rows in {"counts": run["counts"], **run["loops"]}.items():
        text = text.replace(f'"{key}": []', f'"{key}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]")
    return text + "\n"


def counts_table(counts: Sequence[Count], isa: str) -> str:
    """Counts of one instruction set, works down and codes across."""
    of = {(one.work, one.code): one.per_code for one in counts if one.isa == isa}
    codes = list(dict.fromkeys(code for _, code in of))
    rows = [f"{isa:18}" + "".join(f"{spoken(code):>11}" for code in codes)]
    for work in dict.fromkeys(work for work, _ in of):
        cells = (f"{of[work, code]:11.3f}" if (work, code) in of else " " * 11 for code in codes)
        rows.append(f"{work:18}" + "".join(cells))
    return "\n".join(rows)


def loops_table(loops: Iterable[Loop]) -> str:
    """A line for each loop."""
    rows = [f"{'instructions':>12}" + "".join(f"{kind:>10}" for kind in KINDS) + "  function"]
    for loop in loops:
        numbers = "".join(f"{loop.count(kind):10}" for kind in KINDS)
        rows.append(f"{len(loop.body):12}{numbers}  {short_name(loop.function)}")
    return "\n".join(rows)


def names_table(isa: str, program: Path, codes: Sequence[str], name: str) -> str:
    """Instructions per code by their names, the most frequent first, of one work on every code."""
    (work,) = (work for work in WORKS if work.name == name)
    names = {one.address: one.name for part in disassemble(program).values() for one in part}
    rows = []
    for index, code in enumerate(codes):
        shorter, longer = trap(program, work.calls(index, code))
        longer.subtract(shorter)
        found: Counter[str] = Counter()
        for at, times in longer.items():
            found[names.get(at, "in libraries")] += times
        rows.append(f"{work.name}, {spoken(code)}, {isa}: {found.total() / work.codes:.3f}")
        rows += [f"{times / work.codes:8.3f} {word}" for word, times in found.most_common() if times]
    return "\n".join(rows)


def main(arguments: Sequence[str]) -> int:
    """0: counted, if need be in part, and a sentence says what was not; 1: not at all, or not all of the budgets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", choices=ISAS, default=ISAS)
    parser.add_argument("--codes", nargs="+", choices=BUILT, help="default: these, and levels of one's own")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--csrc", type=Path, default=TEMPLATES, help="another copy of the kernels' sources")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--budgets", action="store_true", help="print the tests' budgets, write nothing")
    only.add_argument("--loops", action="store_true", help="print the innermost loops that decode, count nothing")
    only.add_argument("--names", choices=[work.name for work in WORKS], help="print what a work's instructions are")
    options = parser.parse_args(arguments)
    codes = options.codes or (BUILT if options.budgets else CODES)
    counts: list[Count] = []
    loops: dict[str, list[Loop]] = {}
    skipped: dict[str, str] = {}
    for isa in options.isa:
        try:
            require("objdump")
            if not options.loops:
                require_counter(isa)
            with tempfile.TemporaryDirectory() as folder:
                program = build(isa, codes, Path(folder), options.csrc)
                loops[isa] = list(decoding_loops(disassemble(program), isa))
                if options.names:
                    print(names_table(isa, program, codes, options.names))
                elif not options.loops:
                    counts += count(isa, program, codes)
        except OSError as error:
            skipped[isa] = str(error)
            print(f"{isa} was not counted: {error}", file=sys.stderr)
    if options.loops:
        print("\n\n".join(map(loops_table, loops.values())))
    elif options.budgets and not skipped:
        print(budgets(counts, loops, compiler()), end="")
    elif counts and not options.budgets:
        print("\n\n".join(counts_table(counts, isa) for isa in options.isa if isa not in skipped))
        options.output.write_text(spelled(report(counts, skipped, loops)))
    return 1 if not (counts or loops) or (options.budgets and skipped) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
