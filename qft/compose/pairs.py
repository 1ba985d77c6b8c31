"""Rows for models with an encoder and a decoder: what a causal model reads in one line, in two."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..training.data import IGNORE, Examples, Row


def encoder_decoder_rows(rows: Sequence[Row], end: int | None = None) -> Examples:
    """The prompt of each row as the encoder's input, and its completion as the decoder's labels.

    Args:
        rows: of prompt and completion, as `qft.training.data.read` gives them: what is not learned, then what is.
        end: token that closes the encoder's input (T5's and BART's end of sequence); None adds none.

    Raises:
        ValueError: a row has no prompt, or is learned in several pieces.
    """
    return Examples([_pair(number, row, end) for number, row in enumerate(rows, start=1)])


def _pair(number: int, row: Row, end: int | None) -> Row:
    learned = row["labels"] != IGNORE
    start = int((~learned).sum())
    if not start or not learned[start:].all():
        raise ValueError(
            f"row {number} is no prompt followed by a completion, which an encoder and a decoder need; "
            'write {"prompt", "completion"}'
        )
    closing = torch.tensor([] if end is None else [end], dtype=torch.int64)
    return {"input_ids": torch.cat([row["input_ids"][:start], closing]), "labels": row["labels"][start:]}
