"""Fine-tuning a quantized model: transformers' Trainer, and checkpoints that a kill at any moment cannot spoil."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..adapters.scales import train_only
from ..disk import checkpoint
from ..format import FormatError
from ..model.prepare import prepare_for_training
from ..notices import say_once
from . import losses, ranks
from .data import Examples, PaddingCollator

# QLoRA, section 4 (7B); PEQA, section 4: scales are multiplied into every weight of their group, so they move slowly.
LEARNING_RATES = {"lora": 2e-4, "scales": 2e-5}
KEPT = 2  # checkpoints: the one before stays until the newest is complete
TRAINED = "trained.safetensors"
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        method: what trains: the LoRA of every QuantLinear, or its scales (PEQA).
        steps: optimizer steps; 0 takes them from `epochs`.
        epochs: passes over the data, where `steps` is 0.
        batch_size: rows per forward pass, on each rank where torchrun has started several.
        accumulate: forward passes per optimizer step.
        learning_rate: AdamW's, at its peak; None takes the method's of `LEARNING_RATES`.
        warmup: share of the steps with a rising learning rate; it then falls linearly to 0.
        weight_decay, max_grad_norm: AdamW's decoupled decay; gradients are clipped to this norm.
        seed: order of the rows and dropout.
        save_every: optimizer steps between checkpoints.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    """

    method: str = "lora"
    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    save_every: int = 100
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        if self.method not in LEARNING_RATES:
            raise ValueError(f"method {self.method!r} is unknown; use lora or scales")
        at_least = {"steps": 0, "batch_size": 1, "accumulate": 1, "save_every": 1, "weight_decay": 0, "warmup": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; use {least} or more")
        for name in ("epochs", "max_grad_norm", "rate"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)} is not a positive number")
        if self.warmup >= 1:
            raise ValueError(f"warmup={self.warmup} is a share of the steps; use 0 <= warmup < 1")

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class Finetuned:
    """What a run did.

    Attributes:
        steps: optimizer steps in all, those before a resume included.
        loss: mean training loss over all steps, on the first rank those before a resume included, nats per token.
        seconds: of this process.
        resumed_from: step of the checkpoint the run went on from; 0 for a fresh start.
        skipped: a sentence for each incomplete checkpoint.
    """

    steps: int
    loss: float
    seconds: float
    resumed_from: int
    skipped: list[str]


def finetune(
    model: nn.Module,
    train: Examples,
    collate: PaddingCollator,
    recipe: Recipe,
    directory: str | Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Finetuned:
    """Train a quantized causal language model in place.

    Args:
        model: holds QuantLinear layers; with LoRA attached for the method lora.
        train: rows to train on.
        collate: pads rows to a batch.
        recipe: how.
        directory: where checkpoints go. A run of the same recipe and rows that was killed goes on from its newest
            complete checkpoint and ends with the bits of an uninterrupted run. None keeps no checkpoints. Each step's
            loss is in `losses.csv` there.
        on_step: called with (step, steps, training loss in nats per token).

    Raises:
        ValueError: nothing trains, the loss is not finite, or `directory` holds a run of another recipe or other rows.
        OSError: a checkpoint cannot be written.
    """
    train_only(model, recipe.method)
    prepare_for_training(model, gradient_checkpointing=recipe.gradient_checkpointing)
    return run(model, train, collate, recipe, directory, on_step)


def run(
    model: nn.Module,
    train: Examples,
    collate: PaddingCollator,
    recipe: Recipe,
    directory: str | Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Finetuned:
    """As `finetune`, for a model whose trainable parameters are already chosen, whatever they are."""
    ranks.join()
    if directory is None:
        with tempfile.TemporaryDirectory() as scratch:
            return _train(model, train, collate, recipe, Path(scratch), False, on_step)
    settings = _settings(recipe, train)
    ranks.on_first(lambda: checkpoint.claim(Path(directory) / RECIPE, settings))
    return _train(model, train, collate, recipe, Path(directory), True, on_step)


def _train(
    model: nn.Module,
    train: Examples,
    collate: PaddingCollator,
    recipe: Recipe,
    directory: Path,
    save: bool,
    on_step: Callable[[int, int, float], None] | None,
) -> Finetuned:
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.rate,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch",
        seed=recipe.seed,
        save_strategy="steps" if save else "no",
        save_steps=recipe.save_every,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=ranks.count() > 1 and ranks.on_cpu(),
    )
    watch = _Watch(on_step, directory / losses.NAME if save and ranks.is_first() else None)
    trainer = _Trainer(model=model, args=arguments, train_dataset=train, data_collator=collate, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    last, skipped = ranks.on_first(lambda: checkpoint.newest(directory)) if save else (None, [])
    for sentence in skipped:
        say_once(sentence)
    resumed_from = int(last.name.rpartition("-")[2]) if last else 0
    if save and ranks.is_first():
        watch.losses = [loss for _, loss in losses.begin(directory / losses.NAME, resumed_from)]
    start = time.perf_counter()
    if last and TrainerState.load_from_json(str(last / losses.TRAINER)).max_steps == resumed_from:
        trainer._load_from_checkpoint(str(last))  # killed after its last step: Trainer would take one more
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return Finetuned(
        steps=max(trainer.state.global_step, resumed_from),
        loss=watch.mean(),
        seconds=time.perf_counter() - start,
        resumed_from=resumed_from,
        skipped=skipped,
    )


class _Watch(TrainerCallback):
    """Reports each step's loss, writes it down, and stops at one that is not finite."""

    def __init__(self, on_step: Callable[[int, int, float], None] | None, curve: Path | None) -> None:
        self.on_step = on_step
        self.curve = curve
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {state.global_step}; lower the learning rate, now {args.learning_rate}"
            )
        self.losses.append(loss)
        if self.curve:
            losses.append(self.curve, state.global_step, loss)
        state.log_history.clear()  # it is saved with every checkpoint and would grow with the run
        if self.on_step:
            self.on_step(state.global_step, state.max_steps, loss)

    def mean(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else math.nan


class _Trainer(Trainer):
    """transformers' Trainer, whose checkpoints hold only what trains and count once they are sealed."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not ranks.is_first():
            return
        directory = Path(str(output_dir or self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        trained = {name: parameter.detach().contiguous() for name, parameter in _trainable(self.model).items()}
        save_file(trained, directory / TRAINED)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        # an incomplete one, or the run would have gone on from it
        ranks.on_first(lambda: shutil.rmtree(directory) if directory.exists() else None)
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
            raise OSError(f"{directory} cannot be written ({error}); make room and start the run again") from None

        def complete() -> None:
            checkpoint.seal(directory)
            checkpoint.prune(directory, KEPT)

        ranks.on_first(complete)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINED
        try:
            saved = load_file(path)
        except SafetensorError as error:
            raise FormatError(f"{path} is damaged ({error}); delete it to go on from the checkpoint before") from None
        parameters = _trainable(model or self.model)
        if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in parameters.items()}:
            raise FormatError(f"{path} does not hold what this model trains; use another directory for this run")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


def _trainable(model: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _settings(recipe: Recipe, train: Examples) -> dict[str, Any]:
    """What two runs must share for one to go on from the other's checkpoints."""
    tokens = hashlib.sha256()
    for row in train:
        for name in ("input_ids", "labels"):
            tokens.update(row[name].numpy().tobytes())
    rows = {"rows": len(train), "rows_sha256": tokens.hexdigest()}
    return {**asdict(recipe), "learning_rate": recipe.rate, **rows, "ranks": ranks.count()}
