"""One random-weight Llama in a process of its own: a training step, a token, and the memory they take.

Run by scaling.py: python bench/scaling_model.py SHAPE KIND TOKENS THREADS ROUNDS; prints JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import transformers
from resident import extra_peak, resident
from torch import Tensor, nn

from qft.adapters.scales import train_only
from qft.demo import dense_lora
from qft.model.prepare import prepare_for_training
from qft.model.surgery import quantize_model

RANK, VOCABULARY, RATE = 16, 4096, 1e-4
DENSE = "dense bf16"
BLOCK = 1 << 22  # random numbers; weights are made of them again and again


@dataclass(frozen=True)
class Shape:
    """A Llama with multi-head attention and a vocabulary so small that layers make the model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int

    @property
    def parameters(self) -> int:
        """All of them: layers, norms, embedding and head."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.hidden + 2 * VOCABULARY * self.hidden


LEAST = Shape(64, 64, 1, 1)


def dense_model(shape: Shape) -> nn.Module:
    """bf16, of standard deviation 0.02."""
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
            continue
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), BLOCK):
            flat[start : start + BLOCK] = block[: len(flat) - start]
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were computed on no device
    return model


def prepare(shape: Shape, kind: str) -> nn.Module:
    """With a LoRA on every linear layer but the head, ready to train."""
    model = dense_model(shape)
    if kind == DENSE:
        return dense_lora(model, RANK)
    quantize_model(model, kind, rank=RANK)
    return prepare_for_training(train_only(model, "lora"), gradient_checkpointing=False)


def calls(shape: Shape, kind: str, tokens: int) -> tuple[nn.Module, Callable[[], Tensor], Callable[[], Tensor]]:
    """The model, a training step on `tokens` tokens, and a forward of one; they return the loss and the logits."""
    model = prepare(shape, kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    batch = torch.randint(0, VOCABULARY, (1, tokens))

    def step() -> Tensor:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def token() -> Tensor:
        with torch.no_grad():
            return model(input_ids=batch[:, :1]).logits

    return model, step, token


def measure(shape: Shape, kind: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step and of a token, medians after a first; bytes stored, and the most in use beside libraries."""
    torch.manual_seed(0)
    calls(LEAST, kind, 2)[1]()  # what is imported at the first use is a library's too
    gc.collect()
    libraries = resident()
    model, step, token = calls(shape, kind, tokens)
    if not (step().isfinite() and token().isfinite().all()):
        raise ValueError(f"{kind}: loss or logits are not finite")
    steps, ones = timed(step, rounds), timed(token, 3 * rounds)
    held = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    return {
        **asdict(shape),
        "kind": kind,
        "parameters": shape.parameters,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "stored_bytes": sum(held.values()),
        "step_s": median(steps),
        "step_spread_s": [min(steps), max(steps)],
        "token_s": median(ones),
        "token_spread_s": [min(ones), max(ones)],
        "library_bytes": libraries,
        "step_extra_bytes": extra_peak(step),
        "peak_bytes": resident("VmHWM") - libraries,
    }


def timed(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each round."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def main(words: Sequence[str]) -> None:
    shape, kind, tokens, threads, rounds = words
    torch.set_num_threads(int(threads))
    print(json.dumps(measure(Shape(**json.loads(shape)), kind, int(tokens), int(rounds))))


if __name__ == "__main__":
    main(sys.argv[1:])
