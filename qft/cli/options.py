"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Argument(help="A directory written by save_pretrained, or by this command.")]
Data = Annotated[Path, typer.Option(help="A .txt, or a .jsonl of text, prompt and completion, or messages.")]
Task = Annotated[Path | None, typer.Option(help="To load into the model: a task.safetensors, or an adapter's folder.")]
Dtype = Annotated[str, typer.Option(help="Of what is not quantized: auto, float32, bfloat16 or float16.")]
Init = Annotated[str, typer.Option(help="Where codes and LoRA start: plain, search, loftq, qera_exact, cloq, ...")]
Calibrated = Annotated[Path | None, typer.Option(help="What qft calibrate wrote, for a start that uses activations.")]
Alpha = Annotated[float | None, typer.Option(help="LoRA's alpha; left out, the rank.")]
Iters = Annotated[int | None, typer.Option(help="Turns of loftq, cloq or lqlora; left out, 5, 1 and 5.")]
BlockSize = Annotated[int | None, typer.Option(help="Longest row, in tokens; left out, 256 or what the model holds.")]
BatchSize = Annotated[int, typer.Option(help="Rows per forward pass.")]
Requantize = Annotated[str | None, typer.Option(help="For layers of a bitsandbytes model that cannot be kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
