"""qft compose."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .models import open_model
from .options import AsJson, BatchSize, BlockSize, Data, Dtype
from .output import new_table, print_result, progress, quiet


@app.command()
def compose(
    model: Annotated[Path, typer.Argument(help="A quantized model: the base of the adapters.")],
    library: Annotated[Path, typer.Argument(help="A folder of adapters, one directory each.")],
    out: Annotated[Path, typer.Argument(help="A new directory for the composed adapter and lorahub.json.")],
    data: Data,
    evaluations: Annotated[int, typer.Option(help="How many weights to try.")] = 40,
    penalty: Annotated[float, typer.Option(help="On the mean size of the weights, nats.")] = 0.05,
    rows: Annotated[int, typer.Option(help="Use only so many rows of the data; 0 uses all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the search, where it draws.")] = 0,
    block_size: BlockSize = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Weigh a library's adapters for a new task by a few examples, without gradients (LoraHub)."""
    quiet()
    from ..compose.library import Library
    from ..compose.lorahub import lorahub
    from ..compose.pairs import encoder_decoder_rows
    from ..disk import checkpoint
    from ..disk.directory import is_quantized
    from ..disk.pretrained import load_tokenizer, row_length, vocabulary
    from ..training.data import PaddingCollator, read

    checkpoint.refuse_to_overwrite(out)
    if not is_quantized(model):
        raise ValueError(
            f"{model} is not quantized, and qft composes adapters of packed models; run qft quantize first"
        )
    adapters = Library.open(library)
    network, tokenizer = open_model(model, None, dtype), load_tokenizer(model)
    whole, _ = read(data, tokenizer, row_length(network, block_size), vocabulary=vocabulary(network))
    examples = whole[: rows or None]
    if network.config.is_encoder_decoder:
        examples = encoder_decoder_rows(examples, tokenizer.eos_token_id)
    start = time.perf_counter()
    with progress() as tell:
        found = lorahub(
            network,
            adapters,
            examples,
            PaddingCollator.of(tokenizer),
            evaluations=evaluations,
            penalty=penalty,
            seed=seed,
            batch_size=batch_size,
            on_evaluation=lambda done, total, _: tell("composing", done, total),
        )
    found.save(network, out)
    table = new_table("adapter", "weight")
    for name, weight in found.weights.items():
        table.add_row(name, f"{weight:.3f}")
    table.caption = f"loss on the examples {found.base_loss:.4f} → {found.loss:.4f}, written to {out}"
    result = {
        "out": str(out),
        "weights": found.weights,
        "base loss (nats per token)": found.base_loss,
        "loss (nats per token)": found.loss,
        "rows": len(examples),
        "evaluations": evaluations,
        "seconds": time.perf_counter() - start,
        "notes": [note] if (note := whole.note()) else [],
    }
    print_result(result, as_json, table)
