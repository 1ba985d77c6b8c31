"""Text files as rows of tokens and labels.

    .txt     one long text, cut into windows of `block_size` tokens; every token is learned
    .jsonl   one JSON object per line, one row each:
             {"text": ...}                       every token is learned
             {"prompt": ..., "completion": ...}  the completion is learned
             {"messages": [{"role", "content"}]} the assistant's turns are learned, by the tokenizer's chat template

A row is {"input_ids", "labels"}, int64 `[length]` each, length <= block_size; a label is the token itself, or -100
where nothing is learned. The model shifts: label i is predicted from the tokens before i, so the first never counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..format import FormatError

IGNORE = -100  # the label torch's cross entropy leaves out
Row = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Row]):
    """Rows, and what reading them had to leave out.

    Attributes:
        rows: see the module's text.
        cut: number of rows that were longer than block_size and lost their end.
        dropped: line numbers of the rows that held, or were left with, nothing to learn.
    """

    rows: list[Row]
    cut: int = 0
    dropped: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return sum(_learned(row["labels"]) for row in self.rows)

    def note(self) -> str:
        """What was cut or dropped, as one sentence; empty if nothing was."""
        said = []
        if self.cut:
            said.append(f"{self.cut} rows were longer than the block size and lost their end")
        if self.dropped:
            lines = ", ".join(map(str, self.dropped[:5])) + (", ..." if len(self.dropped) > 5 else "")
            said.append(f"{len(self.dropped)} rows had nothing left to learn and were left out (lines {lines})")
        return "; ".join(said)


@dataclass(frozen=True)
class PaddingCollator:
    """Rows of different length as one batch `[rows, longest]`: input_ids, attention_mask, labels, all int64."""

    pad_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> PaddingCollator:
        # The mask and the labels hide padding from the model, so any id will do where a tokenizer has none of its own.
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(next(i for i in ids if i is not None))

    def __call__(self, rows: Sequence[Row]) -> Row:
        def pad(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        return {
            "input_ids": pad([row["input_ids"] for row in rows], self.pad_id),
            "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], 0),
            "labels": pad([row["labels"] for row in rows], IGNORE),
        }


def read(
    path: str | Path, tokenizer: Any, block_size: int, *, held_out: float = 0.0, vocabulary: int | None = None
) -> tuple[Examples, Examples]:
    """The rows of a file, and those of its end that are held out.

    Args:
        path: a .txt or .jsonl file, UTF-8.
        tokenizer: a transformers tokenizer.
        block_size: longest row, in tokens.
        held_out: share of the file's end, 0 <= held_out < 1; of the tokens of a .txt, of the rows of a .jsonl.
        vocabulary: number of token ids the model knows; None does not check.

    Raises:
        FormatError: the file is empty, is no UTF-8, or a line is not one of the records above; the line is named.
        OSError: the file cannot be read.
        ValueError: an argument out of range, or a token the model does not know.
    """
    path = Path(path)
    if block_size < 2:
        raise ValueError(f"block size {block_size} leaves nothing to predict; use 2 or more")
    if not 0 <= held_out < 1:
        raise ValueError(f"held-out share {held_out} is not in [0, 1); write 0.15 for the last 15 %")
    readers = {".txt": _read_text, ".jsonl": _read_records}
    if path.suffix not in readers:
        raise FormatError(f"{path} is neither .txt nor .jsonl; rename it after what it holds")
    text = _decode(path)
    if not text.strip():
        raise FormatError(f"{path} is empty; give it text to train on")
    return readers[path.suffix](path, text, tokenizer, block_size, held_out, vocabulary)


def windows(ids: Sequence[int], block_size: int) -> list[Row]:
    """Consecutive windows of `block_size` tokens; a last window of a single token predicts nothing and is left out."""
    parts = torch.tensor(ids, dtype=torch.int64).split(block_size)
    return [{"input_ids": part, "labels": part.clone()} for part in parts if len(part) > 1]


def check_vocabulary(place: str, ids: Sequence[int], tokenizer: Any, vocabulary: int | None) -> None:
    """Refuse token ids the model has no embedding for; `place` says where they stand."""
    if vocabulary is None or not ids or max(ids) < vocabulary:
        return
    worst = max(ids)
    token = tokenizer.convert_ids_to_tokens(worst)
    raise ValueError(
        f"{place}: tokenizer/vocabulary mismatch: token {token!r} has id {worst}, the model knows ids below "
        f"{vocabulary}; use the tokenizer the model was trained with"
    )


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: byte {error.start} does not decode; convert it first") from None


def _read_text(
    path: Path, text: str, tokenizer: Any, block_size: int, held_out: float, vocabulary: int | None
) -> tuple[Examples, Examples]:
    # No special tokens: all windows but the first would lack them.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    check_vocabulary(str(path), ids, tokenizer, vocabulary)
    kept = int(len(ids) * (1 - held_out))
    parts = Examples(windows(ids[:kept], block_size)), Examples(windows(ids[kept:], block_size))
    for part, share in zip(parts, (1 - held_out, held_out), strict=True):
        if share and not part.rows:
            raise FormatError(
                f"{path} holds {len(ids)} tokens, and {share:.0%} of them predict nothing; give it more text"
            )
    return parts


def _read_records(
    path: Path, text: str, tokenizer: Any, block_size: int, held_out: float, vocabulary: int | None
) -> tuple[Examples, Examples]:
    rows: list[tuple[int, Row, bool]] = []
    for line, record in _records(path, text):
        ids, learned = _encode(f"{path}, line {line}", record, tokenizer)
        check_vocabulary(f"{path}, line {line}", ids, tokenizer, vocabulary)
        tokens = torch.tensor(ids[:block_size], dtype=torch.int64)
        labels = tokens.masked_fill(~torch.tensor(learned[:block_size], dtype=torch.bool), IGNORE)
        rows.append((line, {"input_ids": tokens, "labels": labels}, len(ids) > block_size))
    kept = int(len(rows) * (1 - held_out))
    parts = _examples(rows[:kept]), _examples(rows[kept:])
    for part, share in zip(parts, (1 - held_out, held_out), strict=True):
        if share and not part.rows:
            raise FormatError(
                f"{path} leaves nothing to train on: of {len(rows)} rows, none in its {share:.0%} share has a token to "
                f"learn within {block_size} tokens; use a larger block size or shorter prompts"
            )
    return parts


def _records(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):  # JSON strings may hold every other line separator
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except json.JSONDecodeError as error:
            raise FormatError(f"{path}, line {line}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict):
            raise FormatError(f"{path}, line {line}: a {type(record).__name__}, not an object; {_KEYS}")
        yield line, record


_KEYS = 'write {"text"}, {"prompt", "completion"} or {"messages"}'


def _encode(place: str, record: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a record, and for each whether it is learned."""
    if "messages" in record:
        return _encode_messages(place, record["messages"], tokenizer)
    if "prompt" in record and "completion" in record:
        segments = [(record["prompt"], False), (record["completion"], True)]
    elif "text" in record:
        segments = [(record["text"], True)]
    else:
        raise FormatError(f"{place}: keys {', '.join(map(repr, record)) or 'missing'}; {_KEYS}")
    for text, _ in segments:
        if not isinstance(text, str):
            raise FormatError(f"{place}: a value is a {type(text).__name__}, not text; quote it")
    # A tokenizer that opens every text with its start token does so here; one that closes them (T5) is not followed,
    # the end token stands where the record ends.
    start = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids, learned = _encode_segments(segments, tokenizer)
    return start + ids + end, [False] * len(start) + learned + [True] * len(end)


def _encode_segments(segments: Sequence[tuple[str, bool]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Each segment is tokenized alone, as a prompt is when the model answers it later: no token straddles a border."""
    ids: list[int] = []
    learned: list[bool] = []
    for text, learn in segments:
        part = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += part
        learned += [learn] * len(part)
    return ids, learned


def _encode_messages(place: str, messages: Any, tokenizer: Any) -> tuple[list[int], list[bool]]:
    from jinja2 import TemplateError

    _check_messages(place, messages)
    template = tokenizer.chat_template
    if not template:
        raise FormatError(
            f"{place}: messages need a chat template, the tokenizer has none; write prompt and completion"
        )
    try:
        if isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template):
            coded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return list(coded["input_ids"]), [bool(mark) for mark in coded["assistant_masks"]]
        return _encode_segments(_turns(place, messages, tokenizer), tokenizer)
    except TemplateError as error:
        raise FormatError(f"{place}: the chat template refuses these messages: {error}") from None


def _check_messages(place: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise FormatError(f'{place}: "messages" is no list of turns; write [{{"role": "user", "content": ...}}, ...]')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise FormatError(f'{place}: message {number} lacks "role" or "content" as text')
    if all(message["role"] != "assistant" for message in messages):
        raise FormatError(f'{place}: no message has the role "assistant", so there is nothing to train on')


def _turns(place: str, messages: list[Mapping[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """The rendered conversation in segments: what an assistant's turn adds after the generation prompt is learned."""

    def render(count: int, prompt: bool) -> str:
        if not count:
            return ""
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    whole = render(len(messages), False)
    segments, done = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, True), render(index + 1, False)
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise FormatError(
                f"{place}: the chat template rewrites earlier turns, so the assistant's part cannot be told apart; "
                "mark it in the template with {% generation %}"
            )
        segments += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    return [*segments, (whole[done:], False)]


def _examples(rows: Sequence[tuple[int, Row, bool]]) -> Examples:
    kept = [(row, cut) for _, row, cut in rows if _learned(row["labels"])]
    dropped = [line for line, row, _ in rows if not _learned(row["labels"])]
    return Examples([row for row, _ in kept], sum(cut for _, cut in kept), dropped)


def _learned(labels: torch.Tensor) -> int:
    """Labels that count: the first has nothing before it to be predicted from."""
    return int((labels[1:] != IGNORE).sum())
