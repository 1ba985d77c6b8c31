"""The operators: gradients against float64, and what autograd, fakes and compilers need of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from formats import ABOVE, BOUND, DTYPES, FORMATS, FOUR, ODD, SHAPES, sample
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qft import double_quant, kernels, ops, reference
from qft.format import Format
from qft.tensor import QuantTensor, quantize

pytestmark = pytest.mark.usefixtures("panels_above")  # a row kernel has few rows, a panel many, on any machine
LEADING = ((), (1,), (2, 7), (0,), (3, 0), (ABOVE,))


def packed(q: QuantTensor) -> tuple[object, ...]:
    """What an operator takes after its activations."""
    return (*q.stored, str(q.format), q.shape[1])


def trainable(q: QuantTensor) -> dict[str, Tensor]:
    """The stored tensors that can take a gradient: floating scales and zero points."""
    stored = {name: getattr(q, name) for name in ("weight_scales", "weight_zeros")}
    return {name: tensor for name, tensor in stored.items() if tensor is not None and tensor.is_floating_point()}


class Exact:
    """y and all gradients in float64, and how far off a result computed in another dtype may be.

    `error` is relative to the norm of the result, or to the norm its terms would have with random signs where that is
    larger: a sum whose terms happen to cancel still carries their roundings.
    """

    def __init__(self, x: Tensor, q: QuantTensor, dy: Tensor) -> None:
        levels = torch.tensor(q.format.levels, dtype=torch.float64)[q.unpack().long()]
        if q.zeros is not None:
            levels = levels - reference.per_weight(q.zeros.double(), q.format, q.shape[1])
        factors = x.detach().double(), levels, q.scales.detach().double(), dy.double()
        self.wanted = self._autograd(q.format, *factors)
        self.squares = self._autograd(q.format, *(factor**2 for factor in factors))

    @staticmethod
    def _autograd(fmt: Format, x: Tensor, levels: Tensor, scales: Tensor, dy: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(scales)  # the shift of a zero point from the one in `levels`
        leaves = [tensor.requires_grad_() for tensor in (x, scales, zeros)]
        spread = [reference.per_weight(tensor, fmt, levels.shape[1]) for tensor in (zeros, scales)]
        y = x @ ((levels - spread[0]) * spread[1]).T
        gradients = torch.autograd.grad(y, leaves, dy)
        return {"y": y.detach(), **dict(zip(("x", "weight_scales", "weight_zeros"), gradients, strict=True))}

    def error(self, name: str, got: Tensor) -> float:
        wanted = self.wanted[name]
        assert got.shape == wanted.shape, name
        norm = max(wanted.norm().item(), self.squares[name].abs().sum().sqrt().item())
        return (got.detach().double() - wanted).norm().item() / (norm or 1.0)


def error(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_output_and_gradients_match_float64(fmt: Format, shape: tuple[int, int], dtype: torch.dtype) -> None:
    out, in_features = shape
    q = quantize(sample(shape), fmt)
    for leading in LEADING:
        x, dy = torch.randn(*leading, in_features).to(dtype).requires_grad_(), torch.randn(*leading, out).to(dtype)
        for tensor in trainable(q).values():
            tensor.requires_grad_().grad = None

        y = ops.matmul(x, q)
        y.backward(dy)

        exact = Exact(x, q, dy)
        assert y.dtype == x.grad.dtype == dtype
        assert exact.error("y", y) <= BOUND[dtype], leading
        assert exact.error("x", x.grad) <= BOUND[dtype], leading
        for name, tensor in trainable(q).items():
            # a gradient is rounded once more, to the dtype its tensor is stored in
            assert exact.error(name, tensor.grad) <= max(BOUND[dtype], BOUND[tensor.dtype]), (name, leading)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_real_layer_match_float64(dtype: torch.dtype) -> None:
    q = quantize(sample((512, 1024)), "nf4 g64 f32")
    q.weight_scales.requires_grad_()
    x, dy = torch.randn(2, 300, 1024).to(dtype).requires_grad_(), torch.randn(2, 300, 512).to(dtype)
    y = ops.matmul(x, q)
    y.backward(dy)
    exact = Exact(x, q, dy)
    for name, got in {"y": y, "x": x.grad, "weight_scales": q.weight_scales.grad}.items():
        assert exact.error(name, got) <= BOUND[dtype], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, ABOVE])
@pytest.mark.parametrize("fmt", ["nf4 channel f32", "int4 channel f32", "int3 channel f32 zero", f"{FOUR} channel f32"])
def test_the_per_channel_gradient_needs_no_weight_gradient(
    fmt: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ds = sum of dy * y / s, and the direct sum in the rows where s is 0 and y says nothing."""
    q = quantize(sample(ODD), fmt)
    q.weight_scales[::3] = 0  # with the codes of rows that were not zero
    q.weight_scales.requires_grad_()
    x, dy = torch.randn(rows, ODD[1]).to(dtype), torch.randn(rows, ODD[0]).to(dtype)

    def refuse(*_: object) -> None:
        raise AssertionError("the whole weight gradient was computed")

    monkeypatch.setattr(kernels, "scale_grad", refuse)
    y = ops.matmul(x, q)
    y.backward(dy)

    got, scales = q.weight_scales.grad, q.weight_scales.detach()
    alive = scales[:, 0] != 0
    identity = (dy.double() * y.detach().double()).sum(0)[:, None] / scales.double()
    assert error(got[alive], identity[alive]) <= BOUND[torch.float32]
    exact = Exact(x, q, dy)
    assert exact.error("weight_scales", got) <= BOUND[dtype]
    direct = exact.wanted["weight_scales"][~alive]
    assert error(got[~alive], direct) <= BOUND[torch.float32]
    assert (direct != 0).any()


# ---------------------------------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize("fmt", ["nf4 g32 f32", "int3 channel f32", "int4 g32 f32 zero", "nf2 g64 dq"])
def test_gradcheck_in_float64(fmt: str) -> None:
    """The output is linear in x, in scales and in zero points: a central difference is exact at any step.

    Scales and zero points reach the operator in fp32, where a step that is a power of two and values that are multiples
    of 2^-10 have exact sums.
    """
    q = quantize(torch.randn(3, 40), fmt)
    x = torch.randn(2, 2, 40, dtype=torch.float64)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        stored = dict(zip(trainable(q), (value.float() for value in values), strict=True))
        return ops.matmul(x, QuantTensor(q.format, q.shape, **{**q.tensors(), **stored}))

    values = [(t.double() * 1024).round() / 1024 for t in trainable(q).values()]
    inputs = [t.requires_grad_() for t in (x, *values)]
    # weights are rounded to fp32: 6e-8 of each of 40 terms, divided by the step
    assert torch.autograd.gradcheck(run, inputs, eps=0.25, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- what autograd keeps


def saved_by(run: Callable[[], object]) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return saved


@pytest.mark.parametrize("train", [(), ("weight_scales",), ("weight_zeros",)], ids=str)
@pytest.mark.parametrize("fmt", ["int4 g64 f32 zero", "int4 channel f32 zero"])
@pytest.mark.parametrize("rows", [3, ABOVE])
def test_autograd_keeps_packed_data_and_what_training_needs(fmt: str, rows: int, train: tuple[str, ...]) -> None:
    q = quantize(sample(ODD), fmt)
    x = torch.randn(rows, ODD[1], requires_grad=True)
    for name in train:
        getattr(q, name).requires_grad_()
    kept = {}
    saved = saved_by(lambda: kept.update(y=ops.matmul(x, q)))

    allowed = {tensor.data_ptr(): name for name, tensor in (*q.tensors().items(), ("x", x), ("y", kept["y"]))}
    names = {allowed.get(tensor.data_ptr(), f"another tensor {tuple(tensor.shape)}") for tensor in saved}
    wanted = set(q.tensors()) | ({"x"} if train else set())
    if train == ("weight_scales",) and q.format.group == 0:
        wanted.add("y")
    assert names == wanted


def test_nothing_of_the_size_of_x_is_kept_while_the_scales_are_frozen() -> None:
    q = quantize(sample(ODD), "nf4 g64 f32")
    x = torch.randn(2, 7, ODD[1], requires_grad=True)
    assert all(tensor.numel() < x.numel() for tensor in saved_by(lambda: ops.matmul(x, q)) if tensor is not q.weight)


def test_a_frozen_weight_has_no_graph() -> None:
    q = quantize(sample(ODD), "nf4 g64 f32")
    y = ops.matmul(torch.randn(3, ODD[1]), q)
    assert not y.requires_grad


def test_only_what_trains_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for verb in ("matmul_t", "scale_grad"):
        original = getattr(kernels, verb)
        monkeypatch.setattr(kernels, verb, lambda *args, verb=verb, run=original: called.append(verb) or run(*args))
    q = quantize(sample(ODD), "nf4 g64 f32")
    q.weight_scales.requires_grad_()
    ops.matmul(torch.randn(3, ODD[1]), q).sum().backward()
    assert called == ["scale_grad"]
    called.clear()
    ops.matmul(torch.randn(3, ODD[1], requires_grad=True), quantize(sample(ODD), "nf4 g64 f32")).sum().backward()
    assert called == ["matmul_t"]


@pytest.mark.parametrize("leading", [(3,), (2, 7)], ids=str)
def test_an_output_may_be_changed_in_place(leading: tuple[int, ...]) -> None:
    """As nn.ReLU(inplace=True) does; a view would be refused."""
    q = quantize(sample(ODD), "nf4 g64 f32")
    x = torch.randn(*leading, ODD[1], requires_grad=True)
    ops.matmul(x, q).relu_().sum().backward()
    passing = (x.detach() @ q.dequantize().T > 0).float()
    assert error(x.grad, passing @ q.dequantize()) <= BOUND[torch.float32]


@pytest.mark.parametrize("rows", [3, ABOVE])
def test_any_layout_of_x_and_dy_gives_the_bits_of_a_contiguous_one(rows: int) -> None:
    q = quantize(sample(ODD), "nf4 g64 f32")
    x, dy = torch.randn(rows, ODD[1]), torch.randn(rows, ODD[0])
    results = []
    for lay in (lambda t: t, lambda t: t.T.contiguous().T, lambda t: torch.stack([t, t], -1)[..., 0]):
        leaf = lay(x).detach().requires_grad_()
        y = ops.matmul(leaf, q)
        results.append((y, *torch.autograd.grad(y, leaf, lay(dy))))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


# ---------------------------------------------------------------------------------------------- torch.library

CHECKED = (
    "nf4 g64 f32", "nf4 g64 dq", "int3 channel f32 zero", "int2 g32 bf16 zero", "int4 g32 dq zero", f"{FOUR} g64 f16",
)  # fmt: skip
OPERATORS = ("matmul", "matmul_t", "scale_grad", "zero_grad", "dequantize", "level_grad", "shift_grad")


def has(verb: str, fmt: str) -> bool:
    """Whether an operator is defined under a format: two are about zero points."""
    return Format.parse(fmt).zero or verb not in ("zero_grad", "shift_grad")


def arguments(verb: str, fmt: str, dtype: torch.dtype, leading: tuple[int, ...]) -> tuple[object, ...]:
    q = quantize(sample(ODD), fmt)
    x, dy = torch.randn(*leading, ODD[1]).to(dtype), torch.randn(*leading, ODD[0]).to(dtype)
    if verb in ("matmul", "dequantize"):
        for tensor in (x, *trainable(q).values()):
            tensor.requires_grad_()
        return (x, *packed(q)) if verb == "matmul" else (*packed(q), dtype)
    if verb in ("level_grad", "shift_grad"):
        return torch.randn(ODD).to(dtype), *packed(q)
    if verb == "scale_grad":
        y = ops.matmul(x, q) if q.format.group == 0 else None
        return dy, x, y, *packed(q)
    return (dy, x, *packed(q)) if verb == "zero_grad" else (dy, *packed(q))


def test_every_operator_is_checked() -> None:
    defined = {name.partition("::")[2] for name in map(str, torch._C._dispatch_get_all_op_names())
               if name.startswith("qft::")}  # fmt: skip
    assert defined == {*OPERATORS, "decode_scales"}


def test_scales_are_decoded_by_an_operator_too() -> None:
    q = quantize(sample(ODD), "nf4 g32 dq")
    assert q.weight_scales_absmax is not None
    absmax = q.weight_scales_absmax.repeat_interleave(256)[: q.weight_scales.numel()].view(q.weight_scales.shape)
    given = q.weight_scales, absmax, q.weight_scales_offset
    torch.library.opcheck(torch.ops.qft.decode_scales.default, given)
    with NoHostReads():
        got = double_quant.decode_each(*given)
    assert torch.equal(got, q.scales)


@pytest.mark.parametrize("leading", [(2, 7), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("verb", "fmt"),
    [(verb, fmt) for verb in OPERATORS for fmt in CHECKED if has(verb, fmt)],
)
def test_opcheck(verb: str, fmt: str, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.qft, verb).default, arguments(verb, fmt, dtype, leading))


@pytest.mark.parametrize("fmt", CHECKED)
def test_a_fake_says_what_the_operator_returns(fmt: str) -> None:
    """On the meta device, where a fake is all that runs; dq's integer scales have a floating gradient too."""
    for verb in (verb for verb in OPERATORS if has(verb, fmt)):
        real = arguments(verb, fmt, torch.bfloat16, (2, 7))
        meta = [value.to("meta") if isinstance(value, Tensor) else value for value in real]
        operator = getattr(torch.ops.qft, verb)
        wanted, got = operator(*real), operator(*meta)
        assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride()), verb
        assert got.is_floating_point()


# ---------------------------------------------------------------------------------------------- nothing from the host


class NoHostReads(TorchDispatchMode):
    """Refuses what waits for a device or copies from the host, neither of which can be part of a CUDA graph.

    `_local_scalar_dense` is behind .item(), .tolist() and bool(); `lift_fresh` behind torch.tensor of Python's numbers.
    """

    REFUSED = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique", "_unique2", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} waits for the device, or copies from the host"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("rows", [3, ABOVE])
@pytest.mark.parametrize(("verb", "fmt"), [(verb, fmt) for verb in OPERATORS for fmt in CHECKED if has(verb, fmt)])
@pytest.mark.usefixtures("fresh_choice")
def test_an_operator_reads_nothing_back_once_it_has_run(
    verb: str, fmt: str, rows: int, kernel: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python around the kernels is the same on a GPU."""
    if kernel:
        reference_row = next(row for row in kernels.TABLE if row.name == kernel)
        monkeypatch.setattr(kernels, "TABLE", (reference_row,))
    given = [
        value.detach() if isinstance(value, Tensor) else value
        for value in arguments(verb, fmt, torch.bfloat16, (rows,))
    ]
    run = getattr(ops, f"_{verb}")
    wanted = run(*given)
    with NoHostReads():
        got = run(*given)
    assert torch.equal(got, wanted)
