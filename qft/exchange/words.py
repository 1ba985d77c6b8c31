"""Codes as 32-bit words, the way GPTQ and compressed-tensors store them.

Code i of a row takes the bits from i * bits on, counted through the bytes of the row from the lowest bit up; a 3-bit
code may begin in one byte, or word, and end in the next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CODES = 32  # that many codes fill whole words, whatever their bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[rows, n]`, below 2^bits, as int32 words `[rows, ceil(n * bits / 32)]`; spare bits are 0."""
    rows, n = codes.shape
    eights = torch.nn.functional.pad(codes, (0, -n % CODES)).view(rows, -1, 8)
    packed = torch.zeros(rows, eights.shape[1], bits, dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        packed[..., byte] |= eights[..., i] << offset
        if offset + bits > 8:
            packed[..., byte + 1] |= eights[..., i] >> (8 - offset)
    return packed.flatten(1).view(torch.int32)[:, : math.ceil(n * bits / 32)].contiguous()
