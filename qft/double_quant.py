"""Double quantization (QLoRA, section 3): scales as 8-bit codes around their mean, with an fp32 absmax per 256."""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from .format import DQ_BLOCK


@lru_cache(maxsize=1)
def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map, fp32 `[256]` ascending (Dettmers, 8-Bit Approximations for Parallelism, 2015).

    Seven decades; decade i, from the smallest, holds 2^i means of neighbouring steps between 0.1 and 1, of both signs;
    0 and 1 complete it.
    """
    positive = []
    for decade in range(7):
        steps = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        positive.append(10.0 ** (decade - 6) * ((steps[:-1] + steps[1:]) / 2))
    means = torch.cat(positive)
    return torch.cat([-means, means, torch.tensor([0.0, 1.0])]).sort().values


@cache
def dynamic_map_on(device: torch.device) -> Tensor:
    """The map on a device. Kept: kernels hold its address, and a copy from the host may not be part of a CUDA graph."""
    return dynamic_map().to(device)


def encode(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of fp32 scales `[out, groups]`.

    Returns:
        codes uint8 `[out, groups]`, each the nearest entry of the map; absmax fp32 `[ceil(out * groups / 256)]` of the
        scales minus their mean; the mean, fp32 `[1]`. A code steps to its neighbour where the nearest entry would turn
        a scale's sign.
    """
    table = dynamic_map_on(scales.device)
    offset = scales.mean()
    centred = (scales - offset).flatten()
    blocks = torch.nn.functional.pad(centred, (0, -centred.numel() % DQ_BLOCK)).view(-1, DQ_BLOCK)
    absmax = blocks.abs().amax(1)
    target = torch.nn.functional.pad(scales.flatten(), (0, -centred.numel() % DQ_BLOCK)).view(-1, DQ_BLOCK)

    def nearest(divisor: Tensor) -> Tensor:
        normalised = blocks.double() / torch.where(divisor > 0, divisor, 1).double()[:, None]
        code = torch.bucketize(normalised, (table[1:].double() + table[:-1].double()) / 2)
        decoded = table[code] * divisor[:, None] + offset
        step = ((target > 0) & (decoded <= 0)).int() - ((target < 0) & (decoded >= 0)).int()
        return (code + step).clamp(0, 255)

    codes = nearest(absmax)
    # the map ends at -0.993 and 1: where a block's extreme scale is just beyond 0, the last entry may not be; a wider
    # absmax takes it there
    decoded = table[codes] * absmax[:, None] + offset
    turned = ((target < 0) & (decoded >= 0) | (target > 0) & (decoded <= 0)).any(1)
    if turned.any():
        absmax = torch.where(turned, absmax * (1 + 2**-20) / table[0].abs(), absmax)
        codes = nearest(absmax)
    return codes.to(torch.uint8).flatten()[: centred.numel()].view(scales.shape), absmax, offset.view(1)


def decode(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """fp32 scales `[out, groups]` of codes uint8 `[out, groups]`: map x absmax, rounded, plus the offset, rounded."""
    return decode_each(codes, absmax.repeat_interleave(DQ_BLOCK)[: codes.numel()].view(codes.shape), offset)


def decode_each(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """fp32 scales of codes under an absmax each, both of one shape."""
    return dynamic_map_on(codes.device)[codes.long()] * absmax + offset
