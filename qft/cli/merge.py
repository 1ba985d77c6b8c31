"""qft merge."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from .app import app
from .options import AsJson
from .output import new_table, print_result, quiet


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(help="A quantized model: the adapter's base.")],
    adapter: Annotated[Path, typer.Argument(help="An adapter's directory, as PEFT or qft adapter writes it.")],
    out: Annotated[Path, typer.Argument(help="A new directory for the merged model.")],
    as_json: AsJson = False,
) -> None:
    """Merge a PEFT adapter into a quantized model, each layer quantized again in its own format."""
    quiet()
    from ..disk import checkpoint
    from ..disk.directory import is_quantized
    from ..disk.io import save
    from ..disk.pretrained import load_tokenizer
    from ..integrations.peft_merge import merge_adapter
    from .models import open_model

    checkpoint.refuse_to_overwrite(out)
    if not is_quantized(model):
        raise ValueError(f"{model} is not quantized; merge in PEFT and quantize the result, or run qft quantize first")
    merged, errors = merge_adapter(open_model(model, None, "auto"), adapter)
    save(merged, out, tokenizer=load_tokenizer(model) if (model / "tokenizer_config.json").is_file() else None)
    formats = {path: str(merged.get_submodule(path).format) for path in errors}
    layers = [{"path": path, "format": formats[path], "error": error} for path, error in errors.items()]
    result = {"out": str(out), "layers": layers, "mean error": fmean(errors.values()) if errors else None}
    table = new_table("layer", "format", "error")
    for path, error in errors.items():
        table.add_row(path, formats[path], f"{error:.4f}")
    table.caption = f"error: ||merged - stored|| / ||merged||; {len(errors)} layers merged, written to {out}"
    print_result(result, as_json, table)
