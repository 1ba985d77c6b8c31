"""QuantExperts: the fused experts of a mixture (transformers 5 stores them as 3-D parameters) over packed weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..format import Format
from ..stack import QuantStack
from ..tensor import QuantTensor, quantize
from .packed import Packed, empty, under_autocast

Quantize = Callable[[Tensor, Format, str], QuantTensor]  # of a weight [out, in] and what messages call it


@dataclass(frozen=True)
class Layout:
    """How a family of models keeps its experts.

    Attributes:
        projections: its 3-D parameters: into the experts' width, and back.
        transposed: whether those are [experts, in, out]; otherwise [experts, out, in].
        biased: whether each has a bias, [experts, out], under its name + "_bias".
        gated: whether the first gives a gate and what it gates, side by side or interleaved.
        normed: whether a `post_expert_norm` follows.
        batched: whether inputs come as [experts * tokens, in], weighted and sorted by expert, as Llama 4's do.
    """

    projections: tuple[str, str]
    transposed: bool
    biased: bool
    gated: bool
    normed: bool
    batched: bool = False


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of an experts module that qft knows, or None.

    Known are classes built on transformers' experts interface, which says of itself what it stores, and Llama 4's.
    """
    if isinstance(module, QuantExperts):
        return module.layout
    if type(module).__name__ == "Llama4TextExperts":
        return Layout(("gate_up_proj", "down_proj"), True, False, True, False, batched=True)
    given: Any = module
    if not all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")):
        return None
    first = "gate_up_proj" if given.has_gate else "up_proj"
    return Layout((first, "down_proj"), given.is_transposed, given.has_bias, given.has_gate, given.has_post_expert_norm)


def reason_against(module: nn.Module) -> str:
    """Why a module cannot become QuantExperts; nothing where it can."""
    layout = layout_of(module)
    if layout is None:
        return f"{type(module).__name__} is no experts module that qft knows"
    for name in layout.projections:
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3 or not weight.is_floating_point():
            return f"{type(module).__name__} has no floating 3-D parameter {name}"
    return ""


class QuantExperts(Packed):
    """The experts of one layer of a mixture, with their weights packed.

    For each projection, `gate_up_proj` and `down_proj` (`up_proj` and `down_proj` in a family without gates), named as
    in the dense module: codes uint8 `[experts, out, row_bytes]`, `*_scales` `[experts, out, groups]`, `*_zeros` for
    asymmetric formats, `*_scales_absmax` `[experts, blocks]` and `*_scales_offset` `[experts, 1]` under dq. Rows are
    output features whatever the family: a transposed one is turned around. Biases, activation and whatever else the
    dense module had stay as they are.

    An expert without a token is not read. Products go through the operators a QuantLinear uses: codes stay packed, and
    scales and zero points can train.

    Args:
        like: the experts module to stand in for, on any device; only its shapes and behaviour are taken.
        fmt: a Format or its spelling, of both projections.
        device: of codes and scales.

    Raises:
        ValueError: qft does not know this family; see `reason_against`.
    """

    dense_kind = "the model's own experts"
    layout: Layout
    like: type[nn.Module]  # the dense class, whose gate is applied
    start_errors: dict[str, tuple[float, ...]]  # relative error of each projection after its start, where known
    _shapes: dict[str, tuple[int, ...]]
    _attributes: tuple[str, ...]  # what the dense module held besides tensors and children

    def __init__(self, like: nn.Module, fmt: Format | str, device: torch.device | str | None = None) -> None:
        super().__init__()
        if isinstance(like, QuantExperts):
            self.layout, self.like, self._attributes, self._shapes = (
                like.layout,
                like.like,
                like._attributes,
                like._shapes,
            )
        elif reason := reason_against(like):
            raise ValueError(f"these experts cannot be quantized: {reason}")
        else:
            self.layout = cast(Layout, layout_of(like))
            self.like = type(like)
            self._attributes = tuple(name for name in vars(like) if not name.startswith("_") and name != "qft_reason")
            self._shapes = {name: tuple(oriented(like, name).shape) for name in self.layout.projections}
        self.code_names = self.layout.projections
        _copy(like, self, self._attributes, but=(*self.stored, "weight_format"))
        self.num_experts = self._shapes[self.code_names[0]][0]
        self.start_errors = {}
        self.set_packed({name: empty(Format.parse(fmt), shape, device) for name, shape in self._shapes.items()})

    @classmethod
    def from_experts(cls, experts: nn.Module, fmt: Format | str, *, name: str = "experts") -> QuantExperts:
        """Quantize a dense experts module. Errors are those of `qft.quantize`, which call weight 3 of gate_up_proj
        `name.gate_up_proj[3]`, and of the class."""
        return cls.start(experts, fmt, lambda weight, fmt, name: quantize(weight, fmt, name=name), name=name)

    @classmethod
    def start(cls, experts: nn.Module, fmt: Format | str, how: Quantize, *, name: str = "experts") -> QuantExperts:
        """Quantize a dense experts module, one weight `[out, in]` at a time, as how(weight, fmt, name) does."""
        made, fmt = cls(experts, fmt, "meta"), Format.parse(fmt)
        stacks: dict[str, QuantTensor | QuantStack] = {}
        for projection in made.code_names:
            dense = oriented(experts, projection)
            matrices = (how(weight, fmt, f"{name}.{projection}[{at}]") for at, weight in enumerate(dense))
            stacks[projection] = QuantStack.of(matrices, made.num_experts)
        made.set_packed(stacks)
        return made

    # -------------------------------------------------------------------------------------------------- storage

    def packed_shape(self, name: str) -> tuple[int, ...]:
        """(experts, out_features, in_features) of a projection."""
        return self._shapes[name]

    def stack(self, name: str) -> QuantStack:
        """The stored tensors of a projection, as they are: no copy."""
        return cast(QuantStack, self.packed(name))

    def dequantize(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Dense weights `[experts, out, in]` by projection, rounded once to `dtype` (fp32 where None)."""
        return {name: self.stack(name).dequantize(dtype) for name in self.code_names}

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense experts module it stands in for, its weights those it computes with, in `dtype` (fp32)."""
        dense = self.like.__new__(self.like)
        nn.Module.__init__(dense)
        _copy(self, dense, self._attributes, but=(*self.stored, "weight_format"))
        for name, weight in self.dequantize(dtype).items():
            turned = weight.transpose(1, 2).contiguous() if self.layout.transposed else weight
            dense.register_parameter(name, nn.Parameter(turned, requires_grad=False))
        cast(Any, dense)._is_expert_parallel = False  # what the interface's constructor leaves
        return dense

    # -------------------------------------------------------------------------------------------------- forward

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Weighted sum of the chosen experts' outputs, `[tokens, hidden]` in the dtype of `hidden_states`.

        Args:
            hidden_states: `[tokens, hidden]`; `[experts * tokens, hidden]` in a batched family, which takes it alone.
            top_k_index: `[tokens, k]`, the experts of each token; an index past the last expert is none.
            top_k_weights: `[tokens, k]`.

        The sum over k is in the wider of both dtypes and has one order on every device.
        """
        x = under_autocast(hidden_states)
        if self.layout.batched or top_k_index is None or top_k_weights is None:
            share = x.shape[0] // self.num_experts
            return self._run(x, [share] * self.num_experts).to(hidden_states.dtype)
        tokens, k = top_k_index.shape
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(self.num_experts, device=chosen.device), right=True)
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()  # waits for the device, once
        served = order[: sum(counts)]
        y = self._run(x[served // k], counts) * top_k_weights.reshape(-1)[served, None]
        spread = y.new_zeros(tokens * k, y.shape[1]).index_copy(0, served, y)
        return spread.view(tokens, k, y.shape[1]).sum(1).to(hidden_states.dtype)

    def _run(self, x: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, `counts` of them each, through their experts: `[rows, hidden]`."""
        first, second = (self.stack(name) for name in self.code_names)
        into, back = self._each(self.code_names[0], first), self._each(self.code_names[1], second)
        parts = [
            _linear(self._gate(_linear(part, *into[at])), *back[at])
            for at, part in enumerate(x.split(counts))
            if part.shape[0]
        ]
        y = torch.cat(parts) if parts else x.new_zeros(0, second.shape[1])
        return cast(nn.Module, self.post_expert_norm)(y) if self.layout.normed else y

    def _each(self, name: str, stack: QuantStack) -> list[tuple[QuantTensor, Tensor | None]]:
        """Weight and bias of each expert."""
        biases = cast(Tensor, getattr(self, f"{name}_bias")).unbind() if self.layout.biased else ()
        return list(zip(stack.matrices(), biases or (None,) * self.num_experts, strict=True))

    def _gate(self, y: Tensor) -> Tensor:
        activation = cast(Callable[[Tensor], Tensor], getattr(self, "act_fn", None))
        if not self.layout.gated:
            return activation(y)
        if not self.layout.batched:
            return cast(Any, self.like)._apply_gate(self, y)  # type: ignore[no-any-return]
        gate, up = y.chunk(2, -1)
        return up * activation(gate)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self._shapes.items())
        return f"{self.like.__name__}: {shapes}, {self.format}"


def oriented(experts: nn.Module, projection: str) -> Tensor:
    """A dense module's weights as `[experts, out, in]`, whichever way its family stores them; no copy."""
    weight = cast(Tensor, getattr(experts, projection)).detach()
    return weight.transpose(1, 2) if cast(Layout, layout_of(experts)).transposed else weight


def _copy(source: nn.Module, target: nn.Module, attributes: tuple[str, ...], but: tuple[str, ...]) -> None:
    """Give a module the attributes, parameters, buffers and children of another, but for some tensors."""
    for name in attributes:
        setattr(target, name, getattr(source, name))
    for name, parameter in source._parameters.items():
        if name not in but:
            target.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        if name not in but:
            target.register_buffer(name, buffer, name not in source._non_persistent_buffers_set)
    for name, child in source.named_children():
        target.add_module(name, child)


def _linear(x: Tensor, q: QuantTensor, bias: Tensor | None) -> Tensor:
    y = ops.matmul(x, q)
    return y if bias is None else y + bias.to(y.dtype)
