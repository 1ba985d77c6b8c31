"""What fine-tuning a packed model costs: parameters, bytes, operations and memory, from shapes alone.

Operations per token (multiply and add are two), N the weights of all linear layers, the output head among them:

    forward    2 N, and 2 r (in + out) per LoRA layer, and 2 (L + 1) · width per attention layer: the products with keys
               and values over (L + 1) / 2 earlier tokens on average, `width` being heads · head_dim
    backward   2 N for the gradient of activations. Packed weights have none of their own: 4 N in all instead of full
               tuning's 6 N (Lialin et al. 2023). LoRA and attention take twice their forward pass. Group scales take
               2 N more, the products of dy and x; scales per channel 2 per output.
    recomputed with gradient checkpointing: the forward pass once more, without the head

Peak memory is the sum of: all parameters as stored, trained ones in fp32; fp32 gradients; two fp32 moments (AdamW); and
what the backward pass needs, per token: the block's input per block; with all inputs and outputs of a block's linear
layers, for every block, or for one with checkpointing; and three fp32 values per token of the vocabulary (logits, their
log-softmax, its gradient). Left out: kernels' panels, the allocator's slack, what the framework itself takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..format import Format
from ..model.targets import is_linear, output_head, weight_of
from ..nn.experts import layout_of
from ..nn.linear import QuantLinear
from ..notices import say_once
from ..tensor import STORED

METHODS = ("lora", "scales")
F32 = 4  # bytes


@dataclass(frozen=True)
class Cost:
    """The price of one way to tune. Bytes are of the whole model and one forward and backward pass.

    Attributes:
        method, rank: what trains; rank 0 for scales.
        trainable: number of trained parameters.
        adapter_nbytes: of the file of a task, its header left out: what trains, in fp32.
        forward_flops, backward_flops: per token; recomputation counts into the backward pass.
        weights_nbytes: all parameters, the trained ones in fp32.
        gradient_nbytes, optimizer_nbytes, activation_nbytes: see the module's text.
    """

    method: str
    rank: int
    trainable: int
    adapter_nbytes: int
    forward_flops: int
    backward_flops: int
    weights_nbytes: int
    gradient_nbytes: int
    optimizer_nbytes: int
    activation_nbytes: int

    @property
    def flops(self) -> int:
        """Per token, forward and backward."""
        return self.forward_flops + self.backward_flops

    @property
    def peak_nbytes(self) -> int:
        """Estimated peak memory."""
        return self.weights_nbytes + self.gradient_nbytes + self.optimizer_nbytes + self.activation_nbytes


def cost(
    model: nn.Module,
    rank: int = 0,
    *,
    method: str = "lora",
    fmt: Format | str | None = None,
    rows: int = 8,
    length: int = 256,
    gradient_checkpointing: bool = True,
) -> Cost:
    """What tuning a decoder would cost, without running or changing it.

    Args:
        model: a transformers decoder, packed, or dense with `fmt`; it may be on the meta device. An attached LoRA is
            left out of account.
        rank: of the LoRA on every quantized layer, 1 or more; a layer with fewer features takes what it can hold. 0 for
            the method scales.
        method: "lora" or "scales".
        fmt: of a dense model's linear layers, the output head excepted; None for a packed model.
        rows, length: of a batch, in rows and tokens.
        gradient_checkpointing: whether blocks are computed again in the backward pass.

    Raises:
        ValueError: another method, a rank that does not fit it, a batch of nothing, no quantized layer and no format,
            or a model whose config does not describe a decoder.
        FormatError: `fmt` spells no format.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")
    if (method == "lora") != (rank >= 1):
        raise ValueError(f"rank={rank} does not fit method {method}; use 1 or more for lora, 0 for scales")
    if rows < 1 or length < 1:
        raise ValueError(f"a batch of {rows} rows of {length} tokens is empty; use 1 or more of each")
    layers, others = _parts(model, fmt)
    blocks, hidden, width, vocabulary = _sizes(model)
    head = hidden * vocabulary
    packed = sum(layer.out_features * layer.in_features for layer in layers if layer is not output_head(model))
    scales = sum(layer.quant_tensor.weight_scales.numel() for layer in layers)
    lora = sum(
        min(rank, layer.in_features, layer.out_features) * (layer.in_features + layer.out_features) for layer in layers
    )
    trainable = lora if method == "lora" else scales

    body = 2 * packed + 2 * lora + 2 * (length + 1) * width * blocks
    forward = body + 2 * head
    backward = 2 * (packed + head) + 4 * lora + 4 * (length + 1) * width * blocks
    if method == "scales":
        backward += sum(2 * layer.out_features * (layer.in_features if layer.format.group else 1) for layer in layers)
    if gradient_checkpointing:
        backward += body

    stored = sum(layer.quant_tensor.nbytes for layer in layers)
    if method == "scales":  # held in fp32 while they train, and so are zero points; nothing else stays of dq
        for tensors in (layer.quant_tensor.tensors() for layer in layers):
            stored -= sum(tensor.nbytes for name, tensor in tensors.items() if name != "weight")
            stored += F32 * tensors["weight_zeros"].numel() if "weight_zeros" in tensors else 0
    element = next((p.element_size() for p in others.values() if p.is_floating_point()), F32)
    inside = element * sum(layer.in_features + layer.out_features for layer in layers)  # of all blocks, per token
    kept = element * blocks * hidden + (inside // max(blocks, 1) if gradient_checkpointing else inside)
    return Cost(
        method=method,
        rank=rank,
        trainable=trainable,
        adapter_nbytes=F32 * trainable,
        forward_flops=forward,
        backward_flops=backward,
        weights_nbytes=stored + F32 * trainable + sum(parameter.nbytes for parameter in others.values()),
        gradient_nbytes=F32 * trainable,
        optimizer_nbytes=2 * F32 * trainable,
        activation_nbytes=rows * length * (kept + 3 * F32 * vocabulary),
    )


def _parts(model: nn.Module, fmt: Format | str | None) -> tuple[list[QuantLinear], dict[int, nn.Parameter]]:
    """The quantized layers, those of a dense model as they would be; and every other parameter once, LoRA excepted."""
    layers: list[QuantLinear] = []
    taken: set[int] = set()
    head = output_head(model)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            layers.append(module)
            names = (*STORED, "lora_A", "lora_B")
            taken |= {id(module._parameters[name]) for name in names if module._parameters.get(name) is not None}
        elif fmt is not None and is_linear(module) and module is not head:
            out, in_features = weight_of(module).shape
            layers.append(QuantLinear(in_features, out, fmt, bias=False, device="meta"))
            taken.add(id(module.weight))
        elif layout_of(module) is not None:
            say_once("the cost of a mixture leaves its experts' operations out, and scales of theirs that train")
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no quantized layer; name the fmt it would be quantized to")
    return layers, {id(p): p for p in model.parameters() if id(p) not in taken}


def _sizes(model: Any) -> tuple[int, int, int, int]:
    """Blocks, hidden size, heads · head_dim, vocabulary."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    found = [getattr(config, name, None) for name in names]
    if None in found:
        missing = ", ".join(name for name, value in zip(names, found, strict=True) if value is None)
        raise ValueError(f"the config of {type(model).__name__} lacks {missing}; cost needs a transformers decoder")
    blocks, hidden, heads, vocabulary = (int(value) for value in found if value is not None)
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    return blocks, hidden, width, vocabulary


def peak_memory(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """Call `run` and see how far memory rose above where it stood.

    Returns:
        What `run` returned; and bytes: on a GPU those torch allocated, on a CPU the process's resident set (Linux),
        whose rise misses what was freed before and is used again. None where neither can be measured.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - before
    start = _resident("VmRSS") if _reset_high_water() else None
    result = run()
    top = _resident("VmHWM")
    return result, None if start is None or top is None else top - start


def _reset_high_water() -> bool:
    """Let Linux count the process's largest resident set from here on."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    """A memory field of /proc/self/status, in bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(lines[0].split()[1]) if lines else None
