"""qft compose and qft adapter: from a tuned model to a library, a composition, and a model that uses it."""

import json
import sys

import pytest
import tiny_lm
import torch
from transformers import T5Config, T5ForConditionalGeneration

import qft
from qft.adapters.peft_format import describe_adapter, lora_factors, save_adapter
from qft.compose.pairs import encoder_decoder_rows
from qft.training.data import IGNORE


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


@pytest.fixture
def files(tmp_path):
    """A packed model, three adapters of it that do something, and examples."""
    model = qft.quantize_model(tiny_lm.model(), "nf2 g64 f16")
    qft.save(model, tmp_path / "model", tokenizer=tiny_lm.tokenizer())
    fill_library(model, tmp_path / "library")
    lines = [json.dumps({"prompt": f"say {word}: ", "completion": word}) for word in ("one", "two", "three")]
    (tmp_path / "examples.jsonl").write_text("\n".join(lines))
    return tmp_path


def fill_library(model, folder):
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, qft.QuantLinear):
                layer.remove_lora()
                layer.add_lora(2, B=torch.randn(layer.out_features, 2) / 8)
        save_adapter(model, folder / f"task-{seed}")


def test_a_composition_is_an_adapter_that_lowers_the_loss_it_says(files, result, run):
    examples = files / "examples.jsonl"
    search = ("--data", examples, "--evaluations", 20, "--penalty", 0)  # what random adapters gain is little
    made = result("compose", files / "model", files / "library", files / "out", *search)
    assert made["weights"].keys() == {"task-1", "task-2", "task-3"}
    assert made["loss (nats per token)"] < made["base loss (nats per token)"]
    assert json.loads((files / "out" / "lorahub.json").read_text())["weights"] == made["weights"]
    base = result("eval", files / "model", "--data", examples)
    composed = result("eval", files / "model", "--data", examples, "--task", files / "out")
    assert base["loss (nats per token)"] == pytest.approx(made["base loss (nats per token)"], rel=1e-5)
    assert composed["loss (nats per token)"] == pytest.approx(made["loss (nats per token)"], rel=1e-5)
    code, out, err = run(
        "compose", files / "model", files / "library", files / "shown", "--data", examples, "--rows", 1
    )
    assert code == 0
    assert "task-1" in out
    assert "loss on the examples" in out
    assert "composing" in err


def test_a_tuned_models_lora_becomes_an_adapter(files, result):
    torch.manual_seed(0)
    model = qft.quantize_model(tiny_lm.model(), "nf4 g64 f32", rank=3)
    qft.save(model, files / "tuned")
    made = result("adapter", files / "tuned", files / "taken")
    assert (made["layers"], made["ranks"]) == (14, [3])
    assert describe_adapter(files / "taken").keys() == lora_factors(model).keys()


def test_a_packed_t5_composes_from_prompts_and_completions(tmp_path, result):
    config = T5Config(
        vocab_size=260,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=256,
    )
    torch.manual_seed(0)
    model = qft.quantize_model(T5ForConditionalGeneration(config), "nf4 g32 f32")
    qft.save(model, tmp_path / "model", tokenizer=tiny_lm.tokenizer())
    fill_library(model, tmp_path / "library")
    (tmp_path / "five.jsonl").write_text(json.dumps({"prompt": "add: ", "completion": "one"}))
    words = (tmp_path / "model", tmp_path / "library", tmp_path / "out", "--data", tmp_path / "five.jsonl")
    made = result("compose", *words, "--evaluations", 10)
    assert made["loss (nats per token)"] < made["base loss (nats per token)"]


def test_a_row_becomes_a_pair():
    ids = torch.arange(5)
    row = {"input_ids": ids, "labels": ids.masked_fill(ids < 2, IGNORE)}
    (pair,) = encoder_decoder_rows([row], end=9)
    assert pair["input_ids"].tolist() == [0, 1, 9]
    assert pair["labels"].tolist() == [2, 3, 4]
    (open_ended,) = encoder_decoder_rows([row])
    assert open_ended["input_ids"].tolist() == [0, 1]
    for labels in (ids, ids.masked_fill(ids == 3, IGNORE).masked_fill(ids < 2, IGNORE)):
        with pytest.raises(ValueError, match="row 1 is no prompt followed by a completion"):
            encoder_decoder_rows([{"input_ids": ids, "labels": labels}])


def test_bad_input_is_one_line(files, run, monkeypatch):
    tiny_lm.save(files / "dense")
    arguments = {"model": files / "model", "library": files / "library", "out": files / "new"}

    def refused(**changes):
        code, out, err = run("compose", *(arguments | changes).values(), "--data", files / "examples.jsonl")
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        return err

    assert "is not quantized" in refused(model=files / "dense")
    assert "holds no adapters" in refused(library=files / "model")
    assert "is not empty" in refused(out=files / "library")
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    assert "pip install 'qft[compose]'" in refused()
    assert not (files / "new").exists()
    assert run("adapter", files / "model", files / "new")[0] == 2
