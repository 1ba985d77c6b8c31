"""What the modules over packed weights have in common: where the stored tensors are, and what moving and loading do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..format import DQ_BLOCK, ZERO_DTYPE, Format, FormatError
from ..reference import TORCH_DTYPE
from ..stack import QuantStack
from ..tensor import STORED, QuantTensor
from .casts import in_stored_dtypes


class Packed(nn.Module):
    """A module that holds one packed weight, or several of one format.

    Each lies in Parameters named after the one that holds its codes: `weight`, `weight_scales`, and where the format
    has them `weight_zeros`, `weight_scales_absmax`, `weight_scales_offset`. The buffer `weight_format` holds the
    format's spelling as uint8 text, so that a state_dict says what its bytes mean. `.to(dtype)`, `.half()` and
    `.bfloat16()` leave all of them in the format's dtypes.
    """

    code_names: tuple[str, ...] = ("weight",)  # the Parameters that hold codes
    dense_kind = "nn.Module"  # what holds such a weight unquantized, in error messages
    format: Format
    weight_format: Tensor
    init_errors: tuple[float, ...] = ()  # relative error after each step of the start the weight came from
    dense_nbytes: int = 0  # of the dense weights it came from; 0 where that is not known

    def packed_shape(self, name: str) -> tuple[int, ...]:
        """(out, in) of the weight whose codes are in the Parameter `name`, or (count, out, in) of a stack."""
        raise NotImplementedError

    def packed(self, name: str) -> QuantTensor | QuantStack:
        """The weight whose codes are in the Parameter `name`: the stored tensors, no copy."""
        stored: Any = [self._parameters[stored_name] for stored_name in stored_names(name)]
        shape: Any = self.packed_shape(name)
        return in_stored_dtypes((QuantTensor if len(shape) == 2 else QuantStack)(self.format, shape, *stored))

    def set_packed(self, weights: dict[str, QuantTensor | QuantStack]) -> None:
        """Replace the weights, each under the name of its codes; what trained before does not train any more.

        Raises:
            ValueError: a weight is missing, or has another shape or another format than the rest.
        """
        if set(weights) != set(self.code_names):
            raise ValueError(f"weights are {', '.join(weights)}, this {type(self).__name__} holds {self.code_names}")
        formats = {q.format for q in weights.values()}
        if len(formats) > 1:
            raise ValueError(f"weights are stored as {', '.join(map(str, formats))}; one module holds one format")
        for name, q in weights.items():
            if q.shape != self.packed_shape(name):
                raise ValueError(f"{name} has shape {q.shape}, this {type(self).__name__} {self.packed_shape(name)}")
        (self.format,) = formats
        for name, q in weights.items():
            for own, stored in zip(stored_names(name), STORED, strict=True):
                value = getattr(q, stored)
                self.register_parameter(
                    own, None if value is None else nn.Parameter(value.detach(), requires_grad=False)
                )
        device = next(iter(weights.values())).weight.device
        spelling = torch.tensor(list(str(self.format).encode()), dtype=torch.uint8, device=device)
        self.register_buffer("weight_format", spelling)

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the Parameters of all its weights, those that the format does not have included."""
        return tuple(stored_name for name in self.code_names for stored_name in stored_names(name))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._parameters[self.code_names[0]].device  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the module, but keep the format's dtypes: .half() must not round scales."""
        parameters = [p for name in self.stored if (p := self._parameters[name]) is not None]
        kept = {id(tensor) for p in (*parameters, self.weight_format) for tensor in (p, p.grad) if tensor is not None}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)

    def _replicate_for_data_parallel(self) -> Any:
        raise ValueError(
            "nn.DataParallel, which Trainer takes for several GPUs in one process, cannot hold packed layers; start a "
            "process per GPU with torchrun or accelerate launch, or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        spelling = state_dict.get(prefix + "weight_format")
        here = f"{prefix.rstrip('.') or 'this layer'} stores {self.format}, but the state_dict holds"
        for name in self.code_names:
            codes = state_dict.get(prefix + name)
            if codes is not None and codes.is_floating_point():
                way_out = f"load it into {self.dense_kind} and quantize that"
                raise FormatError(f"{here} a dense {codes.dtype} {name}; {way_out}")
            if codes is not None and spelling is None:
                raise FormatError(
                    f"{here} codes without the weight_format that says what they mean; save the layer again"
                )
        if spelling is not None:
            theirs = bytes(spelling.tolist()).decode(errors="replace")
            if theirs != str(self.format):
                raise FormatError(f"{here} {theirs}; build the layer with that")
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight of a model.

    Attributes:
        path: of its module, or of its codes in a module that holds several weights.
        module: that holds it.
        name: of the Parameter that holds its codes.
    """

    path: str
    module: Packed
    name: str

    @property
    def value(self) -> QuantTensor | QuantStack:
        """The stored tensors, no copy."""
        return self.module.packed(self.name)

    @property
    def scales(self) -> nn.Parameter:
        """The stored scales: uint8 codes under dq."""
        return self.module._parameters[f"{self.name}_scales"]  # type: ignore[return-value]


def weights_of(path: str, module: Packed) -> Iterator[PackedWeight]:
    """The packed weights of one module."""
    for name in module.code_names:
        yield PackedWeight(path if module.code_names == ("weight",) else f"{path}.{name}".lstrip("."), module, name)


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a model by path, each module's once.

    Raises:
        ValueError: there are none.
    """
    modules = ((path, module) for path, module in model.named_modules() if isinstance(module, Packed))
    weights = {weight.path: weight for path, module in modules for weight in weights_of(path, module)}
    if not weights:
        raise ValueError(f"{type(model).__name__} holds no quantized layer; call qft.quantize_model first")
    return weights


def stored_names(name: str) -> tuple[str, ...]:
    """The Parameters of a weight, in the order of `STORED`, by the name of the one that holds its codes."""
    return tuple(name + stored.removeprefix("weight") for stored in STORED)


def empty(fmt: Format, shape: tuple[int, ...], device: torch.device | str | None) -> QuantTensor | QuantStack:
    """A weight (out, in), or a stack (count, out, in), of zeros codes and zero scales, to be loaded into."""
    *lead, in_features = shape
    groups = fmt.groups(in_features)

    def make(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*sizes, dtype=dtype, device=device)

    kind: Any = QuantTensor if len(shape) == 2 else QuantStack
    zeros = make(*lead, groups, dtype=TORCH_DTYPE[ZERO_DTYPE[fmt.scale]]) if fmt.zero else None
    codes = make(*lead, fmt.row_bytes(in_features), dtype=torch.uint8)
    if fmt.scale != "dq":
        return kind(fmt, shape, codes, make(*lead, groups, dtype=TORCH_DTYPE[fmt.scale]), zeros)  # type: ignore[no-any-return]
    blocks = math.ceil(lead[-1] * groups / DQ_BLOCK)
    absmax = make(*lead[:-1], blocks, dtype=torch.float32)
    offset = make(*lead[:-1], 1, dtype=torch.float32)
    return kind(fmt, shape, codes, make(*lead, groups, dtype=torch.uint8), zeros, absmax, offset)  # type: ignore[no-any-return]


def under_autocast(x: Tensor) -> Tensor:
    """x in the dtype that a product takes it in: autocast's under autocast, which leaves fp64 alone."""
    device = "cpu" if x.is_cpu else x.device.type
    available = x.is_cpu or torch.amp.is_autocast_available(device)
    if available and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
