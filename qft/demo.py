"""The main job on a small model, at 4, 3 and 2 bits: quantize, fine-tune, and see what it cost and what was forgotten.

The model (7.3 M parameters) was trained on Python source files; it is tuned on the language reference, English prose,
and measured before and after on the held-out part of both. Three ways to start and to train meet the dense model:

    dense + LoRA    nothing quantized, PEFT's LoRA: the bar
    plain + LoRA    QLoRA
    LoftQ + LoRA    the LoRA starts as the best low-rank fit of the quantization error
    PEQA            no LoRA; the scales train
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from .adapters.scales import train_only
from .disk import checkpoint
from .disk.pretrained import device, load_model, load_tokenizer
from .model.prepare import prepare_for_training
from .model.surgery import quantize_model
from .training.data import Examples, PaddingCollator, read
from .training.evaluate import perplexity
from .training.finetune import Recipe, run

RANK = 16
BLOCK_SIZE = 256  # the context the model was trained on
HELD_OUT = 0.15  # of the language reference's tokens
WINDOWS = 64  # of each held-out text: 16 thousand tokens each, few enough for 6 minutes in all
# Rates: the better of 2e-3 and 4e-3 on the dense model, of 1e-3 and 3e-3 at 4 bits; they hold for every width.
STEPS, BATCH_SIZE = 60, 4
RATES = {"lora": 4e-3, "scales": 3e-3}
Method = Literal["dense", "plain", "loftq", "peqa"]
NAMES: dict[Method, str] = {
    "dense": "dense + LoRA",
    "plain": "plain + LoRA",
    "loftq": "LoftQ + LoRA",
    "peqa": "PEQA (scales)",
}
FORMATS = {4: "nf4 g64 f32", 3: "nf3 g64 f32", 2: "nf2 g64 f32"}

Progress = Callable[[str, int, int], None]  # what, done, in all


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method, bits, format: what ran; a dense model has 16 bits and no format.
        before, after: perplexity on the new domain, untuned and tuned.
        own_before, own_after: perplexity on held-out text of the base's own domain; the rise is what was forgotten.
        bytes: of the tuned model's file.
        trainable: number of trained parameters.
        seconds: to quantize and to train, measuring left out.
    """

    method: Method
    bits: int
    format: str | None
    before: float
    after: float
    own_before: float
    own_after: float
    bytes: int
    trainable: int
    seconds: float


@dataclass(frozen=True)
class Texts:
    """What every run trains on and is measured on; `spare` is text of the model's own domain beside the measured."""

    train: Examples
    new: Examples
    own: Examples
    spare: Examples
    collate: PaddingCollator


def cases() -> Iterator[tuple[Method, int]]:
    """The runs, dense first."""
    yield "dense", 16
    for bits in FORMATS:
        for method in ("plain", "loftq", "peqa"):
            yield method, bits  # type: ignore[misc]


def find_examples(directory: str | Path | None = None) -> Path:
    """The folder with the demo's model and texts: `directory`, ./examples, or the one beside an editable install.

    Raises:
        FileNotFoundError: it is nowhere; the message says how to get it.
    """
    beside = Path(__file__).resolve().parent.parent / "examples"
    for folder in [Path(directory)] if directory else [Path("examples"), beside]:
        if (folder / "stdlib-lm" / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{directory or 'examples'}/stdlib-lm is not here, because the installed package leaves out the demo's model: "
        "clone the repository and run this in it, or name its folder with --examples"
    )


def demo(examples: Path, out: Path, progress: Progress | None = None, steps: int = STEPS) -> list[Row]:
    """Run every case and write `table.json` and `figure.png` into `out`.

    Args:
        examples: holds stdlib-lm/, language-reference.txt and stdlib-held-out.txt.
        out: folder for the results; made if absent.
        progress: told where the run is.
        steps: optimizer steps of each case.
    """
    from .figure import draw

    out.mkdir(parents=True, exist_ok=True)
    tell = progress or (lambda what, done, total: None)
    material = texts(examples)
    start = time.perf_counter()
    rows = [_run(method, bits, examples / "stdlib-lm", material, steps, tell) for method, bits in cases()]
    result = {
        "rows": [asdict(row) for row in rows],
        "steps": steps,
        "rank": RANK,
        "learning_rates": RATES,
        "tokens": {"train": material.train.tokens, "new": material.new.tokens, "own": material.own.tokens},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - start, 1),
    }
    checkpoint.write_json(out / "table.json", result)
    draw(rows, out / "figure.png")
    return rows


def texts(examples: Path) -> Texts:
    """The demo's training rows, and its held-out windows of both domains."""
    tokenizer = load_tokenizer(examples / "stdlib-lm")
    reference, own = examples / "language-reference.txt", examples / "stdlib-held-out.txt"
    train, new = read(reference, tokenizer, BLOCK_SIZE, held_out=HELD_OUT)
    sources, _ = read(own, tokenizer, BLOCK_SIZE)
    spread = [i * len(sources) // WINDOWS for i in range(WINDOWS)]  # from all its files, not the first few
    measured = Examples([sources[i] for i in spread])
    spare = Examples([row for i, row in enumerate(sources) if i not in set(spread)])
    return Texts(train, Examples(new[:WINDOWS]), measured, spare, PaddingCollator.of(tokenizer))


def _run(method: Method, bits: int, base: Path, material: Texts, steps: int, tell: Progress) -> Row:
    """One case: start, measure, train, measure."""
    what = f"{bits} bits, {NAMES[method]}"
    torch.manual_seed(0)
    model = load_model(base, "float32").to(device())
    start = time.perf_counter()
    model = _start(model, method, bits)
    spent = time.perf_counter() - start

    def measure(rows: Examples) -> float:
        return perplexity(model, rows, material.collate).value

    before, own_before = measure(material.new), measure(material.own)
    recipe = Recipe(
        method="scales" if method == "peqa" else "lora",
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=RATES["scales" if method == "peqa" else "lora"],
        warmup=0.1,
        gradient_checkpointing=False,
    )
    done = run(model, material.train, material.collate, recipe, on_step=lambda at, total, loss: tell(what, at, total))
    return Row(
        method=method,
        bits=bits,
        format=FORMATS.get(bits),
        before=before,
        after=measure(material.new),
        own_before=own_before,
        own_after=measure(material.own),
        bytes=stored_bytes(model),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=round(spent + done.seconds, 1),
    )


def _start(model: nn.Module, method: Method, bits: int) -> nn.Module:
    if method == "dense":
        return dense_lora(model)
    if method == "peqa":
        quantize_model(model, FORMATS[bits])
    else:
        quantize_model(model, FORMATS[bits], init=method, rank=RANK)
    train_only(model, "scales" if method == "peqa" else "lora")
    return prepare_for_training(model, gradient_checkpointing=False)


def dense_lora(model: nn.Module, rank: int = RANK) -> nn.Module:
    """PEFT's LoRA of scaling 1 on every linear layer of a dense model."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise OSError("the demo compares with PEFT's LoRA on the dense model; run: pip install peft") from None
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for names it has since renamed
        return get_peft_model(model, config)


def stored_bytes(model: nn.Module) -> int:
    """Size of the model's file with everything that is not quantized in bf16, as the dense model comes."""
    model.to(torch.bfloat16)
    tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    return sum(tensors.values())
