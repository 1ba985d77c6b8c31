"""qft export: every target from the command line, and every refusal as one line."""

import json

import peft
import pytest
import tiny_lm
import torch
from transformers import AutoModelForCausalLM
from tuned_models import logits, merged_qa_lora, nothing_at, optimizer_steps, packed, tuned_scales

import qft


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


@pytest.fixture
def saved(tmp_path):
    """Save a model as qft does, with its tokenizer."""

    def save(model):
        qft.save(model, tmp_path / "q", tiny_lm.tokenizer())
        return tmp_path / "q"

    return save


def with_lora(fmt):
    return optimizer_steps(qft.train_only(packed(fmt, rank=2), "lora"))


def quantization(directory):
    return json.loads((directory / "config.json").read_text()).get("quantization_config", {})


def test_gptq(saved, tmp_path, result, run):
    model = saved(tuned_scales("int4 g32 f16"))
    said = result("export", model, tmp_path / "g", "--to", "gptq")
    assert said["packed layers"] == 14
    assert 0 < said["largest error"] < 2**-11
    assert said["of layer"].startswith("model.layers.")
    assert said["bytes"] == sum(path.stat().st_size for path in (tmp_path / "g").iterdir())
    assert (tmp_path / "g" / "tokenizer.json").is_file()
    code, out, _ = run("export", model, tmp_path / "h", "--to", "gptq", "--dense", "q_proj", "--dense", "up_proj")
    assert code == 0
    assert "packed layers" in out
    assert "model.layers.0.mlp.up_proj" in "".join(quantization(tmp_path / "h")["dynamic"]).replace("\\", "")


def test_compressed_tensors(saved, tmp_path, result):
    model = merged_qa_lora("int4 g32 f16")
    said = result("export", saved(model), tmp_path / "c", "--to", "compressed-tensors")
    assert 1e-4 < said["largest error"] < 0.02
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert (logits(opened) - logits(model)).norm() < 0.02 * logits(model).norm()


def test_dense(saved, tmp_path, result):
    model = with_lora("nf4 g32 f32")
    result("export", saved(model), tmp_path / "d", "--to", "dense", "--dtype", "float32")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
def test_peft_and_the_base_apart(saved, tmp_path, result, run):
    model = with_lora("int4 g32 f32")
    directory = saved(model)
    code, _, err = run("export", directory, tmp_path / "b", "--to", "compressed-tensors")
    assert code == 2
    assert "carries a LoRA" in err
    assert "--without-lora" in err
    assert nothing_at(tmp_path / "b")
    result("export", directory, tmp_path / "b", "--to", "compressed-tensors", "--without-lora")
    result("export", directory, tmp_path / "a", "--to", "peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    logits(base)  # its layers have a weight, which PEFT asks for, from the first forward pass on
    together = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    torch.testing.assert_close(logits(together), logits(model), rtol=0, atol=1e-5)


def test_bitsandbytes(saved, tmp_path, result):
    said = result("export", saved(packed("nf4 g32 f32")), tmp_path / "b", "--to", "bnb")
    assert said["bytes"] > 0
    assert quantization(tmp_path / "b")["quant_method"] == "bitsandbytes"
    assert qft.load(tmp_path / "b").model.layers[0].mlp.up_proj.format == qft.Format.parse("nf4 g32 f32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "gptq"), "q_proj stores nf4 g32 f32, and GPTQ holds integer codes alone"),
        (("--to", "peft"), "carries a LoRA"),
        (("--to", "peft", "--dense", "q_proj"), "--dense chooses layers of a quantized model"),
        (("--to", "dense", "--dtype", "int8"), "dtype 'int8' is unknown; use one of float32, bfloat16, float16"),
        (("--to", "awq"), "'awq' is not one of"),
        ((), "Missing option '--to'"),
    ],
)
def test_refusals_are_one_line(saved, tmp_path, run, words, message):
    code, out, err = run("export", saved(packed("nf4 g32 f32")), tmp_path / "x", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert nothing_at(tmp_path / "x")


def test_a_dense_model_is_refused(tmp_path, run):
    code, _, err = run("export", tiny_lm.save(tmp_path / "m"), tmp_path / "x", "--to", "gptq")
    assert code == 2
    assert "is not quantized; run qft quantize first" in err
    code, _, err = run("export", tmp_path / "m", tmp_path / "m", "--to", "gptq")
    assert "is not empty" in err
