"""Stored tensors that a mixed-precision policy has cast on their way into a forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from ..format import ZERO_DTYPE
from ..notices import say_once
from ..reference import TORCH_DTYPE
from ..stack import QuantStack
from ..tensor import QuantTensor

Q = TypeVar("Q", bound=QuantTensor | QuantStack)


def in_stored_dtypes(q: Q) -> Q:
    """`q` with its companions in the format's dtypes, which kernels read them in.

    They arrive in others where FSDP2 gathers them under `MixedPrecisionPolicy(param_dtype=...)`. That the values were
    rounded is said once; in a compiled graph it is not.
    """
    scale = q.format.scale
    dtypes = {
        "weight_scales": TORCH_DTYPE.get(scale, torch.uint8),
        "weight_zeros": TORCH_DTYPE[ZERO_DTYPE[scale]],
        "weight_scales_absmax": torch.float32,
        "weight_scales_offset": torch.float32,
    }
    cast = {name: t for name in dtypes if (t := getattr(q, name)) is not None and t.dtype != dtypes[name]}
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
