"""A training step of a whole model: its time, and the memory it takes."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_cases import Step
from torch import nn

import qft

SAMPLES = 10
WARM_UP = 3  # steps


def llama(device: str, **sizes: int) -> nn.Module:
    """Random weights in bf16, of the shape of Llama 3.2 1B where `sizes` does not say otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    } | sizes
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).train()
    finally:
        torch.set_default_dtype(before)


def trainable(step: Step, model: nn.Module) -> nn.Module:
    """The model with what the step trains."""
    if step.fmt is None:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=step.rank, lora_alpha=step.rank, target_modules="all-linear"))
    qft.quantize_model(model, step.fmt, rank=step.rank)
    qft.train_only(model, "lora" if step.rank else "scales")
    return qft.prepare_for_training(model, gradient_checkpointing=False)


def training_step(step: Step, device: str, samples: int = SAMPLES, **sizes: int) -> dict[str, Any]:
    """Seconds of a step, and the most memory it held above what this process held before the model."""
    on_gpu = device != "cpu"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    model = trainable(step, llama(device, **sizes))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=step.rate)
    tokens = torch.randint(0, model.config.vocab_size, (1, step.rows), device=device)
    times, losses = [], []
    for at in range(samples + WARM_UP):
        if at == WARM_UP and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = _settled(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(_settled(device) - start)
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise ValueError(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} on one batch; not timed")
    stored = sum({tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())
    return {
        "seconds": times[WARM_UP:],
        "peak_bytes": torch.cuda.max_memory_allocated() - before if on_gpu else None,
        "model_bytes": stored,
        "trained": sum(parameter.numel() for parameter in parameters),
        "losses": [losses[0], losses[-1]],
    }


def _settled(device: str) -> float:
    """The clock, once the device has done all it was asked."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()
