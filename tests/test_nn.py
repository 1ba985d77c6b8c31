"""QuantLinear is a drop-in nn.Linear: same dtypes, same gradients, same life in a model."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import tiny_lm
import torch
from formats import ABOVE, BOUND, DTYPES, FORMATS, FOUR, ODD, REAL, error, sample
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import qft
from qft.format import Format, FormatError
from qft.nn.linear import QuantLinear
from qft.reference import per_weight
from qft.tensor import STORED

pytestmark = pytest.mark.usefixtures("panels_above")  # a row kernel has few rows, a panel many, on any machine

# An operator's result carries two roundings to the activations' dtype: the weight's and its own. Bias and LoRA add six
# (bias and both factors to that dtype, x At, the product, the sum); the rms of eight roundings is twice that of two.
LAYER_BOUND = {dtype: 2 * bound for dtype, bound in BOUND.items()}


def dense(shape: tuple[int, int] = ODD, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(sample(shape) / shape[1] ** 0.5)
    return linear


def packed(
    fmt: Format | str = "nf4 g64 f32",
    shape: tuple[int, int] = ODD,
    bias: bool = True,
    lora: int = 0,
    dtype: torch.dtype = torch.float32,
    scales: bool = False,
) -> QuantLinear:
    """A quantized layer; with `lora`, factors that are not the identity; with `scales`, scales that train."""
    layer = QuantLinear.from_linear(dense(shape, bias, dtype), fmt)
    if lora:
        layer.add_lora(
            lora, alpha=2 * lora, A=torch.randn(lora, shape[1]) / shape[1] ** 0.5, B=torch.randn(shape[0], lora)
        )
    if scales:
        layer.weight_scales.requires_grad_()
    return layer


def twin(layer: QuantLinear) -> nn.Linear:
    """The dense layer that computes the same, LoRA merged."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(layer.dequantize())
        if layer.lora_rank:
            linear.weight += layer.lora_scaling * layer.lora_B.float() @ layer.lora_A.float()
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    return linear


def trains(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}


# ---------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["nf4 g64 dq", "nf4 channel f32", "int4 g64 f32 zero", "nf2 g64 f16"])
def test_output_and_gradients_match_float64(fmt: str, dtype: torch.dtype, parameters: torch.dtype) -> None:
    layer = packed(fmt, lora=4, dtype=parameters, scales="dq" not in fmt)
    if layer.weight_zeros is not None:
        layer.weight_zeros.requires_grad_()
    for leading in ((1,), (2, 7), (0,), (ABOVE,), ()):
        layer.zero_grad()
        x, dy = torch.randn(*leading, ODD[1]).to(dtype).requires_grad_(), torch.randn(*leading, ODD[0]).to(dtype)
        y = layer(x)
        y.backward(dy)

        exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters() if p.requires_grad}
        x64 = x.detach().double().requires_grad_()
        adapter = layer.lora_scaling * x64 @ exact["lora_A"].T @ exact["lora_B"].T
        y64 = x64 @ dense64(layer, exact).T + exact["bias"] + adapter
        y64.backward(dy.double())

        assert y.dtype == x.grad.dtype == dtype
        assert error(y.detach(), y64.detach()) <= LAYER_BOUND[dtype], leading
        assert error(x.grad, x64.grad) <= LAYER_BOUND[dtype], leading
        got = gradients(layer)
        assert got.keys() == exact.keys()
        for name, gradient in got.items():
            # rounded once more, to its parameter's dtype
            bound = max(LAYER_BOUND[dtype], LAYER_BOUND[gradient.dtype])
            assert error(gradient, exact[name].grad) <= bound, (name, leading)


def dense64(layer: QuantLinear, trained: dict[str, Tensor]) -> Tensor:
    """The dequantized weight in float64, differentiable in the scales and zero points that are in `trained`."""
    q, fmt = layer.quant_tensor, layer.format
    levels = torch.tensor(fmt.levels, dtype=torch.float64)[q.unpack().long()]
    if q.zeros is not None:
        levels = levels - per_weight(trained.get("weight_zeros", q.zeros), fmt, layer.in_features)
    return levels * per_weight(trained.get("weight_scales", q.scales), fmt, layer.in_features)


@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_output_has_the_dtype_of_the_input_whatever_the_bias(dtype: torch.dtype, bias: torch.dtype | None) -> None:
    layer = packed(bias=bias is not None, lora=2)
    if bias is not None:
        layer.to(bias)
    for rows in (1, ABOVE):
        assert layer(torch.randn(rows, ODD[1], dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("fmt", ["nf4 g64 f32", "int3 channel f32"])
@pytest.mark.parametrize("rows", [1, ABOVE])
def test_train_and_eval_give_the_same_bits(fmt: str, rows: int) -> None:
    layer, x = packed(fmt, lora=4, scales=True), torch.randn(rows, ODD[1])
    with torch.no_grad():
        quiet = layer.eval()(x)
    assert torch.equal(layer.train()(x), quiet)


def test_dequantize_is_the_stored_weight_alone() -> None:
    linear = dense()
    layer = QuantLinear.from_linear(linear, "nf4 g64 f32")
    layer.add_lora(4, B=torch.ones(ODD[0], 4))
    q = qft.quantize(linear.weight, "nf4 g64 f32")
    assert torch.equal(layer.dequantize(), q.dequantize())
    for dtype in DTYPES:
        assert torch.equal(layer.dequantize(dtype), q.dequantize().to(dtype))


def test_a_layer_takes_the_place_of_a_linear() -> None:
    linear = dense().eval()
    layer = QuantLinear.from_linear(linear, "nf4 g64 f32")
    assert isinstance(layer, nn.Linear)
    assert layer.bias is linear.bias
    assert not layer.training
    assert repr(layer).startswith("QuantLinear(\n  100, 33, nf4 g64 f32, bias=True")
    model = nn.Sequential(packed(bias=False), nn.ReLU(inplace=True), packed(shape=(5, 33)), nn.ReLU(inplace=True))
    x = torch.randn(2, 7, 100, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == x.shape


# ---------------------------------------------------------------------------------------------- training


def test_the_stored_weight_is_frozen_and_training_leaves_it_alone() -> None:
    layer = packed("int4 g64 f32 zero", lora=4, scales=True)
    stored = {name: tensor.clone() for name, tensor in layer.quant_tensor.tensors().items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(5, ODD[1])).square().mean().backward()
        assert layer.weight.grad is None
        optimizer.step()
    now = layer.quant_tensor.tensors()
    assert not layer.weight.requires_grad
    assert torch.equal(now["weight"], stored["weight"])
    assert torch.equal(now["weight_zeros"], stored["weight_zeros"])
    assert not torch.equal(now["weight_scales"], stored["weight_scales"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autograd_keeps_nothing_of_x_while_only_bias_trains(dtype: torch.dtype) -> None:
    layer = packed()
    saved: list[Tensor] = []
    x = torch.randn(2, 7, ODD[1]).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    stored = {tensor.data_ptr() for tensor in layer.quant_tensor.tensors().values()}
    assert {tensor.data_ptr() for tensor in saved} == stored
    y.sum().backward()
    assert layer.bias.grad is not None


def test_autograd_keeps_no_dense_weight_whatever_trains() -> None:
    layer = packed("int4 channel f32 zero", shape=(96, 160), lora=4, scales=True)
    layer.weight_zeros.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(7, 160, requires_grad=True))
    stored = {tensor.data_ptr() for tensor in layer.quant_tensor.tensors().values()}
    assert all(tensor.numel() < 96 * 160 / 2 for tensor in saved if tensor.data_ptr() not in stored)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    model = nn.Sequential(packed("nf4 channel f32", lora=4, scales=True), nn.GELU(), packed(shape=(16, 33), lora=2))
    x = torch.randn(2, ABOVE, ODD[1], requires_grad=True)
    model(x).square().sum().backward()
    wanted = {**gradients(model), "x": x.grad}
    model.zero_grad()
    x.grad = None
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    got = {**gradients(model), "x": x.grad}
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


# ---------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_new_lora_is_the_identity_and_trains(dtype: torch.dtype) -> None:
    layer, x = packed(), torch.randn(5, ODD[1]).to(dtype)
    before = layer(x)
    layer.add_lora(rank=8, alpha=16)
    assert torch.equal(layer(x), before)
    assert layer.lora_rank == 8
    layer(x).square().sum().backward()
    assert (layer.lora_B.grad != 0).any()
    layer.remove_lora()
    assert layer.lora_rank == 0
    assert torch.equal(layer(x), before)
    assert not [name for name in layer.state_dict() if "lora" in name]
    layer.add_lora(rank=4)  # a removed adapter makes room for another


@pytest.mark.parametrize(
    ("alpha", "rslora", "scaling"),
    [(None, False, 1), (32, False, 32 / 16), (32, True, 32 / math.sqrt(16)), (None, True, 4)],
)
def test_lora_is_scaled_by_alpha_over_rank_or_its_root(alpha: float | None, rslora: bool, scaling: float) -> None:
    layer = packed(bias=False)
    layer.add_lora(16, alpha, rslora=rslora, B=torch.randn(ODD[0], 16))
    assert layer.lora_scaling == pytest.approx(scaling)
    x = torch.randn(5, ODD[1])
    with torch.no_grad():
        adapter = layer(x) - x.double() @ layer.dequantize().double().T
        wanted = scaling * x.double() @ layer.lora_A.double().T @ layer.lora_B.double().T
    assert error(adapter, wanted) <= LAYER_BOUND[torch.float32]


def test_dropout_acts_in_training_alone_and_on_the_adapter_alone() -> None:
    layer = packed().eval()
    x = torch.randn(64, ODD[1])
    base = layer(x)
    layer.add_lora(4, dropout=0.5, B=torch.randn(ODD[0], 4))
    assert torch.equal(layer(x), layer(x)), "attached to a layer in eval mode, it must not act"
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), base)


def test_starting_factors_are_copied() -> None:
    factors = torch.randn(4, ODD[1]), torch.randn(ODD[0], 4)
    kept = [factor.clone() for factor in factors]
    layer = packed()
    layer.add_lora(4, A=factors[0], B=factors[1])
    assert torch.equal(layer.lora_A, factors[0])
    assert torch.equal(layer.lora_B, factors[1])
    with torch.no_grad():
        layer.lora_A.zero_()
        layer.lora_B.zero_()
    assert all(map(torch.equal, factors, kept))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
def test_peft_finds_wraps_and_trains_the_layers() -> None:
    from peft import LoraConfig, get_peft_model

    model = qft.quantize_model(tiny_lm.model(), "nf4 g64 f32")
    codes = {name: layer.weight.clone() for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    ids = torch.randint(0, tiny_lm.VOCABULARY, (2, 16))
    with torch.no_grad():
        before = model(ids).logits
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    wrapped = [layer for layer in tuned.modules() if isinstance(getattr(layer, "base_layer", None), QuantLinear)]
    assert len(wrapped) == len(codes) == 14
    assert torch.equal(tuned(ids).logits, before)

    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = tuned(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(layer.base_layer.weight, code) for layer, code in zip(wrapped, codes.values(), strict=True))


# ---------------------------------------------------------------------------------------------- torch.compile


def compiled_and_eager(layer: nn.Module, x: Tensor, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.compiler.reset()  # the limit on recompilations counts those of every test
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.square().sum().backward()
        results.append({"y": y.detach(), "x": leaf.grad, **gradients(layer)})
    return results[1], results[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", ["nf4 g64 dq", "nf4 channel f32", "int4 g64 f32 zero", f"{FOUR} g64 f16"])
def test_a_compiled_layer_equals_the_eager_one(fmt: str, dtype: torch.dtype) -> None:
    layer = packed(fmt, lora=4, scales="dq" not in fmt)
    if layer.weight_zeros is not None:
        layer.weight_zeros.requires_grad_()
    got, wanted = compiled_and_eager(layer, torch.randn(2, 7, ODD[1], dtype=dtype), "aot_eager")
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert error(got[name], wanted[name].double()) <= BOUND[dtype], name


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")  # inductor's own import
def test_inductor_compiles_it() -> None:
    layer = packed("nf4 channel f32", lora=4, scales=True)
    # the cache on disk knows a graph by its operators, not by what their backward is today
    with torch._functorch.config.patch(enable_autograd_cache=False):
        got, wanted = compiled_and_eager(layer, torch.randn(2, 7, ODD[1]), "inductor")
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert error(got[name], wanted[name].double()) <= BOUND[torch.float32], name


def test_a_compiled_layer_follows_autocast() -> None:
    torch.compiler.reset()
    layer, x = packed(lora=4), torch.randn(3, ODD[1])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert compiled(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = compiled(x), layer(x)
    assert got.dtype == torch.bfloat16
    assert error(got.detach(), wanted.detach().double()) <= BOUND[torch.bfloat16]


def test_a_changing_batch_compiles_no_more_often_than_nn_linear() -> None:
    counts = []
    for layer in (dense(), packed(lora=4, scales=True)):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for rows in (3, 5, 8, ABOVE, 100, 1):
            compiled(torch.randn(rows, ODD[1], requires_grad=True)).sum().backward()
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]


# ---------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_treats_it_as_nn_linear(cast: torch.dtype, dtype: torch.dtype) -> None:
    layer = packed(lora=4, scales=True)
    linear = twin(layer)
    x = torch.randn(2, 7, ODD[1], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=cast):
        y, wanted = layer(x), linear(x)
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == dtype
            assert layer(x.float()).dtype == linear(x.float()).dtype == torch.float32
    assert y.dtype == wanted.dtype == cast
    # x itself, the merged weight and both results are rounded to the autocast dtype
    assert error(y.detach(), wanted.detach().double()) <= LAYER_BOUND[cast]
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert {name: gradient.dtype for name, gradient in gradients(layer).items()} == dict.fromkeys(
        ("weight_scales", "bias", "lora_A", "lora_B"), torch.float32
    )


def test_autocast_leaves_float64_alone() -> None:
    """As nn.Linear's: autocast lowers fp32 and narrower only."""
    x, linear = torch.randn(3, ODD[1], dtype=torch.float64), dense().double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed()(x).dtype == linear(x).dtype == torch.float64


# ---------------------------------------------------------------------------------------------- casts and copies

CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "float": (lambda m: m.bfloat16().float(), torch.float32),
    "double": (lambda m: m.double(), torch.float64),
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to cpu and dtype": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("fmt", ["nf4 g64 f32", "nf4 g64 dq", "int4 g64 bf16 zero", "int3 channel f16 zero"])
def test_casts_change_bias_and_lora_alone(fmt: str, cast: str) -> None:
    run, dtype = CASTS[cast]
    layer = packed(fmt, lora=4, scales="dq" not in fmt)
    layer(torch.randn(3, ODD[1])).sum().backward()
    model = nn.Sequential(layer)
    stored = {name: (tensor.dtype, tensor.clone()) for name, tensor in layer.quant_tensor.tensors().items()}
    scale_grad = None if layer.weight_scales.grad is None else layer.weight_scales.grad.clone()

    assert run(model) is model
    for name, (kept, value) in stored.items():
        now = getattr(layer, name)
        assert now.dtype == kept, name
        assert torch.equal(now, value), name
    assert bytes(layer.weight_format.tolist()).decode() == fmt
    assert layer.bias.dtype == layer.lora_A.dtype == layer.lora_B.dtype == dtype
    if scale_grad is not None:
        assert layer.weight_scales.requires_grad
        assert torch.equal(layer.weight_scales.grad, scale_grad)
    layer.zero_grad()
    layer(torch.randn(3, ODD[1])).sum().backward()  # and it still trains


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_meta_device_and_back(fmt: Format) -> None:
    layer = packed(fmt, lora=2)
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()}
    meta = copy.deepcopy(layer).to("meta", torch.float32)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in meta.state_dict().items()} == wanted
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    y = meta(torch.empty(2, 7, ODD[1], dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype) == ((2, 7, ODD[0]), torch.bfloat16)

    meta.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, ODD[1])
    assert torch.equal(meta(x), layer(x))
    assert not meta.weight.requires_grad
    assert meta.lora_A.requires_grad


def through_a_file(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("fmt", ["nf4 g64 dq", "int3 g32 f16 zero", f"{FOUR} g64 f32"])
def test_a_copy_is_equal_and_independent(fmt: str, way: str) -> None:
    layer = packed(fmt, lora=4).eval()
    layer.bias.requires_grad_(False)
    other = COPIES[way](layer)
    x = torch.randn(3, ODD[1])
    assert torch.equal(other(x), layer(x))
    assert (other.format, other.lora_scaling, other.training) == (layer.format, layer.lora_scaling, layer.training)
    assert trains(other) == trains(layer)
    before = layer(x)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert torch.equal(layer(x), before)


# ---------------------------------------------------------------------------------------------- state_dict


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_state_dict_loads_strictly_into_a_fresh_layer(fmt: Format) -> None:
    layer = packed(fmt, lora=2)
    fresh = QuantLinear(ODD[1], ODD[0], str(fmt))
    fresh.add_lora(2, alpha=4)
    state = layer.state_dict()
    assert bytes(state["weight_format"].tolist()).decode() == str(fmt)
    fresh.load_state_dict(state, strict=True)
    for rows in (1, ABOVE):
        x = torch.randn(rows, ODD[1])
        assert torch.equal(fresh(x), layer(x))
    assert {name: tensor.dtype for name, tensor in fresh.state_dict().items()} == {n: t.dtype for n, t in state.items()}


def test_a_fresh_layer_computes_before_it_is_loaded() -> None:
    assert torch.equal(QuantLinear(100, 33, "nf4 g64 f32")(torch.randn(3, 100)), torch.zeros(3, 33))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("theirs", ["nf4 g32 f32", "nf4 g64 dq", "nf3 g64 f32", "int4 g64 f32 zero", "fp4 g64 f32"])
def test_another_format_is_refused_by_both_names(theirs: str, strict: bool) -> None:
    model = nn.Sequential(nn.ReLU(), packed("nf4 g64 f32"))
    before = model(torch.ones(1, ODD[1]))
    state = {f"1.{name}": value for name, value in packed(theirs).state_dict().items()}
    with pytest.raises(FormatError, match=rf"^1 stores nf4 g64 f32, but the state_dict holds {theirs};"):
        model.load_state_dict(state, strict=strict)
    assert torch.equal(model(torch.ones(1, ODD[1])), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dense_weight_is_refused_by_both_names(dtype: torch.dtype) -> None:
    with pytest.raises(FormatError, match=f"stores int3 g64 f32, but the state_dict holds a dense {dtype} weight"):
        packed("int3 g64 f32").load_state_dict(dense().to(dtype).state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_codes_without_their_format_are_refused(strict: bool) -> None:
    layer = packed()
    state = layer.state_dict()
    del state["weight_format"]
    with pytest.raises(
        FormatError, match="stores nf4 g64 f32, but the state_dict holds codes without the weight_format"
    ):
        layer.load_state_dict(state, strict=strict)


def test_missing_and_unexpected_keys_are_torch_s_to_report() -> None:
    layer = packed("nf4 g64 dq")
    for name in ("weight", "weight_scales", "weight_scales_absmax", "weight_scales_offset", "bias"):
        state = layer.state_dict()
        del state[name]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            layer.load_state_dict(state)
        assert layer.load_state_dict(state, strict=False).missing_keys == [name]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"lora_A"'):
        layer.load_state_dict(packed("nf4 g64 dq", lora=2).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(packed("nf4 g64 dq", shape=(34, 100)).state_dict())


def test_an_adapter_alone_may_be_loaded() -> None:
    layer, trained = packed(lora=2), packed(lora=2)
    adapter = {name: value for name, value in trained.state_dict().items() if "lora" in name}
    layer.load_state_dict(adapter, strict=False)
    assert torch.equal(layer.lora_B, trained.lora_B)


# ---------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[Callable[[QuantLinear], object], type[Exception], str]] = {
    "int64 input": (lambda m: m(torch.ones(2, 100, dtype=torch.long)), TypeError, "torch.int64 input"),
    "uint8 input": (lambda m: m(torch.ones(2, 100, dtype=torch.uint8)), TypeError, "torch.uint8 input"),
    "bool input": (lambda m: m(torch.ones(2, 100, dtype=torch.bool)), TypeError, "torch.bool input"),
    "complex input": (lambda m: m(torch.ones(2, 100, dtype=torch.complex64)), TypeError, "torch.complex64 input"),
    "fp8 input": (lambda m: m(torch.ones(2, 100).to(torch.float8_e4m3fn)), TypeError, "float8_e4m3fn input"),
    "wrong width": (lambda m: m(torch.ones(2, 99)), ValueError, r"shape \(2, 99\).* in_features=100"),
    "a scalar": (lambda m: m(torch.tensor(1.0)), ValueError, r"shape \(\).* in_features=100"),
    "another device": (
        lambda m: m(torch.ones(2, 100, device="meta")),
        ValueError,
        "input is on meta, the weight on cpu",
    ),
    "rank 0": (lambda m: m.add_lora(0), ValueError, r"rank=0 is no whole number in 1\.\.33"),
    "rank above the layer's": (lambda m: m.add_lora(34), ValueError, r"rank=34 is no whole number in 1\.\.33"),
    "a fractional rank": (lambda m: m.add_lora(2.5), ValueError, r"rank=2\.5"),
    "alpha 0": (lambda m: m.add_lora(4, alpha=0), ValueError, "alpha=0"),
    "alpha below 0": (lambda m: m.add_lora(4, alpha=-1), ValueError, "alpha=-1"),
    "alpha NaN": (lambda m: m.add_lora(4, alpha=math.nan), ValueError, "alpha=nan"),
    "alpha inf": (lambda m: m.add_lora(4, alpha=math.inf), ValueError, "alpha=inf"),
    "dropout 1": (lambda m: m.add_lora(4, dropout=1), ValueError, "dropout=1 is outside"),
    "dropout below 0": (lambda m: m.add_lora(4, dropout=-0.1), ValueError, "dropout=-0.1 is outside"),
    "dropout NaN": (lambda m: m.add_lora(4, dropout=math.nan), ValueError, "dropout=nan is outside"),
    "A of another shape": (
        lambda m: m.add_lora(4, A=torch.ones(100, 4)),
        ValueError,
        r"A has shape \(100, 4\).*\(4, 100\)",
    ),
    "B of another shape": (
        lambda m: m.add_lora(4, B=torch.ones(33, 3)),
        ValueError,
        r"B has shape \(33, 3\).*\(33, 4\)",
    ),
    "a second LoRA": (lambda m: (m.add_lora(4), m.add_lora(2)), ValueError, r"rank 4 is attached.*remove_lora\(\)"),
    "a weight of another shape": (
        lambda m: m.set_quantized(qft.quantize(torch.ones(3, 4), "nf4 g64")),
        ValueError,
        r"shape \(3, 4\).*\(33, 100\)",
    ),
    "no format": (lambda m: QuantLinear(100, 33, "nf5 g64"), FormatError, "nf5"),
    "a NaN weight": (
        lambda m: QuantLinear.from_linear(nan_linear(), "nf4 g64", name="a.b"),
        ValueError,
        r"a\.b\[1, 2\]",
    ),
}


def nan_linear() -> nn.Linear:
    linear = dense()
    with torch.no_grad():
        linear.weight[1, 2] = math.nan
    return linear


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(case: str) -> None:
    run, kind, match = REFUSED[case]
    layer = packed()
    with pytest.raises(kind, match=match) as refusal:
        run(layer)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 200


def test_a_refused_lora_leaves_the_layer_without_one() -> None:
    layer = packed()
    with pytest.raises(ValueError, match="B has shape"):
        layer.add_lora(4, B=torch.ones(1, 1))
    assert layer.lora_rank == 0
    assert set(layer.state_dict()) == {"weight", "weight_scales", "weight_format", "bias"}


def test_a_real_layer_stores_what_its_format_says() -> None:
    layer = packed("nf4 g64 dq", shape=REAL, bias=False)
    stored = sum(tensor.nbytes for tensor in layer.state_dict().values()) - layer.weight_format.nbytes
    assert stored == layer.quant_tensor.nbytes
    assert stored * 8 / math.prod(REAL) == pytest.approx(4.127, rel=0.01)
    assert [name for name in STORED if getattr(layer, name) is not None] == [
        "weight", "weight_scales", "weight_scales_absmax", "weight_scales_offset",
    ]  # fmt: skip
