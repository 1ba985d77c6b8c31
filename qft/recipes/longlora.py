"""LongLoRA (Chen et al., ICLR 2024): train on long rows with attention inside groups, half of the heads shifted.

Shifted sparse attention (section 3.2): the heads are split in two halves. The first half attends inside groups of G
tokens, the second inside groups that start G/2 earlier, so that the halves carry information across each other's
borders. The groups that would wrap around are not joined, as in the authors' code (`llama_attn_replace.py`) and unlike
the paper's sketch, whose roll lets the first tokens see the last: the second half's first group is G/2 long. In
inference attention is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..adapters.scales import train_only
from ..model.prepare import prepare_for_training
from ..notices import say_once

GROUPS_PER_ROW = 4  # the paper's G is a quarter of the row (section 4.1)
NAME = "shifted_sparse"


def longlora(
    model: nn.Module, group: int | None = None, *, factor: float = 1.0, gradient_checkpointing: bool = True
) -> nn.Module:
    """Make a quantized model with LoRA ready to train on rows longer than it was built for, in place.

    Sets shifted sparse attention; lets the LoRA, every embedding and every norm train (section 3.3: "LoRA+"), and
    nothing else; an output head tied to the embedding trains with it. Then `qft.training.finetune.run` trains it. This
    calls `train_only` and `prepare_for_training` itself, which would freeze embeddings and norms if called later.

    Args:
        model: a transformers model whose attention is causal and goes through transformers' attention interface.
        group: tokens of a group, 2 or more; None takes a quarter of each row.
        factor: position interpolation (Chen et al. 2023): positions are divided by it, on top of what the model does
            already, and `config.max_position_embeddings` grows by it.
        gradient_checkpointing: as in `prepare_for_training`.

    Returns:
        The model itself.

    Raises:
        ValueError: an argument out of range, no LoRA, an attention that cannot be set, or rotary positions other than
            the plain and the linearly interpolated ones with a factor.
    """
    name = NAME if group is None else f"{NAME}_g{_checked(group)}"
    if not factor >= 1:
        raise ValueError(f"factor={factor} would push positions apart; use 1 or more, new length / old length")
    train_only(model, "lora")
    _set_attention(model, name, group)
    if factor > 1:
        _interpolate(model, factor)
    prepare_for_training(model, gradient_checkpointing=gradient_checkpointing)
    for module in model.modules():
        if isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
                if parameter.dtype != torch.float32:
                    say_once(
                        f"embeddings and norms train in {parameter.dtype}, which rounds small steps away; "
                        "load the model in float32 and train under autocast to keep them"
                    )
    return model


def borders(length: int, group: int) -> tuple[list[int], list[int]]:
    """Where groups begin and end, for the first and the second half of the heads.

    Args:
        length: tokens of a row; the last group of a half takes what is left.
        group: G. From `length` on there is one group, full attention, for both halves.

    Returns:
        [0, G, 2G, ..., length] and [0, G/2, 3G/2, ..., length].
    """
    if group >= length:
        return [0, length], [0, length]
    return [0, *range(group, length, group), length], [0, *range(group // 2, length, group), length]


def attended_pairs(length: int, group: int | None = None) -> float:
    """Pairs of tokens (query, key) that one head attends to on average, out of length * (length + 1) / 2."""
    halves = borders(length, _quarter(length) if group is None else group)
    return sum((end - start) * (end - start + 1) / 2 for half in halves for start, end in pairwise(half)) / 2


def shifted_sparse_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    group: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface calls it: shifted and sparse in training, full otherwise.

    Args:
        module: the attention layer. Where it is not training, or a cache holds earlier tokens, attention is full.
        query: `[rows, heads, length, head_dim]`.
        key, value: `[rows, key heads, length, head_dim]`; the key heads divide the heads.
        attention_mask: bool or additive `[rows, 1 or heads, length, length]`, causality and padding in one; None is
            causal without padding.
        dropout, scaling: of the attention's weights, and of its logits before the softmax.
        group: tokens of a group; None is a quarter of the row, rounded up.

    Returns:
        `[rows, length, heads, head_dim]`, and None for the weights.

    Raises:
        ValueError: the model asks for what torch's attention does not have (a soft cap, sinks), or is not causal.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if rest.get(name) is not None:
            raise ValueError(f"shifted sparse attention has no {name}, which {type(module).__name__} asks for")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} is not causal; shifted sparse attention is for decoders")
    length = query.shape[2]
    if not module.training or key.shape[2] != length:
        full: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
        return full
    heads = query.shape[1]
    key, value = (repeat_kv(tensor, heads // key.shape[1]) for tensor in (key, value))
    starts = borders(length, _quarter(length) if group is None else group)
    middle = (heads + 1) // 2
    halves = [
        torch.cat([_attend(query, key, value, attention_mask, *place, dropout, scaling) for place in places], dim=2)
        for places in (_places(0, middle, starts[0]), _places(middle, heads, starts[1]))
        if places
    ]
    return torch.cat(halves, dim=1).transpose(1, 2).contiguous(), None


def _places(first: int, last: int, starts: list[int]) -> list[tuple[slice, slice]]:
    """(heads, tokens) of each group of heads first..last."""
    return [(slice(first, last), slice(*ends)) for ends in pairwise(starts)] if last > first else []


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    heads: slice,
    tokens: slice,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Causal attention of some heads inside one group of tokens."""
    if mask is not None:
        mask = mask[:, heads if mask.shape[1] > 1 else slice(None), tokens, tokens]
    q, k, v = (tensor[:, heads, tokens] for tensor in (query, key, value))
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )


def _quarter(length: int) -> int:
    return max(2, -(-length // GROUPS_PER_ROW))


def _checked(group: int) -> int:
    if not (isinstance(group, int) and group >= 2):
        raise ValueError(f"group={group} is no group of tokens; use 2 or more, or None for a quarter of each row")
    return group


def _set_attention(model: Any, name: str, group: int | None) -> None:
    """Register the attention under a name that says its group, and let the model's layers look it up."""
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"{type(model).__name__} is no transformers model, so its attention cannot be replaced")
    AttentionInterface.register(name, partial(shifted_sparse_attention, group=group))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(f"{type(model).__name__} does not use transformers' attention interface; LongLoRA needs it")


def _interpolate(model: Any, factor: float) -> None:
    """Divide rotary positions by `factor`: the config says so, and the modules are built anew from it."""
    config = model.config
    config.standardize_rope_params()
    rope = config.rope_parameters
    kind = rope.get("rope_type")
    if kind not in ("default", "linear"):
        raise ValueError(
            f"rope_type {kind!r} has no linear factor; leave factor at 1 and set the model's own parameters"
        )
    config.rope_parameters = {**rope, "rope_type": "linear", "factor": factor * rope.get("factor", 1.0)}
    config.max_position_embeddings = int(config.max_position_embeddings * factor)
    for parent, name, rotary in list(_rotary(model)):
        setattr(parent, name, type(rotary)(config).to(rotary.inv_freq.device))


def _rotary(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if hasattr(child, "inv_freq") and hasattr(child, "rope_type"):
                yield parent, name, child
