"""What LoftQ costs and gains: seconds and errors by format, on one large layer and over the demo model.

python bench/starting_points.py         writes bench/results/loftq.json and the tables of docs/starting-points.md
python bench/starting_points.py --page  writes the tables again from the results there are
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import torch
from publish import replace_block, table
from safetensors import safe_open
from torch import Tensor

import qft

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "loftq.json"
PAGE = ROOT / "docs" / "starting-points.md"
MODEL = ROOT / "examples" / "stdlib-lm" / "model.safetensors"
FORMATS = (
    "nf4 g64 f32",
    "nf4 g64 dq",
    "fp4 g64 f32",
    "int4 g64 f16",
    "nf3 g64 f32",
    "int3 g64 f16 zero",
    "nf2 g64 f32",
    "int2 g64 f16",
    "int2 g64 f16 zero",
    "[-1 -0.25 0.3 1] g64 f32",
)
SHAPE, RANK, ITERS, ROUNDS = (4096, 4096), 64, 5, 3
DEMO_RANK = 16


def layer(w: Tensor, fmt: str) -> dict[str, Any]:
    """Errors by step and seconds of ROUNDS runs on one weight."""
    seconds, errors = [], []
    for _ in range(ROUNDS):
        errors.clear()
        start = time.perf_counter()
        q, _, _ = qft.loftq(w, fmt, RANK, ITERS, on_step=lambda step, error: errors.append(error))
        seconds.append(time.perf_counter() - start)
    return {"format": str(q.format), "bits": q.bits_per_weight, "errors": [*errors], "seconds": seconds}


def model(weights: list[Tensor], fmt: str) -> dict[str, Any]:
    """Errors of all weights together, sqrt(Σ‖W − Q − BA‖² / Σ‖W‖²): plain, T = 1, the best of ITERS in either order."""
    squares = {"plain": 0.0, "one": 0.0, "best": 0.0, "svd_first": 0.0}
    start = time.perf_counter()
    for w in weights:
        size, errors, turned = float(w.double().norm()), [], []
        qft.loftq(w, fmt, DEMO_RANK, ITERS, on_step=lambda step, error, to=errors: to.append(error))
        qft.loftq(w, fmt, DEMO_RANK, ITERS, order="svd-first", on_step=lambda step, error, to=turned: to.append(error))
        found = {"plain": errors[0], "one": errors[1], "best": min(errors), "svd_first": min(turned)}
        squares = {key: value + (size * found[key]) ** 2 for key, value in squares.items()}
    whole = sum(float(w.double().norm()) ** 2 for w in weights)
    return {
        "format": str(qft.Format.parse(fmt)),
        **{key: math.sqrt(value / whole) for key, value in squares.items()},
        "seconds": time.perf_counter() - start,
    }


def demo_weights() -> list[Tensor]:
    """Every linear weight of the demo model's blocks, fp32."""
    with safe_open(MODEL, "pt") as file:
        return [file.get_tensor(name).float() for name in sorted(file.keys()) if name.endswith("_proj.weight")]


def measure() -> dict[str, Any]:
    """The results file."""
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weights = demo_weights()
    qft.loftq(w[:1024, :1024], FORMATS[0], 16, 1)  # what libraries set up once
    for fmt in FORMATS:
        qft.quantize(w[:64, :64], fmt)  # levels of one's own are compiled here
    report: dict[str, Any] = {
        "machine": machine.processor(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": os.getloadavg()[0],
        "shape": SHAPE,
        "rank": RANK,
        "iters": ITERS,
        "demo_rank": DEMO_RANK,
        "demo_weights": len(weights),
        "layer": [layer(w, fmt) for fmt in FORMATS],
        "demo": [model(weights, fmt) for fmt in FORMATS],
    }
    one: list[float] = []
    start = time.perf_counter()
    qft.loftq(w, "nf2 g64 f32", RANK, 1, svd="exact", on_step=lambda step, error: one.append(error))
    report["exact"] = {"format": "nf2 g64 f32", "error": one[1], "seconds": time.perf_counter() - start}
    return report


def tables(report: dict[str, Any]) -> str:
    """The measured part of docs/starting-points.md."""
    at, last = report["machine"], report["iters"]
    lines = [
        (
            f"`{row['format']}`",
            f"{row['bits']:.3f}",
            *(f"{row['errors'][step]:.4f}" for step in (0, 1)),
            f"{min(row['errors']):.4f} (step {row['errors'].index(min(row['errors']))})",
            f"{statistics.median(row['seconds']):.2f}",
        )
        for row in report["layer"]
    ]
    head = ("format", "stored bits", "plain", "T = 1", f"best of {last}", f"seconds, T = {last}")
    out, in_features = report["shape"]
    exact = report["exact"]
    randomized = next(row for row in report["layer"] if row["format"] == exact["format"])
    differs = 100 * (randomized["errors"][1] / exact["error"] - 1)
    demo = [
        (f"`{row['format']}`", *(f"{row[key]:.4f}" for key in ("plain", "one", "best", "svd_first")))
        for row in report["demo"]
    ]
    demo_head = ("format", "plain", "T = 1", f"best of {last}", f"best of {last}, SVD first")
    return "\n\n".join(
        (
            f"Relative error of a Gaussian weight {out}x{in_features} at rank {report['rank']}, and median seconds:",
            table(head, lines),
            f"At T = 1 the error with `{exact['format']}` is {differs:.2f} % above the exact SVD's, which took "
            f"{exact['seconds']:.0f} s for its one step.",
            f"The demo model's {report['demo_weights']} linear weights together, rank {report['demo_rank']}:",
            table(demo_head, demo),
            f"{at['cpu']}, {at['cores']} cores, {at['threads']} threads, torch {report['torch']}, load average "
            f"{report['load_before']:.1f} before, {report['date'][:10]}. Measured and written by "
            "`python bench/starting_points.py`.",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing, write the tables")
    if not parser.parse_args().page:
        report = measure()
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(replace_block(PAGE.read_text(), "measured", tables(json.loads(RESULT.read_text()))))


if __name__ == "__main__":
    main()
