"""compressed-tensors files: that library's own reader, and transformers with it, get the numbers qft computes with."""

import json

import pytest
import tiny_lm
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, MixtralConfig, MixtralForCausalLM
from tuned_models import logits, merged_qa_lora, nothing_at, packed, quantized_layers, tuned_scales

import qft
from qft.exchange import compressed_tensors

FORMATS = ("int4 g32 f32", "int4 g32 f16", "int4 channel f32", "int8 g32 f32", "int8 channel f16")


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


def read(directory) -> dict[str, torch.Tensor]:
    """The weight of every packed layer as the library decompresses it, `[out, in]`."""
    config = QuantizationConfig.model_validate(_config(directory))
    tensors, weights = load_file(directory / "model.safetensors"), {}
    for name in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
        (scheme,) = (s for s in config.config_groups.values() if s.targets == ["Linear"] or name in s.targets)
        assert name not in config.ignore
        state = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        assert set(state) == set(BaseCompressor.get_value_from_registry(scheme.format).compression_param_names(scheme))
        weights[name] = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
    return weights


def _config(directory) -> dict:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("zero", ["", " zero"])
@pytest.mark.parametrize(
    "fmt", ["int4 g32 f32", "int8 g32 f32", "int4 channel f32", "int8 channel f16", "int4 g32 f16"]
)
def test_the_librarys_reader_gets_the_same_numbers(tmp_path, fmt, zero):
    model = packed(fmt + zero)
    errors = compressed_tensors.write(model, tmp_path / "c", tiny_lm.tokenizer())
    weights = read(tmp_path / "c")
    assert weights.keys() == quantized_layers(model).keys() == errors.keys()
    for path, q in quantized_layers(model).items():
        # the library computes in the scales' dtype
        assert torch.equal(weights[path], q.dequantize(q.weight_scales.dtype))
    assert max(errors.values()) == 0
    assert (tmp_path / "c" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("scales", ["f16", "bf16"])
def test_scales_can_be_rounded(tmp_path, scales):
    model = tuned_scales("int4 g32 f16")
    errors = compressed_tensors.write(model, tmp_path / "c", scales=scales)
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    for path, q in quantized_layers(model).items():
        rounded = q.with_scales(q.scales, scales)
        assert torch.equal(tensors[f"{path}.weight_scale"], rounded.weight_scales)
        moved = (rounded.dequantize() - q.dequantize()).norm() / q.dequantize().norm()
        assert errors[path] == pytest.approx(moved.item(), rel=1e-3)
        assert 0 < errors[path] < {"f16": 2**-11, "bf16": 2**-8}[scales]


@pytest.mark.parametrize("fmt", ["int4 g32 f16", "int8 channel f32"])
def test_transformers_opens_a_model_whose_scales_were_tuned(tmp_path, fmt):
    model = tuned_scales(fmt)
    compressed_tensors.write(model, tmp_path / "c")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert opened.dtype == torch.float32
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(opened), logits(packed(fmt)), atol=1e-3)  # the tuning is in the file


def test_transformers_opens_zero_points_when_it_dequantizes(tmp_path):
    model = tuned_scales("int8 g32 f32 zero")
    compressed_tensors.write(model, tmp_path / "c")
    with pytest.warns(UserWarning, match="loading attributes"):  # transformers', about any argument of ours
        opened = AutoModelForCausalLM.from_pretrained(
            tmp_path / "c", quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fmt", ["int4 g32 f16", "int4 g32 f32 zero", "int2 g32 f32"])
def test_a_merged_qa_lora_is_opened_as_8_bits(tmp_path, fmt):
    model = merged_qa_lora(fmt)
    compressed_tensors.write(model, tmp_path / "c")
    top = (1 << qft.Format.parse(fmt).bits) - 1
    for path, weight in read(tmp_path / "c").items():
        q = quantized_layers(model)[path]
        reach = torch.maximum(q.zeros, top - q.zeros)  # from the zero point to the farthest code
        finest = (127.5 / reach).floor()  # a factor that keeps codes and zero points within 8 bits
        bound = q.scales.abs() * (1 / (2 * finest) + 1e-5)
        assert ((weight - q.dequantize()).abs() <= bound.repeat_interleave(32, 1)).all()
    (group,) = _config(tmp_path / "c")["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["symmetric"]) == (8, True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert (logits(opened) - logits(model)).norm() < 0.02 * logits(model).norm()


def test_layers_may_differ_and_some_be_dense(tmp_path):
    model = packed("int4 g32 f32", formats={"down_proj": "int8 channel", "lm_head": "int8 g32"}, skip=["k_proj"])
    compressed_tensors.write(model, tmp_path / "c", dense=["model.layers.0.self_attn.v_proj"])
    config = _config(tmp_path / "c")
    k_proj = [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    assert config["ignore"] == [k_proj[0], "model.layers.0.self_attn.v_proj", k_proj[1]]
    assert len(config["config_groups"]) == 3
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-6)


def test_a_packed_head_that_is_tied_to_a_dense_embedding(tmp_path):
    same = dict.fromkeys(("embed_tokens", "lm_head"), "int8 g32 f32")
    model = packed("int4 g32 f32", formats=same)
    compressed_tensors.write(model, tmp_path / "c", dense=["embed_tokens"])
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert opened.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-6)


def test_a_row_that_ends_inside_a_word(tmp_path):
    config = tiny_lm.model().config
    config.intermediate_size = 97
    model = qft.quantize_model(type(tiny_lm.model())(config).eval(), "int4 channel f32 zero")
    compressed_tensors.write(model, tmp_path / "c")
    weights = read(tmp_path / "c")
    assert load_file(tmp_path / "c" / "model.safetensors")["model.layers.0.mlp.down_proj.weight_packed"].shape == (
        64,
        13,
    )
    for path, q in quantized_layers(model).items():
        assert torch.equal(weights[path], q.dequantize())


def test_transformers_opens_experts(tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    model = qft.quantize_model(MixtralForCausalLM(MixtralConfig(**size, **heads)).eval(), "int4 g32 f32")
    compressed_tensors.write(model, tmp_path / "c")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        ("int3 g32 f16", "q_proj stores int3 g32 f16, and readers of compressed-tensors have kernels for 4 and 8 bits"),
        ("nf4 g32 dq", "q_proj stores nf4 g32 dq, and compressed-tensors holds integer codes alone"),
        ("int4 g64 f16", "down_proj has in_features=96, which groups of 64 do not divide"),
    ],
)
def test_what_it_cannot_hold_is_named(tmp_path, fmt, message):
    with pytest.raises(qft.FormatError, match=message):
        compressed_tensors.write(packed(fmt), tmp_path / "c")
    assert nothing_at(tmp_path / "c")


def test_other_refusals(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = packed("int4 g32 f32")
    with pytest.raises(ValueError, match="scales='dq' is none of f32, f16, bf16"):
        compressed_tensors.write(model, tmp_path / "c", scales="dq")
    model.model.layers[0].mlp.up_proj.weight_scales.data[5, 1] = 1e5
    with pytest.raises(
        qft.FormatError, match=r"up_proj, row 5, group 1 does not fit torch.float16; write scales='f32'"
    ):
        compressed_tensors.write(model, tmp_path / "c", scales="f16")
    gpt2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    with pytest.raises(qft.FormatError, match=r"attn.c_attn is a Conv1D in transformers.*export to gptq"):
        compressed_tensors.write(qft.quantize_model(GPT2LMHeadModel(gpt2), "int4 g32"), tmp_path / "c")
    with pytest.raises(qft.FormatError, match="embed_tokens is no linear layer in the model's checkpoint"):
        compressed_tensors.write(packed("int4 g32", formats={"embed_tokens": "int8 g32"}), tmp_path / "c")
    assert nothing_at(tmp_path / "c")
