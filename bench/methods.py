"""The ladder of starting points on the demo model: what each start costs and gains, before and after tuning.

python bench/methods.py             runs what bench/results/methods-*.json lack
python bench/methods.py --jobs 4    the same, so many cases at a time
python bench/methods_page.py        writes the tables and the figure from what there is

A case is one format, start, rank and seed. The seed picks the rows a start is calibrated on, the order of the training
rows, and the adapters' random values. Its result is written as soon as it is there: a killed run goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "ladder.md"
FIGURE = "figures/methods.png"
EXAMPLES = ROOT / "examples"

FORMATS = ("nf4 g64 f16", "nf3 g64 f16", "nf2 g64 f16", "lm2 g64 f16", "int2 g64 f16")
PLAN = "plan 2.25"  # a format for each layer, as many stored bits as the 2-bit formats take
STARTS = ("plain", "search", "loftq", "loftq_search", "qera_diag", "qera_exact", "cloq")
TWO_BIT_STARTS = ("lqlora", "cloq_svd")  # both fit before they round
SCALE_STARTS = ("plain", "search", "gptq")
RILQ_FROM = "cloq"  # the start that RILQ goes on from
SEEDS = (0, 1, 2)
RANK, LOW_RANK = 16, 4
LOW_RANK_FORMATS = ("nf2 g64 f16", "lm2 g64 f16")
LOW_RANK_STARTS = ("loftq_search", "qera_exact", "cloq", f"{RILQ_FROM} + rilq")
STEPS, BATCH_SIZE = 60, 4
# LoRA: the best of 2e-3, 4e-3, 8e-3 and 16e-3 for the dense model at rank 16; scales: the demo's
RATES = {"lora": 8e-3, "scales": 3e-3}
RILQ_STEPS, RILQ_RATE = 40, 1e-3
CALIBRATION_ROWS = 192  # 49 thousand tokens of the new domain
# Okabe and Ito's colours, told apart by every kind of colour vision
COLORS = dict(
    zip(
        ("plain", "search", "loftq", "loftq_search", "qera_diag", "qera_exact", "cloq", "cloq + rilq"),
        ("#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#CC79A7", "#009E73", "#000000", "#888888"),
        strict=True,
    )
)


@dataclass(frozen=True)
class Case:
    """One run. `format` None is the dense model with PEFT's LoRA, PLAN what `qft.plan_bits` chooses; rank 0 trains the
    scales alone."""

    format: str | None
    start: str
    rank: int
    seed: int

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        return RESULTS / f"methods-{self.format.split()[0] if self.format else 'dense'}.json"


def cases() -> Iterator[Case]:
    """Every run, the dense bar first."""
    for seed in SEEDS:
        for rank in (RANK, LOW_RANK):
            yield Case(None, "dense", rank, seed)
            yield Case(PLAN, "cloq", rank, seed)
        for fmt in FORMATS:
            two_bits = TWO_BIT_STARTS if fmt.split()[0].endswith("2") else ()
            for start in (*STARTS, f"{RILQ_FROM} + rilq", *two_bits):
                yield Case(fmt, start, RANK, seed)
            for start in SCALE_STARTS:
                yield Case(fmt, start, 0, seed)
            for start in LOW_RANK_STARTS if fmt in LOW_RANK_FORMATS else ():
                yield Case(fmt, start, LOW_RANK, seed)


def read() -> list[dict[str, Any]]:
    """The results there are."""
    return [row for path in sorted(RESULTS.glob("methods-*.json")) for row in json.loads(path.read_text())["rows"]]


def keep(case: Case, row: dict[str, Any]) -> None:
    """Add a result to its file."""
    from qft.disk.checkpoint import write_json

    rows = json.loads(case.file.read_text())["rows"] if case.file.exists() else []
    rows = [*(old for old in rows if of(old) != case), row]
    rows.sort(key=lambda r: (r["seed"], -r["rank"], r["start"]))
    write_json(case.file, {"rows": rows, "settings": settings()})


def of(row: dict[str, Any]) -> Case:
    """The case of a result."""
    return Case(row["format"], row["start"], row["rank"], row["seed"])


def settings() -> dict[str, Any]:
    """What all runs share."""
    import torch

    return {
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "learning_rates": RATES,
        "rilq": {"steps": RILQ_STEPS, "learning_rate": RILQ_RATE, "from": RILQ_FROM},
        "calibration_rows": CALIBRATION_ROWS,
        "torch": torch.__version__,
    }


# ---------------------------------------------------------------------------------------------------- one case


def run(case: Case) -> dict[str, Any]:
    """Start, measure, train, measure."""
    import torch

    import qft
    from qft.demo import dense_lora, stored_bytes, texts
    from qft.disk.pretrained import device, load_model
    from qft.training.evaluate import perplexity
    from qft.training.finetune import Recipe
    from qft.training.finetune import run as train

    torch.manual_seed(case.seed)
    material = texts(EXAMPLES)
    model = load_model(EXAMPLES / "stdlib-lm", "float32").to(device())
    began = time.perf_counter()
    what = "lora" if case.rank else "scales"
    if case.format is None:
        model = dense_lora(model, case.rank)
    else:
        start, _, rilq = case.start.partition(" + ")
        calibration = _calibration(model, start, case, material)
        planned = case.format == PLAN
        formats = qft.plan_bits(model, float(PLAN.split()[1]), calibration=calibration).formats if planned else None
        qft.quantize_model(
            model,
            None if planned else case.format,
            init=_start(start),
            rank=case.rank,
            calibration=calibration,
            formats=formats,
        )
        qft.train_only(model, what)
        if rilq:
            _rilq(model, material, case)
            qft.train_only(model, what)
        qft.prepare_for_training(model, gradient_checkpointing=False)
    started = time.perf_counter() - began

    def measure() -> tuple[float, float]:
        return tuple(perplexity(model, rows, material.collate).value for rows in (material.new, material.own))

    before, own_before = measure()
    recipe = Recipe(
        what, STEPS, batch_size=BATCH_SIZE, learning_rate=RATES[what], warmup=0.1, seed=case.seed,
        gradient_checkpointing=False,
    )  # fmt: skip
    tuned = train(model, material.train, material.collate, recipe)
    after, own_after = measure()
    bits = None if case.format is None else qft.report(model).bits_per_weight
    return {
        **asdict(case),
        "before": before,
        "after": after,
        "own_before": own_before,
        "own_after": own_after,
        "bits": bits,  # stored, per quantized weight; tuned scales are held in fp32 until they are rounded
        "bytes": stored_bytes(model),
        "start_seconds": started,
        "train_seconds": tuned.seconds,
    }


def _start(name: str) -> Any:
    import qft

    variants = {
        "loftq_search": functools.partial(qft.loftq, quantizer="search"),  # the paper's scales by absmax
        "cloq_svd": functools.partial(qft.init.cloq, iters=4, order="svd-first"),
    }
    return variants.get(name, name)


def _calibration(model: Any, start: str, case: Case, material: Any) -> Any:
    import torch

    import qft
    from qft.training.data import Examples

    if qft.init.NEEDS.get(start.partition("_svd")[0], "none") == "none":
        return None
    draw = torch.Generator().manual_seed(case.seed)
    chosen = torch.randperm(len(material.train), generator=draw)[:CALIBRATION_ROWS].tolist()
    rows = Examples([material.train[i] for i in chosen])
    return qft.calibrate(model, rows, material.collate, gradients=case.format == PLAN)


def _rilq(model: Any, material: Any, case: Case) -> None:
    from qft.disk.pretrained import device, load_model
    from qft.recipes.rilq import rilq
    from qft.training.finetune import Recipe

    teacher = load_model(EXAMPLES / "stdlib-lm", "float32").to(device())
    recipe = Recipe(
        "lora", RILQ_STEPS, batch_size=BATCH_SIZE, learning_rate=RILQ_RATE, seed=case.seed + 100,
        gradient_checkpointing=False,
    )  # fmt: skip
    # on the model's own kind of text, as the paper does: its cross-entropy must be no head start on the task
    rilq(model, teacher, material.spare, material.collate, recipe)


def _worker(case: Case, threads: int) -> tuple[Case, dict[str, Any]]:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    return case, run(case)


def run_missing(jobs: int, wanted: Iterable[Case]) -> None:
    """Run the cases without a result, `jobs` at a time."""
    there = {of(row) for row in read()}
    missing = [case for case in wanted if case not in there]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the workers' libraries as they load
    work = functools.partial(_worker, threads=threads)
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=8) as pool:
        for at, (case, row) in enumerate(pool.imap_unordered(work, missing), 1):
            keep(case, row)
            figures = f"{row['before']:.2f} -> {row['after']:.2f}"
            print(f"{at}/{len(missing)} {case.format}, {case.start}, rank {case.rank}, seed {case.seed}: {figures}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    run_missing(parser.parse_args(arguments).jobs, cases())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
