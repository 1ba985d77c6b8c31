"""Calls on one layer whose time is taken along one axis: its size, rows of x, rank of a LoRA, threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import DOWN, SQUARE
from resident import extra_peak
from scaling_model import DENSE
from torch import Tensor, nn
from torch.nn.functional import linear

import qft
from qft import ops
from qft.nn.linear import QuantLinear
from qft.speed import limits
from qft.speed.check import operand, product_error, require, weight_like
from qft.speed.clock import QUICK, Effort, cache_flush, interleave, spread

KINDS = ("nf4 g64 f32", "nf2 g64 f32", DENSE)
BATCH, TRAINED = 256, 512  # rows of x: along sizes; along ranks and threads
SLICE = 64  # rows of a weight in the untimed call that fetches the code
EFFORT = Effort(9, 51, 2.0)
Call = Callable[[], Any]
Point = dict[str, Any]


@dataclass(frozen=True)
class Axes:
    """Where points are taken, and how long."""

    sizes: Sequence[int] = (1024, 2048, 4096, 8192, 14336)
    rows: Sequence[int] = tuple(1 << power for power in range(13))
    ranks: Sequence[int] = (0, 4, 8, 16, 32, 64, 128, 256)
    effort: Effort = EFFORT
    read_rounds: int = 15


FULL = Axes()
FEW = Axes((1024, 2048, 4096), (1, 4, 16, 64, 256), (0, 16, 64, 256), QUICK, 5)


@dataclass(frozen=True)
class Timed:
    """A call, the same on a slice of the layer, and what its point says beside the time."""

    call: Call
    small: Call
    point: Point


# ---- calls, checked


def stored(kind: str, w: Tensor) -> tuple[int, Callable[[Tensor], Tensor], Tensor]:
    """w `[out, in]`, bf16, as it is or packed: its bytes, its product with x, and what it stands for in fp32."""
    if kind == DENSE:
        return w.nbytes, partial(linear, weight=w), w.float()
    q = qft.quantize(w, kind)
    return q.nbytes, lambda x: ops.matmul(x, q), q.dequantize()


def forward(kind: str, w: Tensor, rows: int) -> Timed:
    """y = x Wt without autograd."""
    nbytes, product, dense = stored(kind, w)
    x = operand(rows, w.shape[1], w.dtype, 1)
    require(product_error(product(x), x, dense.T), "bf16", f"forward of {kind}, {rows} rows")
    small = partial(stored(kind, w[:SLICE])[1], x)
    return Timed(partial(product, x), small, {"kind": kind, "what": "forward", "rows": rows, "stored_bytes": nbytes})


def train(kind: str, w: Tensor, rows: int) -> Timed:
    """y = x Wt and the gradient of x."""
    nbytes, product, dense = stored(kind, w)
    x, dy = operand(rows, w.shape[1], w.dtype, 1).requires_grad_(), operand(rows, w.shape[0], w.dtype, 2)

    def both(product: Callable[[Tensor], Tensor], dy: Tensor) -> tuple[Tensor, Tensor]:
        y = product(x)
        return y, torch.autograd.grad(y, x, dy)[0]

    y, dx = both(product, dy)
    for error in (product_error(y, x, dense.T), product_error(dx, dy, dense)):
        require(error, "bf16", f"forward and dx of {kind}, {rows} rows")
    point = {"kind": kind, "what": "forward and dx", "rows": rows, "stored_bytes": nbytes}
    return Timed(partial(both, product, dy), partial(both, stored(kind, w[:SLICE])[1], dy[:, :SLICE]), point)


def adapted(kind: str, w: Tensor, rank: int) -> Timed:
    """A layer with a LoRA: y, and the gradients of x and of both factors."""
    layer, small = (with_lora(kind, one, rank) for one in (w, w[:SLICE]))
    nbytes, _, dense = stored(kind, w)
    x, dy = operand(TRAINED, w.shape[1], w.dtype, 1).requires_grad_(), operand(TRAINED, w.shape[0], w.dtype, 2)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def step(layer: nn.Module, dy: Tensor) -> tuple[Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy)

    y, dx, *_ = step(layer, dy)  # one factor starts at zero: the base product is what must come out
    for error in (product_error(y, x, dense.T), product_error(dx, dy, dense)):
        require(error, "bf16", f"LoRA of rank {rank} on {kind}")
    point = {"kind": kind, "what": "LoRA, forward and backward", "rows": TRAINED, "rank": rank, "stored_bytes": nbytes}
    point["trainable"] = sum(parameter.numel() for parameter in trained)
    return Timed(partial(step, layer, dy), partial(step, small, dy[:, :SLICE]), point)


def with_lora(kind: str, w: Tensor, rank: int) -> nn.Module:
    """A frozen layer and its LoRA: qft's own, or PEFT's on a dense one. A slice takes the rank that it can hold."""
    rank = min(rank, len(w))
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=w.dtype)
    layer.weight = nn.Parameter(w, requires_grad=False)
    if kind != DENSE:
        layer = QuantLinear.from_linear(layer, kind)
        if rank:
            layer.add_lora(rank)
    elif rank:
        from peft import LoraConfig, get_peft_model  # slow to import, and only one section needs it

        return get_peft_model(nn.Sequential(layer), LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))
    return layer


# ---- axes


def timed(calls: Sequence[Timed], effort: Effort, flush: Call) -> list[Point]:
    """A point for each call: weights come from memory, code does not, as from one layer of a model to the next."""

    def before(small: Call) -> None:
        flush()
        small()

    seconds = interleave([one.call for one in calls], effort, [partial(before, one.small) for one in calls])
    return [
        {**one.point, **spread(times), "extra_bytes": extra_peak(one.call)}
        for one, times in zip(calls, seconds, strict=True)
    ]


def sizes(axes: Axes, threads: int) -> list[Point]:
    """Square layers: a token, and a batch in training."""
    flush, points = cache_flush()[0], []
    for size in axes.sizes:
        w = weight_like((size, size), torch.bfloat16)
        for calls in ([forward(kind, w, 1) for kind in KINDS], [train(kind, w, BATCH) for kind in KINDS]):
            points += [{**point, "size": size} for point in timed(calls, axes.effort, flush)]
    return points


def rows(axes: Axes, threads: int) -> list[Point]:
    """One layer, more and more rows of x."""
    flush, points = cache_flush()[0], []
    w = weight_like(SQUARE, torch.bfloat16)
    for count in axes.rows:
        for call in (forward, train):
            points += timed([call(kind, w, count) for kind in KINDS], axes.effort, flush)
    return points


def ranks(axes: Axes, threads: int) -> list[Point]:
    """One layer in training, with a larger and larger LoRA."""
    flush, points = cache_flush()[0], []
    w = weight_like(SQUARE, torch.bfloat16)
    for rank in axes.ranks:
        points += timed([adapted(kind, w, rank) for kind in KINDS], axes.effort, flush)
    return points


def threads(axes: Axes, most: int) -> list[Point]:
    """A token through a wide layer and a batch through a square one, from one thread to `most`."""
    flush, points = cache_flush()[0], []
    wide, square = weight_like(DOWN, torch.bfloat16), weight_like(SQUARE, torch.bfloat16)
    for count in range(1, most + 1):
        torch.set_num_threads(count)
        found = {"threads": count, "read": limits.limits(axes.read_rounds)["read"]}
        for calls in ([forward(kind, wide, 1) for kind in KINDS], [train(kind, square, TRAINED) for kind in KINDS]):
            points += [{**point, **found} for point in timed(calls, axes.effort, flush)]
    return points
