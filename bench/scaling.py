"""How time and memory grow: with layers, rows of x, ranks, threads and models.

    python bench/scaling.py                     writes bench/results/scaling.json; ten minutes, on a quiet machine
    python bench/scaling.py --quick             fewer points and rounds, two minutes
    python bench/scaling.py --only threads      that section alone; the others stay in the file as they are

A section is written when it is done. Models are Llamas of random weights, each in a process of its own; what they take
is fitted by a straight line over their parameters, and the line says what larger ones would take.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import scaling_layers
import torch
from scaling_layers import FEW, FULL, Point
from scaling_model import DENSE, Shape

from qft.disk.files import replace_file
from qft.speed.limits import processor

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "scaling.json"
MODELS = (Shape(768, 2048, 14, 12), Shape(1024, 2816, 20, 16), Shape(1536, 4096, 18, 12), Shape(2048, 5632, 20, 16))
MODEL_KINDS = ("nf4 g64 dq", "nf2 g64 f32", DENSE)
LARGER = {"3B": 3.2e9, "8B": 8.0e9, "13B": 13.0e9, "70B": 70.6e9}  # parameters of Llamas
FITTED = ("step_s", "token_s", "stored_bytes", "peak_bytes")


@dataclass(frozen=True)
class ModelEffort:
    """Tokens in a step's batch, rounds, and how many of `MODELS`, the smallest first."""

    tokens: int = 512
    rounds: int = 5
    models: int = len(MODELS)


FEW_MODELS = ModelEffort(128, 1, 3)


def models(effort: ModelEffort, threads: int) -> dict[str, Any]:
    """Every model and kind in a process of its own, and lines through what they take."""
    points = []
    for shape in MODELS[: effort.models]:
        for kind in MODEL_KINDS:
            points.append(in_child(shape, kind, effort, threads))
            print(render(points[-1]), flush=True)
    fits = {kind: {what: fit(points, kind, what) for what in FITTED} for kind in MODEL_KINDS}
    return {"points": points, "tokens": effort.tokens, "fits": fits, "larger": larger(fits)}


def in_child(shape: Shape, kind: str, effort: ModelEffort, threads: int) -> Point:
    """One point of `models`. ValueError: its process failed."""
    words = [json.dumps(asdict(shape)), kind, str(effort.tokens), str(threads), str(effort.rounds)]
    program = [sys.executable, "-W", "ignore", str(HERE / "scaling_model.py"), *words]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"{kind} with {shape.parameters / 1e6:.0f} M parameters failed: {last}")
    return dict(json.loads(done.stdout))


def fit(points: Sequence[Point], kind: str, what: str) -> dict[str, float]:
    """Least squares of `what` = a + b * parameters; `residual` is the largest error of a point, of its own size."""
    pairs = [(point["parameters"], point[what]) for point in points if point["kind"] == kind]
    mean_n, mean_y = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    slope = sum((n - mean_n) * (y - mean_y) for n, y in pairs) / sum((n - mean_n) ** 2 for n, _ in pairs)
    line = {"a": mean_y - slope * mean_n, "b": slope}
    return {**line, "residual": max(abs(at(line, n) - y) / y for n, y in pairs)}


def larger(fits: dict[str, dict[str, dict[str, float]]]) -> list[Point]:
    """What the lines say of models that were not measured."""
    return [
        {"name": name, "kind": kind, "parameters": n, **{what: at(line, n) for what, line in lines.items()}}
        for name, n in LARGER.items()
        for kind, lines in fits.items()
    ]


def at(line: dict[str, float], parameters: float) -> float:
    """The line's value."""
    return line["a"] + line["b"] * parameters


LAYER_SECTIONS = {
    "size": scaling_layers.sizes,
    "rows": scaling_layers.rows,
    "rank": scaling_layers.ranks,
    "threads": scaling_layers.threads,
}
SECTIONS = (*LAYER_SECTIONS, "model")


def measure(name: str, quick: bool, threads: int) -> dict[str, Any]:
    """A section's points, and for models the lines through them."""
    if name == "model":
        return models(FEW_MODELS if quick else ModelEffort(), threads)
    points = LAYER_SECTIONS[name](FEW if quick else FULL, threads)
    print("\n".join(render(point) for point in points), flush=True)
    return {"points": points}


def render(point: Point) -> str:
    """A point as a line of text."""
    axes = (f"{key}={point[key]}" for key in ("size", "rank", "threads", "rows", "parameters") if key in point)
    times = (f"{key} {1e3 * point[key]:.3f} ms" for key in ("median_s", "step_s", "token_s") if key in point)
    memory = (f"{key} {value / 1e6:.1f} MB" for key, value in point.items() if key.endswith("_bytes"))
    return " ".join((point["kind"] + ",", point.get("what", "model"), *axes, *times, *memory))


def write(path: Path, name: str, section: dict[str, Any]) -> None:
    """Put a section into the file beside those that it has."""
    report = json.loads(path.read_text()) if path.is_file() else {"kind": "scaling", "sections": {}}
    report["sections"][name] = section
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def main(arguments: Sequence[str]) -> int:
    """0: measured; 2: it could not be, and one sentence says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer points and rounds")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="may be repeated; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: torch's")
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--commit", help="recorded in the report; default: what git says")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    words = ["--quick"] * options.quick + [word for name in options.only or () for word in ("--only", name)]
    try:
        for name in options.only or SECTIONS:
            before = os.getloadavg()[0]
            print(f"{name}:", flush=True)
            section = {
                **measure(name, options.quick, options.threads),
                "machine": processor(),
                "versions": machine.versions(),
                "command": shlex.join(["python", "bench/scaling.py", *words, "--threads", str(options.threads)]),
                "commit": options.commit or machine.commit(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "quick": options.quick,
                "load_before": before,
                "load_after": os.getloadavg()[0],
            }
            write(options.output, name, section)
    except (OSError, ValueError) as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
