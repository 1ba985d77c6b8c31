"""QA-LoRA: a LoRA over sums of groups, merged into zero points with the codes as they were."""

import json
import logging

import pytest
import tiny_lm
import torch
from torch import nn

import qft
from qft import notices
from qft.adapters.pooled import add_pooled_lora, merge_pooled
from qft.disk import manifest
from qft.tensor import QuantTensor

INTEGERS = (
    "int2 g32 f32",
    "int2 g32 f32 zero",
    "int2 g64 f16",
    "int3 g32 bf16 zero",
    "int3 channel f32",
    "int4 g64 dq",
    "int4 channel f32 zero",
    "int8 g32 f32",
    "int8 g128 f16 zero",
)
SHAPES = ((33, 100), (7, 129), (64, 256), (1, 1))  # groups that end short, and groups that do not


def layer_of(fmt, shape=(33, 100), rank=2, **keywords):
    out, in_features = shape
    layer = qft.QuantLinear.from_linear(nn.Linear(in_features, out), fmt)
    rank = min(rank, out, layer.format.groups(in_features))
    layer.add_lora(rank, alpha=3, pooled=True, B=torch.randn(out, rank) * 0.1, **keywords)
    return layer


def dense_with_adapter(layer):
    """W + scaling * B A, A's entries repeated over their groups, in fp64."""
    size = layer.format.group_size(layer.in_features)
    delta = layer.lora_scaling * layer.lora_B.double() @ layer.lora_A.double()
    return layer.dequantize().double() + delta.repeat_interleave(size, 1)[:, : layer.in_features]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------------------ forward


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", INTEGERS)
def test_it_adds_one_number_to_each_group(fmt, shape):
    layer = layer_of(fmt, shape)
    x = torch.randn(5, shape[1])
    exact = x.double() @ dense_with_adapter(layer).T + layer.bias.double()
    assert layer.lora_A.shape == (layer.lora_rank, layer.format.groups(shape[1]))
    assert relative(layer(x).double(), exact) <= 1e-5
    assert relative(layer(x.bfloat16()).double(), exact) <= 2e-2  # x itself is rounded too


def test_its_gradients_are_those_of_the_lora_it_repeats():
    layer, twin = layer_of("int2 g32 f32"), qft.QuantLinear.from_linear(nn.Linear(100, 33), "int2 g32 f32")
    twin.set_quantized(layer.quant_tensor)
    twin.bias = layer.bias
    twin.add_lora(2, 3, A=layer.lora_A.detach().repeat_interleave(32, 1)[:, :100], B=layer.lora_B)
    x = torch.randn(5, 100)
    for module in (layer, twin):
        module(x).square().sum().backward()
    summed = torch.stack([g.sum(1) for g in twin.lora_A.grad.split(32, 1)], 1)
    assert relative(layer.lora_A.grad, summed) <= 1e-5
    assert relative(layer.lora_B.grad, twin.lora_B.grad) <= 1e-5


def test_it_starts_as_the_identity_with_the_spread_of_a_lora():
    layer = qft.QuantLinear.from_linear(nn.Linear(4096, 16), "int2 g32 f32")
    x = torch.randn(3, 4096)
    base = layer(x)
    layer.add_lora(8, pooled=True)
    assert torch.equal(layer(x), base)
    assert 0.95 * 4096**-0.5 < layer.lora_A.abs().max() <= 4096**-0.5
    assert not layer.lora_B.any()
    assert "pooled" in repr(layer)
    layer.remove_lora()
    assert not layer.lora_pooled


def test_a_compiled_layer_computes_the_same():
    layer, x = layer_of("int2 g32 f32"), torch.randn(3, 100)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_layers_that_share_their_input_pool_it_for_themselves():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = layer_of("int2 g32 f32"), layer_of("int4 g64 f32")

        def forward(self, x):
            return self.a(x) + self.b(x)

    model, x = Pair(), torch.randn(3, 100)
    before = model(x)
    qft.share_inputs(model, x)
    assert torch.equal(model(x), before)


# ------------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", INTEGERS)
def test_merged_equals_unmerged_and_the_codes_stay(fmt, shape):
    layer = layer_of(fmt, shape)
    codes, exact = layer.quant_tensor.codes.clone(), dense_with_adapter(layer)
    x = torch.randn(5, shape[1])
    unmerged = layer(x)
    errors = merge_pooled(layer, scale="f32")
    assert torch.equal(layer.quant_tensor.codes, codes)
    assert (layer.lora_rank, str(layer.format)) == (0, f"{fmt.split()[0]} {fmt.split()[1]} f32 zero")
    assert relative(layer.dequantize().double(), exact) <= 1e-6
    assert relative(layer(x), unmerged) <= 1e-5
    assert errors == {"": pytest.approx(relative(layer.dequantize().double(), exact), abs=1e-7)}


@pytest.mark.parametrize("scale", ["f16", "bf16"])
def test_rounded_zero_points_cost_what_is_said(scale):
    layer = layer_of(f"int4 g32 {scale}", (64, 256))
    exact, unit = dense_with_adapter(layer), {"f16": 2.0**-11, "bf16": 2.0**-8}[scale]
    errors = merge_pooled(layer)
    q = layer.quant_tensor
    assert str(q.format) == f"int4 g32 {scale} zero"
    bound = (q.scales * q.zeros).abs().double() * unit * 1.01  # half a unit in the last place of the zero point
    off = (layer.dequantize().double() - exact).abs()
    assert (off <= bound.repeat_interleave(32, 1)).all()
    assert 1e-5 < errors[""] == pytest.approx(relative(layer.dequantize().double(), exact), rel=1e-3)


@pytest.mark.parametrize("fmt", ["int2 g32 f32", "int2 g32 f32 zero", "int8 g32 f32", "int8 g32 bf16"])
def test_groups_without_a_scale_take_the_adapter_exactly(fmt):
    """A group of zeros; one of scale 0 with many codes; one whose weights are nothing beside what is added."""
    weight = torch.randn(4, 96)
    weight[:, :32] = 0
    layer = qft.QuantLinear.from_linear(nn.Linear(96, 4, bias=False), fmt)
    q = qft.quantize(weight, fmt)
    scales = q.scales
    scales[1, 1], scales[2, 1] = 0, 1e-30
    layer.set_quantized(QuantTensor(q.format, q.shape, q.weight, scales.to(q.weight_scales.dtype), q.weight_zeros))
    layer.add_lora(2, pooled=True, B=torch.randn(4, 2))
    with torch.no_grad():
        layer.lora_B[3] = 0  # and a row to which nothing is added
    exact = dense_with_adapter(layer).float()
    merge_pooled(layer)
    merged = layer.dequantize()
    empty = torch.zeros(4, 96, dtype=torch.bool)
    empty[:, :32] = empty[1, 32:64] = empty[2, 32:64] = True
    assert torch.allclose(merged[empty], exact[empty], rtol=1e-6 if "bf16" not in fmt else 4e-3, atol=0)
    assert relative(merged, exact) <= (1e-6 if "bf16" not in fmt else 1e-2)
    x = torch.randn(3, 96)
    assert relative(layer(x), x @ merged.T) <= 1e-5


def test_groups_of_zeros_merge_in_f16_too_and_what_cannot_is_refused_whole():
    layer = qft.QuantLinear.from_quantized(qft.quantize(torch.zeros(4, 64), "int4 g32 f16"))
    layer.add_lora(2, pooled=True, B=torch.randn(4, 2))
    exact = dense_with_adapter(layer).float()
    merge_pooled(layer)
    assert torch.allclose(layer.dequantize(), exact, rtol=1e-3)
    q = qft.quantize(torch.randn(4, 64), "int4 g32 f16")
    layer = qft.QuantLinear.from_quantized(q.with_scales(torch.full((4, 2), 6e-8), "f16"))
    layer.add_lora(2, pooled=True, B=torch.ones(4, 2))
    model = nn.ModuleDict({"first": layer_of("int4 g32 f16"), "second": layer})
    with pytest.raises(qft.FormatError, match=r"merged zero point of second, row \d, group \d does not fit f16; merge"):
        merge_pooled(model)
    assert all(m.lora_pooled and str(m.format) == "int4 g32 f16" for m in model.values())
    merge_pooled(model, scale="f32")
    assert str(model["second"].format) == "int4 g32 f32 zero"


def test_double_quantized_scales_are_held_in_fp32_and_go_back(caplog):
    layer = layer_of("int4 g64 dq", (64, 256))
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "qft"):
        assert merge_pooled(layer)[""] <= 1e-6
    assert caplog.messages == [
        "scales stored as dq are held in fp32 to merge into zero points: 4.129 -> 5.000 bits per weight; "
        "qft.round_scales stores them as before"
    ]
    exact = layer.dequantize()
    qft.round_scales(layer)
    assert str(layer.format) == "int4 g64 dq zero"
    assert relative(layer.dequantize(), exact) < 2e-2


# ------------------------------------------------------------------------------------------------------------ models


def packed(fmt="int2 g32 f16", **keywords):
    return qft.quantize_model(tiny_lm.model(), fmt, **keywords)


def batch():
    return torch.arange(96).reshape(2, 48) * 7 % 256


def train(model, steps=12, rate=3e-2):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch(), labels=batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_packed_model_trains_saves_merges_and_stays_packed(tmp_path):
    model = add_pooled_lora(packed(), rank=2, alpha=32)
    codes = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    qft.prepare_for_training(model)  # with gradient checkpointing
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05  # the random head leaves little more to gain
    model.eval()
    with torch.no_grad():
        trained = model(batch()).logits
        qft.save(model, tmp_path / "trained")
        again = qft.load(tmp_path / "trained")
        assert torch.equal(again(batch()).logits, trained)
        layer = again.model.layers[1].mlp.down_proj
        assert layer.lora_pooled
        assert layer.lora_A.requires_grad
        errors = merge_pooled(model, scale="f32")
        merged = model(batch()).logits
        assert relative(merged, trained) <= 1e-4  # two layers deep, 1e-5 each
        assert len(errors) == 14
        assert max(errors.values()) <= 1e-6
        qft.save(model, tmp_path / "merged")
        assert torch.equal(qft.load(tmp_path / "merged")(batch()).logits, merged)
    named = dict(model.named_parameters())
    assert codes.keys() <= named.keys()
    assert all(torch.equal(named[name], before) for name, before in codes.items())
    assert not any("lora" in name for name in named)


def test_it_trains_under_autocast_with_gradients_for_both_factors():
    model = qft.prepare_for_training(add_pooled_lora(packed(), rank=1))
    model.train()
    for p in (p for name, p in model.named_parameters() if name.endswith("lora_B")):
        nn.init.normal_(p, std=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=batch(), labels=batch()).loss.backward()
    factors = {name: p for name, p in model.named_parameters() if "lora" in name}
    assert len(factors) == 28
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in factors.values())


def test_a_layer_with_few_groups_takes_what_it_holds_and_says_so(caplog):
    model = packed("int2 g64 f16")  # one group in 64 features, two in 96
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "qft"):
        add_pooled_lora(model, 2)
    assert (model.model.layers[0].mlp.up_proj.lora_rank, model.model.layers[0].mlp.down_proj.lora_rank) == (1, 2)
    assert "q_proj has 1 groups or outputs: its pooled adapter takes rank 1, not 2" in caplog.messages[0]
    assert len(caplog.messages) == 12


def test_a_saved_directory_from_before_pooled_loras_still_loads(tmp_path):
    model = packed(rank=2)
    qft.save(model, tmp_path)
    path = tmp_path / manifest.NAME
    body = json.loads(path.read_bytes())
    del body["sha256"]
    for entry in body["layers"].values():
        assert entry["lora"].pop("pooled") is False
    path.write_text(json.dumps(body | {"sha256": manifest._digest(body)}))
    assert torch.equal(qft.load(tmp_path)(batch()).logits, model(batch()).logits)


# ------------------------------------------------------------------------------------------------------------ refusals


REFUSED = {
    "a codebook": (
        lambda: add_pooled_lora(packed("nf2 g64 f16"), 2),
        r"q_proj stores nf2 g64 f16, .* quantize to int8, int4, int3, int2",
    ),
    "a codebook's layer": (
        lambda: qft.QuantLinear(64, 8, "nf4 g64").add_lora(2, pooled=True),
        r"nf4 g64 f32 has no zero points .*; quantize to int8, int4, int3, int2",
    ),
    "a second LoRA": (lambda: add_pooled_lora(packed(rank=2), 2), "q_proj has a LoRA already; call remove_lora"),
    "rank 0": (lambda: add_pooled_lora(packed(), 0), "rank=0 is no whole number in 1..2"),
    "more ranks than groups": (lambda: layer_of("int2 channel f32").add_lora(2, pooled=True), "attached already"),
    "ranks above the groups": (
        lambda: qft.QuantLinear(64, 8, "int2 g32").add_lora(3, pooled=True),
        r"rank=3 is no whole number in 1\.\.2",
    ),
    "A of a LoRA": (
        lambda: qft.QuantLinear(64, 8, "int2 g32").add_lora(2, pooled=True, A=torch.ones(2, 64)),
        r"A has shape \(2, 64\), rank 2 needs \(2, 2\)",
    ),
    "nothing to merge": (lambda: merge_pooled(packed(rank=2)), "has a pooled LoRA; call qft.add_pooled_lora first"),
    "no packed model": (lambda: add_pooled_lora(tiny_lm.model(), 2), "holds no QuantLinear"),
    "dq zero points": (lambda: merge_pooled(layer_of("int2 g32 f32"), "dq"), "scale='dq' is none of f32, f16, bf16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_said(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_model_is_left_as_it_was():
    model = qft.quantize_model(tiny_lm.model(), "int2 g32", formats={"*.1.mlp.down_proj": "nf4 g32"})
    with pytest.raises(qft.FormatError, match=r"1\.mlp\.down_proj stores nf4"):
        add_pooled_lora(model, 2)
    assert not any(m.lora_rank for m in model.modules() if isinstance(m, qft.QuantLinear))
