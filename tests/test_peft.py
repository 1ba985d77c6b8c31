"""PEFT's layers around QuantLinears: how they get there, what merging does, what is refused and with which words."""

import copy
import importlib.util
import io
import logging
import subprocess
import sys

import peft
import pytest
import tiny_lm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import qft
from qft.import_hook import when_imported
from qft.integrations import peft as integration
from qft.integrations.peft_dora import PackedDora
from qft.integrations.peft_weight import effective_weight
from qft.nn.linear import FloatFacingQuantLinear, QuantLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft reads it

TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS = {
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
}


def packed(fmt="nf2 g64 f16"):
    return qft.quantize_model(tiny_lm.model(), fmt)


def batch():
    ids = torch.arange(40).reshape(2, 20) % tiny_lm.VOCABULARY
    return {"input_ids": ids, "labels": ids}


def logits(model, **more):
    with torch.no_grad():
        return model(**batch(), **more).logits


def stir(model, adapter="default", seed=1):
    """Give an adapter values as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if f".{adapter}" in name:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model.eval()


def tuned(method="lora", fmt="nf2 g64 f16", base=None):
    torch.manual_seed(0)
    return stir(get_peft_model(packed(fmt) if base is None else base, METHODS[method]()))


def tuner_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def contents(model):
    """Everything that a model's packed layers store, biases and all."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return [tensor.clone() for layer in layers for tensor in layer.state_dict().values()]


def same(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------ getting in

IN_ORDER = """
import {first}
import {second}
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
import torch, qft
from torch import nn
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
qft.quantize_model(model, "nf2 g64 f16")
model[1].float()
prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
print({{layer.weight_scales.dtype for layer in model}}, {{layer.bias.dtype for layer in model}})
tuned = get_peft_model(model, LoraConfig(target_modules=["0", "1"], use_dora=True, init_lora_weights=False))
x = torch.randn(3, 64)
before = tuned(x)
tuned.merge_adapter()
print(torch.equal(tuned(x), before))
tuned.unmerge_adapter()
print(torch.equal(tuned(x), before), type(tuned.base_model.model[0]).__mro__[1].__name__)
"""


@pytest.mark.parametrize(("first", "second"), [("peft", "qft"), ("qft", "peft")])
def test_it_installs_itself_in_either_order(first, second):
    program = IN_ORDER.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "{torch.float16} {torch.float32}\nFalse\nTrue OnPacked\n", done.stderr


def test_a_name_imported_early_is_replaced_too():
    """`from peft import prepare_model_for_kbit_training` before qft is loaded, as scripts do."""
    module = type(sys)("script")
    module.borrowed = module.prepare = original = lambda: "original"
    original.__name__ = "borrowed"
    sys.modules["script"] = module
    try:
        integration._replace_everywhere(original, lambda function: (function(), "replaced"))
        assert module.borrowed() == ("original", "replaced")
    finally:
        del sys.modules["script"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "late_package.py").write_text("ready = False\nready = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late_package", raising=False)
    yield "late_package"
    sys.modules.pop("late_package", None)


def test_a_call_is_made_once_after_the_package_has_run(package):
    finders, calls = list(sys.meta_path), []
    when_imported(package, lambda: calls.append(sys.modules[package].ready))
    assert importlib.util.find_spec(package)  # asking whether it is there imports nothing
    assert calls == []
    importlib.import_module(package)
    assert calls == [True]
    assert sys.meta_path == finders
    importlib.reload(sys.modules[package])
    assert calls == [True]
    when_imported(package, lambda: calls.append("at once"))
    assert calls == [True, "at once"]


def test_a_package_that_fails_or_is_missing_is_met_when_it_works(package, tmp_path):
    source, calls = tmp_path / "late_package.py", []
    when_imported(package, lambda: calls.append(1))
    when_imported("no_such_package", lambda: calls.append(2))
    good = source.read_text()
    source.write_text("raise KeyError('broken for now')")
    with pytest.raises(KeyError):
        importlib.import_module(package)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_package")
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "package", None) != "no_such_package"]
    source.write_text(good + "\n# longer, so that the bytecode of before does not count\n")
    importlib.import_module(package)
    assert calls == [1]


def bare_new(cls, *args, **kwargs):
    """object's own, spelled out: a class that once had a `__new__` keeps a slot for it when it is deleted."""
    return object.__new__(cls)


@pytest.mark.parametrize(
    ("version", "maker", "words"),
    [
        ("0.17.1", bare_new, "is older than 0.18"),
        ("9.0", lambda cls: None, "has layers that are built otherwise"),
    ],
)
def test_another_peft_is_left_alone_and_lora_still_merges(monkeypatch, caplog, tmp_path, version, maker, words):
    monkeypatch.setattr(BaseTunerLayer, "__new__", staticmethod(maker))
    monkeypatch.setattr(peft, "__version__", version)
    with caplog.at_level(logging.WARNING, logger="qft"):
        integration.install()
    assert words in caplog.text
    assert BaseTunerLayer.__new__ is maker
    if maker is bare_new:  # what the module's text offers instead
        config = LoraConfig(target_modules=TARGETS, init_lora_weights=False)
        config._register_custom_module({QuantLinear: integration.on_packed(peft.tuners.lora.Linear)})
        model = get_peft_model(packed(), config).eval()
        before = logits(model)
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)
        model.save_pretrained(tmp_path)
        again = LoraConfig.from_pretrained(tmp_path)  # the file does not hold the mapping
        again._register_custom_module({QuantLinear: integration.on_packed(peft.tuners.lora.Linear)})
        loaded = PeftModel.from_pretrained(packed(), tmp_path, config=again).eval()
        assert torch.equal(logits(loaded), before)
        assert {type(layer.base_layer) for layer in tuner_layers(loaded)} == {QuantLinear}
        merged = loaded.merge_and_unload()
        assert {layer.format for layer in merged.modules() if isinstance(layer, QuantLinear)} == {
            qft.Format.parse("nf2 g64 f16")
        }


def test_dense_layers_keep_their_classes():
    model = get_peft_model(tiny_lm.model(), METHODS["lora"]())
    assert {type(layer) for layer in tuner_layers(model)} == {peft.tuners.lora.Linear}


# ------------------------------------------------------------------------------------------------ starts


@pytest.mark.parametrize(
    ("start", "more"),
    [
        ("pissa", {}),
        ("pissa_niter_4", {}),
        ("olora", {}),
        ("loftq", {"loftq_config": peft.LoftQConfig(loftq_bits=4)}),
        ("corda", {"corda_config": CordaConfig()}),
    ],
)
def test_a_start_that_needs_the_dense_weight_names_qfts_own(start, more):
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=start, **more)
    with pytest.raises(
        ValueError, match=r"nf2 g64 f16; start from the dense model with qft.quantize_model\(.*init='loftq'"
    ):
        get_peft_model(packed(), config)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_a_start_that_needs_no_weight_works(start):
    base = packed()
    before = logits(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=start)).eval()
    assert (logits(model) - before).abs().max() < 1e-6
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_eva_starts_from_activations():
    base = packed()
    before = logits(base)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(model, [batch()] * 3, show_progress_bar=False)
    assert torch.equal(logits(model.eval()), before)
    for layer in tuner_layers(model):  # A holds directions of the inputs, orthogonal ones
        a = layer.lora_A["default"].weight
        assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-4)


def test_packed_parameters_are_no_targets_of_their_own():
    with pytest.raises(ValueError, match="name its layer in target_modules instead"):
        get_peft_model(packed(), LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]))


@pytest.mark.parametrize("name", ["lm_head", "mlp"])
def test_packed_modules_are_not_trained_whole(name):
    base = qft.quantize_model(tiny_lm.model(), "nf2 g64 f16", formats={"lm_head": "int8 g32"})
    with pytest.raises(ValueError, match=r"this QuantLinear is packed as .*; name it in target_modules, or leave it"):
        get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS[:1], modules_to_save=[name]))
    model = get_peft_model(packed(), LoraConfig(r=4, target_modules=TARGETS[:1], modules_to_save=["norm"]))
    assert model.base_model.model.model.norm.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize("config", ["HRAConfig", "HiraConfig", "ShiraConfig"])
def test_a_method_that_reads_the_dense_weight_says_so(config):
    kind = getattr(peft, config)
    words = "reads the dense weight at every step, this one is packed as nf2 g64 f16; LoRA, DoRA"
    with pytest.raises(ValueError, match=words):
        get_peft_model(packed(), kind(r=2, target_modules=TARGETS))
    get_peft_model(tiny_lm.model(), kind(r=2, target_modules=TARGETS))


def test_a_layer_with_another_adapter_is_refused():
    class OtherLinear(QuantLinear):
        """As GLoRALinear is one."""

    base = packed()
    base.model.layers[0].self_attn.q_proj.__class__ = OtherLinear
    with pytest.raises(ValueError, match="PEFT cannot go around a OtherLinear; merge or release its adapter first"):
        get_peft_model(base, METHODS["lora"]())


# ------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize(
    "methods", [("lora", "lora"), ("lora", "dora"), ("dora", "dora"), ("ia3", "ia3"), ("loha", "loha")]
)
def test_adapters_merged_one_by_one_are_rounded_once(methods):
    model = tuned(methods[0], "int3 g32 f16 zero")
    model.add_adapter("second", METHODS[methods[1]]())
    stir(model, "second", seed=2)
    start = contents(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["second"])
    assert [layer.merged_adapters for layer in tuner_layers(model)] == [["default", "second"]] * 6
    stepwise = contents(model)
    model.unmerge_adapter()
    assert same(contents(model), start)
    model.merge_adapter(["default", "second"])
    assert same(contents(model), stepwise)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(["default"])
    assert same(contents(model), stepwise)
    with model.disable_adapter():  # PEFT unmerges for it
        assert torch.equal(logits(model), logits(packed("int3 g32 f16 zero")))
    assert same(contents(model), start)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [(float("nan"), ValueError, "NaN|finite"), (1e7, qft.FormatError, "the scale of the merged weight.*fp16's 65504")],
)
def test_a_merge_that_fails_changes_nothing(safe, value, error, words):
    model = tuned()
    model.add_adapter("bad", METHODS["lora"]())
    for layer in tuner_layers(model):
        layer.lora_B["bad"].weight.data.fill_(value)
    model.merge_adapter(["default"])
    merged = contents(model)
    with pytest.raises(error, match=words), pytest.warns(UserWarning, match="Already following"):
        tuner_layers(model)[0].merge(safe, ["bad"])
    assert same(contents(model), merged)
    assert tuner_layers(model)[0].merged_adapters == ["default"]
    model.unmerge_adapter()
    assert same(contents(model), contents(packed()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pooled", [False, True])
def test_a_lora_of_qfts_own_stays_beside_what_is_merged(method, pooled):
    """With 8 bits, where rounding is small enough to see that the two add up."""
    base = packed("int8 g32 f32")
    for seed, layer in enumerate(module for module in base.modules() if isinstance(module, QuantLinear)):
        layer.add_lora(2, alpha=4, pooled=pooled)
        layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(seed))
    own = [layer.lora_B.clone() for layer in base.modules() if isinstance(layer, QuantLinear)]
    before = logits(base)
    model = get_peft_model(base, METHODS[method]()).eval()
    assert torch.equal(logits(model), before)
    stir(model)
    assert not any(p.requires_grad for layer in tuner_layers(model) for p in layer.get_base_layer().parameters())
    after = logits(model)
    result = model.merge_and_unload()
    assert (logits(result) - after).norm() < 0.1 * (after - before).norm()
    assert same([layer.lora_B for layer in result.modules() if isinstance(layer, QuantLinear)], own)


def test_a_lora_of_qfts_own_is_frozen_and_that_is_said(caplog):
    qft.notices.say_once.cache_clear()
    layer = QuantLinear.from_linear(nn.Linear(64, 32), "nf2 g64 f16")
    layer.add_lora(2)
    with caplog.at_level(logging.WARNING, logger="qft"):
        integration.on_packed(peft.tuners.lora.Linear)(layer, "default", LoraConfig(), r=4, lora_alpha=4)
    assert not layer.lora_A.requires_grad
    assert not layer.lora_B.requires_grad
    assert "PEFT freezes the LoRA that these layers have of their own" in caplog.text


def test_a_layer_whose_scales_trained_merges_and_gets_them_back():
    base = qft.train_only(packed("nf4 g64 dq"), "scales")
    scales = {id(p) for name, p in base.named_parameters() if name.endswith("weight_scales")}
    model = tuned(base=base)
    for name, p in base.named_parameters():
        p.requires_grad_(name.endswith("weight_scales"))
    for layer in tuner_layers(model):
        layer.get_base_layer().weight_scales.data *= 1.01
    before = contents(model)
    model.merge_adapter()
    assert {str(layer.get_base_layer().format) for layer in tuner_layers(model)} == {"nf4 g64 f32"}
    model.unmerge_adapter()
    assert same(contents(model), before)
    now = {id(p) for name, p in base.named_parameters() if name.endswith("weight_scales") and p.requires_grad}
    assert now == scales  # those that an optimizer may hold


def test_biases_are_merged_and_put_back():
    base = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    qft.quantize_model(base, "int8 g32 f32")
    x = torch.randn(5, 64)
    for config in (
        LoraConfig(r=2, target_modules=["0", "1"], lora_bias=True, init_lora_weights=False),
        peft.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]),
    ):
        model = stir(get_peft_model(copy.deepcopy(base), config))
        before, bias = model(x), model.base_model.model[0].base_layer.bias.clone()
        model.merge_adapter(safe_merge=True)
        assert not torch.equal(model.base_model.model[0].base_layer.bias, bias)
        assert (model(x) - before).norm() < 0.02 * before.norm()
        model.unmerge_adapter()
        assert torch.equal(model.base_model.model[0].base_layer.bias, bias)
        assert torch.equal(model(x), before)


def test_dora_scales_no_bias():
    base = nn.Sequential(nn.Linear(64, 32))
    nn.init.constant_(base[0].bias, 9.0)
    qft.quantize_model(base, "int8 g32 f32")
    model = stir(get_peft_model(base, LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False)))
    x = torch.randn(5, 64)
    before = model(x)
    model.merge_adapter()
    assert (model(x) - before).norm() < 0.02 * (before - 9.0).norm()


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_layer_that_faces_its_parent_with_floats_merges(kind):
    if kind == "lora":
        adapter = LoraConfig(r=2, target_modules=["wo", "q"])
    else:
        adapter = peft.IA3Config(target_modules=["wo", "q"], feedforward_modules=["wo"])
    config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=1, decoder_start_token_id=0)
    base = qft.quantize_model(T5ForConditionalGeneration(config).eval(), "int8 g32 f32")
    facing = [module for module in base.modules() if isinstance(module, FloatFacingQuantLinear)]
    model = stir(get_peft_model(base, adapter))
    ids = torch.arange(6)[None]
    before = model(input_ids=ids, decoder_input_ids=ids).logits
    result = model.merge_and_unload()
    assert (result(input_ids=ids, decoder_input_ids=ids).logits - before).norm() < 0.02 * before.norm()
    assert [module for module in result.modules() if isinstance(module, FloatFacingQuantLinear)] == facing
    assert len(facing) == 2


def test_a_merge_says_once_that_it_rounds(caplog):
    qft.notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="qft"):
        model = tuned(fmt="int4 g64 f32")
        at_start = [layer.errors for layer in qft.report(model).quantized]
        model.merge_adapter()
    assert caplog.text.count("merging rounds weights to int4 g64 f32 once more; qft.report(model)") == 1
    errors = [layer.errors for layer in qft.report(model).quantized if "q_proj" in layer.path]
    assert all(0.01 < error < 0.2 for (error,) in errors)
    model.unmerge_adapter()
    assert [layer.errors for layer in qft.report(model).quantized] == at_start


# ------------------------------------------------------------------------------------------------ several adapters


def two_adapters():
    model = tuned()
    model.add_adapter("second", METHODS["lora"]())
    return stir(model, "second", seed=2)


def test_a_batch_mixes_adapters():
    model = two_adapters()
    mixed = logits(model, adapter_names=["second", "__base__"])
    model.set_adapter("second")
    assert (logits(model)[0] - mixed[0]).abs().max() < 1e-5
    assert (logits(packed())[1] - mixed[1]).abs().max() < 1e-5
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(packed()))


@pytest.mark.parametrize("combination", ["linear", "svd", "cat", "ties_svd", "dare_linear", "magnitude_prune"])
def test_adapters_are_combined(combination):
    model = two_adapters()
    density = {"density": 0.5} if combination[:4] in ("ties", "dare", "magn") else {}
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type=combination, **density)
    model.set_adapter("both")
    layer = tuner_layers(model)[0]
    if combination in ("svd", "cat"):
        wanted = 0.7 * layer.get_delta_weight("default") + 0.3 * layer.get_delta_weight("second")
        if combination == "cat":
            assert (layer.get_delta_weight("both") - wanted).norm() < 1e-5 * wanted.norm()
        else:
            assert (layer.get_delta_weight("both") - wanted).norm() < wanted.norm()
    before = logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_adapters_are_loaded_beside_others(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(packed(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert torch.equal(logits(loaded.eval()), logits(model))


def test_all_linear_finds_every_packed_layer():
    model = get_peft_model(packed(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    around = {id(layer.get_base_layer()) for layer in tuner_layers(model)}
    assert around == {id(module) for module in model.modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("method", METHODS)
def test_a_file_of_plain_pefts_loads_on_packed_layers_and_is_saved_as_it_was(method, tmp_path):
    dense = tiny_lm.model()
    for path, layer in packed().named_modules():
        if isinstance(layer, QuantLinear):
            dense.get_submodule(path).weight.data = layer.dequantize()
    plain = stir(get_peft_model(dense, METHODS[method]()))
    plain.save_pretrained(tmp_path / "plain")
    loaded = PeftModel.from_pretrained(packed(), tmp_path / "plain").eval()
    assert (logits(loaded) - logits(plain)).abs().max() < 1e-4
    loaded.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "again"))
    assert before.keys() == after.keys()
    assert same(list(before.values()), [after[name] for name in before])


@pytest.mark.parametrize("method", METHODS)
def test_a_tuned_model_is_pickled_and_copied_merged_or_not(method):
    model = tuned(method)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
            assert torch.equal(logits(other), logits(model))
            if merged:
                other.unmerge_adapter()
                assert same(contents(other), contents(packed()))


# ------------------------------------------------------------------------------------------------ DoRA


@pytest.mark.parametrize("pooled", [False, True])
def test_the_weight_that_peft_sees_is_the_one_the_layer_multiplies_with(pooled):
    layer = QuantLinear.from_linear(nn.Linear(90, 40), "int4 g32 f32 zero")
    layer.add_lora(3, alpha=5, B=torch.randn(40, 3), pooled=pooled, dropout=0.5)
    assert torch.allclose(effective_weight(layer), layer.eval()(torch.eye(90)).T - layer.bias[:, None], atol=1e-6)


@pytest.mark.parametrize("own", [False, True])
def test_doras_norm_is_that_of_the_dense_matrix(own):
    layer = QuantLinear.from_linear(nn.Linear(96, 40), "nf2 g64 f16")
    if own:
        layer.add_lora(3, B=torch.randn(40, 3))
    a, b = torch.randn(4, 96), torch.randn(40, 4)
    dora = PackedDora(fan_in_fan_out=False)

    def exact():
        return (effective_weight(layer).double() + 0.5 * b.double() @ a.double()).norm(dim=1)

    assert torch.allclose(dora.norm(layer, a, b, 0.5).double(), exact(), rtol=1e-6)
    with torch.no_grad():  # whatever changes the weight
        layer.weight_scales *= 1.5
    assert torch.allclose(dora.norm(layer, a, b, 0.5).double(), exact(), rtol=1e-6)
    layer.set_quantized(qft.quantize(torch.randn(40, 96), "nf2 g64 f16"))
    assert torch.allclose(dora.norm(layer, a, b, 0.5).double(), exact(), rtol=1e-6)


@pytest.mark.parametrize("method", ["dora", "loha"])
def test_no_dense_weight_is_made_to_train(method, monkeypatch):
    config = METHODS[method]()
    if method == "dora":
        config.lora_dropout = 0.5
    base = nn.Sequential(nn.Linear(256, 256))
    qft.quantize_model(base, "nf2 g64 f16")
    config.target_modules = {"0"}
    model = stir(get_peft_model(base, config)).train()
    model(torch.randn(1, 256))  # DoRA's norms of W are taken once
    monkeypatch.setattr(QuantLinear, "dequantize", lambda *args: pytest.fail("the weight was dequantized"))
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(torch.randn(1, 256))
    y.sum().backward()
    if method == "dora":
        assert not any(tensor.is_floating_point() and tensor.numel() >= 256 * 256 for tensor in kept)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_dora_loads_onto_empty_adapters(tmp_path):
    model = tuned("dora")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(packed(), tmp_path, low_cpu_mem_usage=True).eval()
    assert (logits(loaded) - logits(model)).abs().max() < 1e-6  # factors that lie elsewhere may be summed otherwise


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_the_identity_under_autocast(method):
    base = packed()
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(base)
        assert torch.equal(logits(get_peft_model(base, METHODS[method]()).eval()), before)


# ------------------------------------------------------------------------------------------------ training


def test_prepare_for_kbit_training_leaves_the_scales_and_says_what_it_costs(caplog):
    qft.notices.say_once.cache_clear()
    model = packed().bfloat16()
    before, dense = contents(model), sum(p.nbytes for p in model.parameters() if p.dtype == torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="qft"), pytest.warns(FutureWarning):
        prepared = peft.prepare_model_for_kbit_training(model)
    assert same(contents(model), before)
    assert model.model.norm.weight.dtype == torch.float32
    assert f"cast embeddings, norms and other dense weights to fp32, {dense / 2**20:.2f} MiB more" in caplog.text
    assert not hasattr(model, "is_loaded_in_4bit")
    model.train()
    assert prepared is model
    assert model.model.layers[0].gradient_checkpointing
    caplog.clear()
    with pytest.warns(FutureWarning):
        peft.prepare_model_for_kbit_training(model)
    assert caplog.text == ""


def test_prepare_for_kbit_training_of_a_dense_model_is_pefts():
    model = peft.prepare_model_for_kbit_training(tiny_lm.model().bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.model.layers[0].gradient_checkpointing


def loraplus_models():
    own = qft.quantize_model(tiny_lm.model(), "nf2 g64 f16", rank=4)
    return {"peft": get_peft_model(packed(), METHODS["lora"]()), "qft": qft.prepare_for_training(own, False)}


@pytest.mark.parametrize("kind", ["peft", "qft"])
def test_loraplus_gives_b_the_faster_rate(kind):
    model = loraplus_models()[kind]
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trainable) > 0
    for name, p in trainable.items():
        assert rates[id(p)] == pytest.approx(16e-3 if "lora_B" in name else 1e-3)


@pytest.mark.parametrize("kind", ["peft", "qft"])
def test_loraplus_with_ratio_1_is_adamw(kind):
    results = []
    for plus in (True, False):
        torch.manual_seed(0)
        model = loraplus_models()[kind].train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        if plus:
            optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=1)
        else:
            optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch()).loss.backward()
            optimizer.step()
        results.append(trainable)
    assert same(*results)
