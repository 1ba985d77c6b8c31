"""What a layer costs beside its products: microseconds of small calls, next to PEFT's LoRA on a dense nn.Linear.

    python bench/overhead.py [--size 64] [--rows 4]

On a layer so small that its products take next to nothing, what is left is Python, torch's dispatcher and autograd.
Calls take turns; a figure is the least of the rounds, which the rest of the machine disturbs least. The last lines are
one token through a 4096 x 4096 layer from memory, where the same Python is cold.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import qft
from qft import kernels, ops
from qft.speed.clock import Effort, cache_flush, interleave

Call = Callable[[], Any]
FORMAT, RANK = "nf4 g64 f32", 8
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS, CALLS = 40, 100


def least(calls: dict[str, Call]) -> dict[str, float]:
    """Microseconds of a call, the least of `ROUNDS` means over `CALLS`, all taking turns."""
    times = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name] = min(times[name], (time.perf_counter() - start) / CALLS * 1e6)
    return times


def dense(size: int, dtype: torch.dtype) -> nn.Linear:
    """A frozen nn.Linear as an LLM has them."""
    return nn.Linear(size, size, bias=False, dtype=dtype).requires_grad_(False)


def pefts(layer: nn.Module) -> nn.Module:
    """The layer under PEFT's LoRA, its factors in the dtype that PEFT gives them: fp32."""
    model = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]), nn.Sequential(layer))
    return model[0]  # type: ignore[no-any-return,index]


def ours(layer: nn.Linear, lora: bool) -> qft.QuantLinear:
    packed = qft.QuantLinear.from_linear(layer, FORMAT)
    if lora:
        packed.add_lora(RANK, alpha=2 * RANK)
    return packed


def step(layer: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    """Forward and backward into x and the factors, whose gradients are dropped as an optimizer's step does."""
    dy = torch.ones_like(x)
    leaves = [x, *(p for p in getattr(layer, "parameters", list)() if p.requires_grad)]

    def run() -> None:
        layer(x).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return run


def without_grad(layer: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def warm(size: int, rows: int, dtype: torch.dtype) -> dict[str, float]:
    """Microseconds by what is called, on a layer of `size` x `size`."""
    x, leaf = (torch.randn(1, rows, size).to(dtype) for _ in range(2))
    leaf.requires_grad_()
    q = qft.quantize(torch.randn(size, size), FORMAT)
    plain, packed, adapted = dense(size, dtype), ours(dense(size, dtype), False), ours(dense(size, dtype), True)
    under_peft, peft_on_packed = pefts(dense(size, dtype)), pefts(ours(dense(size, dtype), False))
    return least(
        {
            "nn.Linear, no grad": without_grad(plain, x),
            "kernels.matmul": lambda: kernels.matmul(x[0], q),
            "ops.matmul, no grad": without_grad(lambda x: ops.matmul(x, q), x),
            "ops.matmul, x trains": lambda: ops.matmul(leaf, q),
            "torch.ops.qft.matmul, x trains": lambda: torch.ops.qft.matmul(leaf, *q.stored, FORMAT, size),
            "QuantLinear, no grad": without_grad(packed, x),
            "QuantLinear + LoRA, no grad": without_grad(adapted, x),
            "nn.Linear, forward + backward": step(plain, leaf),
            "QuantLinear, forward + backward": step(packed, leaf),
            "QuantLinear + LoRA, forward + backward": step(adapted, leaf),
            "PEFT on nn.Linear, forward + backward": step(under_peft, leaf),
            "PEFT on QuantLinear, forward + backward": step(peft_on_packed, leaf),
        }
    )


def cold(size: int = 4096, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Microseconds of one token through a large layer, everything out of the caches."""
    packed = ours(dense(size, dtype), False)
    q, x = packed.quant_tensor, torch.randn(1, size).to(dtype)
    leaf = x.clone().requires_grad_()
    calls: dict[str, Call] = {
        "kernels.matmul": lambda: kernels.matmul(x, q),
        "ops.matmul, no grad": without_grad(lambda x: ops.matmul(x, q), x),
        "ops.matmul, x trains": lambda: ops.matmul(leaf, q),
        "QuantLinear, no grad": without_grad(packed, x),
        "QuantLinear, x trains": lambda: packed(leaf),
    }
    flush, _ = cache_flush()
    times = interleave(list(calls.values()), Effort(15, 40, 6.0), flush)
    return {name: min(seconds) * 1e6 for name, seconds in zip(calls, times, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="of the small square layer")
    parser.add_argument("--rows", type=int, default=4, help="of its input")
    parser.add_argument("--cold", action=argparse.BooleanOptionalAction, default=True, help="time the large layer too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = {str(dtype): warm(arguments.size, arguments.rows, dtype) for dtype in DTYPES}
    print(
        f"{f'{arguments.size} x {arguments.size}, {arguments.rows} rows, us':44}", *(f"{name:>15}" for name in columns)
    )
    for name in next(iter(columns.values())):
        print(f"{name:44}", *(f"{column[name]:15.1f}" for column in columns.values()))
    if arguments.cold:
        print("4096 x 4096, 1 row of bfloat16 from memory, us")
        for name, value in cold().items():
            print(f"{name:44} {value:15.0f}")


if __name__ == "__main__":
    main()
