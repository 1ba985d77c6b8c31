"""One model directory in, one out: quantize, tune, save; a killed run goes on where its newest checkpoint stands.

While it runs, `out/run` holds what it needs to go on:

    command.json      the settings of the run, which a later start must share
    start/            the quantized model as training begins
    checkpoints/      what trains, the optimizer and the random states, every `save_every` steps

It is deleted once the tuned model stands in `out`, with the losses of the run in `losses.csv`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.scales import save_scales
from ..disk import checkpoint
from ..disk.directory import is_quantized
from ..disk.files import replace_file
from ..disk.io import load, save
from ..disk.pretrained import load_model, load_tokenizer, row_length, vocabulary
from ..format import Format, FormatError
from ..measure.calibration import Calibration
from ..model.surgery import quantize_model
from ..nn.linear import QuantLinear
from ..notices import say_once
from . import losses, ranks
from .data import PaddingCollator, read
from .evaluate import perplexity
from .finetune import Recipe, finetune

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
TASK = "task.safetensors"
COMMAND = "command.json"


@dataclass(frozen=True)
class Start:
    """Where training starts.

    Attributes:
        model: directory of a dense model, or of one qft saved.
        format: spelling of the weight format, for a dense model; None for a quantized one.
        init, iters: where codes and LoRA start, see `qft.quantize_model`.
        calibration: directory of `qft calibrate`, for a start that uses it.
        rank, alpha, dropout: of the LoRA; unused by the method scales.
        dtype: of what is not quantized.
    """

    model: Path
    format: str | None = None
    init: str = "plain"
    rank: int = 16
    alpha: float | None = None
    iters: int | None = None
    calibration: Path | None = None
    dropout: float = 0.0
    dtype: str = "auto"


def open_quantized(
    start: Start,
    lora: bool,
    progress: bool = False,
    requantize: str | None = None,
) -> nn.Module:
    """The quantized model, with a LoRA on every QuantLinear if `lora`; `progress` draws a bar on stderr.

    `requantize` is as in `qft.load`.

    Raises:
        ValueError: a dense model without a format, or a quantized one with.
        FormatError: the format spells none, or the model's files are damaged.
        OSError: there is no model in the directory.
    """
    if is_quantized(start.model):
        if start.format:
            raise ValueError(f"{start.model} is quantized already; leave out the format, or name the dense model")
        model = load_model(start.model, start.dtype, requantize)
        bare = [module for module in model.modules() if isinstance(module, QuantLinear) and not module.lora_rank]
        for module in bare if lora else []:
            module.add_lora(start.rank, start.alpha, start.dropout)
        return model
    if not start.format:
        raise ValueError(f"{start.model} is not quantized; name a format, for example 'nf4 g64 f32'")
    fmt = Format.parse(start.format)  # a misspelt format is said before a large model is read
    return quantize_model(
        load_model(start.model, start.dtype),
        fmt,
        init=start.init,
        rank=start.rank if lora else 0,
        alpha=start.alpha,
        iters=start.iters,
        calibration=Calibration.load(start.calibration) if start.calibration else None,
        dropout=start.dropout,
        progress=progress,
    )


def tune(
    start: Start,
    out: Path,
    data: Path,
    recipe: Recipe,
    *,
    block_size: int | None = None,
    held_out: float = 0.0,
    rounded: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tune a model on a text and save it to `out`; what came of it, by name.

    Args:
        start: the model, and what to do to it first.
        out: a new directory, or that of a run to go on with.
        data: a .txt or .jsonl file.
        recipe: how to train.
        block_size: longest row, in tokens; None as `row_length` says.
        held_out: share of the data's end that is measured before and after, and not trained on.
        rounded: store tuned scales in the format's own type.
        progress: told how far each part is.

    Raises:
        ValueError, TypeError, OSError: as `open_quantized`, `qft.training.data.read` and `qft.finetune.finetune`.
        FileExistsError: `out` holds something else than an unfinished run.
    """
    ranks.join()
    tell = progress if progress and ranks.is_first() else lambda what, done, total: None
    run, finished = out / "run", out / "run.finished"
    settings = _settings(start, data, recipe)
    with ranks.first_goes_ahead():  # and writes the start, which the others read
        if ranks.is_first():
            shutil.rmtree(finished, ignore_errors=True)  # of a run that was killed while it was deleted
            if run.is_dir():
                checkpoint.claim(run / COMMAND, settings)
            else:
                checkpoint.refuse_to_overwrite(out)
        torch.manual_seed(recipe.seed)  # the LoRA's first values
        begun = (run / "start" / checkpoint.SEAL).is_file()
        if begun:
            model = _read_start(run)
        else:
            model = open_quantized(start, recipe.method == "lora", progress=progress is not None)
        tokenizer = load_tokenizer(start.model)
        collate = PaddingCollator.of(tokenizer)
        length = row_length(model, block_size)
        train, rest = read(data, tokenizer, length, held_out=held_out, vocabulary=vocabulary(model))
        if train.note():
            say_once(train.note())
        if not begun:  # nothing is written before everything was read
            checkpoint.claim(run / COMMAND, settings)
            save(model, run / "start")
            checkpoint.seal(run / "start")

    def measure() -> float | None:
        if not held_out:
            return None
        return perplexity(model, rest, collate, on_batch=lambda done, total: tell("measuring", done, total)).value

    before = measure()
    done = finetune(
        model, train, collate, recipe, run / "checkpoints", lambda at, total, loss: tell("training", at, total)
    )
    result = {
        "out": str(out),
        "method": recipe.method,
        "steps": done.steps,
        "train tokens": train.tokens,
        "trainable parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "training loss": done.loss,
        "perplexity before": before,
        "perplexity after": measure(),
        "seconds": done.seconds,
        "resumed from step": done.resumed_from,
        "notes": [*done.skipped, *filter(None, [train.note()])],
    }
    if not ranks.is_first():
        return result
    if recipe.method == "scales":
        save_scales(model, out / TASK)
    with replace_file(out / losses.NAME) as temporary:
        shutil.copy(run / "checkpoints" / losses.NAME, temporary)
    errors = save(model, out, tokenizer, round_scales=rounded)
    if errors:
        result["largest rounding error of scales"] = max(errors.values())
    run.rename(finished)
    shutil.rmtree(finished)
    return result


def _settings(start: Start, data: Path, recipe: Recipe) -> dict[str, Any]:
    """What two commands must share for one to go on with the other's run, beside the recipe and the rows."""
    places = {"model": str(start.model.resolve()), "data": str(data.resolve())}
    if start.calibration:
        places["calibration"] = str(start.calibration.resolve())
    return {**vars(start), **places, "method": recipe.method}


def _read_start(run: Path) -> nn.Module:
    """The model as training began. Reading it, rather than making it again, gives the same bits on any machine."""
    if reason := checkpoint.damage(run / "start"):
        raise FormatError(f"{run / 'start'} is damaged: {reason}; delete {run} to start again")
    return load(run / "start")
