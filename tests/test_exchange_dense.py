"""Dense checkpoints of packed models: transformers alone opens them, and computes what the packed model did."""

import json

import pytest
import tiny_lm
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)
from tuned_models import logits, merged_qa_lora, nothing_at, optimizer_steps, packed, tuned_scales

import qft
from qft.exchange import compressed_tensors, dense
from qft.exchange.checkpoint_tensors import CheckpointTensors, Rows
from qft.exchange.directory_writer import write_directory

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


def with_lora(fmt):
    model = packed(fmt, rank=4, alpha=8)
    return optimizer_steps(qft.train_only(model, "lora"))


def with_pooled_lora(fmt):
    return optimizer_steps(qft.train_only(qft.add_pooled_lora(packed(fmt), 2, alpha=8), "lora"))


def mixtral(fmt):
    return qft.quantize_model(MixtralForCausalLM(MixtralConfig(**SMALL)).eval(), fmt)


def gpt_oss(fmt):
    """Experts with biases, stored [in, out], gate and up interleaved."""
    model = GptOssForCausalLM(GptOssConfig(**SMALL, head_dim=16)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return qft.quantize_model(model, fmt)


def gpt2(fmt):
    """Layers of transformers' Conv1D, stored [in, out], with biases."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    return qft.quantize_model(GPT2LMHeadModel(config).eval(), fmt)


def embedding(fmt):
    return packed(fmt, formats={"embed_tokens": "int8 g32", "lm_head": "int4 g32"})


@pytest.mark.parametrize("fmt", ["nf4 g64 dq", "int3 g32 f16 zero"])
@pytest.mark.parametrize("build", [packed, with_lora, tuned_scales, mixtral, gpt_oss, gpt2, embedding])
def test_transformers_computes_the_same(tmp_path, build, fmt):
    model = build(fmt)
    dense.write(model, tmp_path / "d", dtype=torch.float32)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert "quantization_config" not in config
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "d", output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or of another shape
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize("target", [dense, compressed_tensors])
def test_a_family_whose_checkpoint_has_other_names(tmp_path, target):
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**size, image_size=16, patch_size=8, projection_dim=32).to_dict()
    text = LlamaConfig(**size, vocab_size=64).to_dict()
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    model = qft.quantize_model(LlavaForConditionalGeneration(config).eval(), "int4 g32 f32")
    target.write(model, tmp_path / "d", **({"dtype": torch.float32} if target is dense else {}))
    names = load_file(tmp_path / "d" / "model.safetensors").keys()
    assert names.isdisjoint(model.state_dict())
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "d")
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize("build", [with_pooled_lora, merged_qa_lora])
def test_qa_lora_before_and_after_it_is_merged(tmp_path, build):
    model = build("int4 g32 f32")
    dense.write(model, tmp_path / "d", tiny_lm.tokenizer(), dtype=torch.float32)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=2e-6)
    assert (tmp_path / "d" / "tokenizer_config.json").is_file()


def test_weights_are_rounded_once(tmp_path):
    model = with_lora("nf4 g32 f32")
    dense.write(model, tmp_path / "d")
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "d" / "config.json").read_text())["dtype"] == "bfloat16"
    for path, layer in model.named_modules():
        if isinstance(layer, qft.QuantLinear):
            exact = torch.addmm(layer.dequantize(), layer.lora_B, layer.lora_A, alpha=layer.lora_scaling)
            assert torch.equal(tensors[f"{path}.weight"], exact.bfloat16())
    assert torch.equal(tensors["model.embed_tokens.weight"], model.model.embed_tokens.weight.bfloat16())
    assert "lm_head.weight" not in tensors  # tied


def test_a_head_and_an_embedding_over_one_packed_weight_stay_tied(tmp_path):
    model = packed("nf4 g32 f32", formats=dict.fromkeys(("embed_tokens", "lm_head"), "int8 g32 f32"))
    dense.write(model, tmp_path / "d", dtype=torch.float32)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=2e-6)


def test_what_a_class_keeps_in_fp32_stays_so(tmp_path):
    model = packed("nf4 g32 f32")
    model._keep_in_fp32_modules = {"norm"}
    dense.write(model, tmp_path / "d", dtype=torch.float16)
    kept = {name for name, t in load_file(tmp_path / "d" / "model.safetensors").items() if t.dtype == torch.float32}
    assert kept == {"model.norm.weight"}


def test_a_long_checkpoint_is_several_files(tmp_path):
    model = packed("nf4 g32 f32")
    tensors = CheckpointTensors(model).tensors
    values = ((n, v.dequantize(torch.float32) if isinstance(v, Rows) else v.detach()) for n, v in tensors.items())
    write_directory(model, tmp_path / "d", None, values, shard_bytes=60_000)
    files = sorted(path.name for path in (tmp_path / "d").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "d" / name).values()) for name in files]
    assert sorted(sizes)[-2] <= 60_000  # the embedding alone is longer
    index = json.loads((tmp_path / "d" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "d")), logits(model), rtol=0, atol=2e-6
    )


def test_a_failed_write_leaves_nothing(tmp_path):
    def tensors():
        yield "a", torch.zeros(3)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_directory(packed("nf4 g32"), tmp_path / "d", tiny_lm.tokenizer(), tensors())
    assert nothing_at(tmp_path / "d")


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dtype torch.int8 holds no weights"):
        dense.write(packed("nf4 g32"), tmp_path / "d", dtype=torch.int8)
    with pytest.raises(ValueError, match="Linear is no transformers model"):
        dense.write(torch.nn.Linear(3, 3), tmp_path / "d")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileExistsError, match="is not empty"):
        dense.write(packed("nf4 g32"), tmp_path / "d")
