"""Tiny models after some training: what an export is made of."""

from pathlib import Path

import tiny_lm
import torch
from torch import nn

import qft


def packed(fmt: str, **options) -> nn.Module:
    """The tiny Llama, quantized."""
    return qft.quantize_model(tiny_lm.model(), fmt, **options)


def optimizer_steps(model: nn.Module, n: int = 3, lr: float = 1e-2) -> nn.Module:
    """Train whatever requires a gradient for a few steps."""
    ids = torch.arange(48).view(2, 24)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(n):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def tuned_scales(fmt: str) -> nn.Module:
    """PEQA: the scales have trained."""
    return optimizer_steps(qft.train_only(packed(fmt), "scales"), lr=1e-3)


def merged_qa_lora(fmt: str) -> nn.Module:
    """QA-LoRA, trained and merged: zero points lie between integers."""
    model = qft.add_pooled_lora(packed(fmt), rank=2)
    optimizer_steps(qft.train_only(model, "lora"))
    qft.merge_pooled(model, scale="f32")
    return model


def quantized_layers(model: nn.Module) -> dict[str, qft.QuantTensor]:
    """The packed weights of linear layers by path."""
    return {path: m.quant_tensor for path, m in model.named_modules() if isinstance(m, qft.QuantLinear)}


def logits(model: nn.Module) -> torch.Tensor:
    """Of 40 tokens, in fp32."""
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits.float()


def nothing_at(directory: Path) -> bool:
    """Whether a refused export left no trace."""
    return not directory.exists()
