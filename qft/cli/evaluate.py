"""qft eval."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from .app import app
from .models import open_model
from .options import AsJson, BatchSize, BlockSize, Data, Dtype, Model, Task
from .output import print_result, progress, quiet, values


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Data,
    task: Task = None,
    block_size: BlockSize = None,
    held_out: Annotated[float, typer.Option(help="Measure only this share of the data's end; 0 measures all.")] = 0.0,
    rows: Annotated[int, typer.Option(help="Measure only so many rows; 0 measures all.")] = 0,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a model's perplexity on a text."""
    quiet()
    from ..disk.pretrained import load_tokenizer, row_length, vocabulary
    from ..training.data import PaddingCollator, read
    from ..training.evaluate import perplexity

    network, tokenizer = open_model(model, task, dtype), load_tokenizer(model)
    length = row_length(network, block_size)
    whole, end = read(data, tokenizer, length, held_out=held_out, vocabulary=vocabulary(network))
    wanted = (end if held_out else whole)[: rows or None]
    start = time.perf_counter()
    with progress() as tell:
        measured = perplexity(
            network,
            wanted,
            PaddingCollator.of(tokenizer),
            batch_size,
            lambda done, total: tell("measuring", done, total),
        )
    result = {
        "perplexity": measured.value,
        "loss (nats per token)": measured.loss,
        "tokens": measured.tokens,
        "rows": len(wanted),
        "seconds": time.perf_counter() - start,
        "notes": [note] if (note := whole.note()) else [],
    }
    print_result(result, as_json, values(result))
