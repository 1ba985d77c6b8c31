"""Where an adapter starts: one function per method, any format.

Each returns (QuantTensor, A `[rank, in]`, B `[out, rank]`) with W ≈ Q + scaling · B · A, scaling = alpha / rank.
"""

from __future__ import annotations

from .loftq import loftq
from .plain import plain

__all__ = ["loftq", "plain"]
