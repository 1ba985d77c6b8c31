"""The verbs in obvious torch: what "correct" means. Never optimised, any device, any floating dtype.

Codes are held one per byte here, `[out, in]`; `pack` and `unpack` translate to the stored bytes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .format import Format, to_f32

TORCH_DTYPE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SMALLEST_SCALE = torch.finfo(
    torch.float32
).tiny  # below it a reciprocal is not finite: such a group is a group of zeros


@lru_cache(maxsize=64)
def levels_on(fmt: Format, device: torch.device) -> Tensor:
    """Levels by code, fp32 `[2^bits]`. Kept: a copy from the host may not be part of a CUDA graph."""
    return torch.tensor(fmt.levels, dtype=torch.float32, device=device)


def per_weight(values: Tensor, fmt: Format, in_features: int) -> Tensor:
    """Spread `[out, groups]` over the weights of each group: `[out, in_features]`."""
    return (
        values.repeat_interleave(fmt.group_size(in_features), dim=1)[:, :in_features]
        if fmt.group
        else values.expand(-1, in_features)
    )


def search_factors(fmt: Format) -> tuple[float, ...]:
    """Factors on the absmax scale that a scale search tries, in this order, ties going to the earlier.

    1, then 0.3 to 1.1 in steps of 0.025. Where the levels are not mirror-symmetric the negatives of all of them follow,
    which turn the levels around; under dq they do not, for scales of both signs would spoil the second quantization.
    """
    grid = (1.0, *(to_f32((300 + 25 * step) / 1000) for step in range(33) if step != 28))
    mirrored = all(-level in fmt.levels for level in fmt.levels)
    return grid if fmt.zero or mirrored or fmt.scale == "dq" else grid + tuple(-factor for factor in grid)


def quantize(
    weight: Tensor, fmt: Format, search: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of a dense matrix.

    Args:
        weight: `[out, in]`, finite, any floating dtype.
        search: take, for each group, the scale of least squared error among `search_factors` times the absmax scale,
            each compared as it will be stored.
        importance: fp32 `[in]`, at least 0: weights of the columns in that error.

    Returns:
        codes uint8 `[out, in]`; scales fp32 `[out, groups]`, rounded to the format's scale dtype except under dq, whose
        second quantization comes after; zero points fp32 `[out, groups]`, or None for symmetric formats.

    Codebooks: the group's extreme lands on the level of largest magnitude, other weights on the nearest level, ties on
    the lower one (QLoRA, section 3; bitsandbytes' tree). Integers round half to even; asymmetric ones follow
    s = (max - min) / (2^b - 1), z = round(-min / s) with min <= 0 <= max (PEQA, section 3). A searched scale leaves z
    as it is.
    """
    weight = weight.float()
    out, in_features = weight.shape
    groups, size = fmt.groups(in_features), fmt.group_size(in_features)
    padded = torch.nn.functional.pad(weight, (0, groups * size - in_features)).view(out, groups, size)
    low, high = padded.amin(2).clamp(max=0), padded.amax(2).clamp(min=0)
    levels = levels_on(fmt, weight.device)
    top = len(fmt.levels) - 1
    if fmt.zero:
        exact = (high - low) / top
    else:
        anchor = levels[levels.abs().argmax()]
        mirrored = bool((levels == -anchor).any())
        extreme = torch.where(high > -low, high, low)
        exact = extreme.abs() / anchor.abs() if mirrored else extreme / anchor
    scales = _as_stored(exact, fmt)
    zeros = (-low * _inverse(scales)).round().clamp(0, top) if fmt.zero else None
    if search:
        scales = _search(weight, exact, scales, zeros, fmt, importance)
    return encode(weight, scales, zeros, fmt), scales, zeros


def _as_stored(scales: Tensor, fmt: Format) -> Tensor:
    """Rounded to the format's scale dtype, except under dq; 0 below the smallest scale."""
    if fmt.scale != "dq":
        scales = scales.to(TORCH_DTYPE[fmt.scale]).float()
    return torch.where(scales.abs() < SMALLEST_SCALE, 0, scales)


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0, 1 / scales)


def _search(
    weight: Tensor, exact: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format, importance: Tensor | None
) -> Tensor:
    """The scales of least error; `exact` and `scales` are absmax's, before and after rounding. A group whose scale is 0
    or overflows keeps it, and what overflows or comes to 0 is no candidate."""

    def error_of(candidate: Tensor) -> Tensor:
        decoded = dequantize(encode(weight, candidate, zeros, fmt), candidate, zeros, fmt)
        square = (weight - decoded).square()
        return sum_groups(square if importance is None else square * importance, fmt)

    best, least = scales, error_of(scales)
    for factor in search_factors(fmt)[1:]:
        candidate = _as_stored(exact * factor, fmt)
        possible = candidate.isfinite() & (candidate != 0) & scales.isfinite() & (scales != 0)
        error = error_of(torch.where(possible, candidate, 1))
        better = possible & (error < least)
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def encode(weight: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format) -> Tensor:
    """Nearest codes under given scales: uint8 `[out, n]`.

    Args:
        weight: `[out, n]`, finite: whole rows, or columns that share one group.
        scales, zeros: `[out, groups]`, or `[out, 1]` for columns that share a group; zeros None for symmetric formats.

    Ties go to the lower level; integers round half to even. A scale of 0 gives the code nearest 0.
    """
    spread = (
        (lambda values: values) if scales.shape[1] == 1 else (lambda values: per_weight(values, fmt, weight.shape[1]))
    )
    scaled = (weight.float() * spread(_inverse(scales.float()))).contiguous()
    levels = levels_on(fmt, weight.device)
    if zeros is not None:
        codes = (scaled.round() + spread(zeros.float())).clamp(0, len(fmt.levels) - 1)
    elif fmt.is_integer:
        codes = scaled.round().clamp(levels[0], levels[-1]) - levels[0]
    else:
        ordered, code_of_rank = _ranked(levels)
        codes = code_of_rank[torch.bucketize(scaled, (ordered[:-1] + ordered[1:]) / 2)]
    return codes.to(torch.uint8)


def _ranked(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct levels in ascending order and the first code of each."""
    ordered = levels.unique()
    return ordered, torch.stack([(levels == level).nonzero()[0, 0] for level in ordered])


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights `[out, in]` of codes `[out, in]`, scales and zeros `[out, groups]`: fp32 level x scale, rounded once."""
    in_features = codes.shape[1]
    level = levels_on(fmt, codes.device)[codes.long()]
    if zeros is not None:
        level = level - per_weight(zeros.float(), fmt, in_features)
    return (level * per_weight(scales.float(), fmt, in_features)).to(dtype)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """y = x Wt for x `[rows, in]` and a dequantized weight `[out, in]`, in x's dtype."""
    return x @ weight.to(x.dtype).T


def matmul_t(dy: Tensor, weight: Tensor) -> Tensor:
    """dx = dy W for dy `[rows, out]` and a dequantized weight `[out, in]`, in dy's dtype."""
    return dy @ weight.to(dy.dtype)


def scale_grad(dy: Tensor, x: Tensor, codes: Tensor, zeros: Tensor | None, fmt: Format) -> Tensor:
    """Gradient of the scales, fp32 `[out, groups]`: the weight gradient times its level, summed over each group.

    PEQA (section 3): dL/ds = sum over the group of dL/dW * (level - zero).
    """
    ones = torch.ones(codes.shape[0], fmt.groups(codes.shape[1]), device=codes.device)
    product = (dy.float().T @ x.float()) * dequantize(codes, ones, zeros, fmt)
    return sum_groups(product, fmt)


def zero_grad(dy: Tensor, x: Tensor, scales: Tensor, fmt: Format) -> Tensor:
    """Gradient of the zero points, fp32 `[out, groups]`: minus the scale times the sum of dW over each group."""
    return -scales.float() * (dy.float().T @ sum_groups(x.float(), fmt))


def sum_groups(values: Tensor, fmt: Format) -> Tensor:
    """Sums of `[rows, in]` over each group: `[rows, groups]`."""
    rows, in_features = values.shape
    size, groups = fmt.group_size(in_features), fmt.groups(in_features)
    return torch.nn.functional.pad(values, (0, groups * size - in_features)).view(rows, groups, size).sum(2)


def pack(codes: Tensor, fmt: Format) -> Tensor:
    """Codes uint8 `[out, in]` -> stored bytes uint8 `[out, row_bytes]`, first code in the lowest bits, padding 0."""
    out, in_features = codes.shape
    bits = _bits(torch.nn.functional.pad(codes, (0, -in_features % 32)), fmt.bits).unflatten(1, (-1, 32))
    if fmt.bits == 3:
        # three words of eight nibbles; a word's spare bits are one bit plane of the eight codes 24 places on
        words, planes = bits[:, :, :24].unflatten(2, (3, 8)), bits[:, :, 24:].transpose(2, 3)
        bits = torch.cat([words, planes[..., None]], -1)
    stream = _fit(bits.reshape(out, -1), fmt.row_bytes(in_features) * 8)
    return _number(stream.unflatten(1, (-1, 8)))


def unpack(packed: Tensor, fmt: Format, in_features: int) -> Tensor:
    """Stored bytes uint8 `[out, row_bytes]` -> codes uint8 `[out, in_features]`."""
    blocks = -(-in_features // 32)
    stream = _fit(_bits(packed, 8).flatten(1), blocks * 32 * fmt.bits)
    if fmt.bits == 3:
        nibbles = stream.unflatten(1, (blocks, 3, 8, 4))
        bits = torch.cat([nibbles[..., :3].flatten(2, 3), nibbles[..., 3].transpose(2, 3)], 2)
    else:
        bits = stream.unflatten(1, (blocks, 32, fmt.bits))
    return _number(bits).flatten(1)[:, :in_features]


def _bits(values: Tensor, count: int) -> Tensor:
    """uint8 `[..., n]` -> its lowest `count` bits, lowest first: uint8 `[..., n, count]`."""
    return (values[..., None] >> torch.arange(count, dtype=torch.uint8, device=values.device)) & 1


def _number(bits: Tensor) -> Tensor:
    """The inverse of `_bits`."""
    return (bits << torch.arange(bits.shape[-1], dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def _fit(stream: Tensor, length: int) -> Tensor:
    """Cut or zero-pad the last dimension to `length`."""
    return torch.nn.functional.pad(stream, (0, length - stream.shape[-1]))
