"""Perplexity: how surprised a language model is by a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .data import IGNORE, PaddingCollator, Row


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token.

    Attributes:
        value: the perplexity; inf where it exceeds a float.
        loss: mean negative log-likelihood, nats per token.
        tokens: number of predicted tokens.
    """

    value: float
    loss: float
    tokens: int


@torch.no_grad()
def perplexity(
    model: nn.Module,
    rows: Sequence[Row],
    collate: PaddingCollator,
    batch_size: int = 8,
    on_batch: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `model` over `rows` in their order: every predicted token weighs the same, nothing is random.

    Each row is read alone, so a window's first token has no context and is not predicted. Log-probabilities are fp32,
    their sum float64.

    Args:
        model: a causal language model; its training mode is put back.
        rows: as `qft.training.data.read` gives them.
        collate: pads rows to a batch.
        batch_size: rows per forward pass; logits of `[batch_size, length, vocabulary]` are held at a time.
        on_batch: called with (rows done, rows in all).

    Raises:
        ValueError: no token to predict, or the model's logits are NaN.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    try:
        for first in range(0, len(rows), batch_size):
            batch = {name: tensor.to(device) for name, tensor in collate(rows[first : first + batch_size]).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
            )
            total += losses.double().sum().cpu()
            tokens += int((labels != IGNORE).sum())
            if on_batch:
                on_batch(min(first + batch_size, len(rows)), len(rows))
    finally:
        model.train(was_training)
    if not tokens:
        raise ValueError("perplexity needs at least one token to predict; give rows of two tokens or more")
    loss = total.item() / tokens
    if math.isnan(loss):
        raise ValueError("the model's logits are NaN; its weights are damaged, or overflow: try another dtype")
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, tokens)
