"""LoraHub on the demo model: adapters of parts of a corpus, composed for a part that none has seen.

python bench/lorahub.py     writes bench/results/lorahub.json; about 10 minutes on one thread

Six adapters are trained on consecutive parts of the language reference, two on parts of library sources, all from one
packed nf4 base with one start. Five windows of the reference's last 15 % are the examples of the new task; perplexity
is measured on other windows of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qft
from qft.adapters.peft_format import Factors, attach
from qft.adapters.scales import train_only
from qft.compose.library import Library
from qft.compose.lorahub import WeightedSums, lorahub
from qft.demo import HELD_OUT, find_examples
from qft.disk.pretrained import load_model, load_tokenizer
from qft.speed.limits import processor
from qft.training.data import Examples, PaddingCollator, read
from qft.training.evaluate import perplexity
from qft.training.finetune import Recipe, run

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "lorahub.json"
FORMAT, RANK, BLOCK_SIZE = "nf4 g64 f32", 8, 256
REFERENCE_PARTS, SOURCE_PARTS = 6, 2
STEPS, BATCH_SIZE, RATE = 30, 4, 4e-3  # the demo's rate, half its steps
EXAMPLES, SEEDS = 5, 5
POOL = 32  # windows of the unseen part to draw examples from; the rest is measured


def base(examples: Path) -> nn.Module:
    """The packed model with the LoRA that every adapter starts from."""
    torch.manual_seed(0)
    return qft.quantize_model(load_model(examples / "stdlib-lm", "float32"), FORMAT, rank=RANK)


def parts(rows: Examples, count: int) -> list[Examples]:
    """`count` consecutive parts of about the same length."""
    edges = [at * len(rows) // count for at in range(count + 1)]
    return [Examples(rows[first:last]) for first, last in pairwise(edges)]


def train_library(examples: Path, folder: Path, texts: dict[str, Examples], collate: PaddingCollator) -> dict[str, Any]:
    """One adapter per part; seconds and last losses by name."""
    made = {}
    for name, rows in texts.items():
        model = base(examples)
        train_only(model, "lora")
        recipe = Recipe(
            steps=STEPS, batch_size=BATCH_SIZE, learning_rate=RATE, warmup=0.1, gradient_checkpointing=False
        )
        done = run(model, rows, collate, recipe)
        qft.save_adapter(model, folder / name)
        made[name] = {"windows": len(rows), "loss": done.loss, "seconds": done.seconds}
        print(name, made[name], flush=True)
    return made


def averaged(library: Library) -> dict[str, Factors]:
    """The mean of the adapters' products, exactly: their factors side by side."""
    adapters = [library.read(name) for name in library.names]
    mean = {}
    for path in library.layers:
        pairs = [adapter[path].unscaled() for adapter in adapters]
        a, b = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs], dim=1)
        mean[path] = Factors(a, b / len(adapters), alpha=len(a))
    return mean


def measure() -> dict[str, Any]:
    """The results file."""
    start, examples = time.perf_counter(), find_examples(ROOT / "examples")
    tokenizer = load_tokenizer(examples / "stdlib-lm")
    collate = PaddingCollator.of(tokenizer)
    reference, unseen = read(examples / "language-reference.txt", tokenizer, BLOCK_SIZE, held_out=HELD_OUT)
    sources, _ = read(examples / "stdlib-held-out.txt", tokenizer, BLOCK_SIZE)
    texts = {f"reference-{at}": part for at, part in enumerate(parts(reference, REFERENCE_PARTS))}
    texts |= {f"sources-{at}": part for at, part in enumerate(parts(sources, SOURCE_PARTS))}
    # every other window for the examples, so that both halves come from all of the part
    pool, measured = unseen[: 2 * POOL : 2], Examples([*unseen[1 : 2 * POOL : 2], *unseen[2 * POOL :]])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapters = train_library(examples, folder, texts, collate)
        model, library = base(examples), Library.open(folder)

        def value() -> float:
            return perplexity(model, measured, collate).value

        sums = WeightedSums.of(model, library)
        sums.attach()
        before = {"zero_shot": value()}
        for at, name in enumerate(library.names):
            sums.set([float(at == other) for other in range(len(library.names))])
            adapters[name]["perplexity"] = value()
        sums.set([1 / len(library.names)] * len(library.names))
        before["average_of_factors"] = value()
        attach(model, averaged(library))
        before["average_of_products"] = value()
        print(before, flush=True)
        runs = []
        for seed in range(SEEDS):
            rows = random.Random(seed).sample(pool, EXAMPLES)
            began = time.perf_counter()
            found = lorahub(model, library, rows, collate, seed=seed)
            minutes = (time.perf_counter() - began) / 60
            runs.append(
                {
                    "seed": seed,
                    "perplexity": value(),
                    "examples_base_loss": found.base_loss,
                    "examples_loss": found.loss,
                    "weights": found.weights,
                    "minutes": minutes,
                }
            )
            print(runs[-1], flush=True)
    average = min(before["average_of_factors"], before["average_of_products"])
    return {
        "machine": processor(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": os.getloadavg()[0],
        "format": FORMAT,
        "rank": RANK,
        "training": {"steps": STEPS, "batch_size": BATCH_SIZE, "learning_rate": RATE},
        "examples": EXAMPLES,
        "tokens_measured": measured.tokens,
        "adapters": adapters,
        **before,
        "runs": runs,
        "better_than_both": sum(one["perplexity"] < min(before["zero_shot"], average) for one in runs),
        "median_perplexity": statistics.median(one["perplexity"] for one in runs),
        "median_minutes": statistics.median(one["minutes"] for one in runs),
        "minutes": (time.perf_counter() - start) / 60,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    report = measure()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
