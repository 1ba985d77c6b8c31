"""Stored tensors that a mixed-precision policy has cast on their way into a forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from ..format import SCALE_BITS, ZERO_DTYPE
from ..notices import say_once
from ..reference import TORCH_DTYPE
from ..stack import QuantStack
from ..tensor import QuantTensor

# Of a weight's companions, by how its scales are stored.
_DTYPES = {
    scale: {
        "weight_scales": TORCH_DTYPE.get(scale, torch.uint8),
        "weight_zeros": TORCH_DTYPE[ZERO_DTYPE[scale]],
        "weight_scales_absmax": torch.float32,
        "weight_scales_offset": torch.float32,
    }
    for scale in SCALE_BITS
}

Q = TypeVar("Q", bound=QuantTensor | QuantStack)


def in_stored_dtypes(q: Q) -> Q:
    """`q` with its companions in the format's dtypes, which kernels read them in.

    They arrive in others where FSDP2 gathers them under `MixedPrecisionPolicy(param_dtype=...)`. That the values were
    rounded is said once; in a compiled graph it is not.
    """
    dtypes = _DTYPES[q.format.scale]
    cast = {n: t for n, dtype in dtypes.items() if (t := getattr(q, n)) is not None and t.dtype != dtype}
    if not cast:
        return q
    name, tensor = next(iter(cast.items()))
    rounded = torch.promote_types(tensor.dtype, dtypes[name]) != tensor.dtype
    if rounded and not torch.compiler.is_compiling():
        say_once(
            f"{name} of {q.format} is {dtypes[name]} and was cast to {tensor.dtype} by a mixed-precision policy, which "
            "changes the model; shard with qft.fully_shard, or train under autocast without FSDP's param_dtype"
        )
    return replace(q, **{name: tensor.to(dtypes[name]) for name, tensor in cast.items()})
