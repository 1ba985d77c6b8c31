"""Adapters on disk: PEFT reads ours, we read PEFT's, and what is no plain LoRA of this base is refused by name."""

import json
import math
import warnings

import peft
import pytest
import tiny_lm
import torch
from safetensors.torch import load_file, save_file

import qft
from qft import FormatError
from qft.adapters.peft_format import Factors, attach, describe_adapter, lora_factors, read_factors

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def dense():
    return tiny_lm.model()


def packed(rank=4, **keywords):
    """The tiny model, packed, with a LoRA that does something."""
    model = qft.quantize_model(tiny_lm.model(), "nf4 g64 f32", rank=rank, **keywords)
    generator = torch.Generator().manual_seed(1)
    for factors in lora_factors(model).values() if rank else ():
        factors.B.data.normal_(generator=generator)
    return model


def products(model):
    """What each layer's LoRA adds to its weight."""
    return {path: f.shape.scaling * (f.B @ f.A).detach() for path, f in lora_factors(model).items()}


def peft_products(model):
    """The same of a model that PEFT has wrapped."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def from_peft(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for names it has since renamed
        return peft.PeftModel.from_pretrained(tiny_lm.model(), directory)


def make_with_peft(directory, dtype=torch.float32, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(tiny_lm.model(), peft.LoraConfig(**keywords))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(directory)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, product in ours.items():
        assert (product - theirs[path]).norm() <= 1e-6 * product.norm() > 0


def mixed():
    """Ranks, alphas and even scalings that differ between layers, on some of the layers."""
    model = packed(rank=0)
    layers = dict(model.named_modules())
    for path, rank, alpha, rslora in (
        ("model.layers.0.self_attn.q_proj", 4, 8, False),
        ("model.layers.1.self_attn.q_proj", 4, 8, False),
        ("model.layers.0.mlp.down_proj", 2, 3, False),
        ("model.layers.1.mlp.up_proj", 8, 8, True),
        ("model.layers.1.self_attn.k_proj", 1, 5, True),
    ):
        layers[path].add_lora(rank, alpha, rslora=rslora, B=torch.randn(layers[path].out_features, rank))
    return model


@pytest.mark.parametrize(
    "make",
    [
        packed,
        lambda: packed(alpha=16),
        lambda: packed(alpha=16, rslora=True),
        lambda: packed(rank=1),
        lambda: packed(dropout=0.25),
        lambda: packed(rank=48),  # k_proj and v_proj hold 32 only
        mixed,
    ],
    ids=["plain", "alpha", "rslora", "rank 1", "dropout", "capped ranks", "mixed"],
)
def test_what_we_save_peft_and_we_load_with_the_same_products(make, tmp_path):
    model = make()
    qft.save_adapter(model, tmp_path)
    assert_same(products(model), peft_products(from_peft(tmp_path)))
    again = qft.load_adapter(packed(rank=0), tmp_path)
    for (path, ours), theirs in zip(lora_factors(model).items(), lora_factors(again).values(), strict=True):
        assert torch.equal(ours.A, theirs.A), path
        assert torch.equal(ours.B, theirs.B), path
        assert math.isclose(ours.shape.scaling, theirs.shape.scaling, rel_tol=1e-12)


def test_uniform_settings_come_back_as_they_were(tmp_path):
    qft.save_adapter(packed(rank=5, alpha=10, rslora=True, dropout=0.25), tmp_path)  # 10 / √5 · √5 is not 10
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (5, 10, True, 0.25)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["task_type"] == "CAUSAL_LM"
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == names
    layer = qft.load_adapter(packed(rank=0), tmp_path).model.layers[1].mlp.up_proj
    assert (layer.lora_rank, layer.lora_alpha, layer.lora_dropout.p) == (5, 10, 0.25)
    assert layer.lora_scaling == 10 / math.sqrt(5)


@pytest.mark.parametrize(
    ("keywords", "dtype"),
    [
        ({"target_modules": "all-linear"}, torch.float32),
        ({"target_modules": ["q_proj"], "use_rslora": True}, torch.float32),
        ({"target_modules": ["q_proj", "v_proj"]}, torch.bfloat16),
        (
            {
                "target_modules": r".*\.(q|down)_proj",
                "rank_pattern": {"down_proj": 2},
                "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 3, "down_proj": 5},
            },
            torch.float32,
        ),
    ],
    ids=["all-linear", "rslora", "bf16", "patterns"],
)
def test_what_peft_saves_we_load_with_the_same_products(keywords, dtype, tmp_path):
    make_with_peft(tmp_path, dtype, r=4, lora_alpha=9, **keywords)
    theirs = from_peft(tmp_path)  # read again: its file sorts the patterns, and the first that matches counts
    model = qft.load_adapter(packed(), tmp_path)  # its own LoRA, on every layer, goes
    assert_same(products(model), peft_products(theirs))
    assert all(f.A.dtype == torch.float32 and f.A.requires_grad for f in lora_factors(model).values())


def test_outputs_agree_with_peft_on_what_the_codes_stand_for(tmp_path, dense):
    model = packed()
    qft.save_adapter(model, tmp_path)
    with torch.no_grad():
        for path, module in dense.named_modules():
            twin = dict(model.named_modules())[path]
            if isinstance(twin, qft.QuantLinear):
                module.weight.copy_(twin.dequantize())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(dense, tmp_path)
    ids = torch.arange(20)[None]
    ours = model(ids).logits
    assert (theirs(ids).logits - ours).norm() <= 1e-5 * ours.norm()


def test_loading_leaves_codes_and_scales_alone(tmp_path):
    qft.save_adapter(packed(), tmp_path)
    model = packed(rank=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qft.load_adapter(model, tmp_path)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert len(after) == len(before) + 2 * 14


def test_a_description_reads_no_values(tmp_path):
    qft.save_adapter(packed(alpha=8), tmp_path)
    shapes = describe_adapter(tmp_path)
    assert len(shapes) == 14
    shape = shapes["model.layers.0.mlp.down_proj"]
    assert (shape.rank, shape.in_features, shape.out_features, shape.scaling) == (4, 96, 64, 2)


def test_the_scaling_folds_into_the_factors():
    factors = Factors(torch.randn(3, 5), torch.randn(7, 3), alpha=12, rslora=True)
    a, b = factors.unscaled()
    assert torch.allclose(b @ a, 12 / math.sqrt(3) * factors.B @ factors.A)


def test_a_failed_save_leaves_the_older_adapter(tmp_path, monkeypatch):
    model = packed()
    qft.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qft.disk.tensor_file.write", full)
    with pytest.raises(OSError, match="No space"):
        qft.save_adapter(packed(rank=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def saved(tmp_path):
    """An adapter to spoil: a directory, and the function that rewrites its parts."""
    qft.save_adapter(packed(), tmp_path)

    def spoil(config=None, tensors=None):
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        if tensors:
            held = load_file(tmp_path / "adapter_model.safetensors") | tensors
            held = {name: tensor for name, tensor in held.items() if tensor is not None}
            save_file(held, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        return tmp_path

    return spoil


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "LOHA"}, None, "describes a LOHA, not a LoRA"),
        ({"use_dora": True}, None, "uses use_dora"),
        ({"alora_invocation_tokens": [3]}, None, "uses alora_invocation_tokens"),
        ({"r": "four"}, None, "out of its range"),
        ({"lora_alpha": 0}, None, "out of its range"),
        ({"lora_dropout": 1.5}, None, "out of its range"),
        ({"alpha_pattern": {"(": 2}}, None, "is damaged"),
        ({"r": 5}, None, "has rank 4 at .* and 5 in adapter_config.json"),
        (None, {NAME: None}, r"holds A \[\] and B \[64, 4\] for model.layers.0.self_attn.q_proj"),
        (None, {NAME: torch.full((4, 64), float("nan"))}, "q_proj that is not finite"),
        (None, {NAME: torch.zeros(4, 32)}, r"adapts .*q_proj as \[64, 32\], which is \[64, 64\] here"),
        (None, {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "holds base_model.model.lm_head.weight, which"),
        (
            None,
            {f"base_model.model.lm_head.lora_{f}.weight": torch.zeros(4, 4) for f in "AB"},
            "adapts lm_head, which is no quantized layer",
        ),
    ],
)
def test_what_is_no_plain_lora_of_this_model_is_refused_and_the_model_kept(saved, config, tensors, message):
    model = packed()
    before = products(model)
    with pytest.raises(FormatError, match=message):
        qft.load_adapter(model, saved(config, tensors))
    after = products(model)
    assert all(torch.equal(after[path], product) for path, product in before.items())


def test_damaged_or_missing_files_are_named(saved, tmp_path):
    directory = saved()
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"adapter_model.safetensors is damaged"):
        read_factors(directory)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match=r"adapter_config.json is damaged"):
        read_factors(directory)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json; give a LoRA written by"):
        qft.load_adapter(packed(), tmp_path / "nowhere")


def test_a_rank_that_a_layer_cannot_hold_is_refused():
    model = packed(rank=0)
    wide = Factors(torch.zeros(40, 64), torch.zeros(32, 40), 40)
    with pytest.raises(FormatError, match=r"has rank 40 at model.layers.0.self_attn.k_proj, which holds 32 at most"):
        attach(model, {"model.layers.0.self_attn.k_proj": wide})


def test_a_model_without_a_lora_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match=r"carries a LoRA; call add_lora or qft\.load_adapter"):
        qft.save_adapter(packed(rank=0), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_pooled_lora_is_no_plain_one(tmp_path):
    model = qft.add_pooled_lora(qft.quantize_model(tiny_lm.model(), "int4 g32 f32"), 2)
    with pytest.raises(
        ValueError, match=r"the LoRA of model\.layers\.0\.\S+ is pooled, .* merge it with qft\.merge_pooled"
    ):
        qft.save_adapter(model, tmp_path / "none")
