"""Which kind of model a directory holds, and that the one door opens all of them."""

import json

import pytest
import tiny_lm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import qft
from qft.disk.directory import is_quantized, kind_of
from qft.disk.files import WRITTEN
from qft.disk.pretrained import describe, load_model

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def bnb(tmp_path_factory):
    """A 4-bit model of bitsandbytes with tokenizer; blocks of down_proj straddle its rows of 96."""
    folder = tmp_path_factory.mktemp("models")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_lm.save(folder / "dense"), quantization_config=config)
    model.save_pretrained(folder / "bnb")
    tiny_lm.tokenizer().save_pretrained(folder / "bnb")
    return folder / "bnb"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A 4-bit model of bitsandbytes all of whose blocks lie within rows."""
    folder = tmp_path_factory.mktemp("models")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder / "dense")  # fmt: skip
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config).save_pretrained(folder / "bnb")
    return folder / "bnb"


@pytest.fixture
def saved(tmp_path):
    """A model that `qft.save` wrote, and the model."""
    model = qft.quantize_model(tiny_lm.model(), "nf2 g64 f16", rank=4)
    qft.save(model, tmp_path / "saved")
    return tmp_path / "saved", model


def test_what_qft_saved_is_opened_by_qft(saved):
    folder, model = saved
    assert kind_of(folder) == "qft"
    assert is_quantized(folder)
    assert torch.equal(qft.load(folder)(IDS).logits, model(IDS).logits)
    skeleton = tiny_lm.model(seed=1)
    assert qft.load(folder, skeleton) is skeleton
    assert torch.equal(skeleton(IDS).logits, model(IDS).logits)


def test_what_a_save_was_interrupted_in_is_completed_before_it_is_named(saved):
    folder, model = saved
    (folder / WRITTEN).mkdir()
    (folder / "qft.json").rename(folder / WRITTEN / "qft.json")
    assert kind_of(folder) == "qft"
    assert torch.equal(load_model(folder)(IDS).logits, model(IDS).logits)


def test_without_qft_json_transformers_opens_it_with_the_same_values(saved):
    folder, model = saved
    (folder / "qft.json").unlink()
    assert kind_of(folder) == "transformers"
    again = qft.load(folder)
    assert not again.training
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert describe(folder).quantized == qft.report(again).quantized
    weights = load_file(folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-64])
    with pytest.raises(qft.FormatError, match=r"saved holds damaged weights .*; copy the model again"):
        qft.load(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for architectures in (["Nothing"], ["LlamaConfig"], [], None):
        (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        message = "which transformers does not have" if architectures else "does not say of which class"
        with pytest.raises(qft.FormatError, match=message):
            qft.load(folder)


def test_bitsandbytes_files_are_opened_and_described(whole):
    assert kind_of(whole) == "bitsandbytes"
    assert is_quantized(whole)
    model = qft.load(whole)
    assert {str(layer.format) for layer in qft.report(model).quantized} == {"nf4 g64 dq"}
    assert describe(whole) == qft.report(model)
    half = load_model(whole, "bfloat16")
    assert half.lm_head.weight.dtype == torch.bfloat16
    packed = half.model.layers[0].mlp.down_proj
    assert torch.equal(packed.dequantize(), model.model.layers[0].mlp.down_proj.dequantize())


def test_bitsandbytes_is_not_needed(python, whole, tmp_path):
    program = f"""
import sys
sys.modules["bitsandbytes"] = None  # importing it fails
import transformers, torch
transformers.utils.logging.disable_progress_bar()
import qft
from qft.exchange import bitsandbytes
model = qft.load({str(whole)!r})
print(len(qft.report(model).quantized), tuple(model(torch.arange(4)[None]).logits.shape))
bitsandbytes.write(model, {str(tmp_path / "out")!r})
again = qft.load({str(tmp_path / "out")!r})
print(torch.equal(again(torch.arange(4)[None]).logits, model(torch.arange(4)[None]).logits))
"""
    assert python(program) == "7 (1, 4, 100)\nTrue\n"


def test_a_command_quantizes_again_what_cannot_be_kept_and_reports_the_error(bnb, tmp_path, run, result):
    code, _, err = run("quantize", bnb, tmp_path / "out")
    assert code != 0
    assert "straddle rows of 96; pass requantize=" in err
    assert "Traceback" not in err
    made = result("quantize", bnb, tmp_path / "out", "--requantize", "int8 g32 f16")
    layers = {layer["path"].rpartition(".")[2]: layer for layer in made["layers"]}
    assert layers["down_proj"]["format"] == "int8 g32 f16"
    assert 0 < layers["down_proj"]["errors"][0] < 0.01
    assert layers["q_proj"]["format"] == "nf4 g64 dq"
    assert layers["q_proj"]["errors"] == []
    assert kind_of(tmp_path / "out") == "qft"
    assert result("info", tmp_path / "out")["layers"] == [layer for layer in made["layers"] if layer["format"]]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert isinstance(load_model(bnb, requantize="int4 g32"), LlamaForCausalLM)


def test_a_command_keeps_the_codes_of_a_bitsandbytes_model(whole, tmp_path, run, result):
    result("quantize", whole, tmp_path / "out")
    mine, theirs = qft.load(tmp_path / "out"), qft.load(whole)
    assert torch.equal(mine(IDS).logits, theirs(IDS).logits)
    code, _, err = run("quantize", whole, tmp_path / "other", "--format", "nf2 g64")
    assert code != 0
    assert "is quantized already, by bitsandbytes: it keeps its codes" in err


def test_dense_models_and_other_libraries_are_not_ours(tmp_path):
    dense = tiny_lm.save(tmp_path / "dense")
    assert kind_of(dense) is None
    assert not is_quantized(dense)
    with pytest.raises(qft.FormatError, match=r"holds weights but no qft\.json: it is a dense model"):
        qft.load(dense)
    config = json.loads((dense / "config.json").read_text())
    for said in ({"quant_method": "gptq"}, {"quant_method": "awq", "load_in_4bit": True}, "nf4", None, []):
        (dense / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
        assert kind_of(dense) is None
    for text in ("{", "[]", "[" * 100000):
        (dense / "config.json").write_text(text)
        with pytest.raises(qft.FormatError, match=r"config\.json is damaged"):
            kind_of(dense)
    (tmp_path / "empty").mkdir()
    assert kind_of(tmp_path / "empty") is None
    with pytest.raises(qft.FormatError, match=r"holds no qft\.json"):
        qft.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="is no directory"):
        qft.load(tmp_path / "nowhere")


def test_a_format_or_a_skeleton_that_a_directory_does_not_take_is_refused(saved, whole):
    folder, model = saved
    with pytest.raises(ValueError, match=r"requantize='nf4 g64' is for bitsandbytes' files, which .* does not hold"):
        qft.load(folder, requantize="nf4 g64")
    with pytest.raises(ValueError, match="is for bitsandbytes' files"):
        load_model(folder, requantize="nf4 g64")
    for directory in (whole, folder):
        (folder / "qft.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"is built from its config\.json alone; leave the model out"):
            qft.load(directory, model)
