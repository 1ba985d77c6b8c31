"""The `qft` command: quantize, finetune, eval, generate, info, explain, demo.

Results go to stdout, as a table or as JSON; progress and errors go to stderr. torch and transformers are imported by
the commands that need them.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from .job import Progress as Tell
    from .model import LayerReport, Report

app = typer.Typer(
    help="Quantize, fine-tune and measure language models whose weights are packed to 2, 3, 4 or 8 bits.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Model = Annotated[Path, typer.Argument(help="A directory written by save_pretrained, or by this command.")]
Data = Annotated[Path, typer.Option(help="A .txt, or a .jsonl of text, prompt and completion, or messages.")]
Task = Annotated[Path | None, typer.Option(help="Trained scales to load into the model: a task.safetensors.")]
Dtype = Annotated[str, typer.Option(help="Of what is not quantized: auto, float32, bfloat16 or float16.")]
Init = Annotated[str, typer.Option(help="Where the LoRA starts: plain, or loftq, which fits the quantization error.")]
Alpha = Annotated[float | None, typer.Option(help="LoRA's alpha; left out, the rank.")]
Iters = Annotated[int, typer.Option(help="LoftQ's alternating steps.")]
BlockSize = Annotated[int | None, typer.Option(help="Longest row, in tokens; left out, 256 or what the model holds.")]
BatchSize = Annotated[int, typer.Option(help="Rows per forward pass.")]
Justify = Literal["left", "right"]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def main() -> None:
    """The console script: every bad input ends here, as one line on stderr and exit code 2."""
    logging.basicConfig(format="qft: %(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # transformers loads it, through PEFT, where installed
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:
        print("qft: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        _refuse(str(error))
    except Exception as error:
        # typer's complaints about the command line; their class depends on its version
        if not hasattr(error, "format_message"):
            raise
        _refuse(error.format_message())


def _refuse(message: str) -> None:
    if message:  # a bare `qft` has printed its help instead
        print("qft:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------- commands


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A new directory for the quantized model.")],
    format: Annotated[str, typer.Option(help="The weight format, for example 'nf4 g64 f32' or 'int3 g128 f16'.")],
    init: Init = "plain",
    rank: Annotated[int, typer.Option(help="Rank of the LoRA; 0 attaches none.")] = 0,
    alpha: Alpha = None,
    iters: Iters = 5,
    skip: Annotated[list[str] | None, typer.Option(help="Leave layers of this name dense; can be repeated.")] = None,
    formats: Annotated[list[str] | None, typer.Option(help="For some: 'lm_head=int8 g64'; can be repeated.")] = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Quantize a model's linear layers and save it."""
    _quiet()
    from . import checkpoint
    from .io import save
    from .job import Start, open_quantized
    from .model import report
    from .pretrained import is_quantized, load_tokenizer

    checkpoint.refuse_to_overwrite(out)
    if is_quantized(model):
        raise ValueError(f"{model} is quantized already; name the dense model")
    if init == "loftq" and not rank:
        raise ValueError("init loftq fits a LoRA and there is none; give it a --rank, for example 16")
    start = time.perf_counter()
    origin = Start(model, format, init, rank, alpha, iters, dtype=dtype)
    quantized = open_quantized(origin, bool(rank), skip or [], _by_pattern(formats or []), progress=True)
    save(quantized, out, tokenizer=load_tokenizer(model) if (model / "tokenizer_config.json").is_file() else None)
    made = report(quantized)
    _print(
        {"out": str(out), **_described(made), "seconds": round(time.perf_counter() - start, 1)}, as_json, _layers(made)
    )


def _by_pattern(words: list[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise ValueError(f"--formats {word!r} names no layer; write for example 'lm_head=int8 g64'")
    return dict(word.split("=", 1) for word in words)


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
    iters: Iters = 5,
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
    _quiet()
    from .finetune import Recipe
    from .job import Start, tune

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
    start = Start(model, format, init, rank, alpha, iters, dropout, dtype)
    with _progress() as tell:
        done = tune(
            start, out, data, recipe, block_size=block_size, held_out=held_out, rounded=round_scales, progress=tell
        )
    _print(done, as_json, _values(done))


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
    _quiet()
    from .data import PaddingCollator, read
    from .evaluate import perplexity
    from .pretrained import load_tokenizer, row_length, vocabulary

    network, tokenizer = _open(model, task, dtype), load_tokenizer(model)
    length = row_length(network, block_size)
    whole, end = read(data, tokenizer, length, held_out=held_out, vocabulary=vocabulary(network))
    wanted = (end if held_out else whole)[: rows or None]
    start = time.perf_counter()
    with _progress() as tell:
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
    _print(result, as_json, _values(result))


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
    _quiet()
    import torch

    from .data import check_vocabulary
    from .pretrained import load_tokenizer, vocabulary

    if tokens < 1 or temperature < 0:
        raise ValueError(f"--tokens {tokens} and --temperature {temperature} must be 1 or more, and 0 or more")
    network, tokenizer = _open(model, task, dtype), load_tokenizer(model)
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
    _print(result, as_json, prompt + text)


@app.command()
def info(
    model: Annotated[Path | None, typer.Argument(help="A model, or a file of scales; left out, the machine.")] = None,
    as_json: AsJson = False,
) -> None:
    """Describe this machine, a model, or a task."""
    if model is None:
        machine = _machine()
        _print(machine, as_json, _values(machine))
    elif model.is_file():
        from .adapters.scales import read_task

        layers = read_task(model)
        formats = sorted({str(layer.format) for layer in layers.values()})
        scales = sum(math.prod(layer.stored.shape) for layer in layers.values())
        task = {"layers": len(layers), "formats": formats, "scales": scales, "bytes": model.stat().st_size}
        _print(task, as_json, _values(task))
    else:
        from .model import report
        from .pretrained import describe, is_quantized, load_model

        _quiet()
        made = describe(model) if is_quantized(model) else report(load_model(model))
        _print(_described(made), as_json, _layers(made))


def _machine() -> dict[str, Any]:
    import platform

    import torch

    from . import __version__, native
    from .compiler.jit import cache_folder

    return {
        "qft": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.machine(),
        "threads": native.threads(),
        "instruction sets": list(native.instruction_sets()),
        "compiled codes": sorted({code for code, isa in native.tables() if isa != "cuda"}),
        "CUDA kernels for": sorted({name for names in native.cuda_targets().values() for name in names}),
        "GPUs": [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())],
        "cache": str(cache_folder()),
    }


@app.command()
def explain(
    format: Annotated[str, typer.Argument(help="A weight format, for example 'nf4 g64 f32'.")],
    out_features: Annotated[int, typer.Argument(help="Rows of the weight.")] = 4096,
    in_features: Annotated[int, typer.Argument(help="Columns of the weight.")] = 4096,
    rows: Annotated[int, typer.Option(help="Rows of the activations.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the activations: float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[
        str | None, typer.Option(help="Of the weight: cpu or cuda; without it, cuda where there is.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which kernel each verb takes on this machine, and why the others were passed over."""
    import torch

    from . import kernels
    from .pretrained import CHOICES

    if dtype not in CHOICES[1:]:
        raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(CHOICES[1:])}")
    if min(out_features, in_features, rows) < 1:
        raise ValueError(f"{rows} rows times a {out_features} x {in_features} weight is empty; use 1 or more of each")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is unknown; use cpu or cuda")
    chosen = kernels.explain(format, out_features, in_features, rows, getattr(torch, dtype), device)
    table = _table("verb", "kernel", "passed over", justify="left")
    for verb, choice in chosen.items():
        taken = f"{choice.kernel.name}: {choice.kernel.about}"
        table.add_row(verb, taken, "\n".join(f"{name}: {why}" for name, why in choice.passed_over))
    result = {
        verb: {"kernel": c.kernel.name, "about": c.kernel.about, "passed over": dict(c.passed_over)}
        for verb, c in chosen.items()
    }
    _print(result, as_json, table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for table.json and figure.png.")] = Path("demo-out"),
    examples: Annotated[Path | None, typer.Option(help="Folder with the demo's model and texts.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each case.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a small model at 4, 3 and 2 bits and compare it with the dense one: about 5 minutes on 4 cores."""
    _quiet()
    from .demo import NAMES, STEPS, find_examples
    from .demo import demo as run

    with _progress() as tell:
        rows = run(find_examples(examples), out, tell, STEPS if steps is None else steps)
    table = _table("perplexity on", "new domain", "own domain", "stored MB", "trainable", "seconds")
    for index, row in enumerate(rows):
        table.add_row(
            f"{row.bits} bits, {NAMES[row.method]}",
            f"{row.before:.2f} → {row.after:.2f}",
            f"{row.own_before:.2f} → {row.own_after:.2f}",
            f"{row.bytes / 1e6:.2f}",
            f"{row.trainable:,}",
            f"{row.seconds:.0f}",
            end_section=index + 1 < len(rows) and rows[index + 1].bits != row.bits,
        )
    table.caption = f"written to {out / 'table.json'} and {out / 'figure.png'}"
    _print({"rows": [asdict(row) for row in rows], "out": str(out)}, as_json, table)


# ---------------------------------------------------------------------------------------------------- shared


def _quiet() -> None:
    """Leave stderr to this command: transformers draws bars and gives advice of its own."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


def _open(model: Path, task: Path | None, dtype: str) -> Any:
    from .adapters.scales import load_scales
    from .pretrained import device, load_model

    network = load_model(model, dtype)
    if task:
        load_scales(network, task)
    return network.to(device())


@contextmanager
def _progress() -> Iterator[Tell]:
    """Progress bars on stderr, one per thing that is told about; yields the function to tell with."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    known: dict[str, Any] = {}

    def tell(what: str, done: int, total: int) -> None:
        bars.start()  # at the first telling: before it there may be an error to print
        if what not in known or bars.tasks[known[what]].finished:
            known[what] = bars.add_task(what, total=total)
        bars.update(known[what], completed=done, total=total)

    try:
        yield tell
    finally:
        if known:
            bars.stop()


def _print(result: Mapping[str, Any], as_json: bool, shown: Any) -> None:
    if as_json:
        print(json.dumps(_plain(result), indent=1, allow_nan=False))
    elif isinstance(shown, str):
        print(shown)
    else:
        Console().print(shown)


def _plain(value: Any) -> Any:
    """What JSON can hold: it has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _table(*columns: str, justify: Justify = "right") -> Table:
    table = Table(box=SIMPLE_HEAD)
    for index, name in enumerate(columns):
        table.add_column(name, justify=justify if index else "left", overflow="fold")
    return table


def _values(result: Mapping[str, Any]) -> Table:
    """One line per value; what is None or empty says nothing and is left out."""
    table = _table("", "")
    for name, value in result.items():
        if value not in (None, []):
            table.add_row(name, _spelled(value))
    return table


def _spelled(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_spelled, value))
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _described(made: Report) -> dict[str, Any]:
    layers = [
        {
            "path": layer.path,
            "format": str(layer.format) if layer.format else None,
            "shape": list(layer.shape),
            "bytes": layer.nbytes,
            "bits per weight": layer.bits_per_weight,
            "rank": layer.rank,
            "errors": list(layer.errors),
            **({"reason": layer.reason} if layer.reason else {}),
        }
        for layer in made.layers
    ]
    return {"layers": layers, "bytes": made.nbytes, "bits per quantized weight": made.bits_per_weight}


def _layers(made: Report) -> Table:
    """Layers of the same kind in one line: a large model has hundreds."""
    kinds: dict[tuple[str, ...], list[LayerReport]] = {}
    for layer in made.layers:
        shape = "x".join(map(str, layer.shape))
        kinds.setdefault((layer.path.rpartition(".")[2], str(layer.format or "dense"), shape), []).append(layer)
    table = _table("layer", "format", "weight", "layers", "MB", "bits", "rank", "error")
    for (name, format, shape), layers in kinds.items():
        errors = [layer.errors[-1] for layer in layers if layer.errors]
        table.add_row(
            name,
            format,
            shape,
            str(len(layers)),
            f"{sum(layer.nbytes for layer in layers) / 1e6:.2f}",
            f"{layers[0].bits_per_weight:.3f}",
            str(layers[0].rank or ""),
            f"{sum(errors) / len(errors):.4f}" if errors else "",
        )
    packed = sum(layer.nbytes for layer in made.quantized)
    table.add_row("all else", "", "", "", f"{made.other_nbytes / 1e6:.2f}", end_section=True)
    table.add_row("quantized", "", "", str(len(made.quantized)), f"{packed / 1e6:.2f}", f"{made.bits_per_weight:.3f}")
    table.add_row("the model", "", "", "", f"{made.nbytes / 1e6:.2f}")
    reasons = {f"{layer.path.rpartition('.')[2]} is dense: {layer.reason}" for layer in made.dense if made.quantized}
    table.caption = "\n".join(sorted(reasons)) or None
    return table
