"""Every method of PEFT's trains, saves, reloads and, where it is defined, merges on packed weights."""

import copy
from functools import cache

import peft
import pytest
import tiny_lm
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import qft
from qft.nn.linear import QuantLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # AdaLoRA's, at every load
    pytest.mark.filterwarnings("ignore:Adapter 'default':UserWarning"),  # AdaLoRA cut a layer's rank to 0
]

FORMATS = ("nf2 g64 f16", "nf4 g64 dq", "int3 g32 f16 zero")
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
ADA_STEPS = 8

LAYERS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=TARGETS),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=3, tinit=1, tfinal=2, deltaT=1, total_step=ADA_STEPS, target_modules=TARGETS
    ),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS),
}
CAUSAL = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
PROMPTS = {
    "prefix": lambda: peft.PrefixTuningConfig(**CAUSAL),
    "prefix_projection": lambda: peft.PrefixTuningConfig(**CAUSAL, prefix_projection=True, encoder_hidden_size=16),
    "prompt": lambda: peft.PromptTuningConfig(**CAUSAL),
    "p_tuning": lambda: peft.PromptEncoderConfig(**CAUSAL, encoder_hidden_size=16),
    "multitask_prompt": lambda: peft.MultitaskPromptTuningConfig(**CAUSAL, num_tasks=2),
}
METHODS = {**LAYERS, **PROMPTS}
# how far training moves the logits is 0.1 to 1, so this separates a method that is there from one that is not
CLOSE = 2e-4


def batch(method=""):
    ids = torch.arange(40).reshape(2, 20) % tiny_lm.VOCABULARY
    tasks = {"task_ids": torch.tensor([0, 1])} if method == "multitask_prompt" else {}
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), **tasks}


@cache
def quantized(fmt):
    return qft.quantize_model(tiny_lm.model(), fmt)


def packed(fmt):
    return copy.deepcopy(quantized(fmt))


@cache
def trained(method, fmt):
    """A tuned model, its losses, and what of the base must not have moved: to be copied, not changed."""
    torch.manual_seed(0)
    base = packed(fmt)
    frozen = codes(base)
    model = get_peft_model(base, METHODS[method]())
    return model, train(model, method), frozen


def dense_twin(model):
    """A dense model with the weights that a packed one stands for."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantLinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                linear.weight = nn.Parameter(child.dequantize())
                if child.bias is not None:
                    linear.bias = child.bias
                setattr(parent, name, linear.eval())
    return twin


def codes(model):
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return [tensor.clone() for layer in layers for tensor in layer.quant_tensor.tensors().values()]


def train(model, method, lr=2e-2):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for step in range(ADA_STEPS if method == "adalora" else 4):
        loss = model(**batch(method)).loss
        loss.backward()
        optimizer.step()
        if method == "adalora":
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model, method=""):
    return model(**batch(method)).logits


def reload(base, folder):
    return PeftModel.from_pretrained(base, folder).eval()


def apart(a, b):
    return (a - b).abs().max().item()


def take_ranks(loaded, trained):
    """PEFT divides AdaLoRA's product by the first rank in a trained model and by the last in a loaded one."""
    ranks = {name: p for name, p in trained.named_parameters() if "ranknum" in name}
    for name, rank in loaded.named_parameters():
        if "ranknum" in name:
            rank.data.copy_(ranks[name])


def saved_and_loaded(model, folder, base):
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    take_ranks(loaded, model)
    return loaded


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("method", LAYERS)
def test_a_method_starts_as_the_identity_in_fp32(method, fmt):
    base = packed(fmt)
    before = logits(base)
    model = get_peft_model(base, LAYERS[method]()).eval()
    assert torch.equal(logits(model), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_saves_and_reloads(method, fmt, tmp_path):
    model, losses, frozen = trained(method, fmt)
    assert losses[-1] < losses[0]
    assert same(codes(model), frozen)
    after = logits(model, method)
    again = logits(saved_and_loaded(model, tmp_path, packed(fmt)), method)
    if method == "adalora":  # the file leaves out the directions that were cut: other sums, nearly the same
        assert apart(again, after) < CLOSE
    else:
        assert torch.equal(again, after)
    plain = saved_and_loaded(model, tmp_path, dense_twin(packed(fmt)))
    assert apart(logits(plain, method), after) < CLOSE  # what plain PEFT computes from the same file
    if method in LAYERS:
        assert apart(after, logits(quantized(fmt))) > 20 * CLOSE


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("method", LAYERS)
def test_a_method_merges_and_unmerges(method, fmt, tmp_path):
    tuned, _, frozen = trained(method, fmt)
    model, twin = copy.deepcopy(tuned), saved_and_loaded(tuned, tmp_path, dense_twin(packed(fmt)))
    after = logits(model)
    twin.merge_adapter()
    model.merge_adapter()
    merged = logits(model)
    assert not torch.equal(merged, after)
    for path, layer in tuned_layers(model):
        exact = twin.get_submodule(path).get_base_layer().weight
        error = (exact - layer.dequantize()).norm() / exact.norm()
        rounding = (exact - qft.quantize(exact, fmt).dequantize()).norm() / exact.norm()
        assert layer.init_errors == (pytest.approx(error.item(), rel=1e-3),)
        assert error.item() == pytest.approx(rounding.item(), rel=1e-2)
    model.unmerge_adapter()
    assert torch.equal(logits(model), after)
    assert same(codes(model), frozen)

    result = model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(result), merged)
    assert not tuned_layers(result)


def tuned_layers(model):
    return [
        (path, module.get_base_layer())
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    ]


def test_a_merged_model_is_saved_and_loaded(tmp_path):
    result = copy.deepcopy(trained("dora", FORMATS[0])[0]).merge_and_unload()
    formats = {layer.format for layer in result.modules() if isinstance(layer, QuantLinear)}
    assert formats == {qft.Format.parse(FORMATS[0])}
    qft.save(result, tmp_path)
    assert torch.equal(logits(qft.load(tmp_path)), logits(result))


def test_adalora_goes_down_to_its_budget():
    config = LAYERS["adalora"]()
    model = get_peft_model(packed(FORMATS[0]), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    layers, kept, budgets = len(tuned_layers(model)), [], []
    for step in range(1, config.total_step + 1):
        model(**batch()).loss.backward()
        optimizer.step()
        budgets.append(model.base_model.rankallocator.budget_schedule(step)[0])
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        kept.append(sum(int((e != 0).sum()) for name, e in model.named_parameters() if "lora_E" in name))
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == layers * config.init_r
    assert budgets[-1] == layers * config.target_r
    assert kept[-1] == layers * config.target_r
    assert sorted(kept, reverse=True) == kept


def test_vera_draws_its_projections_from_a_seed():
    first, second = (get_peft_model(packed(FORMATS[0]), LAYERS["vera"]()) for _ in range(2))
    a, b = (model.base_model.vera_A["default"] for model in (first, second))
    assert torch.equal(a, b)
    widths = [layer.out_features for _, layer in tuned_layers(first)]
    assert sum(p.numel() for p in first.parameters() if p.requires_grad) == sum(width + 8 for width in widths)


@pytest.mark.parametrize("method", [name for name in PROMPTS if not name.startswith("prefix")])  # PEFT refuses prefixes
def test_a_prompt_trains_with_gradient_checkpointing(method):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = packed(FORMATS[0])
        if checkpointing:
            qft.prepare_for_training(base)
        model = get_peft_model(base, PROMPTS[method]()).train()
        model(**batch(method)).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(grad.abs().max() > 0 for grad in grads[-1])
    assert all(apart(a, b) < 1e-6 for a, b in zip(*grads, strict=True))


def test_a_projected_prefix_equals_its_folded_keys_and_values():
    model = trained("prefix_projection", FORMATS[0])[0]
    encoder = model.prompt_encoder["default"]
    folded = encoder.transform(encoder.embedding.weight)
    plain = get_peft_model(packed(FORMATS[0]), PROMPTS["prefix"]()).eval()
    plain.prompt_encoder["default"].embedding.weight.data = folded.detach()
    assert apart(logits(plain), logits(model)) < 1e-6


@pytest.mark.parametrize("method", LAYERS)
def test_a_method_trains_in_bfloat16(method):
    model = get_peft_model(packed(FORMATS[0]).bfloat16(), LAYERS[method]())
    losses = train(model, method)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    after = logits(model)
    assert after.dtype == torch.bfloat16
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), after)
