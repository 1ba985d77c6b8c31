"""qft generate."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from .app import app
from .models import open_model
from .options import AsJson, Dtype, Model, Task
from .output import print_result, quiet


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    task: Task = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draw, where the temperature is above 0.")] = 0,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Let a model go on from a prompt."""
    quiet()
    import torch

    from ..disk.pretrained import load_tokenizer, vocabulary
    from ..training.data import check_vocabulary

    if tokens < 1 or temperature < 0:
        raise ValueError(f"--tokens {tokens} and --temperature {temperature} must be 1 or more, and 0 or more")
    network, tokenizer = open_model(model, task, dtype), load_tokenizer(model)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(network.device)
    if not inputs["input_ids"].numel():
        raise ValueError("the prompt is empty; write at least a word")
    check_vocabulary("the prompt", inputs["input_ids"][0].tolist(), tokenizer, vocabulary(network))
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    start = time.perf_counter()
    with torch.inference_mode():
        written = network.generate(**inputs, max_new_tokens=tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    new = written[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    result = {"prompt": prompt, "completion": text, "tokens": len(new), "seconds": time.perf_counter() - start}
    print_result(result, as_json, prompt + text)
