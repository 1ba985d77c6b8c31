"""qft finetune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import Alpha, AsJson, BatchSize, BlockSize, Calibrated, Data, Dtype, Init, Iters, Model
from .output import print_result, progress, quiet, values


@app.command()
def finetune(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A new directory for the tuned model, or that of a run to go on with.")],
    data: Data,
    method: Annotated[str, typer.Option(help="What trains: lora, or scales (PEQA).")] = "lora",
    format: Annotated[str | None, typer.Option(help="Quantize a dense model first, for example 'nf4 g64 f32'.")] = None,
    init: Init = "plain",
    rank: Annotated[int, typer.Option(help="Rank of the LoRA, where the model has none yet.")] = 16,
    alpha: Alpha = None,
    iters: Iters = None,
    calibration: Calibrated = None,
    dropout: Annotated[float, typer.Option(help="Dropout of the LoRA's input while training.")] = 0.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps; 0 takes them from --epochs.")] = 0,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    learning_rate: Annotated[float | None, typer.Option(help="Left out: 2e-4 for lora, 2e-5 for scales.")] = None,
    batch_size: BatchSize = 8,
    accumulate: Annotated[int, typer.Option(help="Forward passes per optimizer step.")] = 1,
    block_size: BlockSize = None,
    held_out: Annotated[float, typer.Option(help="Share of the data's end to measure and not to train on.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the rows' order, the dropout, and the LoRA's first values.")] = 0,
    save_every: Annotated[int, typer.Option(help="Optimizer steps between checkpoints.")] = 100,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory for about a third more time.")] = True,
    round_scales: Annotated[bool, typer.Option(help="Store tuned scales in the format's own type.")] = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Tune a model on a text; repeating the command goes on with a run that was killed."""
    quiet()
    from ..training.finetune import Recipe
    from ..training.job import Start, tune
    from ..training.ranks import is_first

    recipe = Recipe(
        method=method,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        learning_rate=learning_rate,
        seed=seed,
        save_every=save_every,
        gradient_checkpointing=gradient_checkpointing,
    )
    start = Start(model, format, init, rank, alpha, iters, calibration, dropout, dtype)
    with progress() as tell:
        done = tune(
            start, out, data, recipe, block_size=block_size, held_out=held_out, rounded=round_scales, progress=tell
        )
    if is_first():
        print_result(done, as_json, values(done))
