"""The demo, in small: its texts, its model, its table and its figure."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from qft import demo
from qft.disk.pretrained import load_model, load_tokenizer
from qft.figure import draw
from qft.training.data import PaddingCollator, read
from qft.training.evaluate import perplexity

EXAMPLES = Path(__file__).parent.parent / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def test_the_dense_model_has_the_perplexity_its_readme_states():
    tokenizer = load_tokenizer(EXAMPLES / "stdlib-lm")
    _, rows = read(EXAMPLES / "language-reference.txt", tokenizer, 256, held_out=0.15)
    measured = perplexity(load_model(EXAMPLES / "stdlib-lm"), rows[:64], PaddingCollator.of(tokenizer))
    assert measured.value == pytest.approx(40.6, abs=0.05)


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the texts are CPython 3.11.7's own")
def test_the_texts_are_what_their_script_writes():
    made = runpy.run_path(str(EXAMPLES / "make_texts.py"))
    assert made["language_reference"]().encode() == (EXAMPLES / "language-reference.txt").read_bytes()
    assert made["held_out_sources"]().encode() == (EXAMPLES / "stdlib-held-out.txt").read_bytes()


def test_every_case_reads_the_same_texts_and_none_it_is_measured_on():
    texts = demo.texts(EXAMPLES)
    tokens = 140_303
    assert sum(len(row["labels"]) for row in texts.train) == int(0.85 * tokens)
    assert (len(texts.new), len(texts.own)) == (64, 64)
    _, held_out = read(EXAMPLES / "language-reference.txt", load_tokenizer(EXAMPLES / "stdlib-lm"), 256, held_out=0.15)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(texts.new, held_out, strict=False))
    sources, _ = read(EXAMPLES / "stdlib-held-out.txt", load_tokenizer(EXAMPLES / "stdlib-lm"), 256)
    assert torch.equal(texts.own[63]["labels"], sources[296]["labels"])  # of 301


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The demo at 2 bits, with few steps on few windows."""
    out = tmp_path_factory.mktemp("demo")
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FORMATS", {2: demo.FORMATS[2]})
        patch.setattr(demo, "WINDOWS", 8)
        rows = demo.demo(EXAMPLES, out, lambda *what: told.append(what), steps=5)
    return rows, out, told


def test_tuning_helps_and_loftq_starts_and_ends_ahead_of_plain(small):
    rows = {row.method: row for row in small[0]}
    assert [row.method for row in small[0]] == ["dense", "plain", "loftq", "peqa"]
    assert all(row.after < row.before for row in rows.values())
    assert rows["loftq"].before < rows["plain"].before
    assert rows["loftq"].after < rows["plain"].after
    assert rows["peqa"].before == rows["plain"].before
    assert all(row.own_after < row.after and row.own_before < row.before for row in rows.values())
    assert rows["dense"].own_before < rows["loftq"].own_before < rows["plain"].own_before


def test_bytes_and_parameters_are_those_of_the_model(small):
    rows = {row.method: row for row in small[0]}
    linear = 8 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 768 * 256)
    lora = 8 * 16 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 768))
    scales = linear // 64
    rest = 4096 * 256 + 17 * 256  # embedding and norms, in bf16
    assert {method: row.trainable for method, row in rows.items()} == {
        "dense": lora, "plain": lora, "loftq": lora, "peqa": scales,
    }  # fmt: skip
    spelling = 7 * 8 * len("nf2 g64 f32")
    assert rows["dense"].bytes == 2 * (linear + rest + lora)
    assert rows["peqa"].bytes == linear // 4 + 4 * scales + 2 * rest + spelling
    assert rows["plain"].bytes == rows["loftq"].bytes == rows["peqa"].bytes + 2 * lora


def test_the_table_is_written_as_returned(small):
    rows, out, told = small
    table = json.loads((out / "table.json").read_text())
    assert [demo.Row(**row) for row in table["rows"]] == rows
    assert table["steps"] == 5
    assert [what for what in told if what[0] == "2 bits, LoftQ + LoRA"] == [
        ("2 bits, LoftQ + LoRA", step, 5) for step in range(1, 6)
    ]


def test_the_figure_is_a_picture(small, tmp_path):
    assert (small[1] / "figure.png").read_bytes()[:8] == PNG
    rows = [demo.Row("dense", 16, None, 40.0, 30.0, 9.0, 10.0, 1, 1, 1.0)]
    draw(rows, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes()[:8] == PNG


def test_without_examples_one_sentence_says_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="clone the repository") as caught:
        demo.find_examples(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "site-packages" / "qft" / "demo.py"))
    with pytest.raises(FileNotFoundError, match=r"^examples/stdlib-lm is not here"):
        demo.find_examples()
    monkeypatch.chdir(EXAMPLES.parent)
    assert demo.find_examples() == Path("examples")
