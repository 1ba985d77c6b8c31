"""bitsandbytes' 4-bit checkpoints: what transformers and bitsandbytes write, qft reads bit for bit, and the reverse."""

import copy
import json
import math
import random
from fnmatch import fnmatch

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_lm import tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import qft
from qft.disk.files import WRITTEN
from qft.exchange.bitsandbytes import read, write
from qft.exchange.bitsandbytes_weight import read_dense, read_quantized, read_state
from qft.exchange.checkpoint_files import CheckpointFiles
from qft.nn.linear import FloatFacingQuantLinear
from qft.notices import say_once

IDS = torch.arange(12)[None]
NESTED = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
DOWN = "model.layers.0.mlp.down_proj"
Q = "model.layers.1.self_attn.q_proj"


def llama(dtype=torch.bfloat16, **sizes):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "tie_word_embeddings": True} | sizes
    config = LlamaConfig(
        vocab_size=100, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, **sizes
    )
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()  # its buffers keep fp32


def gpt2():
    config = GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def theirs(dense, folder, **options):
    """The model as transformers and bitsandbytes quantize it; training, for their CPU path repacks it in eval mode."""
    dense.save_pretrained(folder / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    return AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config).train()


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder).train()


def layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def weight_of(layer):
    """What bitsandbytes says a layer's weight is."""
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def assert_same_weights(mine, their_model):
    found = layers(their_model)
    quantized = {path: module for path, module in mine.named_modules() if isinstance(module, qft.QuantLinear)}
    assert quantized.keys() == found.keys() != set()
    for path, layer in found.items():
        wanted = weight_of(layer)
        made = quantized[path].dequantize(wanted.dtype)
        assert made.dtype == wanted.dtype
        assert torch.equal(made, wanted), path


def tensors_in(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def rewrite(folder, change):
    """Let `change` edit the file's tensors in place."""
    held = tensors_in(folder)
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def state_key(held, path):
    return next(name for name in held if name.startswith(f"{path}.weight.quant_state."))


def edit_state(held, path, **changes):
    key = state_key(held, path)
    said = json.loads(bytes(held[key].tolist())) | changes
    held[key] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def said(caplog):
    say_once.cache_clear()
    return lambda: [record.message for record in caplog.records if record.name == "qft"]


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """A bf16 Llama with double-quantized nf4 layers, as transformers and bitsandbytes save it."""
    folder = tmp_path_factory.mktemp("nested")
    theirs(llama(), folder, **NESTED).save_pretrained(folder / "bnb")
    return folder / "bnb"


@pytest.fixture
def broken(nested, tmp_path):
    """A copy of it, to be broken."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in nested.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# ------------------------------------------------------------------------------------------------------------ read


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [NESTED, {"bnb_4bit_quant_type": "fp4"}], ids=["nf4 dq", "fp4 f32"])
def test_a_checkpoint_of_bitsandbytes_keeps_every_weight(tmp_path, options, storage):
    their_model = theirs(llama(), tmp_path, bnb_4bit_quant_storage=storage, **options)
    their_model.save_pretrained(tmp_path / "bnb")
    model = read(tmp_path / "bnb")
    assert_same_weights(model, their_model)
    assert not model.training
    wanted = "nf4 g64 dq" if options is NESTED else "fp4 g64 f32"
    assert {str(layer.format) for layer in qft.report(model).quantized} == {wanted}
    torch.testing.assert_close(model(IDS).logits, their_model(IDS).logits, rtol=0, atol=0.02)  # bf16 products


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_blocksize_and_dtype_dequantizes_as_bitsandbytes_does(tmp_path, quant_type, double):
    held, wanted = {}, {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            dense = (torch.randn(24, 4096) * torch.rand(24, 1)).to(dtype)
            packed, state = functional.quantize_4bit(dense, None, None, blocksize, double, quant_type)
            name = f"{dtype}.{blocksize}"
            held |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()} | {name: packed}
            wanted[name] = functional.dequantize_4bit(packed, state)
    save_file(held, tmp_path / "model.safetensors")
    with CheckpointFiles(tmp_path) as files:
        for name, weight in wanted.items():
            state = read_state(files, name, quant_type)
            q = read_quantized(files, name, state)
            assert str(q.format) == f"{quant_type} g{name.rpartition('.')[2]} {'dq' if double else 'f32'}"
            assert state.dtype == weight.dtype
            assert torch.equal(q.dequantize(state.dtype), weight), name
            assert torch.equal(read_dense(files, name, state).to(state.dtype), weight), name


def test_conv1d_is_read_as_the_linear_layer_it_is(tmp_path):
    their_model = theirs(gpt2(), tmp_path, bnb_4bit_quant_type="nf4")
    their_model.save_pretrained(tmp_path / "bnb")
    model = read(tmp_path / "bnb")
    assert_same_weights(model, their_model)
    assert model.transformer.h[0].attn.c_attn.bias.shape == (192,)
    for module in their_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(model(IDS).logits, their_model(IDS).logits, rtol=0, atol=1e-5)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_sharded_checkpoint_is_read_as_one(tmp_path):
    their_model = theirs(llama(), tmp_path, **NESTED)
    their_model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    their_model.save_pretrained(tmp_path / "whole")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model, whole = read(tmp_path / "shards"), read(tmp_path / "whole")
    assert_same_weights(model, their_model)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_quantized_head_is_not_tied_to_the_embedding(tmp_path):
    their_model = theirs(llama(tie_word_embeddings=False), tmp_path, llm_int8_skip_modules=[], **NESTED)
    their_model.save_pretrained(tmp_path / "bnb")
    edit_config(tmp_path / "bnb", tie_word_embeddings=True)
    model = read(tmp_path / "bnb")
    assert isinstance(model.lm_head, qft.QuantLinear)
    assert not model.config.tie_word_embeddings
    assert_same_weights(model, their_model)


def mixture(intermediate=64):
    config = Qwen3MoeConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, moe_intermediate_size=intermediate, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=12, num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def test_dense_experts_and_their_router_come_as_transformers_loads_them(tmp_path):
    their_model = theirs(mixture(), tmp_path, bnb_4bit_quant_type="nf4")
    their_model.save_pretrained(tmp_path / "bnb")
    model = read(tmp_path / "bnb")
    assert_same_weights(model, their_model)
    mine, wanted = (each.model.layers[0].mlp.experts.gate_up_proj for each in (model, their_model))
    assert torch.equal(mine, wanted)
    torch.testing.assert_close(model(IDS).logits, their_model(IDS).logits, rtol=0, atol=1e-4)


EXPERTS = "model.layers.0.mlp.experts"


def quantize_experts(held, double=False, fp4="none"):
    """Each expert on its own, as transformers 4 did."""
    for name in [name for name in held if name.startswith(EXPERTS)]:
        dense, kind = held[name].to(torch.bfloat16), "fp4" if fp4 in name else "nf4"
        packed, state = functional.quantize_4bit(dense, quant_type=kind, compress_statistics=double)
        held |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()} | {name: packed}


def expert(held, at, projection):
    """What bitsandbytes says an expert's weight is, blocks that straddle rows included."""
    name = f"{EXPERTS}.{at}.{projection}.weight"
    stats = {key.removeprefix(f"{name}."): value for key, value in held.items() if key.startswith(f"{name}.")}
    state = functional.QuantState.from_dict(stats, device="cpu")
    shape, state.shape = state.shape, torch.Size((state.shape.numel() // 64, 64))
    return functional.dequantize_4bit(held[name], state).view(shape)


@pytest.mark.parametrize("double", [False, True])
def test_experts_quantized_one_by_one_are_fused_without_a_change(tmp_path, double, said):
    theirs(mixture(), tmp_path, bnb_4bit_quant_type="nf4").save_pretrained(tmp_path / "bnb")
    rewrite(tmp_path / "bnb", lambda held: quantize_experts(held, double))
    held = tensors_in(tmp_path / "bnb")
    model = read(tmp_path / "bnb")
    made = model.get_submodule(EXPERTS)
    assert isinstance(made, qft.QuantExperts)
    assert str(made.format) == "nf4 g64 f32"
    dense = made.dequantize(torch.bfloat16)
    for at in range(12):
        gate, up = (expert(held, at, name) for name in ("gate_proj", "up_proj"))
        assert torch.equal(dense["gate_up_proj"][at], torch.cat([gate, up]))
        assert torch.equal(dense["down_proj"][at], expert(held, at, "down_proj"))
    assert [sentence.startswith("36 weights of") for sentence in said()] == [True] * double
    assert model(IDS).logits.isfinite().all()
    qft.save(model, tmp_path / "saved")
    assert torch.equal(qft.load(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def test_experts_whose_blocks_straddle_rows_are_quantized_again(tmp_path):
    theirs(mixture(96), tmp_path, bnb_4bit_quant_type="nf4").save_pretrained(tmp_path / "bnb")
    rewrite(tmp_path / "bnb", quantize_experts)
    held = tensors_in(tmp_path / "bnb")
    with pytest.raises(qft.FormatError, match=rf"{EXPERTS}.0.down_proj.weight in .* straddle rows of 96"):
        read(tmp_path / "bnb")
    made = read(tmp_path / "bnb", requantize="int4 g32 dq zero").get_submodule(EXPERTS)
    assert str(made.format) == "int4 g32 f32 zero"
    wanted = torch.stack([expert(held, at, "down_proj") for at in range(12)]).float()
    error = ((wanted - made.dequantize()["down_proj"]).norm() / wanted.norm()).item()
    assert made.start_errors["down_proj"] == (pytest.approx(error, rel=0.02),)  # measured before rounding to bf16
    assert made.start_errors.keys() == {"gate_up_proj", "down_proj"}


EXPERT_BREAKS = {
    "a missing expert": (f"{EXPERTS}.3.up_proj", None, r"make no model\.layers\.0\.mlp\.experts\.gate_up_proj"),
    "a missing last expert": (f"{EXPERTS}.11.down_proj", None, r"make no .*down_proj \[12, 64, 64\] of one format"),
    "no projection": (f"{EXPERTS}.*.down_proj", None, r"holds no model\.layers\.0\.mlp\.experts\.down_proj"),
    "another shape": (f"{EXPERTS}.3.up_proj", {"shape": [32, 128]}, r"make no .*gate_up_proj \(stack expects"),
    "another width": (f"{EXPERTS}.*.down_proj", {"shape": [128, 32], "blocksize": 64}, r"straddle rows of 32"),
    "another blocksize": (f"{EXPERTS}.3.up_proj", {"blocksize": 32}, r"\.absmax in .* is F32 \[64\] and must be"),
}


@pytest.mark.parametrize(("where", "state", "message"), EXPERT_BREAKS.values(), ids=EXPERT_BREAKS)
def test_damaged_experts_are_refused(tmp_path, where, state, message):
    theirs(mixture(), tmp_path, bnb_4bit_quant_type="nf4").save_pretrained(tmp_path / "bnb")

    def damage(held):
        quantize_experts(held)
        for path in {name.rpartition(".weight")[0] for name in held if fnmatch(name, f"{where}.weight")}:
            if state:
                edit_state(held, path, **state)
            else:
                for name in [name for name in held if name.startswith(f"{path}.")]:
                    del held[name]

    rewrite(tmp_path / "bnb", damage)
    with pytest.raises(qft.FormatError, match=message):
        read(tmp_path / "bnb")


@pytest.mark.parametrize(
    ("fp4", "message"),
    [
        (".3.up_proj", r"its like make no .*gate_up_proj \[12, 128, 64\] of one format"),
        ("down_proj", r"experts in .* has projections in fp4 g64 f32, nf4 g64 f32; they must have one format"),
    ],
)
def test_experts_of_several_formats_are_refused(tmp_path, fp4, message):
    theirs(mixture(), tmp_path, bnb_4bit_quant_type="nf4").save_pretrained(tmp_path / "bnb")
    rewrite(tmp_path / "bnb", lambda held: quantize_experts(held, fp4=fp4))
    with pytest.raises(qft.FormatError, match=message):
        read(tmp_path / "bnb")


def test_scales_stored_in_half_precision_stay_so(broken):
    def halve(held):
        for name in [name for name in held if name.endswith("nested_absmax")]:
            path = name.removesuffix(".weight.nested_absmax")
            scales = torch.rand(held[f"{path}.weight.absmax"].numel()) + 0.5
            held[f"{path}.weight.absmax"] = scales.to(torch.bfloat16 if path == Q else torch.float16)
            said = json.loads(bytes(held[state_key(held, path)].tolist()))
            text = json.dumps({key: value for key, value in said.items() if not key.startswith("nested")})
            held[state_key(held, path)] = torch.tensor(list(text.encode()), dtype=torch.uint8)
            del held[name], held[f"{path}.weight.nested_quant_map"]

    rewrite(broken, halve)
    model = read(broken)
    assert str(model.get_submodule(Q).format) == "nf4 g64 bf16"
    assert str(model.get_submodule(DOWN).format) == "nf4 g64 f16"
    assert_same_weights(model, opened(broken))


def test_other_second_quantizations_become_fp32_scales_of_the_same_value(broken, said):
    """As bitsandbytes leaves them once it has run on a CPU in eval mode, or with a map of one's own."""

    def spoil(held):
        edit_state(held, DOWN, nested_dtype="bfloat16")
        held[f"{Q}.weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
        path = "model.layers.0.self_attn.q_proj"
        edit_state(held, path, nested_blocksize=32)
        held[f"{path}.weight.nested_absmax"] = torch.rand(2)

    rewrite(broken, spoil)
    model, their_model = read(broken), opened(broken)
    for path in (DOWN, Q, "model.layers.0.self_attn.q_proj"):
        assert str(model.get_submodule(path).format) == "nf4 g64 f32"
        assert torch.equal(model.get_submodule(path).dequantize(torch.bfloat16), weight_of(layers(their_model)[path]))
    (sentence,) = said()
    assert "3 weights" in sentence
    assert "kept as fp32, 0.37 bits per weight more" in sentence


def test_dq_is_said_to_cost_nothing(nested, said):
    read(nested)
    assert not said()


def flat_weight_of(layer):
    """A weight whose blocks straddle rows, in rows of a block: on others bitsandbytes' AVX-512 kernel goes wrong."""
    state = copy.copy(layer.weight.quant_state)
    shape, state.shape = state.shape, torch.Size((state.shape.numel() // state.blocksize, state.blocksize))
    return functional.dequantize_4bit(layer.weight.data, state).view(shape)


def test_blocks_that_straddle_rows_are_refused_by_name_or_quantized_again(tmp_path):
    their_model = theirs(llama(torch.float32, intermediate_size=96), tmp_path, **NESTED)
    their_model.save_pretrained(tmp_path / "bnb")
    with pytest.raises(qft.FormatError, match=rf"{DOWN}.weight in .* straddle rows of 96; pass requantize"):
        read(tmp_path / "bnb")
    model = read(tmp_path / "bnb", requantize="int4 g32")
    formats = {layer.path: str(layer.format) for layer in qft.report(model).quantized}
    errors = {layer.path: layer.errors for layer in qft.report(model).quantized}
    for path, layer in layers(their_model).items():
        made = model.get_submodule(path).dequantize()
        if path.endswith("down_proj"):
            wanted = flat_weight_of(layer)
            assert formats[path] == "int4 g32 f32"
            assert torch.equal(made, qft.quantize(wanted, "int4 g32").dequantize())
            assert errors[path] == (pytest.approx(((wanted - made).norm() / wanted.norm()).item(), rel=1e-5),)
        else:
            assert formats[path] == "nf4 g64 dq"
            assert not errors[path]
            assert torch.equal(made, weight_of(layer))
    with pytest.raises(qft.FormatError, match="'int9' is no format"):
        read(tmp_path / "bnb", requantize="int9")


def test_a_model_read_is_saved_and_trained_as_any_other(tmp_path, nested):
    model = read(nested)
    qft.save(model, tmp_path)
    again = qft.load(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    model.get_submodule(Q).add_lora(4)
    qft.prepare_for_training(model).train()(IDS, labels=IDS).loss.backward()
    assert model.get_submodule(Q).lora_B.grad.norm() > 0


def test_older_configs_name_no_method(broken):
    said = json.loads((broken / "config.json").read_text())["quantization_config"]
    del said["quant_method"]
    edit_config(broken, quantization_config=said)
    assert isinstance(read(broken).get_submodule(Q), qft.QuantLinear)


def test_an_interrupted_copy_of_files_is_completed_first(broken):
    (broken / WRITTEN).mkdir()
    (broken / "config.json").rename(broken / WRITTEN / "config.json")
    assert isinstance(read(broken), LlamaForCausalLM)


# --------------------------------------------------------------------------------------------------------- refusal


def test_eight_bits_are_refused(broken):
    edit_config(broken, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(qft.FormatError, match=r"8-bit weights \(load_in_8bit\), and qft reads 4-bit ones; open"):
        read(broken)
    edit_config(broken, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    rewrite(broken, lambda held: held.update({f"{Q}.SCB": torch.ones(64)}))
    with pytest.raises(qft.FormatError, match=rf"{Q}.SCB in .* is of an 8-bit weight"):
        read(broken)


def test_scales_that_bitsandbytes_has_transposed_are_refused_with_the_reason(tmp_path):
    """On a CPU with bf16 dot products it repacks in eval mode, and saves the scales as it left them."""
    theirs(llama(), tmp_path, bnb_4bit_quant_type="nf4").save_pretrained(tmp_path / "bnb")

    def transpose(held):
        name = f"{DOWN}.weight.absmax"
        held[name] = held[name].view(64, 2).T.to(torch.bfloat16).contiguous()

    rewrite(tmp_path / "bnb", transpose)
    with pytest.raises(
        qft.FormatError, match=rf"{DOWN}.weight.absmax in .* \[2, 64\] and must be .* save a model before"
    ):
        read(tmp_path / "bnb")


def resized(name, change):
    def apply(held):
        held[name] = change(held[name])

    return apply


def stated(path=Q, **changes):
    return lambda held: edit_state(held, path, **changes)


def text(said):
    return lambda held: held.update({state_key(held, Q): torch.tensor(list(said), dtype=torch.uint8)})


def without(name):
    return lambda held: held.pop(name)


BREAKS = {
    "no scales": (without(f"{Q}.weight.absmax"), rf"{Q}.weight.absmax in .* is missing"),
    "no levels": (without(f"{Q}.weight.quant_map"), rf"{Q}.weight.quant_map in .* is missing"),
    "no codes": (without(f"{Q}.weight"), rf"{Q}.weight in .* is missing"),
    "no nested scales": (without(f"{Q}.weight.nested_absmax"), rf"{Q}.weight.nested_absmax in .* is missing, and"),
    "no nested levels": (without(f"{Q}.weight.nested_quant_map"), rf"{Q}.weight.nested_quant_map in .* is missing"),
    "no state": (lambda held: held.pop(state_key(held, Q)), rf"{Q}.weight.* in .* belongs to no 4-bit weight"),
    "no norm": (without("model.norm.weight"), r"holds no model.norm.weight, which the model needs"),
    "fewer codes": (
        resized(f"{Q}.weight", lambda t: t[:-1].clone()),
        rf"{Q}.weight in .* takes 2047 bytes, \[64, 64\]",
    ),
    "more codes": (resized(f"{Q}.weight", lambda t: t.repeat(2, 1)), rf"{Q}.weight in .* takes 4096 bytes"),
    "fewer scales": (resized(f"{Q}.weight.absmax", lambda t: t[1:].clone()), rf"{Q}.weight.absmax in .* is U8 \[63\]"),
    "scales of no code": (
        resized(f"{Q}.weight.absmax", lambda t: t.float()),
        rf"{Q}.weight.absmax in .* is F32 \[64\]",
    ),
    "more blocks": (resized(f"{Q}.weight.nested_absmax", lambda t: t.repeat(2)), r"nested_absmax in .* is F32 \[2\]"),
    "integer blocks": (resized(f"{Q}.weight.nested_absmax", lambda t: t.int()), r"nested_absmax in .* is I32 \[1\]"),
    "scales of NaN": (
        resized(f"{Q}.weight.nested_absmax", lambda t: t * math.nan),
        r"nested_absmax in .* gives a scale that is not finite",
    ),
    "short map": (
        resized(f"{Q}.weight.nested_quant_map", lambda t: t[:9].clone()),
        r"nested_quant_map in .* \[9\] and",
    ),
    "other levels": (
        resized(f"{Q}.weight.quant_map", lambda t: t.flip(0)),
        r"quant_map in .* are not the levels of nf4",
    ),
    "other norm": (
        resized("model.norm.weight", lambda t: t[:5].clone()),
        r"model.norm.weight in .* is \[5\], and conf",
    ),
    "integer norm": (resized("model.norm.weight", lambda t: t.int()), r"model.norm.weight in .* is I32, and the model"),
    "dense integers": (
        lambda held: held.update({"extra.weight": torch.ones(2, dtype=torch.int8)}),
        r"extra.weight in .* is I8",
    ),
    "a name of ours": (
        lambda held: held.update({f"{Q}.weight_scales": torch.zeros(64, 1)}),
        rf"holds {Q}.weight_scales beside the weight it would replace",
    ),
    "two states": (
        lambda held: held.update({f"{Q}.weight.quant_state.bitsandbytes__fp4": held[state_key(held, Q)].clone()}),
        rf"{Q}.weight in .* both nf4 and fp4",
    ),
    "a place for no layer": (
        lambda held: [held.update({n.replace(Q, "model.q"): held.pop(n)}) for n in list(held) if n.startswith(Q)],
        r"model.q.weight in .* for which LlamaForCausalLM has no layer",
    ),
    "a quantized norm": (
        lambda held: [held.update({n.replace(Q, "model.norm"): held.pop(n)}) for n in list(held) if n.startswith(Q)],
        r"model.norm.weight in .* for which LlamaForCausalLM has no layer",
    ),
    "no JSON": (text(b"\xff\xfe{"), r"quant_state.bitsandbytes__nf4 in .* describes no nf4 weight"),
    "a list": (text(b"[1, 2]"), "describes no nf4 weight"),
    "nested lists": (text(b"[" * 4096), "describes no nf4 weight"),
    "a long text": (text(b" " * 5000), "no JSON text in uint8"),
    "a float text": (
        lambda held: held.update({state_key(held, Q): held[state_key(held, Q)].float()}),
        "no JSON text in uint8",
    ),
    "a huge shape": (stated(shape=[1 << 62, 1 << 62]), "describes no nf4 weight"),
    "a large shape": (
        stated(shape=[1 << 30, 1 << 30]),
        rf"{Q}.weight in .* and config.json gives the layer \[64, 64\]",
    ),
    "a transposed shape": (stated("model.layers.1.mlp.up_proj", shape=[64, 128]), r"is \[64, 128\], and config.json"),
    "a negative shape": (stated(shape=[-64, -64]), "describes no nf4 weight"),
    "no shape": (stated(shape=None), "describes no nf4 weight"),
    "three sizes": (stated(shape=[64, 8, 8]), "describes no nf4 weight"),
    "sizes that are not whole": (stated(shape=[64.0, 64]), "describes no nf4 weight"),
    "sizes that are truths": (stated(shape=[True, 64]), "describes no nf4 weight"),
    "blocks of nothing": (stated(blocksize=0), "describes no nf4 weight"),
    "negative blocks": (stated(blocksize=-64), "describes no nf4 weight"),
    "odd blocks": (stated(blocksize=48), "describes no nf4 weight"),
    "blocks as text": (stated(blocksize="64"), "describes no nf4 weight"),
    "another type": (stated(quant_type="fp4"), "describes no nf4 weight"),
    "no dtype": (stated(dtype="load"), "describes no nf4 weight"),
    "a list for a dtype": (stated(dtype=["float32"]), "describes no nf4 weight"),
    "an infinite offset": (stated(nested_offset=math.inf), "describes no nf4 weight"),
    "an offset beyond fp32": (stated(nested_offset=1e300), "describes no nf4 weight"),
    "a whole offset beyond all": (stated(nested_offset=10**400), "describes no nf4 weight"),
    "an offset as text": (stated(nested_offset="0.5"), "describes no nf4 weight"),
    "nested blocks of nothing": (stated(nested_blocksize=0), "describes no nf4 weight"),
    "nested blocks beyond the scales": (stated(nested_blocksize=16), r"nested_absmax in .* is F32 \[1\] and must be"),
}


@pytest.mark.parametrize(("change", "message"), BREAKS.values(), ids=BREAKS)
def test_a_damaged_file_is_refused_with_file_and_tensor(broken, change, message):
    rewrite(broken, change)
    with pytest.raises(qft.FormatError, match=message) as caught:
        read(broken)
    assert str(broken) in str(caught.value)


CONFIGS = {
    "no class": ({"architectures": []}, "does not say of which class"),
    "a class of nowhere": ({"architectures": ["Nothing"]}, "holds a Nothing, which transformers"),
    "a class of no model": ({"architectures": ["LlamaConfig"]}, "holds a LlamaConfig, which transformers"),
    "sizes of another model": ({"hidden_size": 128}, "and config.json gives the layer"),
    "sizes of none": ({"hidden_size": "many"}, "builds no LlamaForCausalLM"),
    "another vocabulary": ({"vocab_size": 101}, r"embed_tokens.weight in .* is \[100, 64\], and config.json"),
    "fewer layers": ({"num_hidden_layers": 1}, "for which LlamaForCausalLM has no layer"),
    "more layers": ({"num_hidden_layers": 3}, "holds no model.layers.2"),
    "no quantization": ({"quantization_config": None}, "names no bitsandbytes model"),
    "another quantization": ({"quantization_config": {"quant_method": "gptq"}}, "names no bitsandbytes model"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_of_another_model_is_refused(broken, changes, message):
    edit_config(broken, **changes)
    with pytest.raises(qft.FormatError, match=message):
        read(broken)


def test_missing_and_lying_files_are_refused(broken, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no directory"):
        read(tmp_path / "nowhere")
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(qft.FormatError, match=r"model.safetensors is damaged"):
        read(broken)
    file.write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])
    with pytest.raises(qft.FormatError, match=r"model.safetensors is damaged"):
        read(broken)
    index = broken / "model.safetensors.index.json"
    for listing, message in (
        ({}, "index.json is damaged"),
        ({"weight_map": []}, "index.json is damaged"),
        ({"weight_map": {"a": 3}}, "index.json is damaged"),
        ({"weight_map": {"a": "../model.safetensors"}}, "index.json is damaged"),
        ({"weight_map": {"a": "other.safetensors"}}, "other.safetensors is missing"),
        ({"weight_map": {"a": "model.safetensors"}}, "lacks a, which .* says it holds"),
    ):
        file.write_bytes(whole)
        index.write_text(json.dumps(listing))
        with pytest.raises(qft.FormatError, match=message):
            read(broken)
    index.unlink()
    file.rename(broken / "pytorch_model.bin")
    with pytest.raises(qft.FormatError, match="pickles are not read"):
        read(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(qft.FormatError, match=r"config\.json is damaged"):
        read(broken)
    (broken / "config.json").unlink()
    with pytest.raises(qft.FormatError, match=r"holds no config\.json"):
        read(broken)


def test_a_dense_model_that_claims_to_be_quantized_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(qft.FormatError, match="holds no 4-bit weight"):
        read(tmp_path)


def test_flipped_bytes_are_read_or_refused_and_nothing_else(broken):
    """Headers, JSON texts and values, wherever the flip falls."""
    file = broken / "model.safetensors"
    whole, chance = file.read_bytes(), random.Random(0)
    with safe_open(file, "pt") as held:
        key = state_key(dict.fromkeys(held.keys()), Q)
        said = bytes(held.get_tensor(key).tolist())
    head, blob = 8 + int.from_bytes(whole[:8], "little"), whole.index(said)
    refused = 0
    for place in [chance.randrange(head) for _ in range(60)] + [blob + chance.randrange(len(said)) for _ in range(60)]:
        file.write_bytes(whole[:place] + bytes([chance.randrange(256)]) + whole[place + 1 :])
        try:
            read(broken)
        except qft.FormatError:
            refused += 1
    assert refused > 60


# ----------------------------------------------------------------------------------------------------------- write


def test_a_checkpoint_read_and_written_again_is_the_same_in_every_byte(tmp_path, nested):
    write(read(nested), tmp_path / "out", tokenizer())
    before, after = tensors_in(nested), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    mine, first = opened(tmp_path / "out"), opened(nested)
    assert torch.equal(mine(IDS).logits, first(IDS).logits)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (nested, tmp_path / "out")]
    skipped = configs[1]["quantization_config"].pop("llm_int8_skip_modules")
    assert skipped == ["lm_head"]
    assert configs[0]["quantization_config"].pop("llm_int8_skip_modules") is None
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("make", "fmt"),
    [
        (llama, "nf4 g64 f32"),
        (llama, "nf4 g32 dq"),
        (llama, "fp4 g64 bf16"),
        (llama, "nf4 channel f16"),  # rows of 64 and 128 weights are blocks
        (gpt2, "nf4 g64 dq"),
    ],
)
def test_what_qft_quantized_has_the_same_weights_in_bitsandbytes(tmp_path, make, fmt):
    model = qft.quantize_model(make(), fmt)
    write(model, tmp_path / "out")
    their_model = opened(tmp_path / "out")
    assert_same_weights(model, their_model)
    assert not list(tmp_path.glob("out/qft.json"))
    again = read(tmp_path / "out")
    for path, layer in layers(their_model).items():
        mine = model.get_submodule(path)
        assert torch.equal(again.get_submodule(path).weight, mine.weight)
        assert torch.equal(again.get_submodule(path).quant_tensor.scales, mine.quant_tensor.scales)
        assert (layer.weight.quant_state.state2 is not None) == ("dq" in fmt)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_scales_of_either_sign_and_mixed_formats_are_written_as_they_are(tmp_path):
    model = llama(torch.float32, tie_word_embeddings=False)
    model = qft.quantize_model(
        model, "nf4 g64 f32", init="search", formats={"lm_head": "fp4 g32 dq", "*.mlp.*": "nf4 g32"}, skip=["k_proj"]
    )
    assert (model.get_submodule(Q).weight_scales < 0).any()
    write(model, tmp_path / "out")
    their_model = opened(tmp_path / "out")
    assert_same_weights(model, their_model)
    assert type(their_model.model.layers[0].self_attn.k_proj) is nn.Linear
    torch.testing.assert_close(their_model(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)


def unfit(fmt="nf4 g64", make=llama, **options):
    return qft.quantize_model(make(), fmt, **options)


def with_lora():
    model = unfit()
    model.get_submodule(Q).add_lora(4)
    return model


def t5():
    config = T5Config(vocab_size=50, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    return T5ForConditionalGeneration(config)


REFUSED = {
    "another codebook": (lambda: unfit("nf3 g64"), "stores nf3 g64 f32, and bitsandbytes has nf4 and fp4"),
    "integers": (lambda: unfit("int4 g64"), "stores int4 g64 f32, and bitsandbytes has nf4 and fp4"),
    "a short group": (lambda: unfit("nf4 g128"), "over in_features=64, and bitsandbytes' blocks are 32, 64"),
    "rows that are no blocks": (
        lambda: unfit("nf4 channel", lambda: llama(intermediate_size=96)),
        f"{DOWN} stores nf4 channel f32 over in_features=96",
    ),
    "a LoRA": (with_lora, f"{Q} carries a LoRA"),
    "what transformers keeps in fp32": (lambda: unfit(make=t5), "wo is taken by the name wo, which transformers keeps"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_bitsandbytes_cannot_hold_is_refused_by_name(tmp_path, make, message):
    with pytest.raises(qft.FormatError, match=message) as caught:
        write(make(), tmp_path / "out")
    assert "name it in dense" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_layers_named_in_dense_are_written_dequantized(tmp_path):
    model = qft.quantize_model(llama(torch.float32), "nf4 g64", formats={"o_proj": "int3 g64"})
    with pytest.raises(ValueError, match="'nothing' names no quantized layer"):
        write(model, tmp_path / "out", dense=["nothing"])
    with pytest.raises(ValueError, match="holds no quantized layer to pack"):
        write(model, tmp_path / "out", dense=["*"])
    write(model, tmp_path / "out", dense=["o_proj"])
    their_model = opened(tmp_path / "out")
    projection = their_model.model.layers[0].self_attn.o_proj
    assert type(projection) is nn.Linear
    assert torch.equal(projection.weight, model.model.layers[0].self_attn.o_proj.dequantize())
    torch.testing.assert_close(their_model(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)


def test_a_directory_with_something_in_it_is_left_alone(tmp_path, nested):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        write(read(nested), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
    with pytest.raises(ValueError, match="is no transformers model"):
        write(nn.Sequential(nn.Linear(64, 64)), tmp_path / "new")


def test_a_layer_whose_parent_reads_its_dtype_goes_on_facing_it(tmp_path):
    """Mamba casts activations to `lm_head.weight.dtype`."""
    config = MambaConfig(
        vocab_size=64, hidden_size=64, state_size=4, num_hidden_layers=1, tie_word_embeddings=False, time_step_rank=4
    )
    model = qft.quantize_model(
        MambaForCausalLM(config).eval(), "nf4 g64", formats={"lm_head": "nf4 g64"}, skip=["x_proj", "dt_proj"]
    )
    write(model, tmp_path / "out")
    again = read(tmp_path / "out")
    assert type(again.lm_head) is FloatFacingQuantLinear
    assert torch.equal(again(IDS).logits, model(IDS).logits)
