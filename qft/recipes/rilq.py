"""RILQ (Lee et al. 2024): before the task, train all adapters together so that the whole model computes what it did.

A start such as LoftQ or QERA corrects every layer for itself. Here the layers' adapters make up for each other's
error: what is matched is the last hidden state, the one place where all errors meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.prepare import prepare_for_training
from ..training.data import IGNORE, Examples, PaddingCollator
from ..training.finetune import Finetuned, Recipe, run


def rilq(
    model: nn.Module,
    teacher: nn.Module,
    rows: Examples,
    collate: PaddingCollator,
    recipe: Recipe | None = None,
    *,
    hidden: float = 0.5,
    cross_entropy: float = 0.5,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Finetuned:
    """Train the adapters of `model` to give the dense model's last hidden state, in place.

    The loss is `hidden` · ‖Y − Y_q‖ / ‖Y‖ + `cross_entropy` · CE (RILQ, section 3: both weights 0.5), with
    Y `[tokens, hidden]` the dense model's last hidden states at tokens that are no padding, Y_q the quantized one's.
    The paper does not divide by ‖Y‖; doing so makes the weights mean the same for every model.

    Args:
        model: a quantized transformers model whose LoRA (or whatever requires gradients) trains.
        teacher: the dense model it was quantized from, on the same device; it is not changed.
        rows: text to match on; that of the task, or of no task in particular.
        collate: pads rows to a batch.
        recipe: how to train; None is 300 steps of 8 rows at a peak learning rate of 1e-4.
        on_step: called with (step, steps, loss).

    Raises:
        ValueError: the weights are negative or both 0, nothing trains, or the loss is not finite.
    """
    if min(hidden, cross_entropy) < 0 or not hidden + cross_entropy > 0:
        raise ValueError(f"hidden={hidden} and cross_entropy={cross_entropy} weigh the losses; give one a positive one")
    recipe = recipe or Recipe(steps=300, learning_rate=1e-4)
    prepare_for_training(model, gradient_checkpointing=recipe.gradient_checkpointing)
    teacher_mode = teacher.training
    teacher.eval()
    try:
        return run(_Matching(model, teacher, hidden, cross_entropy), rows, collate, recipe, on_step=on_step)
    finally:
        teacher.train(teacher_mode)


class _Matching(nn.Module):
    """The quantized model, returning RILQ's loss. The teacher is no submodule: it is neither trained nor saved."""

    accepts_loss_kwargs = False  # for transformers' Trainer: the loss is a mean over this batch alone

    def __init__(self, model: nn.Module, teacher: nn.Module, hidden: float, cross_entropy: float) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        self.hidden, self.cross_entropy = hidden, cross_entropy
        self._teacher = (teacher,)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        output = self.model(**batch, output_hidden_states=True)
        with torch.no_grad():
            wanted = _last_hidden(self._teacher[0](**batch, output_hidden_states=True))
        kept = batch["labels"] != IGNORE if self.config.is_encoder_decoder else batch["attention_mask"].bool()
        wanted, found = wanted[kept].float(), _last_hidden(output)[kept].float()
        distance = (found - wanted).norm() / wanted.norm()
        return {"loss": self.hidden * distance + self.cross_entropy * output.loss}


def _last_hidden(output: Any) -> Tensor:
    """`[batch, length, hidden]`; the decoder's, where there are two stacks."""
    states: Tensor = (output.get("decoder_hidden_states") or output["hidden_states"])[-1]
    return states
