"""LoftQ on a layer and a fine-tuning step of the demo's model, as checked calls like those of `contenders`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from cases import LOFTQ_ITERS, LOFTQ_RANK, Case, Step
from contenders import Ready, UnavailableError
from torch import Tensor, nn

import qft
from qft.analysis.cost import cost
from qft.cli.output import quiet
from qft.demo import BATCH_SIZE, BLOCK_SIZE, HELD_OUT, RANK, RATES, dense_lora, find_examples
from qft.disk.pretrained import load_model, load_tokenizer
from qft.speed.check import TOLERANCE, weight_like
from qft.speed.roofline import Work
from qft.training.data import PaddingCollator, read

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
EXCESS = 0.05  # over the exact SVD's error, above which the result is wrong; the target is far stricter


# ---- LoftQ


@lru_cache(maxsize=2)
def exact_error(shape: tuple[int, int], fmt: str) -> float:
    """LoftQ's error with the exact SVD in all its steps: some seconds each."""
    return last_error(weight_like(shape, torch.float32), fmt, "exact")


def last_error(w: Tensor, fmt: str, svd: str = "randomized") -> float:
    """|W - Q - BA| / |W| of the best iterate, which LoftQ returns."""
    errors: list[float] = []
    qft.loftq(w, fmt, LOFTQ_RANK, LOFTQ_ITERS, svd=svd, on_step=lambda step, error: errors.append(error))
    return min(errors)


def loftq(case: Case) -> Ready:
    """Checked against the exact SVD: the error of the row is how much larger LoftQ's is, as a share of it.

    Least work: in every step the weight is read, B A taken off it, and what remains multiplied by a basis on both
    sides.
    """
    w = weight_like(case.shape, torch.float32)
    q = qft.quantize(w, case.fmt)
    excess = last_error(w, case.fmt) / exact_error(case.shape, case.fmt) - 1
    if not excess <= EXCESS:
        raise ValueError(f"{case.name}, {case.work}: its error is {excess:.2g} above the exact SVD's; it is not timed")
    products = 3 * 2 * case.shape[0] * case.shape[1] * LOFTQ_RANK
    least = Work(LOFTQ_ITERS * w.nbytes, q.nbytes, LOFTQ_ITERS * products, "f32")
    return Ready(lambda: qft.loftq(w, case.fmt, LOFTQ_RANK, LOFTQ_ITERS), excess, q.nbytes, least, "")


# ---- a step of the demo's fine-tuning


@lru_cache(maxsize=1)
def batches() -> list[dict[str, Tensor]]:
    """The demo's training text in its order, in batches of its size."""
    tokenizer = load_tokenizer(EXAMPLES / "stdlib-lm")
    rows, _ = read(EXAMPLES / "language-reference.txt", tokenizer, BLOCK_SIZE, held_out=HELD_OUT)
    collate = PaddingCollator.of(tokenizer)
    return [collate([rows[at + i] for i in range(BATCH_SIZE)]) for at in range(0, 8 * BATCH_SIZE, BATCH_SIZE)]


def model_for(step: Step) -> tuple[nn.Module, nn.Module | None]:
    """The model whose step is timed, and for a packed one its dense twin: the same weights, dequantized."""
    torch.manual_seed(0)
    model = load_model(EXAMPLES / "stdlib-lm", "float32")
    if step.fmt is None:
        return dense_lora(model).train(), None
    twin = load_model(EXAMPLES / "stdlib-lm", "float32")
    qft.quantize_model(model, step.fmt, init="plain", rank=RANK)
    for name, layer in model.named_modules():
        if isinstance(layer, qft.QuantLinear):
            twin.get_submodule(name).weight.data = layer.quant_tensor.dequantize()
    qft.train_only(model, "lora")
    return qft.prepare_for_training(model, gradient_checkpointing=False).train(), twin.train()


def training_step(model: nn.Module) -> Callable[[], Any]:
    """Forward, backward and AdamW on what trains, each call on the next batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATES["lora"] / 100)
    rows = cycle(batches())

    def step() -> None:
        model(**next(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def demo_step(step: Step) -> Ready:
    """Checked before any step: a LoRA starts as nothing, so that the loss is that of the dense twin.

    Least work: `qft.analysis.cost`'s operations, and the weights read forward and backward. The dense model is its own
    twin: its error is 0.
    """
    try:
        find_examples(EXAMPLES)
    except FileNotFoundError as reason:
        raise UnavailableError(str(reason)) from None
    quiet()
    model, twin = model_for(step)
    error = 0.0
    if twin is not None:
        with torch.no_grad():
            made, truth = (float(one(**batches()[0]).loss) for one in (model, twin))
        error = abs(made - truth) / truth
    if not error <= TOLERANCE["f32"]:
        raise ValueError(f"{step.name}: the loss is {error:.2g} off its dense twin's; it is not timed")
    price = cost(
        load_model(EXAMPLES / "stdlib-lm", "float32"),
        RANK,
        fmt=step.fmt or "int8 g64 f32",
        rows=BATCH_SIZE,
        length=BLOCK_SIZE,
        gradient_checkpointing=False,
    )
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    least = Work(2 * stored, 0, step.rows * price.flops, "f32")
    return Ready(training_step(model), error, stored, least, "")


def prepare(case: Case | Step) -> Ready:
    """A job, checked.

    Raises:
        UnavailableError: this checkout lacks what it needs.
        ValueError: its result is wrong, so that its time would mean nothing.
    """
    return demo_step(case) if isinstance(case, Step) else loftq(case)
