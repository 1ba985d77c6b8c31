"""The least that a verb costs on a machine, and how near a time comes to it (Williams et al. 2009, the roofline)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
SEARCH_OPERATIONS = 4  # of a weight and a candidate scale: scaled, compared, squared and summed; its level is looked up


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: bytes that cross memory where nothing is cached, and operations."""

    read: int
    written: int
    operations: int
    dtype: str = "bf16"  # of the operations: a key of `DTYPES`

    @property
    def nbytes(self) -> int:
        """Read and written."""
        return self.read + self.written


def work(verb: str, shape: tuple[int, int], stored: int, rows: int = 0, dtype: str = "bf16") -> Work:
    """The least that a verb costs on one layer.

    Args:
        verb: matmul, matmul_t, scale_grad, quantize or dequantize; train is a matmul and the matmul_t of its gradient,
            weight_grad a dense layer's dW, channel_scale_grad the sum of dy y / s over the rows of a y that is there.
        shape: (out_features, in_features).
        stored: bytes of the weight with its scales, packed or dense.
        rows: of x and dy; 0 for verbs without.
        dtype: of x, y and the dense weight: bf16 or f32.

    Raises:
        ValueError: another verb or dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} has no measured limit; use one of {', '.join(DTYPES)}")
    out, in_features = shape
    size = DTYPES[dtype].itemsize
    x, y, weight = rows * in_features * size, rows * out * size, out * in_features * size
    product = 2 * rows * out * in_features
    costs = {
        "matmul": (stored + x, y, product),
        "matmul_t": (stored + y, x, product),
        "train": (2 * stored + x + y, x + y, 2 * product),
        "scale_grad": (stored + x + y, 0, product),
        "weight_grad": (x + y, weight, product),
        "channel_scale_grad": (2 * y, 0, 2 * rows * out),
        "quantize": (weight, stored, 0),
        "dequantize": (stored, weight, 0),
    }
    if verb not in costs:
        raise ValueError(f"verb {verb!r} is unknown; use one of {', '.join(costs)}")
    return Work(*costs[verb], dtype)


def search_work(shape: tuple[int, int], stored: int, candidates: int, dtype: str = "bf16") -> Work:
    """Of quantize with a search for scales: every candidate is tried on every weight, in fp32."""
    plain = work("quantize", shape, stored, dtype=dtype)
    return Work(plain.read, plain.written, SEARCH_OPERATIONS * candidates * shape[0] * shape[1], "f32")


def bound(work: Work, limits: dict[str, float]) -> tuple[float, str]:
    """The least seconds that `limits` (see `limits.limits`) allow, and what sets them: "memory" or "arithmetic"."""
    arithmetic = work.operations / limits[work.dtype]
    memory = max(work.read / limits["read"], work.written / limits["write"])
    return max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory"


def percent(work: Work, seconds: float, limits: dict[str, float]) -> float:
    """Of its roofline that a call reaches: 100 where it takes no longer than the machine must."""
    return 100 * bound(work, limits)[0] / seconds
