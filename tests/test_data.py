"""Text files as rows of tokens and labels: what is learned, what is cut, and what is refused where."""

import json

import pytest
import tiny_lm
import torch

from qft import FormatError
from qft.training.data import IGNORE, Examples, PaddingCollator, read

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}|{% endgeneration %}{% else %}{{ m['content'] }}|{% endif %}{% endfor %}"
)
REWRITING = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] if loop.last else '' }}|{% endfor %}"
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]


@pytest.fixture
def tokenizer():
    return tiny_lm.tokenizer()


def jsonl(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def learned(row, tokenizer):
    """The learned tokens of a row as text; a label is its own token wherever it counts."""
    mask = row["labels"] != IGNORE
    assert torch.equal(row["labels"][mask], row["input_ids"][mask])
    return tokenizer.decode(row["input_ids"][mask])


@pytest.mark.parametrize("block_size", [2, 7, 100, 1000])
def test_windows_hold_every_token_once_and_in_order(tmp_path, tokenizer, block_size):
    text = "Everything that is written, ünïcödé too, once. " * 9
    path = tmp_path / "text.txt"
    path.write_text(text)
    rows, held_out = read(path, tokenizer, block_size)
    ids = torch.cat([row["input_ids"] for row in rows])
    assert tokenizer.decode(ids) == text[: len(text) - (len(text.encode()) % block_size == 1)]
    assert all(len(row["input_ids"]) == block_size for row in rows[:-1])
    assert all(torch.equal(row["input_ids"], row["labels"]) for row in rows)
    assert len(held_out) == 0


def test_a_text_is_held_out_by_tokens_and_from_its_end(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("a" * 850 + "b" * 150)
    rows, held_out = read(path, tokenizer, 64, held_out=0.15)
    assert tokenizer.decode(torch.cat([r["input_ids"] for r in rows])) == "a" * 850
    assert tokenizer.decode(torch.cat([r["input_ids"] for r in held_out])) == "b" * 150
    assert held_out.tokens == 150 - len(held_out)  # a window's first token is not predicted


def test_records_are_held_out_by_rows(tmp_path, tokenizer):
    path = jsonl(tmp_path, *({"text": str(i)} for i in range(20)))
    rows, held_out = read(path, tokenizer, 64, held_out=0.25)
    assert [learned(r, tokenizer) for r in rows] == [f"{i}<end>" for i in range(15)]
    assert [learned(r, tokenizer) for r in held_out] == [f"{i}<end>" for i in range(15, 20)]


def test_only_the_completion_is_learned(tmp_path, tokenizer):
    path = jsonl(tmp_path, {"prompt": "2+2=", "completion": "4"}, "", {"text": "all of it"})
    (first, second), _ = read(path, tokenizer, 64)
    assert tokenizer.decode(first["input_ids"]) == "2+2=4<end>"
    assert learned(first, tokenizer) == "4<end>"
    assert learned(second, tokenizer) == "all of it<end>"


def test_a_tokenizer_that_opens_texts_opens_rows(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<start>"})
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", start)]
    )
    (row,), _ = read(jsonl(tmp_path, {"prompt": "p", "completion": "c"}), tokenizer, 64)
    assert tokenizer.decode(row["input_ids"]) == "<start>pc<end>"
    assert learned(row, tokenizer) == "c<end>"


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["plain", "marked"])
def test_only_the_assistants_turns_are_learned(tmp_path, tokenizer, template):
    tokenizer.chat_template = template
    (row,), _ = read(jsonl(tmp_path, {"messages": CHAT}), tokenizer, 256)
    assert tokenizer.decode(row["input_ids"]) == ("<system>be brief|<user>one?|<assistant>1|<user>two?|<assistant>2|")
    assert learned(row, tokenizer) == "1|2|"


def test_long_rows_are_cut_and_it_is_said(tmp_path, tokenizer):
    path = jsonl(
        tmp_path, {"prompt": "p" * 4, "completion": "c" * 40}, {"prompt": "p" * 40, "completion": "c"}, {"text": "t"}
    )
    rows, _ = read(path, tokenizer, 16)
    assert [learned(r, tokenizer) for r in rows] == ["c" * 12, "t<end>"]
    assert (rows.cut, rows.dropped) == (1, [2])
    assert rows.note() == (
        "1 rows were longer than the block size and lost their end; "
        "1 rows had nothing left to learn and were left out (lines 2)"
    )
    assert Examples([]).note() == ""


def test_padding_is_neither_seen_nor_learned(tmp_path, tokenizer):
    rows, _ = read(jsonl(tmp_path, {"text": "long one"}, {"text": "s"}), tokenizer, 64)
    batch = PaddingCollator.of(tokenizer)(rows[:])
    assert {name: tuple(t.shape) for name, t in batch.items()} == dict.fromkeys(batch, (2, 9))
    assert batch["attention_mask"][1].tolist() == [1, 1] + [0] * 7
    assert batch["labels"][1].tolist()[2:] == [IGNORE] * 7
    assert torch.equal(batch["input_ids"][0], rows[0]["input_ids"])


@pytest.mark.parametrize(("pad", "eos", "wanted"), [(5, 6, 5), (None, 6, 6), (0, 6, 0), (None, None, 0)])
def test_padding_takes_an_id_the_tokenizer_has(pad, eos, wanted):
    class Ids:
        pad_token_id, eos_token_id = pad, eos

    assert PaddingCollator.of(Ids).pad_id == wanted


BAD_RECORDS = {
    "not json": ("{'text': 1}", r"line 2: not JSON \(.* column 2\)"),
    "cut off": ('{"text": "a', "line 2: not JSON"),
    "a list": ("[1, 2]", "line 2: a list, not an object"),
    "missing keys": ('{"prompt": "a"}', "line 2: keys 'prompt'; write"),
    "no keys": ("{}", "line 2: keys missing"),
    "a number for text": ('{"text": 5}', "line 2: a value is a int, not text"),
    "messages is text": ('{"messages": "hi"}', "line 2: \"messages\" is no list"),
    "no messages": ('{"messages": []}', "line 2: \"messages\" is no list"),
    "a turn without content": ('{"messages": [{"role": "user"}]}', "line 2: message 1 lacks"),
    "a turn of a number": ('{"messages": [{"role": "assistant", "content": 5}]}', "line 2: message 1 lacks"),
    "no assistant": ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: no message has the role"),
    "no chat template": ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2: messages need"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, tokenizer, line, message):
    path = jsonl(tmp_path, {"text": "good"}, line)
    with pytest.raises(FormatError, match=f"^{path}, {message}"):
        read(path, tokenizer, 64)


@pytest.mark.parametrize(
    ("template", "message"),
    [(REWRITING, "rewrites earlier turns"), ("{{ raise_exception('no system turn') }}", "refuses .*: no system turn")],
    ids=["rewriting", "refusing"],
)
def test_a_template_that_does_not_serve_is_named(tmp_path, tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(FormatError, match=f"line 1: the chat template {message}"):
        read(jsonl(tmp_path, {"messages": CHAT}), tokenizer, 64)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text: byte 3"),
        ("one.txt", b"a", "holds 1 tokens"),
        ("long.jsonl", b'{"prompt": "0123456789", "completion": "a"}', "leaves nothing to train on: of 1 rows"),
        ("table.csv", b"a,b", "neither .txt nor .jsonl"),
    ],
)  # fmt: skip
def test_a_file_without_anything_to_train_on_is_refused(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        read(path, tokenizer, 8)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_to_hold_out_is_refused(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("abcdef")
    with pytest.raises(FormatError, match="6 tokens, and 15% of them"):
        read(path, tokenizer, 8, held_out=0.15)


def test_a_missing_file_is_an_os_error(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.txt", tokenizer, 8)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_token_the_model_does_not_know_is_a_mismatch(tmp_path, tokenizer, name):
    path = tmp_path / name
    path.write_text(json.dumps({"text": "hi"}))
    highest = max(tokenizer('{"text": "hi"}<end>')["input_ids"])
    read(path, tokenizer, 64, vocabulary=highest + 1)
    with pytest.raises(ValueError, match=r"tokenizer/vocabulary mismatch: token .* has id"):
        read(path, tokenizer, 64, vocabulary=16)


@pytest.mark.parametrize(
    ("argument", "message"), [({"block_size": 1}, "block size 1"), ({"held_out": 1.0}, "share 1.0")]
)
def test_arguments_out_of_range_are_refused(tmp_path, tokenizer, argument, message):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    with pytest.raises(ValueError, match=message):
        read(path, tokenizer, **{"block_size": 8, **argument})
