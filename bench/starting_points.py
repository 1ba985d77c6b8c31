"""What starting points cost and gain: seconds on large layers, and errors of the weights and outputs they leave.

python bench/starting_points.py                measures all, writes bench/results/starting-points.json and the tables of
                                               docs/starting-points.md
python bench/starting_points.py --part starts  measures one part again, loftq, starts or seconds, and keeps the others
python bench/starting_points.py --page         writes the tables again from the results there are
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from publish import replace_block, table
from safetensors import safe_open
from torch import Tensor

import qft
from qft.demo import texts
from qft.disk.pretrained import load_model
from qft.init import NEEDS, output_error
from qft.model.targets import quantizable
from qft.speed.limits import processor

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "starting-points.json"
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
STARTS: dict[str, dict[str, Any]] = {  # by the name in the table
    "plain": {},
    "loftq": {},
    "search": {},
    "loftq, search": {"quantizer": "search"},
    "lqlora": {},
    "qera_diag": {},
    "qera_exact": {},
    "gptq": {},
    "cloq": {},
    "cloq, 3 turns": {"iters": 3},
}
START_FORMATS = ("nf4 g64 f32", "nf3 g64 f32", "nf2 g64 f32", "lm2 g64 f16")
CALIBRATION_ROWS = 192  # windows of 256 tokens
TIMED_SHAPES = ((4096, 4096), (4096, 11008))
TIMED_FORMAT = "nf2 g64 f32"


def layer(w: Tensor, fmt: str) -> dict[str, Any]:
    """Errors by step and seconds of ROUNDS runs on one weight."""
    seconds, errors = [], []
    for _ in range(ROUNDS):
        errors.clear()
        begun = time.perf_counter()
        q, _, _ = qft.loftq(w, fmt, RANK, ITERS, on_step=lambda step, error: errors.append(error))
        seconds.append(time.perf_counter() - begun)
    return {"format": str(q.format), "bits": q.bits_per_weight, "errors": [*errors], "seconds": seconds}


def model(weights: list[Tensor], fmt: str) -> dict[str, Any]:
    """Errors of all weights together, sqrt(Σ‖W − Q − BA‖² / Σ‖W‖²): plain, T = 1, the best of ITERS in either order."""
    squares = {"plain": 0.0, "one": 0.0, "best": 0.0, "svd_first": 0.0}
    begun = time.perf_counter()
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
        "seconds": time.perf_counter() - begun,
    }


def demo_weights() -> list[Tensor]:
    """Every linear weight of the demo model's blocks, fp32."""
    with safe_open(MODEL, "pt") as file:
        return [file.get_tensor(name).float() for name in sorted(file.keys()) if name.endswith("_proj.weight")]


def start(name: str, w: Tensor, fmt: str, rank: int, moment: Tensor) -> tuple[qft.QuantTensor, Tensor, Tensor]:
    """A row of STARTS, given what it needs of the second moment and what it may use."""
    function = name.partition(",")[0]
    uses = NEEDS[function] != "none" or function == "search"
    given = {"second_moment": moment} if uses else {}
    return getattr(qft.init, function)(w, fmt, rank, **given, **STARTS[name])


def here() -> dict[str, Any]:
    """Where and when a part is measured."""
    return {
        "machine": processor(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": os.getloadavg()[0],
    }


def measure_starts() -> dict[str, Any]:
    """Relative error of the demo model's outputs, sqrt(Σ E‖(W − Q − BA) x‖² / Σ E‖W x‖²), on text not calibrated on."""
    report = here()
    model = load_model(MODEL.parent, "float32")
    material = texts(MODEL.parent.parent)
    layers = {path: module.weight.detach() for path, module in quantizable(model).items()}
    calibration = qft.calibrate(model, material.train[:CALIBRATION_ROWS], material.collate)
    held_out = qft.calibrate(model, material.new, material.collate)
    whole = {path: float((w.double() @ held_out[path].double() * w).sum()) for path, w in layers.items()}
    rows = []
    for fmt in START_FORMATS:
        for name in STARTS:
            lost = 0.0
            for path, w in layers.items():
                q, a, b = start(name, w, fmt, DEMO_RANK, calibration[path])
                lost += output_error(w, q.dequantize(), a, b, 1.0, held_out[path]) ** 2 * whole[path]
            rows.append(
                {"format": str(qft.Format.parse(fmt)), "start": name, "error": math.sqrt(lost / sum(whole.values()))}
            )
    return report | {
        "rank": DEMO_RANK,
        "layers": len(layers),
        "tokens": {"calibration": calibration.tokens, "held out": held_out.tokens},
        "rows": rows,
    }


def measure_seconds() -> dict[str, Any]:
    """Seconds of every start on large layers, the median of ROUNDS."""
    report = here() | {"rank": RANK, "format": TIMED_FORMAT, "rows": []}
    for shape in TIMED_SHAPES:
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(shape, generator=generator)
        x = torch.randn(2 * shape[1], shape[1], generator=generator) * torch.rand(shape[1], generator=generator)
        moment = (x.T @ x).div_(len(x))
        del x
        for name in STARTS:
            seconds = []
            for _ in range(ROUNDS):
                begun = time.perf_counter()
                start(name, w, TIMED_FORMAT, RANK, moment)
                seconds.append(time.perf_counter() - begun)
            report["rows"].append({"shape": shape, "start": name, "seconds": seconds})
    return report


def measure_loftq() -> dict[str, Any]:
    """LoftQ's errors of the weights by step, and its seconds."""
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weights = demo_weights()
    qft.loftq(w[:1024, :1024], FORMATS[0], 16, 1)  # what libraries set up once
    for fmt in FORMATS:
        qft.quantize(w[:64, :64], fmt)  # levels of one's own are compiled here
    report: dict[str, Any] = here() | {
        "shape": SHAPE,
        "rank": RANK,
        "iters": ITERS,
        "demo_rank": DEMO_RANK,
        "demo_weights": len(weights),
        "layer": [layer(w, fmt) for fmt in FORMATS],
        "demo": [model(weights, fmt) for fmt in FORMATS],
    }
    one: list[float] = []
    begun = time.perf_counter()
    qft.loftq(w, "nf2 g64 f32", RANK, 1, svd="exact", on_step=lambda step, error: one.append(error))
    report["exact"] = {"format": "nf2 g64 f32", "error": one[1], "seconds": time.perf_counter() - begun}
    return report


def loftq_tables(report: dict[str, Any]) -> str:
    """What LoftQ leaves of the weights."""
    last = report["iters"]
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
            machine_line(report),
        )
    )


def starts_tables(report: dict[str, Any]) -> str:
    """What every start leaves of the outputs."""
    error = {(row["start"], row["format"]): row["error"] for row in report["rows"]}
    formats = list(dict.fromkeys(row["format"] for row in report["rows"]))
    names = dict.fromkeys(row["start"] for row in report["rows"])
    lines = [(f"`{name}`", *(f"{error[name, fmt]:.4f}" for fmt in formats)) for name in names]
    tokens = report["tokens"]
    return "\n\n".join(
        (
            f"Relative error of the outputs of the demo model's {report['layers']} linear layers together, rank "
            f"{report['rank']}, calibrated on {tokens['calibration']} tokens of the language reference and measured on "
            f"{tokens['held out']} others:",
            table(("start", *(f"`{fmt}`" for fmt in formats)), lines),
            machine_line(report),
        )
    )


def seconds_tables(report: dict[str, Any]) -> str:
    """How long every start takes for a large layer."""
    took = {(row["start"], tuple(row["shape"])): statistics.median(row["seconds"]) for row in report["rows"]}
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in report["rows"]))
    names = dict.fromkeys(row["start"] for row in report["rows"])
    lines = [(f"`{name}`", *(f"{took[name, shape]:.1f}" for shape in shapes)) for name in names]
    return "\n\n".join(
        (
            f"Median seconds for one layer, `{report['format']}`, rank {report['rank']}:",
            table(("start", *(f"{out}x{in_features}" for out, in_features in shapes)), lines),
            machine_line(report),
        )
    )


def machine_line(report: dict[str, Any]) -> str:
    """Where and when a part was measured."""
    at = report["machine"]
    return (
        f"{at['cpu']}, {at['cores']} cores, {at['threads']} threads, torch {report['torch']}, load average "
        f"{report['load_before']:.1f} before, {report['date'][:10]}. Measured and written by "
        "`python bench/starting_points.py`."
    )


PARTS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "starts": (measure_starts, starts_tables),
    "seconds": (measure_seconds, seconds_tables),
    "loftq": (measure_loftq, loftq_tables),
}


def tables(results: dict[str, Any]) -> str:
    """The measured part of docs/starting-points.md: of the parts that have been measured."""
    return "\n\n".join(write(results[part]) for part, (_, write) in PARTS.items() if part in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing, write the tables")
    parser.add_argument("--part", choices=PARTS, help="measure this part again, keep the others")
    asked = parser.parse_args()
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if not asked.page:
        results |= {part: PARTS[part][0]() for part in ([asked.part] if asked.part else PARTS)}
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(replace_block(PAGE.read_text(), "measured", tables(results)))


if __name__ == "__main__":
    main()
