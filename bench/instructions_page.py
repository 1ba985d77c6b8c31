"""Markdown of what `instructions.py` counted. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_tables import table

NAME = "cpu-instructions.json"
HOW_TO_READ = """\
- Machine instructions per weight of the CPU kernels, on one thread, with fp32 scales per 64 weights and x in bf16: what
  twice as many rows of W take more, over the weights of those rows. M: rows of x; dq: double-quantized scales; zero:
  with zero points; searched: a search among 9 scales.
- Scalar and AVX2 kernels were counted by `valgrind --tool=callgrind`; AVX-512 kernels, which valgrind cannot run, by
  the processor's trap flag. Counts depend on the sources and the compiler, not on the machine or its load. A test holds
  them to the budgets of tests/instructions.toml.
- Fewer instructions are not always faster: a kernel that waits for memory has some to spare."""
KINDS_READ = """\
What they are, for nf4 with AVX-512. Products: vector multiplications, fused with a sum or not. Shuffles move numbers
between lanes, table lookups among them. Stack: vectors moved to the stack or back."""


def section(results: Path) -> str:
    """What docs/numbers.md says of instructions: the counts, or that there are none."""
    path = results / NAME
    if not path.is_file():
        return "## Instructions\n\nNo run of `python bench/instructions.py` is in bench/results: not counted yet."
    run = json.loads(path.read_text())
    made = f"`{run['command']}`, {run['compiler']}, {run['date'][:10]}, commit {run['commit']}."
    parts = ["## Instructions", HOW_TO_READ, made]
    for isa in dict.fromkeys(one["isa"] for one in run["counts"]):
        parts += [f"### {isa}", _counts([one for one in run["counts"] if one["isa"] == isa])]
    if kinds := [one for one in run["counts"] if one["kinds"] and one["code"] == "nf4"]:
        parts += [KINDS_READ, _kinds(kinds)]
    parts += [f"{isa} was not counted: {reason}" for isa, reason in run["skipped"].items()]
    return "\n\n".join(parts)


def _counts(counts: list[dict[str, Any]]) -> str:
    of = {(one["work"], one["code"]): f"{one['per_code']:.2f}" for one in counts}
    codes = list(dict.fromkeys(one["code"] for one in counts))
    works = dict.fromkeys(one["work"] for one in counts)
    return table(("", *codes), [(work, *(of.get((work, code), "") for code in codes)) for work in works])


def _kinds(counts: list[dict[str, Any]]) -> str:
    kinds = list(counts[0]["kinds"])
    head = ("", "all", *kinds)
    return table(
        head,
        [(one["work"], f"{one['per_code']:.3f}", *(f"{one['kinds'][kind]:.3f}" for kind in kinds)) for one in counts],
    )
