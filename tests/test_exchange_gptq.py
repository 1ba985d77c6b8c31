"""GPTQ files: a reader written from the published layout gets the numbers that qft computes with."""

import json
import re

import numpy as np
import pytest
import tiny_lm
import torch
from safetensors.torch import load_file
from tuned_models import merged_qa_lora, nothing_at, packed, quantized_layers, tuned_scales

import qft
import qft.notices
from qft.exchange import gptq, words


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


def fields(words: torch.Tensor, bits: int) -> np.ndarray:
    """int32 `[n, columns]` -> the unsigned fields of `bits` bits along the first dimension, lowest bits first."""
    stream = np.unpackbits(words.T.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    kept = stream[:, : stream.shape[1] // bits * bits].reshape(stream.shape[0], -1, bits)
    return (kept.astype(np.int64) << np.arange(bits)).sum(-1).T


def settings(config: dict, layer: str) -> tuple[int, int] | None:
    """Bits and group of a layer, as GPTQModel and vLLM look them up; None where `dynamic` says that it is dense."""
    for rule, changes in config.get("dynamic", {}).items():
        if re.match(rule[2:], layer):
            return None if rule.startswith("-:") else (changes["bits"], changes["group_size"])
    return config["bits"], config["group_size"]


def read(directory) -> tuple[dict[str, dict[str, np.ndarray]], dict]:
    """Of every packed layer its codes and zero points, scales and weight, `[in, out]`; and the quantize_config."""
    config = json.loads((directory / "quantize_config.json").read_text())
    assert config == json.loads((directory / "config.json").read_text())["quantization_config"]
    tensors, layers = load_file(directory / "model.safetensors"), {}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        qweight, qzeros, scales, g_idx = (
            tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        assert (qweight.dtype, qzeros.dtype, g_idx.dtype) == (torch.int32,) * 3
        assert scales.dtype == torch.float16
        bits, group = settings(config, name)
        in_features, out = len(g_idx), scales.shape[1]
        assert qweight.shape == (in_features * bits // 32, out)
        assert qzeros.shape == (1 if group == -1 else in_features // group, out * bits // 32)
        assert scales.shape[0] == qzeros.shape[0]
        zeros = fields(qzeros.T.contiguous(), bits).T
        if config["checkpoint_format"] == "gptq":
            zeros = zeros + 1
        codes, group_of = fields(qweight, bits), g_idx.numpy()
        weight = scales.double().numpy()[group_of] * (codes - zeros[group_of])
        layers[name] = {"codes": codes, "zeros": zeros, "scales": scales.numpy(), "weight": weight}
    return layers, config


def own_weight(q: qft.QuantTensor, scales: torch.Tensor) -> np.ndarray:
    """`[in, out]`, fp64: what qft's codes and zero points stand for under scales `[out, groups]`."""
    levels = torch.tensor(q.format.levels, dtype=torch.float64)[q.unpack().long()]
    size = q.format.group_size(q.shape[1])
    if q.zeros is not None:
        levels = levels - q.zeros.double().repeat_interleave(size, 1)[:, : q.shape[1]]
    return (levels * scales.detach().double().repeat_interleave(size, 1)[:, : q.shape[1]]).T.numpy()


@pytest.mark.parametrize("zero", ["", " zero"])
@pytest.mark.parametrize("fmt", ["int4 g32 f16", "int3 g32 f16", "int2 g32 f16", "int8 g32 f16", "int4 channel f16"])
def test_a_reader_of_the_published_layout_gets_the_same_numbers(tmp_path, fmt, zero):
    model = packed(fmt + zero)
    errors = gptq.write(model, tmp_path / "g", tiny_lm.tokenizer())
    layers, config = read(tmp_path / "g")
    assert layers.keys() == quantized_layers(model).keys() == errors.keys()
    for path, q in quantized_layers(model).items():
        assert (q.unpack().numpy() == layers[path]["codes"].T).all()
        assert (torch.from_numpy(layers[path]["weight"].T).float() == q.dequantize()).all()
    assert max(errors.values()) == 0
    assert (config["sym"], config["checkpoint_format"]) == ((True, "gptq") if not zero else (False, "gptq_v2"))
    assert (config["bits"], config["group_size"]) == (q.format.bits, q.format.group or -1)
    assert (tmp_path / "g" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("fmt", ["int4 g32 f32", "int4 g32 dq", "int3 g32 bf16 zero", "int8 channel f32"])
def test_scales_are_rounded_to_fp16_and_nothing_else_changes(tmp_path, fmt):
    model = packed(fmt)
    errors = gptq.write(model, tmp_path / "g")
    for path, layer in read(tmp_path / "g")[0].items():
        q = quantized_layers(model)[path]
        assert (q.scales.half().numpy() == layer["scales"].T).all()
        assert (layer["weight"] == own_weight(q, q.scales.half())).all()
        own = own_weight(q, q.scales)
        assert errors[path] == pytest.approx(np.linalg.norm(layer["weight"] - own) / np.linalg.norm(own), rel=1e-3)
        assert errors[path] < 2**-11


def test_a_model_whose_scales_were_tuned(tmp_path):
    model = tuned_scales("int4 g32 f16")
    before = quantized_layers(packed("int4 g32 f16"))
    assert all((q.scales != before[path].scales).any() for path, q in quantized_layers(model).items())
    gptq.write(model, tmp_path / "g")
    for path, layer in read(tmp_path / "g")[0].items():
        q = quantized_layers(model)[path]
        assert q.format.scale == "f32"
        assert (layer["weight"] == own_weight(q, q.scales.half())).all()
        # rounding to fp16, which has 11 bits; below 2^-14 its steps are 2^-24
        bound = (2.0**-11 * q.scales.double().abs()).clamp(min=2.0**-25)
        assert (np.abs(layer["weight"] - own_weight(q, q.scales)) <= np.abs(own_weight(q, bound)) * (1 + 1e-9)).all()


@pytest.mark.parametrize("fmt", ["int4 g32 f16", "int3 g32 f32 zero", "int2 g32 f32"])
def test_a_merged_qa_lora_keeps_its_zero_points_in_8_bits(tmp_path, fmt, caplog):
    qft.notices.say_once.cache_clear()
    model = merged_qa_lora(fmt)
    zeros = torch.cat([q.zeros.flatten() for q in quantized_layers(model).values()])
    assert (zeros != zeros.round()).any()
    errors = gptq.write(model, tmp_path / "g")
    layers, config = read(tmp_path / "g")
    assert (config["bits"], config["sym"], config["checkpoint_format"]) == (8, True, "gptq")
    top = (1 << qft.Format.parse(fmt).bits) - 1
    for path, layer in layers.items():
        q = quantized_layers(model)[path]
        reach = torch.maximum(q.zeros.double(), top - q.zeros.double())  # from the zero point to the farthest code
        finest = (127.5 / reach).floor()  # a factor that keeps codes and zero points within 8 bits
        moved = 1 / (2 * finest) + 2.0**-11 * (reach + 1)  # of a step: by the zero point, and by the scale in fp16
        bound = (q.scales.double().abs() * moved).repeat_interleave(32, 1).T.numpy()
        own = own_weight(q, q.scales)
        assert (np.abs(layer["weight"] - own) <= bound).all()
        assert errors[path] == pytest.approx(np.linalg.norm(layer["weight"] - own) / np.linalg.norm(own), rel=1e-3)
    assert "zero points between integers" in caplog.text


def test_zero_points_of_8_bits_are_rounded(tmp_path):
    model = merged_qa_lora("int8 g32 f32")
    gptq.write(model, tmp_path / "g")
    layers, config = read(tmp_path / "g")
    assert (config["bits"], config["sym"]) == (8, False)
    for path, q in quantized_layers(model).items():
        assert (q.zeros.round().numpy() == layers[path]["zeros"].T).all()
        assert (q.unpack().numpy() == layers[path]["codes"].T).all()


def test_both_spellings_of_a_zero_point(tmp_path):
    model = packed("int3 g32 f16 zero")
    for q in quantized_layers(model).values():
        q.weight_zeros.data.clamp_(min=1)
    gptq.write(model, tmp_path / "one", checkpoint_format="gptq")
    gptq.write(model, tmp_path / "two", checkpoint_format="gptq_v2")
    (one, first), (two, second) = read(tmp_path / "one"), read(tmp_path / "two")
    assert (first["checkpoint_format"], second["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert not first["sym"]
    for path in one:
        assert (one[path]["zeros"] == two[path]["zeros"]).all()
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    name = "model.layers.0.self_attn.q_proj.qzeros"
    assert (fields(stored[0][name].T.contiguous(), 3) == fields(stored[1][name].T.contiguous(), 3) - 1).all()


def test_a_zero_point_of_0_needs_the_second_spelling(tmp_path):
    model = packed("int4 g32 f16 zero")
    model.model.layers[1].mlp.up_proj.weight_zeros.data[3, 1] = 0
    for path, q in quantized_layers(model).items():
        if path != "model.layers.1.mlp.up_proj":
            q.weight_zeros.data.clamp_(min=1)
    with pytest.raises(qft.FormatError, match=r"layers.1.mlp.up_proj has a zero point of 0.*write gptq_v2"):
        gptq.write(model, tmp_path / "g", checkpoint_format="gptq")
    assert nothing_at(tmp_path / "g")
    gptq.write(model, tmp_path / "g")
    assert read(tmp_path / "g")[0]["model.layers.1.mlp.up_proj"]["zeros"][1, 3] == 0


def test_layers_may_differ_and_some_be_dense(tmp_path):
    own = {"down_proj": "int8 channel", "layers.1.*.up_proj": "int3 g32", "layers.1.*.gate_proj": "int3 g32"}
    named = {pattern if "." not in pattern else f"model.{pattern}": fmt for pattern, fmt in own.items()}
    model = packed("int4 g32 f16", formats=named, skip=["k_proj"])
    gptq.write(model, tmp_path / "g", dense=["model.layers.0.self_attn.v_proj"])
    layers, config = read(tmp_path / "g")
    tensors = load_file(tmp_path / "g" / "model.safetensors")
    for path, q in quantized_layers(model).items():
        if path == "model.layers.0.self_attn.v_proj":
            assert (tensors[f"{path}.weight"] == q.dequantize()).all()
            assert settings(config, path) is None
        else:
            assert settings(config, path) == (q.format.bits, q.format.group or -1)
            assert (layers[path]["weight"] == own_weight(q, q.scales.half())).all()
    assert settings(config, "model.layers.1.self_attn.k_proj") is None
    # vLLM asks for the layer that it makes of gate and up
    assert settings(config, "model.layers.1.mlp.gate_up_proj") == (3, 32)
    assert settings(config, "model.layers.0.mlp.gate_up_proj") == (4, 32)
    assert not config["lm_head"]
    assert "modules_in_block_to_quantize" not in config  # which v_proj, dense in one block, would contradict


def test_layers_dense_in_every_block_are_named_for_optimum_too(tmp_path):
    gptq.write(packed("int4 g32 f16"), tmp_path / "g", dense=["k_proj", "up_proj"])
    named = read(tmp_path / "g")[1]["modules_in_block_to_quantize"]
    attention = ["self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert named == [["mlp.down_proj", "mlp.gate_proj", *attention]]


def test_a_packed_head_is_said_to_be_one(tmp_path):
    model = qft.quantize_model(tiny_lm.model(256), "int4 g32 f16", formats={"lm_head": "int4 g32 f16"})
    gptq.write(model, tmp_path / "g")
    layers, config = read(tmp_path / "g")
    assert config["lm_head"]
    assert "lm_head" in layers
    assert json.loads((tmp_path / "g" / "config.json").read_text())["tie_word_embeddings"] is False


def test_writing_leaves_the_model_as_it_was(tmp_path):
    model = tuned_scales("int4 g32 f16")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    gptq.write(model, tmp_path / "g", dense=["q_proj"])
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(q.weight_scales.requires_grad for q in quantized_layers(model).values())


def test_experts_are_written_one_by_one(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    model = qft.quantize_model(MixtralForCausalLM(MixtralConfig(**size, **heads)), "int4 g32 f16 zero")
    gptq.write(model, tmp_path / "g")
    layers, config = read(tmp_path / "g")
    experts = model.model.layers[0].mlp.experts.dequantize()
    for expert in range(3):
        gate, up = experts["gate_up_proj"][expert].chunk(2)
        for name, own in (("w1", gate), ("w3", up), ("w2", experts["down_proj"][expert])):
            path = f"model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            assert (torch.from_numpy(layers[path]["weight"].T).float() == own).all()
    assert settings(config, "model.layers.0.block_sparse_moe.gate") is None


def refusals():
    def lora(model):
        for layer in model.modules():
            if isinstance(layer, qft.QuantLinear):
                layer.add_lora(2)

    def overflow(model):
        model.model.layers[0].mlp.up_proj.weight_scales.data[5, 1] = 1e5

    def far(model):
        model.model.layers[0].mlp.up_proj.weight_zeros.data[5, 1] = 1e4 + 0.5

    def pooled(model):
        qft.add_pooled_lora(model, 2)

    def nothing(model):
        pass

    q_proj, up_proj = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj, row 5, group 1"
    return {
        "codebook": ("nf4 g32 f16", nothing, f"{q_proj} stores nf4 g32 f16, and GPTQ holds integer codes"),
        "lora": ("int4 g32 f16", lora, f"{q_proj} carries a LoRA, which GPTQ files do not hold"),
        "pooled": ("int4 g32 f16", pooled, "carries a LoRA.*merge_pooled"),
        "short group": ("int4 g64 f16", nothing, "down_proj has in_features=96, which groups of 64"),
        "overflow": ("int4 g32 f32", overflow, f"the scale of {up_proj} exceeds fp16's 65504"),
        "far": ("int4 g32 f32 zero", far, f"the zero point 10000.5 of {up_proj} is too far"),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_gptq_cannot_hold_is_named(tmp_path, case):
    fmt, change, message = refusals()[case]
    model = packed(fmt)
    change(model)
    with pytest.raises(qft.FormatError, match=message):
        gptq.write(model, tmp_path / "g")
    assert nothing_at(tmp_path / "g")


def test_shapes_that_end_inside_a_word_are_refused(tmp_path):
    model = packed("int4 g32 f16", formats={"lm_head": "int8 g32"})
    with pytest.raises(qft.FormatError, match="lm_head has out_features=257, and GPTQ packs 8-bit codes 4 at a time"):
        gptq.write(model, tmp_path / "g")
    with pytest.raises(qft.FormatError, match="out_features=257, and GPTQ packs 3-bit codes 32 at a time"):
        gptq.write(packed("int4 g32 f16", formats={"lm_head": "int3 g32"}), tmp_path / "g")
    gptq.write(model, tmp_path / "g", dense=["lm_head"])


def test_bad_arguments_are_refused(tmp_path):
    model = packed("int4 g32 f16")
    with pytest.raises(ValueError, match=r"checkpoint_format 'gptq_v3' is unknown; use one of gptq, gptq_v2"):
        gptq.write(model, tmp_path / "g", checkpoint_format="gptq_v3")
    with pytest.raises(ValueError, match="'x_proj' names no quantized layer"):
        gptq.write(model, tmp_path / "g", dense=["x_proj"])
    with pytest.raises(ValueError, match="all quantized layers are named in dense"):
        gptq.write(model, tmp_path / "g", dense=["*"])
    with pytest.raises(ValueError, match="the model holds no quantized layer"):
        gptq.write(tiny_lm.model(), tmp_path / "g")
    with pytest.raises(ValueError, match="Sequential is no transformers model"):
        gptq.write(torch.nn.Sequential(torch.nn.Linear(32, 32)), tmp_path / "g")
    assert nothing_at(tmp_path / "g")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        gptq.write(model, tmp_path / "g")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
def test_adapters_that_are_not_the_layers_own_are_refused(tmp_path):
    import peft

    model = packed("int4 g32 f16")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PeftModel is no transformers model.*merge_and_unload"):
        gptq.write(wrapped, tmp_path / "g")
    with pytest.raises(ValueError, match="q_proj carries an adapter of PEFT"):
        gptq.write(model, tmp_path / "g")
    gptq.write(wrapped.unload(), tmp_path / "g")
    multi = packed("int4 g32 f16")
    qft.add_multilora(multi, 2, 2)
    with pytest.raises(ValueError, match="q_proj is a MultiLoRALinear; merge or release its adapter"):
        gptq.write(multi, tmp_path / "h")


def test_words_hold_fields_in_order():
    """Of 3-bit codes, AutoGPTQ's own table: the 11th and the 22nd lie across two words."""
    codes = torch.arange(32, dtype=torch.uint8) % 8
    words_of = [word & 0xFFFFFFFF for word in words.pack(codes[None], 3)[0].tolist()]
    assert words_of[0] == sum((i % 8) << (3 * i) for i in range(10)) | (10 % 8 & 3) << 30
    assert words_of[1] & 1 == (10 % 8) >> 2
    assert words_of[1] >> 31 == (21 % 8) & 1
    assert words_of[2] & 3 == (21 % 8) >> 1
    assert words_of[2] >> 29 == 31 % 8
    for bits in (2, 3, 4, 8):
        given = torch.randint(0, 1 << bits, (5, 70), dtype=torch.uint8)
        assert (fields(words.pack(given, bits).T.contiguous(), bits).T[:, :70] == given.numpy()).all()
