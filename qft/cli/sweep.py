"""qft sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .app import app
from .options import AsJson, BatchSize, BlockSize, Calibrated, Data, Dtype, Init, Iters, Model
from .output import new_table, print_result, progress, quiet


@app.command()
def sweep(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A directory for the table and the checkpoints.")],
    data: Data,
    ranks: Annotated[str, typer.Option(help="Ranks of the LoRA, with commas between.")] = "4,8,16,32",
    scales: Annotated[bool, typer.Option(help="Tune the scales alone as well (PEQA).")] = True,
    format: Annotated[str | None, typer.Option(help="Quantize a dense model first, for example 'nf4 g64 f32'.")] = None,
    init: Init = "plain",
    iters: Iters = None,
    calibration: Calibrated = None,
    alpha_per_rank: Annotated[float, typer.Option(help="LoRA's alpha as a multiple of its rank.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run; 0 takes them from --epochs.")] = 0,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    learning_rate: Annotated[float | None, typer.Option(help="Of the LoRA; left out, 2e-4.")] = None,
    scales_learning_rate: Annotated[float | None, typer.Option(help="Of the scales; left out, 2e-5.")] = None,
    batch_size: BatchSize = 8,
    block_size: BlockSize = None,
    held_out: Annotated[float, typer.Option(help="Share of the data's end to measure on.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the rows' order and the LoRA's first values.")] = 0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory for about a third more time.")] = True,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Tune at several ranks and print what each gains and costs."""
    quiet()
    import torch

    from ..disk import checkpoint
    from ..disk.directory import is_quantized
    from ..disk.pretrained import device, load_model, load_tokenizer, row_length, vocabulary
    from ..notices import say_once
    from ..recipes.rank_sweep import rank_sweep
    from ..training.data import PaddingCollator, read
    from ..training.finetune import Recipe
    from ..training.job import Start, open_quantized

    wanted = _numbers(ranks)
    if not 0 < held_out < 1:
        raise ValueError(f"--held-out {held_out} leaves nothing to train or to measure on; write 0.1 for the last 10 %")
    if is_quantized(model) and format:
        raise ValueError(f"{model} is quantized already; leave out --format, or name the dense model")
    tokenizer, described = load_tokenizer(model), load_model(model, dtype)
    train, measured = read(
        data, tokenizer, row_length(described, block_size), held_out=held_out, vocabulary=vocabulary(described)
    )
    del described
    if train.note():
        say_once(train.note())

    def start(rank: int, alpha: float) -> torch.nn.Module:
        torch.manual_seed(seed)
        origin = Start(model, format, init, rank, alpha or None, iters, calibration, dtype=dtype)
        return open_quantized(origin, bool(rank)).to(device())

    recipe = Recipe(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
    )
    with progress() as tell:
        rows = rank_sweep(
            start,
            train,
            measured,
            PaddingCollator.of(tokenizer),
            recipe,
            wanted,
            scales=scales,
            scales_learning_rate=scales_learning_rate,
            alpha_per_rank=alpha_per_rank,
            directory=out,
            on_step=tell,
        )
    table = [row.as_dict() for row in rows]
    result = {"model": str(model), "format": format, "init": init, "rows": table}
    checkpoint.write_json(out / "sweep.json", result)
    print_result(result, as_json, _table(table, out))


def _numbers(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not all(word.isdigit() for word in words):
        raise ValueError(f"--ranks {text!r} is no list of whole numbers; write for example 4,8,16")
    return [int(word) for word in words]


def _table(rows: Sequence[Mapping[str, Any]], out: Path) -> Table:
    table = new_table("rank", "alpha", "trained", "file MB", "MFLOP", "peak MB", "rise MB", "before", "after")
    for row in rows:
        rise = row["memory_rise"]
        table.add_row(
            str(row["rank"] or "scales"),
            f"{row['alpha']:g}" if row["rank"] else "",
            f"{row['trainable']:,}",
            f"{row['adapter_nbytes'] / 1e6:.2f}",
            f"{row['flops'] / 1e6:,.1f}",
            f"{row['peak_nbytes'] / 1e6:,.1f}",
            "" if rise is None else f"{rise / 1e6:,.1f}",
            f"{row['before']:.2f}",
            f"{row['after']:.2f}",
        )
    table.caption = (
        "trained: parameters; MFLOP: per token, forward and backward; peak: estimated, the model included; rise: "
        f"measured above the loaded model; before, after: held-out perplexity. Written to {out / 'sweep.json'}"
    )
    return table
