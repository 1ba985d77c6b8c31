"""MultiLoRA: n parallel LoRAs that start as the identity, spread their update, and merge into one."""

import copy

import pytest
import tiny_lm
import torch
from torch import nn

import qft
from qft.adapters.multilora import MultiLoRALinear, add_multilora, merge_multilora
from qft.nn.linear import FloatFacingQuantLinear

FORMATS = ("int2 g32 f32", "nf2 g64 f16", "lm2 g64 dq", "int3 channel f32 zero")


def layer_of(fmt="nf2 g64 f16", shape=(33, 100), modules=3, rank=2, trained=True, **keywords):
    layer = qft.QuantLinear.from_linear(nn.Linear(shape[1], shape[0]), fmt)
    MultiLoRALinear.adopt(layer, modules, rank, **keywords)
    if trained:
        nn.init.normal_(layer.multilora_scales, std=0.3)
    return layer


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------------------ layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_it_starts_as_the_identity_though_b_is_random(fmt, dtype):
    layer = qft.QuantLinear.from_linear(nn.Linear(100, 33), fmt)
    x = torch.randn(2, 5, 100).to(dtype)
    before = layer(x)
    MultiLoRALinear.adopt(layer, 3, 4)
    assert torch.equal(layer(x), before)
    for factor, bound in ((layer.multilora_A, 100**-0.5), (layer.multilora_B, 4**-0.5)):
        assert 0.9 * bound < factor.abs().max() <= bound
    assert not layer.multilora_scales.any()


@pytest.mark.parametrize("fmt", FORMATS)
def test_it_sums_its_modules_each_scaled_output_by_output(fmt):
    layer, x = layer_of(fmt, alpha=5), torch.randn(7, 100)
    exact = x.double() @ layer.dequantize().double().T + layer.bias.double()
    for i, scale in enumerate(layer.multilora_scales.double()):
        a, b = layer.multilora_A[2 * i : 2 * i + 2].double(), layer.multilora_B[:, 2 * i : 2 * i + 2].double()
        exact = exact + 5 / 2 * (x.double() @ a.T @ b.T) * scale
    assert relative(layer(x).double(), exact) <= 1e-5
    assert relative(layer(x.bfloat16()).double(), exact) <= 2e-2


def test_the_scales_learn_first_and_wake_the_factors():
    layer, x = layer_of(trained=False), torch.randn(7, 100)
    layer(x).square().sum().backward()
    assert layer.multilora_scales.grad.abs().min() > 0
    assert not layer.multilora_A.grad.any()
    assert not layer.multilora_B.grad.any()
    with torch.no_grad():
        layer.multilora_scales -= layer.multilora_scales.grad
    layer(x).square().sum().backward()
    assert layer.multilora_A.grad.any()
    assert layer.multilora_B.grad.any()


def test_a_compiled_layer_computes_the_same():
    layer, x = layer_of(), torch.randn(7, 100)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert "3 modules of rank 2, alpha=2" in repr(layer)


def test_dropout_is_for_training_alone():
    layer, x = layer_of(dropout=0.5), torch.randn(7, 100)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


# ------------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("start", [None, "lora"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_merged_it_is_one_lora_of_all_the_ranks(fmt, start, tmp_path):
    layer = qft.QuantLinear.from_linear(nn.Linear(100, 33), fmt)
    if start:  # the correction of a starting point such as LoftQ's
        layer.add_lora(4, alpha=3, B=torch.randn(33, 4) * 0.1)
    MultiLoRALinear.adopt(layer, 3, 2, alpha=5)
    nn.init.normal_(layer.multilora_scales, std=0.3)
    x, codes = torch.randn(7, 100), layer.quant_tensor.codes.clone()
    before = layer(x).detach()
    layer.merge()
    assert type(layer) is qft.QuantLinear
    assert layer.lora_rank == (10 if start else 6)
    assert (layer(x) - before).abs().max() <= 1e-6 * before.abs().max()
    assert torch.equal(layer.quant_tensor.codes, codes)
    assert not any(name.startswith("multilora") for name, _ in layer.named_parameters())
    qft.save(layer, tmp_path)
    assert torch.equal(qft.load(tmp_path, nn.Linear(100, 33))(x), layer.eval()(x))


def test_a_layer_that_faces_its_parent_with_a_float_goes_on_doing_so():
    layer = qft.QuantLinear.from_linear(nn.Linear(100, 33), "nf2 g64")
    FloatFacingQuantLinear.adopt(layer, torch.bfloat16)
    MultiLoRALinear.adopt(layer, 2, 2)
    assert layer.weight.dtype == torch.bfloat16
    assert copy.deepcopy(layer).weight.dtype == torch.bfloat16
    layer.merge()
    assert type(layer) is FloatFacingQuantLinear
    assert layer.weight.dtype == torch.bfloat16
    bare = layer_of()
    assert bare.weight.dtype == torch.uint8
    bare.release()
    assert type(bare) is qft.QuantLinear
    assert {name for name, _ in bare.named_parameters()} == {"weight", "weight_scales", "bias"}


# ------------------------------------------------------------------------------------------------------------ training


def entropy(update):
    """Of the singular values as shares of their sum, in nats."""
    share = torch.linalg.svdvals(update.detach())
    share = share / share.sum()
    return -(share * share.clamp(min=1e-12).log()).sum().item()


def learn_tasks(seed, modules):
    """Four tasks, each with inputs in 8 dimensions of its own and an update of rank 2, half as strong as the last.

    Trains 4 LoRAs of rank 2, or one of rank 8, until the loss is 3 % of what it was; the update's entropy.
    """
    torch.manual_seed(seed)
    layer = qft.QuantLinear.from_linear(nn.Linear(64, 32, bias=False), "int2 g32 f32")
    base = layer.dequantize()
    targets = [base + 2.0 ** (1 - task) * torch.randn(32, 2) @ torch.randn(2, 64) / 8 for task in range(4)]
    inputs = torch.randn(4, 8, 64)
    outputs = torch.stack([x @ target.T for x, target in zip(inputs, targets, strict=True)])
    if modules == 1:
        layer.add_lora(8)
    else:
        MultiLoRALinear.adopt(layer, modules, 8 // modules)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], 2e-2, weight_decay=0)
    first = loss = (layer(inputs) - outputs).square().mean()
    while loss > 0.03 * first:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = (layer(inputs) - outputs).square().mean()
    a, b = layer.factors() if modules > 1 else (layer.lora_A, layer.lora_B)
    return entropy(b @ a)


@pytest.mark.parametrize("seed", range(4))
def test_its_update_is_spread_more_evenly_than_one_loras_at_the_same_loss(seed):
    assert learn_tasks(seed, modules=4) > learn_tasks(seed, modules=1) + 0.01


def batch():
    return torch.arange(96).reshape(2, 48) * 7 % 256


def test_a_packed_model_trains_and_merges(tmp_path):
    model = qft.quantize_model(tiny_lm.model(), "nf2 g64 f16", "loftq", rank=2)
    codes = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    with torch.no_grad():
        base = model(batch()).logits
        add_multilora(model, modules=3, rank=2)
        assert torch.equal(model(batch()).logits, base)
    qft.prepare_for_training(model).train()
    trainable = [p for name, p in model.named_parameters() if p.requires_grad]
    assert sum("multilora_" in name for name, p in model.named_parameters() if p.requires_grad) == 14 * 3
    optimizer = torch.optim.AdamW(trainable, 3e-2)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch(), labels=batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    with torch.no_grad():
        trained = model(batch()).logits
        with pytest.raises(TypeError, match=r"is a MultiLoRALinear; .* merge it with qft\.merge_multilora first"):
            qft.save(model, tmp_path)
        assert not list(tmp_path.iterdir())
        merge_multilora(model)
        assert relative(model(batch()).logits, trained) <= 1e-5
        qft.save(model, tmp_path)
        assert torch.equal(qft.load(tmp_path)(batch()).logits, model(batch()).logits)
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], before) for name, before in codes.items())
    assert model.model.layers[0].mlp.up_proj.lora_rank == 8


# ------------------------------------------------------------------------------------------------------------ refusals


REFUSED = {
    "too many ranks": (lambda: layer_of(modules=9, rank=4), r"9 modules of rank 4 do not fit: .* at most 33"),
    "no modules": (lambda: layer_of(modules=0), "0 modules of rank 2 do not fit"),
    "rank of a half": (lambda: layer_of(rank=0.5), r"3 modules of rank 0\.5 do not fit"),
    "alpha 0": (lambda: layer_of(alpha=0), r"alpha=0\.0 must be a positive number"),
    "dropout 1": (lambda: layer_of(dropout=1), r"dropout=1 is outside \[0, 1\)"),
    "twice": (lambda: MultiLoRALinear.adopt(layer_of(), 2, 2), "is a MultiLoRALinear already; merge or release"),
    "a model twice": (lambda: add_multilora(nn.Sequential(layer_of()), 2, 2), "0 is a MultiLoRALinear already"),
    "nothing to merge": (lambda: merge_multilora(nn.Linear(2, 2)), "holds no MultiLoRALinear; call qft.add_multilora"),
    "a dense model": (lambda: add_multilora(nn.Linear(2, 2), 2, 2), "holds no QuantLinear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_said(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_pooled_lora_is_refused_and_left():
    layer = qft.QuantLinear.from_linear(nn.Linear(100, 33), "int2 g32")
    layer.add_lora(2, pooled=True)
    with pytest.raises(ValueError, match=r"has a pooled LoRA, .* call qft\.merge_pooled first"):
        MultiLoRALinear.adopt(layer, 2, 2)
    assert type(layer) is qft.QuantLinear
    assert layer.lora_pooled
