"""QuantEmbedding: a drop-in nn.Embedding over packed rows."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..format import DQ_BLOCK, Format
from ..tensor import STORED, QuantTensor, quantize
from .casts import in_stored_dtypes
from .packed import Packed, empty

# forward of transformers' scaled word embeddings: Bart's and its kin, Gemma's and its kin
_SCALED = re.compile(r"return super\(\)\.forward\((\w+)\) \* self\.embed_scale(?P<cast>\.to\(self\.weight\.dtype\))?")


class QuantEmbedding(Packed, nn.Embedding):
    """Rows of W by index, with W packed: a row is one of the weight's, so a lookup decodes the rows it was asked for.

    Parameters, named as in a file: `weight` uint8 `[num_embeddings, row_bytes]` (frozen codes) and its companions, as
    in a QuantLinear, with which it can share them: a tied output head is a QuantLinear over the same Parameters.
    Scales and zero points can train; the row at padding_idx gets no gradient.

    Returns `dtype`, which follows `.to(dtype)`, `.half()` and `.bfloat16()` as a dense weight's would, and changes
    nothing of what is stored.

    Args:
        num_embeddings, embedding_dim: shape of W.
        fmt: a Format or its spelling.
        padding_idx: as nn.Embedding's.
        embed_scale: the rows are multiplied by this, as transformers' scaled word embeddings do; None is not at all.
        scale_rounds: whether embed_scale is first rounded to the rows' dtype, as Gemma's is and Bart's is not.
        device, dtype: where to put it, and what it returns.
    """

    dense_kind = "nn.Embedding"
    dense_dtype: Tensor  # empty, of the dtype that a lookup returns: a buffer, so that .to() casts it

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        fmt: Format | str,
        padding_idx: int | None = None,
        embed_scale: float | None = None,
        scale_rounds: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate the dense weight
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.embed_scale, self.scale_rounds = embed_scale, scale_rounds
        face = torch.empty(0, dtype=dtype or torch.get_default_dtype(), device=device)
        self.register_buffer("dense_dtype", face, persistent=False)
        self.set_packed({"weight": empty(Format.parse(fmt), (num_embeddings, embedding_dim), device)})

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, fmt: Format | str, *, name: str = "weight") -> QuantEmbedding:
        """Quantize an nn.Embedding, or one of transformers' scaled word embeddings.

        Errors are those of `qft.quantize`, which call the weight `name`, and of `from_quantized`.
        """
        return cls.from_quantized(quantize(embedding.weight, fmt, name=name), embedding)

    @classmethod
    def from_quantized(cls, q: QuantTensor, like: nn.Embedding) -> QuantEmbedding:
        """An embedding over an already quantized weight, that looks up as `like` does and returns its dtype.

        Raises:
            ValueError: `like` does more than look up and scale, or the shapes differ.
        """
        layer = cls.without_values(like, q.format)
        layer.set_quantized(q)
        layer.dense_dtype = torch.empty_like(layer.dense_dtype, device=q.weight.device)
        return layer

    @classmethod
    def without_values(cls, like: nn.Embedding, fmt: Format | str) -> QuantEmbedding:
        """One on the meta device, of `like`'s shape and behaviour, to be given values.

        Raises:
            ValueError: `like` does more than look up and scale.
        """
        if reason := reason_against(like):
            raise ValueError(f"this embedding cannot be quantized: {reason}")
        scale, rounds = _scale_of(like)
        dtype = like.dense_dtype.dtype if isinstance(like, QuantEmbedding) else like.weight.dtype
        made = cls(like.num_embeddings, like.embedding_dim, fmt, like.padding_idx, scale, rounds, "meta", dtype)
        return made.train(like.training)

    # -------------------------------------------------------------------------------------------------- storage

    @property
    def quant_tensor(self) -> QuantTensor:
        """The stored tensors, as they are: no copy."""
        stored: Any = [self._parameters[name] for name in STORED]
        return in_stored_dtypes(QuantTensor(self.format, (self.num_embeddings, self.embedding_dim), *stored))

    def packed_shape(self, name: str) -> tuple[int, ...]:
        """(num_embeddings, embedding_dim), of the one weight there is."""
        return self.num_embeddings, self.embedding_dim

    def set_quantized(self, q: QuantTensor) -> None:
        """Replace the stored weight, its format included; what trained before does not train any more."""
        self.set_packed({"weight": q})

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense weight `[num_embeddings, embedding_dim]`, rounded once to `dtype` (fp32 where None), not scaled."""
        return self.quant_tensor.dequantize(dtype)

    # -------------------------------------------------------------------------------------------------- forward

    def forward(self, input: Tensor) -> Tensor:
        """Indices `[...]`, int32 or int64 -> rows `[..., embedding_dim]` in the dtype of `dense_dtype`.

        Raises:
            TypeError: the indices are of another dtype.
            IndexError: an index is outside 0..num_embeddings - 1.
        """
        if input.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"QuantEmbedding got {input.dtype} indices; convert them with .long()")
        rows = ops.dequantize(self._rows(input.reshape(-1)), self.dense_dtype.dtype)
        if self.embed_scale is not None:
            rows = rows * (rows.new_full((), self.embed_scale) if self.scale_rounds else self.embed_scale)
        return rows.reshape(*input.shape, self.embedding_dim)

    def _rows(self, at: Tensor) -> QuantTensor:
        """The packed rows at `[n]` as a weight of their own; scales and zero points with their gradients."""
        q = self.quant_tensor
        zeros = None if q.weight_zeros is None else self._gather(at, q.weight_zeros)
        shape = (at.shape[0], self.embedding_dim)
        if q.weight_scales_absmax is None or q.weight_scales_offset is None:
            scales = self._gather(at, q.weight_scales)
            return QuantTensor(q.format, shape, q.weight.index_select(0, at), scales, zeros)
        groups = q.weight_scales.shape[1]
        own = at.long()[:, None] * groups + torch.arange(groups, device=at.device)  # flat places of the rows' scales
        codes, absmax = q.weight_scales.index_select(0, at), q.weight_scales_absmax[own // DQ_BLOCK]
        scales = ops.decode_scales(codes, absmax, q.weight_scales_offset)
        fmt = Format(q.format.code, q.format.group, "f32", q.format.zero)
        zeros = None if zeros is None else zeros.float()
        return QuantTensor(fmt, shape, q.weight.index_select(0, at), scales, zeros)

    def _gather(self, at: Tensor, values: Tensor) -> Tensor:
        """Rows of scales or zero points: a lookup of their own, which leaves padding_idx out of the gradient."""
        return nn.functional.embedding(at, values, self.padding_idx)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        scale = "" if self.embed_scale is None else f", embed_scale={self.embed_scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}{padding}{scale}"


def reason_against(module: nn.Embedding) -> str:
    """Why a module cannot become a QuantEmbedding; nothing where it can."""
    if isinstance(module, QuantEmbedding):
        return ""
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} renormalizes its weight at every lookup"
    if type(module) is not nn.Embedding and not _scaled(type(module)):
        return f"a {type(module).__name__}, which does more than look up and scale"
    return ""


def _scaled(kind: type[nn.Module]) -> re.Match[str] | None:
    """Whether a subclass of nn.Embedding does nothing but multiply its rows by `embed_scale`, and how."""
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):  # defined where no source is kept
        return None
    body = source.partition(":\n")[2].strip() if source.count("return") == 1 else ""
    return _SCALED.fullmatch(body)


def _scale_of(module: nn.Embedding) -> tuple[float | None, bool]:
    """What rows are multiplied by, and whether that is first rounded to their dtype."""
    if isinstance(module, QuantEmbedding):
        return module.embed_scale, module.scale_rounds
    found = _scaled(type(module))
    if found is None:
        return None, False
    given: Any = module
    scale = getattr(given, "scalar_embed_scale", given.embed_scale)  # a buffer of Gemma's has no value on meta
    return (1.0 if scale is None else float(scale)), found["cast"] is not None
