"""qft quantize."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .models import described, layers_table
from .options import Alpha, AsJson, Calibrated, Dtype, Init, Iters, Model, Requantize
from .output import print_result, quiet


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A new directory for the quantized model.")],
    format: Annotated[str | None, typer.Option(help="The weight format, for example 'nf4 g64 f32'.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Formats by layer, written by qft plan.")] = None,
    init: Init = "plain",
    rank: Annotated[int, typer.Option(help="Rank of the LoRA; 0 attaches none.")] = 0,
    alpha: Alpha = None,
    iters: Iters = None,
    calibration: Calibrated = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave layers of this name dense; can be repeated.")] = None,
    formats: Annotated[list[str] | None, typer.Option(help="For some: 'lm_head=int8 g64'; can be repeated.")] = None,
    dtype: Dtype = "auto",
    requantize: Requantize = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a model, larger than memory or not, and save it; interrupted, repeat the command and it goes on.

    A bitsandbytes 4-bit model keeps the codes it has.
    """
    quiet()
    from ..disk.checkpoint import refuse_to_overwrite
    from ..disk.directory import kind_of
    from ..disk.io import save
    from ..disk.pretrained import load_tokenizer
    from ..disk.streaming import quantize_checkpoint
    from ..measure.plan import Plan
    from ..model.layer_report import report
    from ..training.job import Start, open_quantized

    kind = kind_of(model)
    if kind == "bitsandbytes" and (format or plan or formats or skip or init != "plain" or calibration):
        kept = "it keeps its codes, so leave --format and the options of a start out"
        raise ValueError(f"{model} is quantized already, by bitsandbytes: {kept}, or name the dense model")
    if kind not in (None, "bitsandbytes"):
        raise ValueError(f"{model} is quantized already; name the dense model")
    if requantize and not kind:
        raise ValueError(f"--requantize is for a bitsandbytes model, and {model} is dense; name a --format")
    if init == "loftq" and not rank:
        raise ValueError("init loftq fits a LoRA and there is none; give it a --rank, for example 16")
    start = time.perf_counter()
    tokenizer = load_tokenizer(model) if (model / "tokenizer_config.json").is_file() else None
    if kind:
        refuse_to_overwrite(out)
        origin = Start(model, rank=rank, alpha=alpha, iters=iters, dtype=dtype)
        quantized = open_quantized(origin, bool(rank), requantize=requantize)
        save(quantized, out, tokenizer)
        made = report(quantized)
    else:
        named, planned = _by_pattern(formats or []), Plan.load(plan).formats if plan else {}
        by_layer = {**named, **planned, **named}  # the first that matches wins, so what is named here comes first
        made = quantize_checkpoint(
            model, out, format, init, rank, alpha, iters=iters, calibration=calibration, skip=skip or [],
            formats=by_layer, dtype=dtype, tokenizer=tokenizer, progress=True,
        )  # fmt: skip
    result = {"out": str(out), **described(made), "seconds": round(time.perf_counter() - start, 1)}
    print_result(result, as_json, layers_table(made))


def _by_pattern(words: list[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise ValueError(f"--formats {word!r} names no layer; write for example 'lm_head=int8 g64'")
    return dict(word.split("=", 1) for word in words)
