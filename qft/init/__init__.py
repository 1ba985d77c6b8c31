"""Where an adapter starts: one function per method, any format.

Each returns (QuantTensor, A `[rank, in]`, B `[out, rank]`) with W ≈ Q + scaling · B · A, scaling = alpha / rank.
"""

from __future__ import annotations

from .cloq import cloq
from .gptq import gptq
from .loftq import loftq
from .lqlora import lqlora
from .plain import plain
from .qera_diag import qera_diag
from .qera_exact import qera_exact
from .search import search
from .second_moment import output_error

# What of E[x xᵀ] a start cannot do without: "none", its "diagonal" or the "full" matrix.
NEEDS: dict[str, str] = {
    "plain": "none",
    "search": "none",  # and takes the diagonal where there is one
    "loftq": "none",
    "lqlora": "diagonal",
    "qera_diag": "diagonal",
    "qera_exact": "full",
    "gptq": "full",
    "cloq": "full",
}

__all__ = [
    "NEEDS",
    "cloq",
    "gptq",
    "loftq",
    "lqlora",
    "output_error",
    "plain",
    "qera_diag",
    "qera_exact",
    "search",
]
