"""Bit plans against uniform bits at equal stored bytes, on the demo model: perplexity of quantized, untuned models.

python bench/plan.py         writes bench/results/plan.json, docs/figures/plan.png and the table of docs/bit-plans.md
python bench/plan.py --page  writes the table again from the results there are

Calibrated on the first 64 rows of the language reference, with gradients; measured on 64 held-out windows of it and
64 of the model's own domain, as `qft demo` measures. Every model here is quantized with searched scales whose columns
are weighted by E[x_j²], so that only the choice of formats differs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from publish import replace_block, table
from torch import Tensor

import qft
from qft.demo import Texts, texts
from qft.disk.pretrained import load_model
from qft.measure.calibration import Calibration
from qft.measure.measured_plan import LADDER
from qft.measure.plan import Candidate, Plan, Weight, choose, first_layers
from qft.measure.plan_figure import draw_plan
from qft.model.targets import quantizable
from qft.speed.limits import processor
from qft.training.evaluate import perplexity

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "plan.json"
PAGE = ROOT / "docs" / "bit-plans.md"
FIGURE = ROOT / "docs" / "figures" / "plan.png"
EXAMPLES = ROOT / "examples"
CALIBRATION_ROWS = 64
BEST = "loss"
# The rise of the loss, sensitivity / 2 · tr(R S Rᵀ); the share of the outputs or of the weights that is lost,
# tr(R S Rᵀ) / tr(W S Wᵀ) or ‖R‖² / ‖W‖²; and these without their denominators.
CRITERIA = (BEST, "outputs", "outputs, absolute", "weights", "weights, absolute")
UNIFORM = {
    2.25: ("lm2 g64 f16", "nf2 g64 f16", "int2 g64 f16"),
    2.5: ("lm2 g32 f16",),
    2.75: (),
    3.25: ("lm3 g64 f16", "nf3 g64 f16"),
}
FIRST = {2.75: 2, 3.25: 4}  # LoftQ's mixed precision of the same bytes: so many of 8 blocks at 4 bits, the rest at 2
HIGH, LOW = "lm4 g64 f16", "lm2 g64 f16"
DRAWN = 2.5  # bits of the plan in the figure


class Trial:
    """The demo model, and what it becomes in any formats."""

    def __init__(self) -> None:
        self.model = load_model(EXAMPLES / "stdlib-lm", "float32")
        self.texts: Texts = texts(EXAMPLES)
        self.layers = quantizable(self.model)
        self.dense = {path: module.weight.detach().clone() for path, module in self.layers.items()}
        rows = self.texts.train[:CALIBRATION_ROWS]
        self.calibration: Calibration = qft.calibrate(self.model, rows, self.texts.collate, gradients=True)
        self.known: dict[tuple[str, str], tuple[int, Tensor]] = {}

    def stored(self, path: str, fmt: str) -> tuple[int, Tensor]:
        """Bytes and values of one weight in one format."""
        if (path, fmt) not in self.known:
            importance = self.calibration[path].diagonal().contiguous()
            q = qft.quantize(self.dense[path], fmt, search=True, importance=importance)
            self.known[path, fmt] = q.nbytes, q.dequantize()
        return self.known[path, fmt]

    def measured(self, criterion: str) -> list[Weight]:
        """The candidates of every weight, their errors by a criterion, straight from its formula in float64."""
        weights = []
        for path, dense in self.dense.items():
            w = dense.double()
            s = torch.eye(w.shape[1]).double() if criterion.startswith("weights") else self.calibration[path].double()
            worth = 1 / float(((w @ s) * w).sum())
            if criterion == BEST:
                worth = self.calibration.sensitivity[path] / 2
            elif criterion.endswith("absolute"):
                worth = 1.0
            candidates = []
            for fmt in LADDER:
                nbytes, values = self.stored(path, fmt)
                r = w - values.double()
                candidates.append(Candidate(fmt, nbytes, worth * float(((r @ s) * r).sum())))
            weights.append(Weight((path,), tuple(w.shape), tuple(candidates)))
        return weights

    def perplexities(self) -> dict[str, float]:
        """Of the model as it is, on both domains."""
        domains = {"new": self.texts.new, "own": self.texts.own}
        return {name: perplexity(self.model, rows, self.texts.collate).value for name, rows in domains.items()}

    @torch.no_grad()
    def run(self, bits: float, name: str, formats: Mapping[str, str]) -> dict[str, Any]:
        """Perplexities of the model in these formats."""
        nbytes = 0
        for path, module in self.layers.items():
            size, values = self.stored(path, formats[path])
            nbytes += size
            module.weight.copy_(values)
        row = {
            "bits": bits,
            "name": name,
            "bytes": nbytes,
            **self.perplexities(),
            "formats": dict(sorted(Counter(formats.values()).items())),
        }
        print(row, flush=True)
        return row


def measure() -> dict[str, Any]:
    """The results file."""
    start, load = time.perf_counter(), os.getloadavg()[0]
    trial = Trial()
    dense = trial.perplexities()
    candidates = {criterion: trial.measured(criterion) for criterion in CRITERIA}
    rows = []
    for bits, uniform in UNIFORM.items():
        for fmt in uniform:
            rows.append(trial.run(bits, fmt, dict.fromkeys(trial.layers, fmt)))
        if bits in FIRST:
            plan = first_layers(candidates[BEST], FIRST[bits], HIGH, LOW)
            rows.append(trial.run(bits, f"first {FIRST[bits]} of 8 blocks {HIGH}, rest {LOW}", plan.formats))
        for criterion, weights in candidates.items():
            plan = choose(weights, bits)
            rows.append({**trial.run(bits, f"plan by {criterion}", plan.formats), "predicted": plan.error})
            if (bits, criterion) == (DRAWN, BEST):
                draw(plan)
    return {
        "machine": processor(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": load,
        "seconds": round(time.perf_counter() - start),
        "calibration tokens": trial.calibration.tokens,
        "weights": len(trial.layers),
        "dense": dense,
        "rows": rows,
    }


def draw(plan: Plan) -> None:
    FIGURE.parent.mkdir(exist_ok=True)
    draw_plan(plan, FIGURE)


def tables(report: dict[str, Any]) -> str:
    """The measured part of docs/bit-plans.md."""
    lines = [("16", "dense", "", f"{report['dense']['new']:.2f}", f"{report['dense']['own']:.2f}")]
    for row in report["rows"]:
        name = row["name"] if row["name"] != f"plan by {BEST}" else f"**{row['name']}**"
        lines.append((f"{row['bits']:.2f}", name, f"{row['bytes']:,}", f"{row['new']:.2f}", f"{row['own']:.2f}"))
    at = report["machine"]
    return "\n\n".join(
        (
            "Perplexity, new domain (held-out language reference) and own domain (held-out library sources), untuned:",
            table(("bits", "formats", "stored bytes", "new", "own"), lines),
            f"{report['weights']} weights, calibrated on {report['calibration tokens']:,} tokens of the new domain; "
            f"{at['cpu']}, torch {report['torch']}, {report['date'][:10]}, {report['seconds'] / 60:.0f} minutes. "
            "Measured and written by `python bench/plan.py`.",
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
