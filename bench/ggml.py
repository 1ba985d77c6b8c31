"""llama.cpp's ggml against qft: the same layers, about the same bits, timed in turn in one process.

    python bench/ggml.py --ggml DIR             writes bench/results/cpu-ggml.json; three minutes, on a quiet machine
    python bench/ggml.py --ggml DIR --quick     5 rounds on one small layer, nothing written without --output

DIR holds the shared libraries of a build of ggml or llama.cpp. From a checkout of ggml:

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON
    cmake --build build                         then DIR is build/src; llama.cpp has them in build/bin

ggml gets its best: its own threads kept in a pool, every kind of memory it has for a type (it repacks weights for the
CPU as llama.cpp does when it loads a model), the faster of them compared. Both sides read the weight from memory: a
buffer of four times the last-level cache is read before each call, by the threads of the side whose turn it is, so that
they are awake as they are between the layers of a model; then the same call runs on the layer's first rows, so that
code is where the layer before would have left it. Neither is timed. Where the two sides have different threads, the
others are sent to sleep first, and the turn begins when the process uses no processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
from cases import DOWN, SQUARE, UP
from ggml_library import Ggml, Product, Weight
from torch import Tensor

import qft
from qft import ops, reference
from qft.disk.files import replace_file
from qft.speed import limits
from qft.speed.check import TOLERANCE, product_error, relative_error, weight_like
from qft.speed.clock import QUICK, Effort, cache_flush, interleave, spread
from qft.speed.roofline import DTYPES

RESULT = Path(__file__).resolve().parent / "results" / "cpu-ggml.json"
# (qft's code, ggml's type). Bits per weight with scales: 4.5 and 4.5, 3.5 and 3.44, 2.5 and 2.63.
PAIRS = (("nf4", "q4_0"), ("nf4", "iq4_nl"), ("int4", "q4_0"), ("nf3", "q3_K"), ("nf2", "q2_K"))
SHAPES, SMALL = (SQUARE, UP, DOWN), (256, 4096)
ROWS = (1, 2, 4, 8, 16)
SLICE = 64  # rows of a weight in the untimed call that fetches the code
HELD = (UP, DOWN)  # one token through these must be at least as fast as in ggml
# On |y - truth| / |truth|. ggml rounds x to 8 bits in blocks of 32 (for q4_0 and iq4_nl) or 256: of normal x, whose
# largest in a block lies at 2.1 or 2.9 standard deviations, that is 0.5 % or 0.7 %. Twice the latter is allowed.
GGML_TOLERANCE = 1.4e-2
REST, CALM, PATIENCE = 2e-3, 0.05, 2.0  # seconds looked at, cores in use that count as none, seconds until giving up
RUNTIME = re.compile(r"\S*/(lib(?:gomp|omp|iomp5)\S*\.so\S*)")


@dataclass(frozen=True)
class Timed:
    """A checked call, what its row says of it, and the same call on the first rows of the weight."""

    row: dict[str, Any]
    call: Callable[[], Any]
    small: Callable[[], Any]


# ---- whose turn it is


def quiet() -> None:
    """Wait until no thread of this process runs. OSError: they never stop."""
    start = time.perf_counter()
    while time.perf_counter() - start < PATIENCE:
        used = time.process_time()
        time.sleep(REST)
        if time.process_time() - used < CALM * REST:
            return
    raise OSError("threads of this process do not come to rest; unset OMP_WAIT_POLICY and GOMP_SPINCOUNT")


def openmp_runtimes(maps: str) -> list[str]:
    """File names of the OpenMP libraries in a process, from the text of /proc/self/maps."""
    return sorted(set(RUNTIME.findall(maps)))


class Turns:
    """Hands the cores from one side's threads to the other's, and empties the caches with them."""

    def __init__(self, ggml: Ggml) -> None:
        self.ggml, self.side = ggml, ""
        runtimes = openmp_runtimes(Path("/proc/self/maps").read_text())
        self.shared = "OPENMP" in ggml.features and len(runtimes) == 1
        torch_flush, self.nbytes = cache_flush()
        rows = torch.ones(self.nbytes // 4 // 4096, 4096)
        ggml_flush = Product(Weight(ggml, rows.view(torch.uint8), "f32", 4096), 1)
        ggml_flush.load(torch.ones(1, 4096))
        self.flush = {"qft": torch_flush, "ggml": ggml_flush}

    def before(self, side: str, small: Callable[[], Any]) -> Callable[[], None]:
        """What to run, untimed, before a call of `side`; `small` fetches the call's code."""

        def prepare() -> None:
            if side != self.side and not self.shared:
                self.ggml.pause()
                quiet()
                if side == "ggml":
                    self.ggml.resume()
            self.side = side
            self.flush[side]()
            small()

        return prepare

    def close(self) -> None:
        self.ggml.pause()


# ---- what is timed


def operand(rows: int, width: int) -> Tensor:
    """x, fp32; whole in bf16, so that both dtypes multiply the same numbers."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).bfloat16().float()


def ours(shape: tuple[int, int], rows: Sequence[int]) -> list[Timed]:
    """qft's formats on one layer, for x in bf16 and in fp32."""
    w, made = weight_like(shape, torch.bfloat16), []
    for code in dict.fromkeys(code for code, _ in PAIRS):
        fmt = f"{code} g64 f32"
        q, few = qft.quantize(w, fmt), qft.quantize(w[:SLICE], fmt)
        expected = reference.dequantize(q.unpack(), q.scales, q.zeros, q.format)
        lost = relative_error(expected, w)
        for dtype in DTYPES:
            for m in rows:
                x = operand(m, shape[1]).to(DTYPES[dtype])
                error = check(ops.matmul(x, q), x, expected, TOLERANCE[dtype], f"qft's {fmt} on {m} rows of {dtype}")
                row = {"who": "qft", "format": fmt, "place": "", "dtype": dtype, "rows": m, "shape": list(shape)}
                row |= {"stored_bytes": q.nbytes, "weight_error": lost, "relative_error": error}
                made.append(Timed(row, partial(ops.matmul, x, q), partial(ops.matmul, x, few)))
    return made


def theirs(ggml: Ggml, shape: tuple[int, int], rows: Sequence[int]) -> tuple[list[Timed], list[dict[str, str]]]:
    """ggml's types on one layer in every kind of memory that has them; and why the others have not."""
    w, made, absent = weight_like(shape, torch.bfloat16).float(), [], []
    for name in dict.fromkeys(name for _, name in PAIRS):
        stored = ggml.quantize(w, name)
        expected = ggml.dequantize(stored, name, shape[1])
        lost = relative_error(expected, w)
        for place in ggml.buffer_types:
            try:
                weight, few = (Weight(ggml, some, name, shape[1], place) for some in (stored, stored[:SLICE]))
            except OSError as reason:
                absent.append({"format": name, "place": place, "reason": str(reason)})
                continue
            for m in rows:
                product, small, x = Product(weight, m), Product(few, m), operand(m, shape[1])
                product.load(x)
                small.load(x)
                product()
                what = f"ggml's {name} ({place}) on {m} rows"
                error = check(product.result(), x, expected, GGML_TOLERANCE, what)
                row = {"who": "ggml", "format": name, "place": place, "dtype": "f32", "rows": m, "shape": list(shape)}
                row |= {"stored_bytes": stored.nbytes, "weight_error": lost, "relative_error": error}
                made.append(Timed(row, product, small))
    return made, absent


def check(y: Tensor, x: Tensor, expected: Tensor, most: float, what: str) -> float:
    """The relative error of y = x expectedT. ValueError: it is more than `most`."""
    error = product_error(y, x, expected.T)
    if not error <= most:
        raise ValueError(f"{what}: the relative error {error:.2g} exceeds {most:g}; a wrong result is not timed")
    return error


# ---- figures


def figures(row: dict[str, Any], seconds: Sequence[float], read: float) -> dict[str, Any]:
    """A row with its times, and what follows from them; `read` is the machine's, in bytes per second."""
    found, weights = spread(seconds), row["shape"][0] * row["shape"][1]
    rate = row["stored_bytes"] / found["median_s"]
    return {
        **row,
        **found,
        "bits_per_weight": 8 * row["stored_bytes"] / weights,
        "tokens_per_s": row["rows"] / found["median_s"],
        "bytes_per_s": rate,
        "percent_of_read": 100 * rate / read,
    }


def comparisons(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pair of formats on every layer and number of rows, ggml in its faster memory; targets met or missed."""
    found = []
    for row in (row for row in rows if row["who"] == "qft"):
        for code, name in PAIRS:
            if row["format"].split()[0] == code:
                same = (
                    o for o in rows if o["format"] == name and o["rows"] == row["rows"] and o["shape"] == row["shape"]
                )
                peer = min(same, key=lambda one: one["median_s"])
                ratio = peer["median_s"] / row["median_s"]
                held = row["rows"] == 1 and row["dtype"] == "bf16" and tuple(row["shape"]) in HELD
                entry = {key: row[key] for key in ("shape", "rows", "dtype")}
                entry |= {"qft": row["format"], "ggml": name, "place": peer["place"], "ratio": ratio}
                found.append({**entry, "least": 1.0 if held else None, "met": ratio >= 1.0 if held else None})
    return found


def disturbance(turns: Turns, timed: dict[str, Timed], effort: Effort) -> dict[str, dict[str, float]]:
    """Median seconds of a call as all are timed, and with the other side's threads awake: they flushed just before."""
    found = {}
    for side, other in (("qft", "ggml"), ("ggml", "qft")):

        def awake(side: str = side, other: str = other) -> None:
            turns.before(side, timed[side].small)()
            turns.ggml.resume()
            turns.flush[other]()
            timed[side].small()
            turns.side = other  # whose threads are awake: the next turn waits for them

        usual, disturbed = interleave([timed[side].call] * 2, effort, [turns.before(side, timed[side].small), awake])
        found[side] = {"usual_s": median(usual), "disturbed_s": median(disturbed)}
    return found


def run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measure everything; the report as it is written."""
    if options.threads:
        torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    ggml = Ggml(options.ggml, torch.get_num_threads())
    turns, effort = Turns(ggml), QUICK if options.quick else Effort()
    ggml.pause()
    quiet()
    capacity = limits.limits(5 if options.quick else 15)
    rows: list[dict[str, Any]] = []
    absent: list[dict[str, str]] = []
    for shape in (SMALL,) if options.quick else SHAPES:
        peers, absent = theirs(ggml, shape, ROWS)
        timed = [*ours(shape, ROWS), *peers]
        turns.side = ""  # checks have woken everybody
        for m in ROWS:
            of = [one for one in timed if one.row["rows"] == m]
            times = interleave(
                [one.call for one in of], effort, [turns.before(one.row["who"], one.small) for one in of]
            )
            rows += [figures(one.row, seconds, capacity["read"]) for one, seconds in zip(of, times, strict=True)]
            print(render(rows[-len(of) :]), flush=True)
    one_token = {one.row["format"]: one for one in timed if one.row["rows"] == 1}
    disturbed = disturbance(turns, {"qft": one_token["nf4 g64 f32"], "ggml": one_token["q4_0"]}, effort)
    turns.close()
    return {
        "kind": "ggml",
        "command": shlex.join(["python", "bench/ggml.py", *nameless(arguments, options)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options.commit or machine.commit(),
        "versions": machine.versions(),
        "machine": limits.processor(),
        "ggml": {
            "version": ggml.version,
            "commit": options.ggml_commit or ggml.commit,
            "features": ggml.features,
            "threads": ggml.threads,
        },
        "shared_threads": turns.shared,
        "quick": options.quick,
        "flush_bytes": turns.nbytes,
        "limits": capacity,
        "rows": rows,
        "absent": absent,
        "comparisons": comparisons(rows),
        "disturbance": disturbed,
        "load_before": load,
        "load_after": os.getloadavg()[0],
    }


def nameless(arguments: Sequence[str], options: argparse.Namespace) -> list[str]:
    """The arguments with folders of this machine left out."""
    names = {str(options.ggml): "DIR", str(options.output): getattr(options.output, "name", "")}
    return [names.get(word, word) for word in arguments]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as lines of text."""
    lines = []
    for row in rows:
        work = f"{row['shape'][0]}x{row['shape'][1]} M={row['rows']}"
        who = f"{row['who']}, {row['format']}, {row['place'] or row['dtype']}"
        rate = f"{row['bytes_per_s'] / 1e9:6.1f} GB/s  {row['percent_of_read']:3.0f} % of read"
        speed = f"{1e3 * row['median_s']:8.3f} ms  {row['tokens_per_s']:8.0f} tokens/s"
        lines.append(f"{work:17} {who:28} {speed}  {row['bits_per_weight']:.2f} bits  {rate}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """0: measured, met or not; 2: it could not be, and one sentence says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, required=True, metavar="DIR", help="holds ggml's shared libraries")
    parser.add_argument("--threads", type=int, metavar="N", help="of either side; default: torch's")
    parser.add_argument("--quick", action="store_true", help="5 rounds, one small layer")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: bench/results/{RESULT.name}")
    parser.add_argument("--commit", help="qft's, recorded in the report; default: what git says")
    parser.add_argument("--ggml-commit", metavar="NAME", help="recorded in the report; default: what the build says")
    options = parser.parse_args(arguments)
    try:
        with torch.no_grad():
            report = run(options, arguments)
        output = options.output or (None if options.quick else RESULT)
        if output:
            with replace_file(output) as temporary:
                temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
            print(output)
    except (OSError, ValueError) as error:
        print(f"ggml: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
