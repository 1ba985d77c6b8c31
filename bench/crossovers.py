"""Which numbers of rows each kernel serves, timed: writes qft/crossovers.json, which the table of kernels reads.

    python bench/crossovers.py               as every machine that this one can stand for; minutes, on a quiet machine
    python bench/crossovers.py --best avx2   as a machine whose best instruction set is AVX2, and no other
    python bench/crossovers.py --quick       few rows, one format, one layer; nothing written without --output

A panel product is a dense product of torch's, whose speed depends on the instruction set as much as ours does: in bf16
without AVX-512 it takes up to forty times as long. So each instruction set is timed in a process of its own, in which
torch is held to that set by the switches of its libraries and qft knows none that is better. The best that this machine
has is timed with torch as it is.

In one process all kernels and the panel product take turns, cold, as `qft.speed.clock` does it, in several formats on
two layers. Each result is compared with the panel's first. A kernel's lead is the time of the best alternative, panels
or a plainer instruction set, over its own (geometric mean over formats and layers); it serves the run of rows with the
greatest sum of logarithms of leads, which is where it leads, unmoved by noise around 1. Entries of machines that were
not timed stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import machine
import torch
from torch import Tensor
from written import renew

import qft
from qft import crossovers, kernels, native
from qft.compiler.emit import CPU_FLAGS
from qft.crossovers import NO_ROWS, Rows
from qft.speed import check, limits
from qft.speed.clock import SMALL, Call, Effort, before_each, cache_flush, interleave
from qft.tensor import QuantTensor

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path("qft") / crossovers.FILE
TOLERANCE = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # keys of `check.TOLERANCE`, by torch's dtype

BEHIND, OFTEN = 1.5, 2  # a kernel that a panel leads by this much, so many times in a row, is timed no further
AHEAD = 4.0  # a lead at which rows that take too long to be timed are taken for granted
TIE = 1.15  # what a plainer instruction set must lead by: text that both share runs alike on both, give or take noise
SLOW = 0.3  # seconds of a call: nothing of more rows is timed

# What holds torch's dense products (oneDNN, MKL, its own) to an instruction set. Nothing for scalar: processors for
# which qft has nothing better, such as Arm's, have vectors that torch uses.
HELD = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}


@dataclass(frozen=True)
class Wanted:
    """What is timed.

    Attributes:
        rows: of x or dy, ascending.
        many: above this many rows, the first format alone: decoding no longer takes most of the time.
        shapes: (out_features, in_features).
    """

    rows: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 2048)
    many: int = 32
    formats: tuple[str, ...] = ("nf4 g64 f32", "nf2 g64 f32", "int4 g64 f32")
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 14336))
    effort: Effort = field(default_factory=lambda: Effort(3, 5, 0.1))


MOST = Wanted().rows[-1]  # a kernel that still leads here has no end
QUICK = Wanted((1, 4, 16, 32, 64, 128), 0, Wanted.formats[:1], Wanted.shapes[:1], Effort(3, 3))


@dataclass(frozen=True)
class Layer:
    """A packed weight, and the same format with few outputs, which brings the code into the caches before a call."""

    whole: QuantTensor
    few: QuantTensor


def layers(wanted: Wanted) -> list[Layer]:
    """Every format on every shape, the formats of a shape together."""
    made = []
    for shape in wanted.shapes:
        w = check.weight_like(shape, torch.float32)
        made += [Layer(qft.quantize(w, fmt), qft.quantize(w[:SMALL].clone(), fmt)) for fmt in wanted.formats]
    return made


def products(verb: str, rows: Tensor, q: QuantTensor, names: Sequence[str]) -> dict[str, Call]:
    """The call of each kernel, all on the same columns of the operand: as many as the weight takes."""
    x = rows[:, : q.shape[verb == "matmul"]].contiguous()
    return {name: partial(getattr(kernels, verb), x, q, name) for name in names}


def timed(verb: str, rows: Tensor, layer: Layer, names: Sequence[str], effort: Effort, flush: Call) -> dict[str, float]:
    """Median seconds of each kernel and of the panel product, in turn, once their results were found to agree.

    Raises:
        ValueError: a result differs from the panel's.
    """
    calls = products(verb, rows, layer.whole, (*names, "panel"))
    panel = calls["panel"]().double()
    dtype = str(rows.dtype).removeprefix("torch.")
    for name in names:
        what = f"{verb} of {layer.whole.format} by {name}, {len(rows)} rows of {dtype}"
        check.require(check.relative_error(calls[name](), panel), TOLERANCE[dtype], what)
    before = [before_each(flush, few) for few in products(verb, rows, layer.few, [*calls]).values()]
    times = interleave([*calls.values()], effort, before)
    return {name: median(seconds) for name, seconds in zip(calls, times, strict=True)}


def runnable(verb: str, dtype: torch.dtype, fmt: qft.Format) -> tuple[list[str], dict[str, str]]:
    """The row kernels that can run a product here, in the table's order, and why the others cannot."""
    found, reasons = [], {}
    for name in [row.name for row in kernels.TABLE if row.name in CPU_FLAGS]:
        try:
            kernels.choose(kernels.Problem(verb, fmt, "cpu", dtype, 1), name)
            found.append(name)
        except ValueError as reason:
            reasons[name] = str(reason)
    return found, reasons


def lead(name: str, names: Sequence[str], seconds: Sequence[Mapping[str, float]]) -> float:
    """The time of the best alternative to a kernel over its own; `seconds` holds each layer's times by kernel."""
    plainer = [other for other in names[names.index(name) + 1 :] if other in seconds[0]]
    return min([ratio("panel", name, seconds), *(TIE * ratio(other, name, seconds) for other in plainer)])


def ratio(other: str, name: str, seconds: Sequence[Mapping[str, float]]) -> float:
    """Geometric mean over layers of one kernel's time over another's."""
    return geometric_mean(each[other] / each[name] for each in seconds)


def fastest(leads: Mapping[int, float]) -> Rows:
    """From how many rows to how many a kernel leads, by its lead at each number of rows that was timed."""
    rows = sorted(leads)
    runs = [(first, last) for first in range(len(rows)) for last in range(first, len(rows))]
    gains = {run: math.fsum(math.log(leads[count]) for count in rows[run[0] : run[1] + 1]) for run in runs}
    best = max(gains, key=gains.__getitem__)
    if gains[best] <= 0:
        return NO_ROWS
    least, most = (rows[at] for at in best)
    endless = most == rows[-1] and (most == MOST or leads[most] >= AHEAD)
    return least, None if endless else most


def curve(
    verb: str, dtype: torch.dtype, names: Sequence[str], all_layers: Sequence[Layer], wanted: Wanted, flush: Call
) -> dict[str, dict[int, float]]:
    """Each kernel's lead by rows, as far as it was timed."""
    leads: dict[str, dict[int, float]] = {name: {} for name in names}
    behind = dict.fromkeys(names, 0)
    width = max(max(shape) for shape in wanted.shapes)
    for rows in wanted.rows:
        left = [name for name in names if behind[name] < OFTEN]
        if not left:
            break
        some = all_layers if rows <= wanted.many else all_layers[:: len(wanted.formats)]
        x = check.operand(rows, width, dtype, seed=rows)
        seconds = [timed(verb, x, layer, left, wanted.effort, flush) for layer in some]
        for name in left:
            leads[name][rows] = lead(name, left, seconds)
            behind[name] = behind[name] + 1 if ratio("panel", name, seconds) <= 1 / BEHIND else 0
        if max(max(each.values()) for each in seconds) > SLOW:
            break
    return leads


def measure(best: str, wanted: Wanted) -> dict[str, Any]:
    """What one machine's part of the file says: provenance, and an entry for each kernel, verb and dtype."""
    known = native.instruction_sets()
    native.instruction_sets = lambda: known[: known.index(best) + 1]
    kernels.SLOW_PRODUCTS = kernels.slow_products(native.instruction_sets())
    found: dict[str, Any] = {
        "basis": "measured",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "machine": limits.processor(),
        "load_before": os.getloadavg()[0],
    }
    flush, _ = cache_flush()
    all_layers, served, said = layers(wanted), [], set()
    for verb in crossovers.VERBS:
        for dtype in native.DTYPES:
            spelled = str(dtype).removeprefix("torch.")
            names, reasons = runnable(verb, dtype, all_layers[0].whole.format)
            for name, reason in reasons.items():
                if (name, reason) not in said:
                    said.add((name, reason))
                    tell(f"as {best}: {reason}")
            for name, leads in curve(verb, dtype, names, all_layers, wanted, flush).items():
                served.append(entry(name, verb, spelled, leads))
                spans = ", ".join(f"{rows}: {lead:.2f}" for rows, lead in leads.items())
                tell(f"as {best}: {verb} {spelled} {name} serves {crossovers.spell(fastest(leads))} ({spans})")
    return {**found, "load_after": os.getloadavg()[0], "served": served}


def entry(kernel: str, verb: str, dtype: str, leads: Mapping[int, float]) -> dict[str, Any]:
    """As the file holds it; leads to three digits."""
    rounded = {rows: float(f"{lead:.3g}") for rows, lead in leads.items()}
    least, most = fastest(rounded)
    return {"kernel": kernel, "verb": verb, "dtype": dtype, "least": least, "most": most, "lead": rounded}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure_apart(best: str, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """`measure` in a process of its own, with torch held to the instruction set.

    Raises:
        OSError: that process failed; it has said why.
    """
    held = {} if best == native.instruction_sets()[-1] else HELD.get(best, {})
    command = [sys.executable, str(Path(__file__).resolve()), "--as", best, *["--quick"] * options.quick]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **held})
    if done.returncode:
        raise OSError(f"as {best}: the process that measures ended with {done.returncode}")
    found = json.loads(done.stdout)
    wanted = QUICK if options.quick else Wanted()
    words = [word if word != str(options.output) else options.output.name for word in arguments]
    about = {
        "basis": found.pop("basis"),
        "command": shlex.join(["python", "bench/crossovers.py", *words]),
        "date": found.pop("date"),
        "commit": options.commit or machine.commit(),
        "torch_held_by": held,
        "formats": list(wanted.formats),
        "shapes": [list(shape) for shape in wanted.shapes],
    }
    return {**about, **found}


def render(machines: Mapping[str, Mapping[str, Any]]) -> str:
    """The file's text, an entry a line, so that it reads as a table; machines from plain to best, then GPUs."""
    parts = []
    for name in sorted(machines, key=[*CPU_FLAGS, *(name for name in machines if name not in CPU_FLAGS)].index):
        about = {key: value for key, value in machines[name].items() if key != "served"}
        fields = [f"   {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in about.items()]
        entries = ",\n".join(f"    {json.dumps(one, allow_nan=False)}" for one in machines[name]["served"])
        body = ",\n".join([*fields, f'   "served": [\n{entries}\n   ]'])
        parts.append(f"  {json.dumps(name)}: {{\n{body}\n  }}")
    text = '{\n "machines": {\n' + ",\n".join(parts) + "\n }\n}\n"
    crossovers.parse(text)
    return text


def main(arguments: Sequence[str]) -> int:
    """0: measured; 2: it could not be, and one sentence says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = native.instruction_sets()
    parser.add_argument("--best", nargs="+", choices=sets, default=sets, metavar="SET", help=f"of {', '.join(sets)}")
    parser.add_argument(
        "--quick", action="store_true", help="few rows of one case; nothing is written without --output"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: {TABLE}")
    parser.add_argument("--commit", help="recorded in the file; default: what git says")
    parser.add_argument("--as", dest="apart", choices=sets, help=argparse.SUPPRESS)  # the process that measures
    options = parser.parse_args(arguments)
    try:
        if options.apart:
            print(json.dumps(measure(options.apart, QUICK if options.quick else Wanted())))
            return 0
        machines = json.loads((ROOT / TABLE).read_text())["machines"]
        machines |= {best: measure_apart(best, options, arguments) for best in options.best}
        output = options.output or (None if options.quick else ROOT / TABLE)
        if output:
            renew(output.parent, {output.name: render(machines)}, {}, check=False)
            print(output.name)
    except (OSError, ValueError) as error:
        print(f"crossovers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
