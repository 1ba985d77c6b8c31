"""From QuantLinear down to the CUDA kernels and back, as on a GPU, with the emulator in the GPU's place."""

import emulated
import pytest
import torch

import qft
from qft import kernels, native

pytestmark = pytest.mark.emulator

CODES = ("levels4", "int3")
FORMATS = ("nf4 g64 dq", "int3 g32 f16 zero", "nf4 channel f32", "int3 channel f32 zero")


@pytest.fixture(scope="module")
def libraries():
    return {code: emulated.library(code) for code in CODES}


@pytest.fixture
def emulated_gpu(libraries, monkeypatch, fresh_choice):
    """The table's GPU rows serve tensors of the CPU: what they launch, the emulator runs and checks."""
    tables = dict(native.tables())
    for code, library in libraries.items():
        library.use(emulated.FIRST)
        tables[code, "cuda"] = native._native.load_kernels(str(library.path))
    monkeypatch.setattr(native, "tables", lambda: tables)
    monkeypatch.setattr(native, "_device", lambda isa, tensor: tensor.device)
    monkeypatch.setattr(kernels, "_not_on_cuda", lambda problem: kernels._other_dtype(problem))
    fresh_choice()  # the fixture may come in the middle of a test
    return tables


def step(fmt, rows, dtype):
    """Output and every gradient of one training step of a layer."""
    torch.manual_seed(1)
    layer = qft.QuantLinear.from_linear(torch.nn.Linear(200, 72).to(dtype), fmt)
    layer.add_lora(4, B=torch.randn(72, 4))
    qft.train_only(layer, "lora")
    if layer.weight_scales.is_floating_point():
        layer.weight_scales.data = layer.weight_scales.data.float()
        layer.weight_scales.requires_grad_()
    with torch.no_grad():
        if layer.format.group == 0:
            layer.weight_scales[5] = 0
    x = torch.randn(rows, 200).to(dtype).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", [text for text in FORMATS if "f16" not in text])
def test_a_training_step_agrees_with_the_cpus(fmt, dtype, rows, libraries, request):
    wanted = step(fmt, rows, dtype)
    request.getfixturevalue("emulated_gpu")
    before = sum(library.blocks() for library in libraries.values())
    got = step(fmt, rows, dtype)
    assert sum(library.blocks() for library in libraries.values()) > before
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        # in bf16 the two sides round levels, sums and gradients at different places, each by 2^-9
        bound = 1e-4 if dtype == torch.float32 else 2e-2
        assert (got[name].float() - value.float()).norm() <= bound * value.float().norm(), name


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantizing_and_dequantizing_give_the_cpus_bits(fmt, request):
    weight = torch.randn(40, 200)
    q = qft.quantize(weight, fmt)
    dense = q.dequantize(torch.bfloat16)
    request.getfixturevalue("emulated_gpu")
    again = qft.quantize(weight, fmt, kernel="cuda")
    assert again.tensors().keys() == q.tensors().keys()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in q.tensors().items())
    assert torch.equal(kernels.dequantize(q, torch.bfloat16, "cuda"), dense)
    weight[7, 9] = torch.nan
    with pytest.raises(ValueError, match=r"weight\[7, 9\] is nan"):
        qft.quantize(weight, fmt, kernel="cuda")


def test_what_a_launch_says_reaches_the_caller_with_verb_format_and_shape(emulated_gpu):
    q = qft.quantize(torch.randn(4, 200), "nf4 g64", kernel="cuda")
    with pytest.raises(OSError, match=r"^matmul of nf4 g64 f32 \(4, 200\) on cuda failed: matmul on CUDA multiplies"):
        native.matmul(torch.randn(1, 200), q, "levels4", "cuda")
    with pytest.raises(ValueError, match="tensor cores multiply bfloat16 and float16, not float32"):
        kernels.matmul(torch.randn(1, 200), q, "cuda")


def test_the_scratch_a_call_asks_for_is_what_it_gets(emulated_gpu):
    """A short workspace would be an access out of bounds: several splits need one, a single split needs none."""
    table = emulated_gpu["levels4", "cuda"]
    assert table.matmul_workspace(out=16, in_=4096, rows=3, device=0) > 0
    assert table.matmul_workspace(out=4096, in_=64, rows=3, device=0) == 0
    q = qft.quantize(torch.randn(16, 4096), "nf4 g64", kernel="cuda")
    x = torch.randn(3, 4096).bfloat16()
    exact = x.double() @ q.dequantize().double().T
    assert (kernels.matmul(x, q, "cuda").double() - exact).norm() < 5e-3 * exact.norm()
