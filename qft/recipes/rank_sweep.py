"""Which rank is enough: the same tuning at several ranks, and with the scales alone, with what each costs.

How LoRA's rank trades against quality depends on the task and the data ("Beyond Full Fine-tuning", Xin et al. 2024;
Raschka, "Practical Tips for Finetuning LLMs", 2023: adapt all layers, try alpha = 2 r), so measure it on your own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..analysis.cost import Cost, cost, peak_memory
from ..nn.linear import QuantLinear
from ..training.data import Examples, PaddingCollator
from ..training.evaluate import perplexity
from ..training.finetune import Recipe, finetune

Start = Callable[[int, float], nn.Module]


@dataclass(frozen=True)
class SweepRow:
    """One run of a sweep.

    Attributes:
        cost: what it costs by the formulas of `qft.analysis.cost`; its method and rank are the run's.
        alpha: of the LoRA; 0 for scales.
        before, after: held-out perplexity, untuned and tuned.
        loss: mean training loss over the run, nats per token; NaN where the run had been finished before.
        seconds: of training.
        memory_rise: bytes that memory rose above the loaded model while training, as `peak_memory` measures it.
    """

    cost: Cost
    alpha: float
    before: float
    after: float
    loss: float
    seconds: float
    memory_rise: int | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the costs beside the rest, and their sums."""
        own = {name: value for name, value in asdict(self).items() if name != "cost"}
        return {**asdict(self.cost), "flops": self.cost.flops, "peak_nbytes": self.cost.peak_nbytes, **own}


def rank_sweep(
    start: Start,
    train: Examples,
    held_out: Examples,
    collate: PaddingCollator,
    recipe: Recipe,
    ranks: Sequence[int],
    *,
    scales: bool = False,
    scales_learning_rate: float | None = None,
    alpha_per_rank: float = 1.0,
    directory: str | Path | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> list[SweepRow]:
    """Tune at each rank from the same start, and measure what it gained and cost.

    Args:
        start: start(rank, alpha) gives a fresh packed model, with a LoRA on its layers; start(0, 0.0) one without.
        train, held_out: rows to train on, and to measure perplexity on.
        collate: pads rows to a batch.
        recipe: how to train; its method does not matter here, its learning rate is the LoRA's.
        ranks: of the LoRA, each 1 or more and once.
        scales: whether to tune the scales alone as well (PEQA), as the last run.
        scales_learning_rate: for that run; None is the method's own.
        alpha_per_rank: alpha is so many times the rank; 1 scales the product by 1, 2 is the practical tips'.
        directory: where checkpoints go, a folder per run; a sweep that was killed goes on. None keeps none.
        on_step: called with (run, step, steps).

    Returns:
        A row per run, in the order of `ranks`.

    Raises:
        ValueError: no run is asked for, a rank is not positive or named twice, alpha_per_rank is not positive, or
            training fails as `qft.training.finetune.finetune` says.
    """
    if not ranks and not scales:
        raise ValueError("there is nothing to sweep; name one or more ranks, or scales")
    if min(ranks, default=1) < 1 or len(set(ranks)) < len(ranks):
        raise ValueError(f"ranks {', '.join(map(str, ranks))} must be 1 or more, each named once")
    if not (alpha_per_rank > 0 and math.isfinite(alpha_per_rank)):
        raise ValueError(f"alpha_per_rank={alpha_per_rank} is not a positive number; 1 or 2 are usual")
    rows = []
    for rank in (*ranks, *([0] if scales else [])):
        name = f"rank {rank}" if rank else "scales"
        rate = recipe.learning_rate if rank else scales_learning_rate
        own = replace(recipe, method="lora" if rank else "scales", learning_rate=rate)
        alpha = alpha_per_rank * rank
        where = None if directory is None else Path(directory) / name.replace(" ", "-")
        rows.append(_run(start(rank, alpha), name, rank, alpha, train, held_out, collate, own, where, on_step))
    return rows


def _run(
    model: nn.Module,
    name: str,
    rank: int,
    alpha: float,
    train: Examples,
    held_out: Examples,
    collate: PaddingCollator,
    recipe: Recipe,
    directory: Path | None,
    on_step: Callable[[str, int, int], None] | None,
) -> SweepRow:
    price = cost(
        model,
        rank,
        method=recipe.method,
        rows=recipe.batch_size,
        length=max(len(row["input_ids"]) for row in train),
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    attached = sum(p.numel() for module in model.modules() if isinstance(module, QuantLinear) for p in _lora(module))
    if attached != (price.trainable if rank else 0):
        raise ValueError(
            f"start({rank}, {alpha:g}) gave a model with {attached} LoRA parameters, {name} has "
            f"{price.trainable if rank else 0}; start from a model without LoRA"
        )
    before = perplexity(model, held_out, collate, recipe.batch_size).value

    def told(step: int, steps: int, loss: float) -> None:
        if on_step:
            on_step(name, step, steps)

    done, rise = peak_memory(
        lambda: finetune(model, train, collate, recipe, directory, told), next(model.parameters()).device
    )
    return SweepRow(
        cost=price,
        alpha=alpha,
        before=before,
        after=perplexity(model, held_out, collate, recipe.batch_size).value,
        loss=done.loss,
        seconds=round(done.seconds, 1),
        memory_rise=rise,
    )


def _lora(layer: QuantLinear) -> list[nn.Parameter]:
    return [parameter for parameter in (layer.lora_A, layer.lora_B) if parameter is not None]
