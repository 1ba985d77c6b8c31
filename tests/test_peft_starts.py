"""PEFT's LoRA over layers that start with low-rank factors: it begins from them, and nothing counts twice."""

import copy
import logging
from functools import cache

import peft
import pytest
import tiny_lm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM

import qft
from qft.nn.linear import QuantLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft reads it


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


FORMAT = "nf2 g64 f16"
RANK = 4
TARGETS = ["q_proj", "v_proj", "down_proj"]
CLOSE = 1e-5  # leaving the start out moves the logits by 0.4


@cache
def _started():
    return qft.quantize_model(tiny_lm.model(), FORMAT, init="loftq", rank=RANK, alpha=6)


def started():
    """A model whose layers start with factors that make up for some of the rounding."""
    return copy.deepcopy(_started())


def config(rank=RANK, targets=TARGETS, **more):
    return LoraConfig(r=rank, target_modules=targets, **more)


def logits(model, **more):
    ids = torch.arange(40).reshape(2, 20) % tiny_lm.VOCABULARY
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@cache
def wanted():
    """qft's own logits, with the factors attached."""
    return logits(_started())


def apart(a, b):
    return (a - b).abs().max().item()


def stirred(model, adapter="default", seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if f".{adapter}" in name:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model.eval()


def layers(model):
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def tuners(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def own_factors(model):
    return [p.clone() for layer in layers(model) for p in (layer.lora_A, layer.lora_B)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_factors_matter():
    """Or every test here would pass without them."""
    assert apart(logits(qft.quantize_model(tiny_lm.model(), FORMAT)), wanted()) > 0.1


# ------------------------------------------------------------------------------------------------ beginning


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 1, 2])
def test_an_adapter_begins_from_the_start_at_any_scaling(ratio, rslora, dora):
    more = {"lora_alpha": ratio * RANK, "use_rslora": rslora, "use_dora": dora}
    model = get_peft_model(started(), config(targets="all-linear", **more)).eval()
    assert apart(logits(model), wanted()) < CLOSE
    for tuner in tuners(model):
        layer = tuner.get_base_layer()
        assert torch.equal(tuner.lora_A["default"].weight, layer.lora_A)
        product = tuner.get_delta_weight("default")
        assert torch.allclose(product, layer.lora_scaling * layer.lora_B @ layer.lora_A, atol=1e-6)
        assert product.abs().max() > 0


def test_a_start_with_rslora_of_its_own_and_a_layer_that_faces_floats_begin_too():
    base = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32))
    qft.quantize_model(base, FORMAT, init="loftq", rank=3, alpha=5, rslora=True)
    qft.nn.linear.FloatFacingQuantLinear.adopt(base[0], torch.float16)
    x = torch.randn(5, 64)
    before = base(x)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=2, target_modules=["0", "1"]))
    assert apart(model(x), before) < CLOSE


def test_it_begins_under_autocast_and_in_bfloat16():
    base = started()
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(base)
        assert apart(logits(get_peft_model(base, config()).eval()), before) < 0.05
    base = started().bfloat16()
    before = logits(base)
    assert apart(logits(get_peft_model(base, config()).eval()), before) < 0.05


def test_only_the_adapter_trains():
    base = started()
    own, codes = own_factors(base), [layer.quant_tensor.weight.clone() for layer in layers(base)]
    model = get_peft_model(base, config()).train()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(tuners(model))
    assert all(name.endswith(".default.weight") for name in trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    ids = torch.arange(40).reshape(2, 20)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert same(own_factors(base), own)
    assert same([layer.quant_tensor.weight for layer in layers(base)], codes)


def test_layers_that_are_no_targets_keep_their_factors():
    model = get_peft_model(started(), config(targets=["q_proj"])).eval()
    assert sum(layer.lora_aside for layer in layers(model)) == len(tuners(model)) == 2
    assert apart(logits(model), wanted()) < CLOSE


def test_layers_that_share_their_input_share_no_longer_what_is_left_out():
    base = started()
    qft.share_inputs(base, torch.arange(8)[None])
    model = get_peft_model(base, config(targets=["q_proj"])).eval()
    for _ in range(2):
        assert apart(logits(model), wanted()) < CLOSE
    assert not any(layer.shared_input._waiting for layer in layers(model) if layer.shared_input)


OTHERS = {
    "another rank": lambda: config(rank=2),
    "gaussian": lambda: config(init_lora_weights="gaussian"),
    "vera": lambda: peft.VeraConfig(r=RANK, target_modules=TARGETS),
    "adalora": lambda: peft.AdaLoraConfig(init_r=RANK, target_r=2, total_step=8, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=RANK, target_modules=TARGETS),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_rank_or_method_leaves_the_start_beside_it_and_says_so(other, caplog):
    qft.notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="qft"):
        model = get_peft_model(started(), OTHERS[other]()).eval()
    assert caplog.text.count("PEFT freezes the LoRA that these layers have of their own") == 1
    assert "begins from the LoRA" not in caplog.text
    assert not any(layer.lora_aside for layer in layers(model))
    assert apart(logits(model), wanted()) < CLOSE


def test_a_pooled_lora_is_no_start():
    base = nn.Sequential(nn.Linear(64, 32))
    qft.quantize_model(base, "int4 g32 f32 zero")
    base[0].add_lora(2, B=torch.randn(32, 2), pooled=True)
    x = torch.randn(5, 64)
    before = base(x)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    assert not tuners(model)[0].get_base_layer().lora_aside
    assert apart(model(x), before) < CLOSE


def test_that_it_begins_is_said_once(caplog):
    qft.notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="qft"):
        get_peft_model(started(), config())
    assert caplog.text.count("PEFT's adapter begins from the LoRA that these layers have of their own") == 1


# ------------------------------------------------------------------------------------------------ nothing twice


def test_a_second_adapter_begins_from_the_same_start():
    model = stirred(get_peft_model(started(), config()))
    first = logits(model)
    model.add_adapter("second", config(lora_alpha=16))
    model.set_adapter("second")
    assert apart(logits(model), wanted()) < CLOSE
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("first", ["other", "same"])
def test_the_start_counts_where_no_active_adapter_contains_it(first):
    configs = {"same": config(), "other": config(rank=2)}
    order = [first, *(name for name in configs if name != first)]
    model = get_peft_model(started(), configs[order[0]], adapter_name=order[0])
    model.add_adapter(order[1], configs[order[1]])
    for name in order:
        model.set_adapter(name)
        assert apart(logits(model.eval()), wanted()) < CLOSE
    model.base_model.set_adapter(order)
    assert apart(logits(model), wanted()) < CLOSE
    model.delete_adapter("same")
    assert not any(layer.lora_aside for layer in layers(model))
    assert apart(logits(model), wanted()) < CLOSE


def test_an_adapter_is_normed_and_merged_by_what_it_contains_whatever_else_is_active():
    """DoRA divides by the norm of the weight with the start in it once, also while another adapter has it beside it."""
    base = started()
    model = get_peft_model(base, config(rank=2), adapter_name="other")
    model.add_adapter("same", config(use_dora=True))
    stirred(model, "same")
    model.set_adapter("same")
    after = logits(model)
    model.merge_adapter(["same"])
    merged = [layer.dequantize() for layer in layers(model)]
    model.unmerge_adapter()
    model.set_adapter("other")
    model.merge_adapter(["same"])
    assert same([layer.dequantize() for layer in layers(model)], merged)
    model.unmerge_adapter()
    model.set_adapter("same")
    assert torch.equal(logits(model), after)

    fresh = get_peft_model(started(), config(rank=2), adapter_name="other")
    fresh.add_adapter("same", config(use_dora=True))
    fresh.set_adapter("same")
    assert apart(logits(fresh.eval()), wanted()) < CLOSE


def test_layers_without_values_begin_without_them():
    base = nn.Sequential(nn.Linear(64, 32))
    qft.quantize_model(base, FORMAT, rank=2)
    model = get_peft_model(base.to("meta"), LoraConfig(r=2, target_modules=["0"]))
    assert tuners(model)[0].get_base_layer().lora_aside


@pytest.mark.parametrize("dora", [False, True])
def test_disabled_and_unloaded_it_is_the_model_it_was(dora):
    base = started()
    own = own_factors(base)
    model = stirred(get_peft_model(base, config(use_dora=dora)))
    after = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted())
    assert torch.equal(logits(model), after)
    model.merge_adapter()
    with model.disable_adapter():  # PEFT unmerges for it
        assert torch.equal(logits(model), wanted())
    assert torch.equal(logits(model), after)
    model = model.unload()
    assert torch.equal(logits(model), wanted())
    assert same(own_factors(model), own)


@pytest.mark.parametrize("active", ["default", "other"])
def test_a_batch_mixes_adapters_with_and_without_the_start(active):
    model = stirred(get_peft_model(started(), config(targets=["q_proj", "up_proj"])))
    model.add_adapter("other", config(rank=2))
    stirred(model, "other", seed=2)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    model.set_adapter(active)
    for names in (["default", "other"], ["default", "__base__"], ["other", "__base__"], ["default", "default"]):
        mixed = logits(model, adapter_names=names)
        for row, name in enumerate(names):
            assert apart(mixed[row], alone.get(name, wanted())[row]) < CLOSE, names
    assert torch.equal(logits(model), alone[active])


@pytest.mark.parametrize("dora", [False, True])
def test_merging_takes_the_start_along_and_unmerging_is_exact(dora):
    model = stirred(get_peft_model(started(), config(use_dora=dora)))
    after = logits(model)
    stored = [layer.quant_tensor.tensors() for layer in layers(model)]
    stored = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in stored]
    exact = {}
    for path, tuner in model.named_modules():
        if isinstance(tuner, BaseTunerLayer) and not dora:
            exact[path] = tuner.get_base_layer().dequantize() + tuner.get_delta_weight("default")
    model.merge_adapter()
    for path, weight in exact.items():
        layer = model.get_submodule(path).get_base_layer()
        assert torch.equal(layer.dequantize(), qft.quantize(weight, FORMAT).dequantize())
    merged = logits(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model), after)
    for layer, tensors in zip(layers(model), stored, strict=True):
        assert same(list(layer.quant_tensor.tensors().values()), list(tensors.values()))
    targets = {tuner.get_base_layer() for tuner in tuners(model)}
    result = model.merge_and_unload()
    assert torch.equal(logits(result), merged)
    assert not tuners(result)
    assert {type(layer) for layer in targets} == {QuantLinear}
    assert {layer.lora_rank for layer in targets} == {0}  # its start is in the weight now
    assert {layer.lora_rank for layer in layers(result) if layer not in targets} == {RANK}


def test_merging_an_adapter_of_another_rank_leaves_the_start_beside_it():
    """With 8 bits, where rounding is small enough to see what counts."""
    base = qft.quantize_model(tiny_lm.model(), "int8 g32 f32", rank=RANK)
    for seed, layer in enumerate(layers(base)):
        layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(seed))
    before = logits(base)
    model = stirred(get_peft_model(base, config()))
    model.add_adapter("other", config(rank=2))
    stirred(model, "other", seed=2)
    model.set_adapter("other")
    after = logits(model)
    model.set_adapter("default")
    model.merge_adapter(["other"])  # while one that contains the start is active
    assert (logits(model) - after).norm() < 0.1 * (after - before).norm()
    result = model.unload()
    assert (logits(result) - after).norm() < 0.1 * (after - before).norm()
    assert {layer.lora_rank for layer in layers(result)} == {RANK}


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_a_combination_contains_the_start_once(combination, caplog):
    qft.notices.say_once.cache_clear()
    model = get_peft_model(started(), config(lora_alpha=RANK))
    model.add_adapter("second", config(lora_alpha=RANK))
    with caplog.at_level(logging.WARNING, logger="qft"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type=combination)
    model.set_adapter("both")
    # PEFT's linear combination puts a square root of each weight into both factors: exact for factors that are the same
    if combination == "linear":
        assert all(layer.lora_aside for layer in (tuner.get_base_layer() for tuner in tuners(model)))
    else:
        assert apart(logits(model.eval()), wanted()) < 1e-4
    assert ("at another rank: load its file on a base without that LoRA" in caplog.text) == (combination == "cat")


def test_a_combination_of_adapters_without_the_start_does_not_contain_it():
    model = get_peft_model(started(), config(init_lora_weights="gaussian"))
    model.add_adapter("second", config(init_lora_weights=True))
    model.add_weighted_adapter(["default"], [1.0], "one", combination_type="svd")
    model.set_adapter("one")
    assert apart(logits(model.eval()), wanted()) < CLOSE
    model.add_weighted_adapter(["default"], [1.0], "one", combination_type="svd")  # PEFT leaves it as it is
    assert apart(logits(model), wanted()) < CLOSE


def test_copies_know_what_they_contain():
    model = stirred(get_peft_model(started(), config()))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert torch.equal(logits(twin.unload()), wanted())
    assert not torch.equal(logits(model), wanted())


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_reloads_onto_a_fresh_base(low_cpu_mem_usage, dora, tmp_path):
    qft.save(started(), tmp_path / "base")
    model = stirred(get_peft_model(started(), config(use_rslora=True, use_dora=dora)))
    model.save_pretrained(tmp_path / "adapter")
    base = qft.load(tmp_path / "base").eval()
    assert torch.equal(logits(base), wanted())
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert apart(logits(loaded), logits(model)) < CLOSE
    loaded.load_adapter(tmp_path / "adapter", "again", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("again")
    assert apart(logits(loaded), logits(model)) < CLOSE
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), wanted())


def test_training_goes_on_from_a_file(tmp_path):
    model = stirred(get_peft_model(started(), config()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(started(), tmp_path, is_trainable=True)
    assert apart(logits(loaded.eval()), logits(model)) < CLOSE
    assert {p.requires_grad for tuner in tuners(loaded) for p in tuner.lora_B.parameters()} == {True}


def test_plain_peft_loads_the_file_over_the_dequantized_codes(tmp_path):
    """The file holds the whole product, the start included; what it belongs to are the codes alone."""
    model = stirred(get_peft_model(started(), config(targets="all-linear")))
    model.save_pretrained(tmp_path)
    dense = tiny_lm.model()
    for path, layer in started().named_modules():
        if isinstance(layer, QuantLinear):
            dense.get_submodule(path).weight.data = layer.dequantize()
    assert apart(logits(PeftModel.from_pretrained(dense, tmp_path).eval()), logits(model)) < 2e-4


def test_an_adapter_of_another_base_goes_beside_the_start_where_its_config_says_so(tmp_path):
    """As one of the same rank that was trained on the dense model: what it learned is added to W, not to the codes."""
    dense = stirred(get_peft_model(tiny_lm.model(), config()))
    dense.save_pretrained(tmp_path)
    beside = LoraConfig.from_pretrained(tmp_path)
    beside.init_lora_weights = False
    model = PeftModel.from_pretrained(started(), tmp_path, config=beside).eval()
    assert not any(layer.lora_aside for layer in layers(model))
    tuner, twin = tuners(model)[0], tuners(dense)[0]
    assert torch.equal(tuner.get_delta_weight("default"), twin.get_delta_weight("default"))


# ------------------------------------------------------------------------------------------------ transformers


def test_a_start_that_transformers_read_is_begun_from_too(tmp_path):
    """`QftConfig` in from_pretrained, its own save_pretrained, and transformers' add_adapter."""
    tiny_lm.save(tmp_path / "dense")
    start = qft.QftConfig(FORMAT, init="loftq", rank=RANK, alpha=6)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=start).eval()
    assert apart(logits(base), wanted()) < CLOSE
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(targets="all-linear", lora_alpha=2, task_type="CAUSAL_LM")).eval()
    assert apart(logits(model), wanted()) < CLOSE
    stirred(model).save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert apart(logits(PeftModel.from_pretrained(again, tmp_path / "adapter").eval()), logits(model)) < CLOSE
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other.add_adapter(config())
    assert apart(logits(other.eval()), wanted()) < CLOSE
    assert any(layer.lora_aside for layer in layers(other))
    other.disable_adapters()
    assert not any(layer.lora_aside for layer in layers(other))
    assert apart(logits(other), wanted()) < CLOSE
