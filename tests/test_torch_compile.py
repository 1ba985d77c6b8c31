"""torch.compile(fullgraph=True) of a decoder block over packed weights: one graph, the eager results, no recompiles."""

import logging
import shutil

import pytest
import tiny_lm
import torch
import torch._inductor.config
from formats import ABOVE
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

import qft
from qft import kernels
from qft.nn.linear import QuantLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft reads it
    pytest.mark.usefixtures("panels_above"),  # a row kernel has few rows, a panel many, on any machine
]


@pytest.fixture(autouse=True)
def fresh_compiler(threads):
    """Nothing of an earlier test's graphs; one thread, which is faster at this size."""
    threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def own_lora(fmt):
    model = qft.quantize_model(tiny_lm.model().requires_grad_(False), fmt, rank=4)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def shared_lora(fmt):
    model = own_lora(fmt)
    assert qft.share_inputs(model, torch.arange(8)[None]) == 4
    return model


def scales(fmt):
    return qft.train_only(qft.quantize_model(tiny_lm.model(), fmt), "scales")


def zero_points(fmt):
    model = qft.quantize_model(tiny_lm.model(), fmt)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(("weight_zeros", "weight_scales")))
    return model


def pefts(fmt, **more):
    base = qft.quantize_model(tiny_lm.model(), fmt)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **more)
    get_peft_model(base, config)
    return base


def dora(fmt):
    return pefts(fmt, use_dora=True)


def pefts_from_a_start(fmt):
    base = qft.quantize_model(tiny_lm.model(), fmt, init="loftq", rank=4)
    get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return base


CASES = [
    (own_lora, "nf4 g64 f16", None),
    (own_lora, "nf4 g64 dq", torch.bfloat16),
    (own_lora, "int3 g32 f16 zero", torch.float16),
    (shared_lora, "nf2 g64 f32", torch.bfloat16),
    (scales, "nf4 g64 f32", None),
    (scales, "int4 channel f32", torch.bfloat16),
    (scales, "nf4 g64 dq", torch.bfloat16),
    (zero_points, "int4 g32 f32 zero", None),
    (pefts, "nf4 g64 dq", None),
    (pefts, "nf2 g64 f16", torch.bfloat16),
    (pefts_from_a_start, "nf2 g64 f16", torch.bfloat16),
    (dora, "nf4 g64 dq", torch.bfloat16),
]
named = pytest.mark.parametrize(("make", "fmt", "amp"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))


class Block:
    """The first decoder block of a tiny Llama with what it is called with, and one training step of it."""

    def __init__(self, make, fmt, amp):
        self.model, self.amp = make(fmt).train(), amp
        self.module = self.model.model.layers[0]
        self.trainable = [p for p in self.module.parameters() if p.requires_grad]
        assert self.trainable

    def step(self, function, rows=2, tokens=7):
        """[output, gradient of the input, gradients of what trains] of `function` in the block's place."""
        x = torch.randn(rows, tokens, 64, generator=torch.Generator().manual_seed(rows * tokens)).requires_grad_()
        position = self.model.model.rotary_emb(x, torch.arange(tokens)[None])
        for p in self.trainable:
            p.grad = None
        with torch.autocast("cpu", self.amp or torch.bfloat16, enabled=self.amp is not None):
            y = function(x, position_embeddings=position)
        y.float().square().mean().backward()
        return [y.detach(), x.grad, *(p.grad for p in self.trainable)]


def close(got, wanted, amp, exact=False):
    tolerance = 0 if exact else {None: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}[amp]
    for a, b in zip(got, wanted, strict=True):
        assert a is not None
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm() + 1e-9


@named
def test_a_block_is_one_graph_with_the_eager_results(make, fmt, amp):
    block = Block(make, fmt, amp)
    wanted = block.step(block.module)
    assert all(tensor.abs().max() > 0 for tensor in wanted)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block.module, fullgraph=True, backend=counter)
    exact = make not in (shared_lora, own_lora)  # outside a graph one sums in another order, one rounds less often
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):  # the second step finds the graph of the first
            close(block.step(compiled), wanted, amp, exact)
    assert counter.frame_count == 1
    verbs = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes if "qft" in str(node.target)]
    assert sum("matmul" in verb for verb in verbs) >= 7


def test_any_number_of_rows_runs_the_same_graph():
    """Which kernel multiplies depends on the number of rows, and is decided behind the operator."""
    module = own_lora("nf4 g64 f16").model.layers[0].mlp
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 5, ABOVE - 1, ABOVE):
            x = torch.randn(rows, 64, requires_grad=True)
            y = compiled(x)
            y.square().sum().backward()
            assert torch.allclose(y, module(x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [own_lora, pefts])
def test_any_batch_and_length_run_the_same_graph_of_a_block(make):
    block = Block(make, "nf4 g64 f16", None)
    sizes = [(2, 3), (3, 5), (4, (ABOVE - 1) // 4), (5, ABOVE - 1)]
    chosen = {
        kernels.choose(kernels.Problem("matmul", qft.Format.parse("nf4 g64 f16"), "cpu", torch.float32, a * b)).kernel
        for a, b in sizes
    }
    assert len(chosen) > 1
    compiled = torch.compile(block.module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, tokens in sizes:
            close(block.step(compiled, rows, tokens), block.step(block.module, rows, tokens), None)


@pytest.mark.parametrize("make", [scales, own_lora])
def test_trained_values_reach_the_graph(make):
    """Scales and factors are the graph's inputs: a step of an optimizer needs no other one."""
    block = Block(make, "nf4 g64 f32", None)
    compiled = torch.compile(block.module, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        before = block.step(compiled)
        torch.optim.SGD(block.trainable, lr=0.1).step()
        after = block.step(compiled)
    assert not torch.equal(after[0], before[0])
    close(after, block.step(block.module), None)


def test_blocks_that_are_alike_share_a_graph():
    """As where each block of a model is compiled by itself."""
    block = Block(pefts, "nf4 g64 dq", None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layer in block.model.model.layers:
            block.step(torch.compile(layer, fullgraph=True, backend="aot_eager"))


def test_what_is_said_once_is_said_from_a_graph_too(caplog):
    """float64 runs on the reference, which says so: behind the operator, so that the graph does not break."""
    qft.notices.say_once.cache_clear()
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 32), "nf4 g64 f32").double()
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    with caplog.at_level(logging.WARNING, logger="qft"):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        y.sum().backward()
    assert "uses the reference" in caplog.text
    assert torch.allclose(y, x @ layer.dequantize().double().T + layer.bias)


def test_an_adapter_switched_on_or_off_is_another_graph():
    """PEFT's flags and qft's are read when the graph is made: each setting finds its own."""
    base = qft.quantize_model(tiny_lm.model(), "nf2 g64 f16", init="loftq", rank=4)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for name, p in model.named_parameters():
        if ".default" in name:
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    block = base.model.layers[0]
    x = torch.randn(2, 7, 64)
    position = base.model.rotary_emb(x, torch.arange(7)[None])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        on = compiled(x, position_embeddings=position)
        assert torch.equal(on, block(x, position_embeddings=position))
        with model.disable_adapter():
            off = compiled(x, position_embeddings=position)
            assert torch.equal(off, block(x, position_embeddings=position))
        assert torch.equal(compiled(x, position_embeddings=position), on)
    assert (on - off).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("make", [own_lora, pefts])
def test_the_whole_model_is_one_graph(make):
    model = make("nf4 g64 dq").train()
    ids = torch.arange(14).reshape(2, 7)
    wanted = model(input_ids=ids, labels=ids, use_cache=False).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(input_ids=ids, labels=ids, use_cache=False).loss
    assert torch.allclose(got, wanted, rtol=1e-5)
    got.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_the_check_of_a_prepared_models_gradients_asks_for_no_other_graph():
    model = qft.prepare_for_training(own_lora("nf4 g64 f16"), gradient_checkpointing=False).train()
    model.disable_input_require_grads()  # transformers' hook, which no graph can hold
    ids = torch.arange(14).reshape(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch's own use of it
def test_inductor_gives_the_eager_results(tmp_path, monkeypatch):
    """The backend that people use; in bf16 it rounds fewer intermediate results than eager torch does."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    for make, amp in ((own_lora, None), (scales, torch.bfloat16), (pefts, torch.bfloat16), (dora, None)):
        torch._dynamo.reset()
        block = Block(make, "nf4 g64 dq", amp)
        compiled = torch.compile(block.module, fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                close(block.step(compiled), block.step(block.module), amp)
