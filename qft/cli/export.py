"""qft export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .options import AsJson
from .output import print_result, quiet, values


class Target(StrEnum):
    """Whose files to write."""

    peft = "peft"
    bnb = "bnb"
    gptq = "gptq"
    compressed_tensors = "compressed-tensors"
    dense = "dense"


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A quantized model.")],
    out: Annotated[Path, typer.Argument(help="A new directory for the files.")],
    to: Annotated[Target, typer.Option(help="peft writes the LoRA alone, dense a model that is not quantized.")],
    dense: Annotated[
        list[str] | None, typer.Option(help="Write layers of this name dequantized; can be repeated.")
    ] = None,
    without_lora: Annotated[bool, typer.Option("--without-lora", help="Leave the LoRA out.")] = False,
    dtype: Annotated[str, typer.Option(help="Of a dense model: bfloat16, float16 or float32.")] = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Write a quantized model as files that other libraries read."""
    quiet()
    import torch

    from ..disk import checkpoint
    from ..disk.directory import is_quantized
    from ..disk.pretrained import CHOICES, load_model, load_tokenizer
    from ..nn.linear import QuantLinear

    checkpoint.refuse_to_overwrite(out)
    if dense and to in (Target.peft, Target.dense):
        raise ValueError(f"--dense chooses layers of a quantized model, and --to {to} writes none; leave it out")
    if dtype not in CHOICES[1:]:
        raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(CHOICES[1:])}")
    if not is_quantized(model):
        raise ValueError(f"{model} is not quantized; run qft quantize first")
    network: Any = load_model(model)
    if without_lora:
        for layer in network.modules():
            if isinstance(layer, QuantLinear):
                layer.remove_lora()
    tokenizer = load_tokenizer(model) if (model / "tokenizer_config.json").is_file() else None
    errors: dict[str, float] = {}
    if to == Target.peft:
        from ..adapters.peft_format import save_adapter

        save_adapter(network, out)
    elif to == Target.dense:
        from ..exchange.dense import write as write_dense

        write_dense(network, out, tokenizer, getattr(torch, dtype))
    elif to == Target.bnb:
        from ..exchange.bitsandbytes import write as write_bitsandbytes

        write_bitsandbytes(network, out, tokenizer, dense=dense or ())
    elif to == Target.gptq:
        from ..exchange.gptq import write as write_gptq

        errors = write_gptq(network, out, tokenizer, dense=dense or ())
    else:
        from ..exchange.compressed_tensors import write as write_compressed_tensors

        errors = write_compressed_tensors(network, out, tokenizer, dense=dense or ())
    result: dict[str, Any] = {"out": str(out), "bytes": sum(path.stat().st_size for path in out.iterdir())}
    if errors:
        worst = max(errors, key=errors.__getitem__)
        result |= {"packed layers": len(errors), "largest error": errors[worst], "of layer": worst}
    print_result(result, as_json, values(result))
