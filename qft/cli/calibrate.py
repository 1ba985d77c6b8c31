"""qft calibrate."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .models import open_model
from .options import AsJson, BatchSize, BlockSize, Dtype, Model
from .output import print_result, quiet, values


@app.command()
def calibrate(
    model: Model,
    data: Annotated[Path, typer.Argument(help="A .txt, or a .jsonl of text, prompt and completion, or messages.")],
    out: Annotated[Path, typer.Argument(help="A new directory, or that of a calibration to go on with.")],
    rows: Annotated[int, typer.Option(help="Read only so many rows, drawn at random; 0 reads all.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the draw of rows.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of the data's end to leave alone, as finetune does.")] = 0.0,
    block_size: BlockSize = None,
    batch_size: BatchSize = 8,
    diagonal: Annotated[bool, typer.Option(help="Keep mean squares alone: enough for search and qera_diag.")] = False,
    gradients: Annotated[bool, typer.Option(help="Measure the loss's gradients as well: for qft plan.")] = False,
    memory: Annotated[float, typer.Option(help="Most GB of sums held at a time; less takes more passes.")] = 2.0,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out layers of this name; can be repeated.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Take a layer left dense otherwise: lm_head.")] = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure what a dense model's layers read on a text; repeating the command goes on where it was killed."""
    quiet()
    from ..disk.directory import is_quantized
    from ..disk.pretrained import load_tokenizer, row_length, vocabulary
    from ..measure.calibration import calibrate as measure
    from ..notices import say_once
    from ..training.data import PaddingCollator, read

    if is_quantized(model):
        raise ValueError(f"{model} is quantized already; name the dense model")
    if not memory > 0:
        raise ValueError(f"--memory {memory} holds no sum; write for example 2 for 2 GB")
    network, tokenizer = open_model(model, None, dtype), load_tokenizer(model)
    length = row_length(network, block_size)
    kept, _ = read(data, tokenizer, length, held_out=held_out, vocabulary=vocabulary(network))
    if kept.note():
        say_once(kept.note())
    places: Sequence[int] = range(len(kept))
    if 0 < rows < len(kept):
        places = sorted(random.Random(seed).sample(places, rows))
    start = time.perf_counter()
    made = measure(
        network,
        [kept[at] for at in places],
        PaddingCollator.of(tokenizer),
        full=not diagonal,
        gradients=gradients,
        batch_size=batch_size,
        directory=out,
        memory=int(memory * 1e9),
        skip=skip or (),
        include=include or (),
        progress=True,
    )
    result = {
        "out": str(out),
        "layers": len(made),
        "moments": len(made.groups),
        "tokens": made.tokens,
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print_result(result, as_json, values(result))
