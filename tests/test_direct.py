"""Calls without torch's dispatcher: when they are taken, that they compute the same, and how little Python they run."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest
import torch
from formats import BOUND, ODD, error, sample
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import qft
from qft import ops
from qft.nn import fused_lora
from qft.nn.linear import QuantLinear
from qft.tensor import QuantTensor, quantize


class Seen(TorchDispatchMode):
    """The operators that torch's dispatcher gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


def layer(fmt: str = "nf4 g64 f32", bias: bool = True, lora: int = 0, **given: object) -> QuantLinear:
    made = QuantLinear.from_linear(nn.Linear(ODD[1], ODD[0], bias=bias), fmt)
    if made.bias is not None:
        made.bias.requires_grad_(False)
    if lora:
        made.add_lora(lora, alpha=3 * lora, B=torch.randn(ODD[0], lora), **given)
    return made


def product(x: Tensor, q: QuantTensor) -> Tensor:
    return x @ qft.kernels.dequantize(q, x.dtype, "reference").T


# ---------------------------------------------------------------------------------------------- which way a call goes


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that `ops.matmul` and the backward pass of a direct product went through."""
    names: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> Callable[..., Tensor]:
            names.append(name)
            return getattr(real, name)

    real = torch.ops.qft
    monkeypatch.setattr(torch.ops, "qft", Watched())
    return names


def test_plain_tensors_meet_no_dispatcher(called: list[str]) -> None:
    q = quantize(sample(ODD), "nf4 g64 f32")
    q.weight_scales.requires_grad_()
    x = nn.Parameter(torch.randn(3, ODD[1]))
    ops.matmul(x, q).sum().backward()
    with torch.no_grad():
        ops.matmul(x, q)
    assert called == []


class Subclass(Tensor):
    pass


class Nothing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


def within(mode: Callable[[], object]) -> Callable[[Tensor, QuantTensor], object]:
    def run(x: Tensor, q: QuantTensor) -> Tensor:
        with mode():  # type: ignore[attr-defined]
            return ops.matmul(x, q)

    return run


def fake(x: Tensor, q: QuantTensor) -> None:
    with FakeTensorMode() as mode:
        pretended = {name: mode.from_tensor(tensor) for name, tensor in q.tensors().items()}
        y = ops.matmul(mode.from_tensor(x), QuantTensor(q.format, q.shape, **pretended))
    assert isinstance(y, torch._subclasses.FakeTensor)
    assert ops.matmul(mode.from_tensor(x), QuantTensor(q.format, q.shape, **pretended)).shape == y.shape  # mode left


def on_meta(x: Tensor, q: QuantTensor) -> None:
    meta = QuantTensor(q.format, q.shape, **{name: tensor.to("meta") for name, tensor in q.tensors().items()})
    assert ops.matmul(x.to("meta"), meta).is_meta


def dual(x: Tensor, q: QuantTensor) -> None:
    with forward_ad.dual_level():
        ops.matmul(forward_ad.make_dual(x, torch.ones_like(x)), q)


def transformed(x: Tensor, q: QuantTensor) -> None:
    with suppress(RuntimeError):  # torch's own: an operator with a formula for autograd has none for torch.func
        torch.func.grad(lambda x: ops.matmul(x, q).sum())(x)


ELSEWHERE: dict[str, Callable[[Tensor, QuantTensor], object]] = {
    "a dispatch mode": within(Seen),
    "a function mode": within(Nothing),
    "a default device": within(lambda: torch.device("cpu")),
    "fake tensors": fake,
    "meta tensors": on_meta,
    "a subclass": lambda x, q: ops.matmul(x.as_subclass(Subclass), q),
    "a weight of a subclass": lambda x, q: ops.matmul(
        x, QuantTensor(q.format, q.shape, q.weight, q.weight_scales.as_subclass(Subclass))
    ),
    "torch.func.grad": transformed,
    "forward-mode derivatives": dual,
    "make_fx": lambda x, q: torch.fx.experimental.proxy_tensor.make_fx(lambda x: ops.matmul(x, q))(x),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.autograd.forward_ad's own
@pytest.mark.parametrize("run", ELSEWHERE.values(), ids=ELSEWHERE)
def test_whoever_listens_gets_the_operator(run: Callable[[Tensor, QuantTensor], object], called: list[str]) -> None:
    run(torch.randn(3, ODD[1]), quantize(sample(ODD), "nf4 g64 f32"))
    assert called[:1] == ["matmul"]


def test_a_profile_names_the_kernel(called: list[str]) -> None:
    q, x = quantize(sample(ODD), "nf4 g64 f32"), torch.randn(3, ODD[1], requires_grad=True)
    with torch.profiler.profile() as profile:
        ops.matmul(x, q).sum().backward()
    names = " ".join(event.key for event in profile.key_averages())
    assert "qft matmul nf4 g64 f32 " in names
    assert "qft matmul_t nf4 g64 f32 " in names
    assert called == []


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_traced_product_is_no_constant() -> None:
    q = quantize(sample(ODD), "nf4 g64 f32")
    traced = torch.jit.trace(lambda x: ops.matmul(x, q), torch.randn(3, ODD[1]))
    x = torch.randn(3, ODD[1])
    assert torch.equal(traced(x), ops.matmul(x, q))


def test_a_mode_of_the_backward_pass_gets_the_operator_of_a_layer_with_lora() -> None:
    y = layer(lora=4)(torch.randn(3, ODD[1], requires_grad=True))
    with Seen() as seen:
        y.sum().backward()
    assert "qft.matmul_t" in seen.names


def test_a_mode_of_the_backward_pass_gets_its_operators() -> None:
    q, x = quantize(sample(ODD), "int4 g64 f32 zero"), torch.randn(3, ODD[1], requires_grad=True)
    q.weight_scales.requires_grad_()
    q.weight_zeros.requires_grad_()
    y = ops.matmul(x, q)
    with Seen() as seen:
        y.sum().backward()
    assert {name for name in seen.names if name.startswith("qft")} == {
        "qft.matmul_t", "qft.scale_grad", "qft.zero_grad",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- the same results


def step(q: QuantTensor, x: Tensor, dy: Tensor, mode: TorchDispatchMode | None) -> list[Tensor]:
    leaves = [x, *(t for t in (q.weight_scales, q.weight_zeros) if t is not None and t.is_floating_point())]
    for leaf in leaves:
        leaf.requires_grad_()
    with mode or nullcontext():
        y = ops.matmul(x, q)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", ["nf4 g64 f16", "int3 channel f32 zero", "int4 g32 bf16 zero", "nf2 g64 dq"])
@pytest.mark.parametrize("leading", [(3,), (2, 5), (150,), (0,)], ids=str)
def test_both_ways_give_the_same_bits(leading: tuple[int, ...], fmt: str, dtype: torch.dtype) -> None:
    q = quantize(sample(ODD), fmt)
    x, dy = torch.randn(*leading, ODD[1]).to(dtype), torch.randn(*leading, ODD[0]).to(dtype)
    seen = Seen()
    direct, dispatched = step(q, x, dy, None), step(q, x, dy, seen)
    assert {"qft.matmul", "qft.matmul_t"} <= set(seen.names)
    assert len(direct) == len(dispatched)
    assert all(map(torch.equal, direct, dispatched))


# ---------------------------------------------------------------------------------------------- the LoRA as one node


def lora_step(
    made: QuantLinear, x: Tensor, mode: TorchDispatchMode | None, run: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    for parameter in made.parameters():
        parameter.grad = None
    with mode or nullcontext():
        y = (run or made)(leaf)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)).sum().backward()
    return {"y": y.detach(), "x": leaf.grad, "A": made.lora_A.grad, "B": made.lora_B.grad}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for each product that took its LoRA along."""
    products: list[str] = []
    whole = fused_lora.product
    monkeypatch.setattr(fused_lora, "product", lambda *given: products.append("fused") or whole(*given))
    return products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(3,), (2, 5), (150,), (0,), ()], ids=str)
def test_a_layer_and_its_lora_are_one_node(
    leading: tuple[int, ...], bias: bool, dtype: torch.dtype, fused: list[str]
) -> None:
    made = layer(bias=bias, lora=4)
    x = torch.randn(*leading, ODD[1]).to(dtype)
    with torch.no_grad():
        assert made(x).shape == (*leading, ODD[0])
    got, wanted = lora_step(made, x, None), lora_step(made, x, Seen())
    assert fused == ["fused"] * 2
    for name, value in wanted.items():
        assert got[name].shape == value.shape, name
        assert got[name].dtype == value.dtype, name
        # one node rounds less often than the many: the bound is twice that of one rounding
        bound = 2 * BOUND.get(dtype, 1e-6)
        assert (got[name] - value).norm() <= bound * value.norm(), name


def test_what_does_not_train_gets_no_gradient(fused: list[str]) -> None:
    made, x = layer(lora=4), torch.randn(3, ODD[1])
    made(x).sum().backward()
    assert made.lora_A.grad is not None
    made.lora_A.requires_grad_(False)
    made.lora_A.grad = None
    made(x).sum().backward()
    assert made.lora_A.grad is None
    made.lora_B.requires_grad_(False)
    assert not made(x).requires_grad
    assert made(x.clone().requires_grad_()).requires_grad
    assert len(fused) == 4


OTHERWISE: dict[str, Callable[[QuantLinear], object]] = {
    "scales train": lambda made: made.weight_scales.requires_grad_(),
    "the bias trains": lambda made: made.bias.requires_grad_(),
    "dropout": lambda made: setattr(made, "lora_dropout", nn.Dropout(0.5)),
}


@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
def test_what_one_node_does_not_cover_goes_the_long_way(
    change: Callable[[QuantLinear], object], fused: list[str]
) -> None:
    made = layer(lora=4)
    change(made)
    y = made(torch.randn(3, ODD[1]))
    y.sum().backward()
    assert fused == []
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)


def test_half_precision_on_a_cpu_multiplies_factors_in_fp32(fused: list[str]) -> None:
    made = layer(lora=4)
    lora_step(made, torch.randn(3, ODD[1]).half(), None)
    assert fused == []


def test_nothing_but_activations_factors_and_packed_data_is_kept() -> None:
    made, saved = layer(lora=4), []
    x = torch.randn(2, 5, ODD[1], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made(x)
    known = {t.data_ptr() for t in (x, made.lora_A, made.lora_B, *made.quant_tensor.tensors().values())}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(10, 4)]  # x At


def test_a_backward_pass_under_autocast_gives_gradients_in_their_dtypes() -> None:
    made, x = layer(lora=4), torch.randn(3, ODD[1], requires_grad=True)
    y = made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.sum().backward()
    assert {x.grad.dtype, made.lora_A.grad.dtype, made.lora_B.grad.dtype} == {torch.float32}


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, ODD[1], requires_grad=True)
    (dx,) = torch.autograd.grad(layer(lora=4)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# ---------------------------------------------------------------------------------------------- what autograd does


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("leading", [(3,), (2, 7)], ids=str)
def test_an_output_may_be_changed_in_place(leading: tuple[int, ...], lora: int) -> None:
    made = layer(lora=lora)
    x = torch.randn(*leading, ODD[1], requires_grad=True)
    made(x).relu_().sum().backward()
    passing = (made(x) > 0).float().detach()
    (wanted,) = torch.autograd.grad(made(x), x, passing)
    assert torch.equal(x.grad, wanted)


def test_a_scale_changed_before_the_backward_pass_is_noticed() -> None:
    made, x = layer(lora=4), torch.randn(3, ODD[1], requires_grad=True)
    y = made(x)
    with torch.no_grad():
        made.weight_scales.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_recomputes_the_same(reentrant: bool, lora: int) -> None:
    made = nn.Sequential(layer(lora=lora), nn.GELU(), QuantLinear(ODD[0], ODD[0], "nf4 g64"))
    x = torch.randn(2, 5, ODD[1], requires_grad=True)
    results = []
    for run in (made, lambda x: checkpoint(made, x, use_reentrant=reentrant)):
        x.grad = None
        made.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in made.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("lora", [0, 4])
def test_selective_checkpointing_sees_the_product_and_keeps_it(lora: int) -> None:
    made, x, asked = layer(lora=lora), torch.randn(3, ODD[1], requires_grad=True), []

    def keep(context, operator, *args, **kwargs):  # type: ignore[no-untyped-def]
        asked.append((operator, context.is_recompute))
        ours = operator == torch.ops.qft.matmul.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    made(x).square().sum().backward()
    wanted, x.grad = x.grad, None
    made.zero_grad()
    y = checkpoint(made, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep))
    y.square().sum().backward()
    assert (torch.ops.qft.matmul.default, False) in asked
    assert error(x.grad, wanted) <= BOUND[torch.float32]


# ---------------------------------------------------------------------------------------------- memory that changes


def other_data(made: QuantLinear, other: QuantLinear) -> None:
    for name, tensor in other.quant_tensor.tensors().items():
        made._parameters[name].data = tensor.data.clone()


CHANGES: dict[str, Callable[[QuantLinear, QuantLinear], object]] = {
    "set_quantized": lambda made, other: made.set_quantized(other.quant_tensor),
    "load_state_dict": lambda made, other: made.load_state_dict(other.state_dict()),
    "load_state_dict(assign)": lambda made, other: made.load_state_dict(other.state_dict(), assign=True),
    ".data": other_data,
    "in place": lambda made, other: [
        made._parameters[name].copy_(tensor) for name, tensor in other.quant_tensor.tensors().items()
    ],
}


@pytest.mark.parametrize("fmt", ["nf4 g64 f16", "int4 g64 dq zero"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_layer_computes_with_what_it_holds_now(
    change: Callable[[QuantLinear, QuantLinear], object], fmt: str
) -> None:
    made, other, x = layer(fmt, bias=False), layer(fmt, bias=False), torch.randn(3, ODD[1])
    before = made(x)
    change(made, other)
    assert torch.equal(made(x), other(x))
    assert not torch.equal(made(x), before)


@torch.no_grad()
def test_moving_and_casting_leave_the_weight() -> None:
    made, x = layer(), torch.randn(3, ODD[1])
    before = made(x)
    for change in (lambda: made.to("meta").to_empty(device="cpu"), made.bfloat16, made.float, lambda: made.to("cpu")):
        state = copy.deepcopy(made.state_dict())
        change()
        made.load_state_dict(state)
    assert error(made(x), before) < 1e-2  # the bias went through bf16


@torch.no_grad()
def test_one_memory_under_two_formats_is_two_weights() -> None:
    """What is remembered of an address is never taken for another format, shape or dtype."""
    q, x = quantize(sample((64, 128)), "nf4 g64 f16"), torch.randn(3, 128)
    for fmt in ("nf4 g64 f16", "int4 g64 f16", "nf4 g64 bf16"):
        scales = q.weight_scales.view(torch.bfloat16) if "bf16" in fmt else q.weight_scales
        same = QuantTensor(qft.Format.parse(fmt), q.shape, q.weight, scales)
        assert error(ops.matmul(x, same), product(x, same)) <= BOUND[torch.float32], fmt
    with pytest.raises(TypeError, match=r"weight_scales is torch.bfloat16, expected torch.float16"):
        ops.matmul(x, QuantTensor(q.format, q.shape, q.weight, q.weight_scales.view(torch.bfloat16)))
    with pytest.raises(ValueError, match="weight_scales has shape"):
        ops.matmul(x, QuantTensor(q.format, q.shape, q.weight, q.weight_scales.view(2, 64)))
    half = QuantTensor(q.format, (32, 128), q.weight[:32], q.weight_scales[:32])
    assert torch.equal(ops.matmul(x, half), ops.matmul(x, q)[:, :32])


@torch.no_grad()
@pytest.mark.parametrize("make", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"])
def test_a_copy_has_a_memory_of_its_own(make: Callable[[QuantLinear], QuantLinear]) -> None:
    made, x = layer(lora=4), torch.randn(3, ODD[1])
    before = made(x)
    twin = make(made)
    assert torch.equal(twin(x), before)
    twin.weight_scales.zero_()
    assert torch.equal(made(x), before)
    assert not torch.equal(twin(x), before)


def test_two_python_threads_do_not_disturb_each_other(threads: Callable[[int], None]) -> None:
    threads(1)
    layers = [layer("nf4 g64 f16", lora=4), layer("int3 g64 f32 zero", lora=4)]
    inputs = [torch.randn(rows, ODD[1]) for rows in (1, 40)]
    wanted = [lora_step(made, x, None) for made, x in zip(layers, inputs, strict=True)]
    wrong: list[str] = []

    def run(at: int) -> None:
        for _ in range(100):
            got = lora_step(layers[at], inputs[at], None)
            wrong.extend(name for name, value in got.items() if not torch.equal(value, wanted[at][name]))

    workers = [threading.Thread(target=run, args=(at,)) for at in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_scratch_is_fp32_whatever_the_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = quantize(sample(ODD), "nf4 channel f32"), torch.randn(3, ODD[1])
    q.weight_scales.requires_grad_()
    wanted = torch.autograd.grad(ops.matmul(x, q).sum(), q.weight_scales)
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **given: made.append(empty(*size, **given)) or made[-1])
    torch.set_default_dtype(torch.float64)  # bfloat16 would leave scratch half as large as kernels take it to be
    try:
        got = torch.autograd.grad(ops.matmul(x, q).sum(), q.weight_scales)
    finally:
        torch.set_default_dtype(torch.float32)
    assert made
    assert all(tensor.dtype == torch.float32 for tensor in made)
    assert torch.equal(got[0], wanted[0])


# ---------------------------------------------------------------------------------------------- memory given


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_is_dequantized_into_memory_that_is_there(dtype: torch.dtype, kernel: str | None) -> None:
    q = quantize(sample(ODD), "int4 g64 f16 zero")
    out = torch.full(ODD, torch.nan, dtype=dtype)
    assert qft.kernels.dequantize(q, dtype, kernel, out) is out
    assert torch.equal(out, q.dequantize(dtype))
    assert q.dequantize(out=out.zero_()) is out
    assert torch.equal(out, q.dequantize(dtype))
    made = QuantLinear.from_quantized(q)
    assert torch.equal(made.dequantize(out=out.zero_()), made.dequantize(dtype))


UNFIT = {
    "shape": (torch.empty(ODD[1], ODD[0]), None, ValueError, r"^out has shape \(100, 33\), expected \(33, 100\)$"),
    "layout": (torch.empty(ODD[1], ODD[0]).T, None, ValueError, "^out is not contiguous"),
    "device": (torch.empty(ODD, device="meta"), None, ValueError, "^out is on meta"),
    "dtype": (torch.empty(ODD), torch.bfloat16, TypeError, "^out is torch.float32, expected torch.bfloat16"),
}


@pytest.mark.parametrize(("out", "dtype", "kind", "sentence"), UNFIT.values(), ids=UNFIT)
def test_memory_that_does_not_fit_is_refused(
    out: Tensor, dtype: torch.dtype | None, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        quantize(sample(ODD), "nf4 g64").dequantize(dtype, out=out)


def test_autograd_notices_that_memory_was_written() -> None:
    q, x = quantize(sample(ODD), "nf4 g64"), torch.randn(3, ODD[1], requires_grad=True)
    dense = q.dequantize()
    y = x @ dense.T
    q.dequantize(out=dense)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---------------------------------------------------------------------------------------------- how little Python


def functions_run(call: Callable[[], object]) -> int:
    """Functions that a warm call enters, Python's and C's: what it costs where the products are small."""
    call()
    entered = 0

    def count(frame, event: str, argument) -> None:  # type: ignore[no-untyped-def]
        nonlocal entered
        entered += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def forward(lora: int) -> Callable[[], object]:
    made, x = layer(lora=lora).requires_grad_(False), torch.randn(3, ODD[1])
    return lambda: made(x)


def training(lora: int) -> Callable[[], object]:
    made, x, dy = layer(lora=lora), torch.randn(3, ODD[1], requires_grad=True), torch.ones(3, ODD[0])
    leaves = [x, *(p for p in made.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(made(x), leaves, dy)


# A tenth more than counted with torch 2.13 and Python 3.11: one line more does not matter, one layer of Python does.
# Through the dispatcher, and with a node for each step of a LoRA, they were 129, 146, 296 and 325.
LIMITS = {
    "forward": (86, forward, 0),
    "forward with a LoRA": (124, forward, 4),
    "forward and backward": (220, training, 0),
    "forward and backward with a LoRA": (260, training, 4),
}


@pytest.mark.parametrize(("limit", "make", "lora"), LIMITS.values(), ids=LIMITS)
def test_a_call_runs_little_python(limit: int, make: Callable[[int], Callable[[], object]], lora: int) -> None:
    assert functions_run(make(lora)) <= limit
