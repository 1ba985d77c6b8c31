"""What torch asks of an operator on a GPU: tracing, autograd, graphs, streams, devices, sizes, files, whole models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_lm
import torch
from formats import BOUND, DTYPES, ODD, error
from place import BOTH, DEVICE, OWN, here, there
from test_ops import CHECKED, OPERATORS, arguments, has

import qft
from qft import kernels, native, ops, reference
from qft.disk.pretrained import load_model

GIB = 1 << 30
DEMO = Path(__file__).resolve().parents[2] / "examples" / "stdlib-lm"

# ------------------------------------------------------------------------------------------------ tracing, autograd


@pytest.mark.parametrize("verb", OPERATORS)
@pytest.mark.parametrize("fmt", CHECKED)
def test_opcheck(verb, fmt):
    if not has(verb, fmt):
        pytest.skip(f"{fmt} has no zero points")
    for dtype, leading in ((torch.bfloat16, (2, 7)), (torch.float32, (0,))):
        on_cpu = arguments(verb, fmt, dtype, leading)
        on_gpu = [
            there(value.detach()).requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
            for value in on_cpu
        ]
        torch.library.opcheck(getattr(torch.ops.qft, verb).default, tuple(on_gpu))


def layer_on_cpu(fmt, dtype):
    """QuantLinear with a bias, a LoRA whose product is not zero, and scales that train where they can."""
    linear = torch.nn.Linear(200, 136)
    layer = qft.QuantLinear.from_linear(linear, fmt).to(dtype)
    layer.add_lora(8, alpha=16, B=torch.randn(136, 8) * 0.05)
    if layer.format.scale == "f32":
        layer._parameters["weight_scales"].requires_grad_()
    return layer


def gradients(layer, x, dy):
    """y and every gradient, on the CPU."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    named = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {name: here(value.detach()) for name, value in {"y": y, "x": leaf.grad, **named}.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("fmt", ["nf4 g64 dq", "nf4 g64 f32", "int4 channel f32", "int3 g32 f32 zero"])
def test_a_layer_with_lora_learns_as_on_the_cpu(fmt, rows, dtype, poisoned):
    layer = layer_on_cpu(fmt, dtype)
    x, dy = torch.randn(2, rows, 200).to(dtype), torch.randn(2, rows, 136).to(dtype)
    wanted = gradients(copy.deepcopy(layer).float(), x.float(), dy.float())
    got = gradients(layer.to(DEVICE), there(x), there(dy))
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        # y, then the low-rank product and the sums over rows are rounded to dtype on the way
        assert error(value, wanted[name].double()) <= 3 * BOUND[dtype], name


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")  # inductor's own import
@pytest.mark.parametrize("rows", [3, 300])
def test_compiles_as_one_graph(rows):
    torch.compiler.reset()
    layer = layer_on_cpu("nf4 g64 f32", torch.bfloat16).to(DEVICE)
    x, dy = there(torch.randn(rows, 200).bfloat16()), there(torch.randn(rows, 136).bfloat16())
    plain = gradients(layer, x, dy)
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True)
    leaf = x.clone().requires_grad_()
    with torch._functorch.config.patch(enable_autograd_cache=False):  # it does not know what a backward is today
        y = compiled(leaf)
        y.backward(dy)
    # a compiler may keep fp32 where the plain layer rounds between two steps
    assert error(here(y.detach()), plain["y"].double()) <= BOUND[torch.bfloat16]
    assert error(here(leaf.grad), plain["x"].double()) <= BOUND[torch.bfloat16]
    assert error(here(layer.lora_A.grad), plain["lora_A"].double()) <= 2 * BOUND[torch.bfloat16]


# ---------------------------------------------------------------------------------------------- graphs and streams

VERBS = {
    "dequantize": lambda x, dy, q, kernel: kernels.dequantize(q, x.dtype, OWN),
    "matmul": lambda x, dy, q, kernel: kernels.matmul(x, q, kernel),
    "matmul_t": lambda x, dy, q, kernel: kernels.matmul_t(dy, q),
    "scale_grad": lambda x, dy, q, kernel: (
        kernels.scale_grad(dy, x, q) if q.format.group else kernels.channel_scale_grad(dy, x, dy.cos(), q)
    ),
    "layer": lambda x, dy, q, kernel: ops.matmul(x, q),
}


def uses_cublas(verb, kernel, rows):
    return kernel == "panel" or verb in ("matmul_t", "scale_grad") or (verb == "layer" and rows > 64)


def same(out, wanted, cublas):
    """Bit for bit, but for cuBLAS, which may take another way through a sum in a graph or another stream."""
    return error(out, wanted.double()) <= BOUND[torch.bfloat16] if cublas else torch.equal(out, wanted)


RUNS = [(verb, OWN) for verb in VERBS] + [("matmul", "panel")]


@pytest.mark.parametrize("fmt", ["nf4 g64 dq", "int3 g32 f16 zero", "int4 channel f32"])
@pytest.mark.parametrize(("verb", "kernel"), RUNS)
def test_a_captured_graph_replays_on_other_inputs(verb, kernel, fmt, emptied):
    """Outputs and workspaces hold garbage before each replay; a narrow and deep weight splits its sums over blocks."""
    for shape, rows in ((ODD, 5), ((64, 8192), 16), ((64, 8192), 300)):
        x, dy = there(torch.randn(rows, shape[1]).bfloat16()), there(torch.randn(rows, shape[0]).bfloat16())
        q = there(qft.quantize(torch.randn(shape), fmt))
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # lazy set-up must be over before a capture begins
            VERBS[verb](x, dy, q, kernel)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        emptied.clear()
        with torch.cuda.graph(graph):
            out = VERBS[verb](x, dy, q, kernel)
        inside = list(emptied)
        for seed in range(3):
            torch.manual_seed(seed)
            x.copy_(torch.randn(x.shape))
            dy.copy_(torch.randn(dy.shape))
            q.weight.copy_(there(qft.quantize(torch.randn(shape), fmt)).weight)
            wanted = VERBS[verb](x, dy, q, kernel)
            for garbage in inside:
                garbage.fill_(float("nan") if garbage.is_floating_point() else 0xA5)
            out.fill_(float("nan"))
            graph.replay()
            assert same(out, wanted, uses_cublas(verb, kernel, rows)), f"{shape}, {rows} rows, replay {seed}"


def block_step(compiled=False):
    """A decoder block of a small Llama with LoRA on the device: one training step of it, on inputs of a seed."""
    model = qft.quantize_model(tiny_lm.model().requires_grad_(False), "nf4 g64 dq", rank=4).to(DEVICE).train()
    for layer in model.modules():
        if isinstance(layer, qft.QuantLinear):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    block = model.model.layers[0]
    trainable = [p for p in block.parameters() if p.requires_grad]
    x = torch.zeros(2, 40, 64, device=DEVICE, requires_grad=True)
    position = model.model.rotary_emb(x, torch.arange(40, device=DEVICE)[None])
    run = torch.compile(block, fullgraph=True) if compiled else block

    def step():
        for leaf in (x, *trainable):
            leaf.grad = None
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):  # a cached cast would outlive a graph
            y = run(x, position_embeddings=position)
        y.float().square().mean().backward()
        return [y.detach(), *(leaf.grad for leaf in (x, *trainable))]

    def fill(seed):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))

    return step, fill


def test_a_step_of_a_block_waits_for_nothing():
    step, fill = block_step()
    fill(0)
    step()  # lazy set-up may
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_of_a_block_is_captured_and_replays():
    step, fill = block_step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = step()
    for seed in range(3):
        fill(seed)
        graph.replay()
        got = [here(tensor.clone()) for tensor in inside]
        for value, wanted in zip(got, map(here, step()), strict=True):
            assert error(value, wanted.double()) <= 3 * BOUND[torch.bfloat16], seed


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")  # inductor's own import
def test_a_block_compiles_as_one_graph():
    torch.compiler.reset()
    torch.manual_seed(0)
    step, fill = block_step()
    fill(0)
    wanted = list(map(here, step()))
    torch.manual_seed(0)
    step, fill = block_step(compiled=True)
    fill(0)
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        for _ in range(2):
            for value, exact in zip(map(here, step()), wanted, strict=True):
                # a compiler may keep fp32 where eager torch rounds between two steps
                assert error(value, exact.double()) <= 10 * BOUND[torch.bfloat16]


@pytest.mark.parametrize("fmt", ["int3 g32 f32 zero", "int4 channel f32 zero"])
def test_gradients_of_scales_and_zero_points_are_captured(fmt):
    layer = layer_on_cpu(fmt, torch.bfloat16).to(DEVICE)
    trained = [layer._parameters[name].requires_grad_() for name in ("weight_scales", "weight_zeros")]
    x, dy = there(torch.randn(5, 200).bfloat16()), there(torch.randn(5, 136).bfloat16())

    def step():
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x).backward(dy)
        dense = ops.dequantize(layer.quant_tensor, torch.bfloat16)
        dense.backward(torch.ones_like(dense))
        return [parameter.grad for parameter in trained]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = step()
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(x.shape))
        dy.copy_(torch.randn(dy.shape))
        graph.replay()
        got = [here(tensor.clone()) for tensor in inside]
        for value, wanted in zip(got, map(here, step()), strict=True):
            assert error(value, wanted.double()) <= 3 * BOUND[torch.bfloat16], seed


@pytest.mark.parametrize(("verb", "kernel"), [*RUNS, ("quantize", OWN)])
def test_kernels_run_in_the_callers_stream(verb, kernel):
    """The inputs are produced late, in that stream: a kernel in another one would read what was there before."""
    q = there(qft.quantize(torch.randn(64, 512), "nf4 g64"))
    inputs = [there(torch.randn(5, 512).bfloat16()), there(torch.randn(5, 64).bfloat16())]
    weight = there(torch.randn(64, 512))
    late = [*(torch.zeros_like(value) for value in inputs), qft.quantize(torch.ones_like(weight), "nf4 g64")]
    late_weight = torch.zeros_like(weight)

    def run(x, dy, q, weight):
        return kernels.quantize(weight, q.format, OWN)[0] if verb == "quantize" else VERBS[verb](x, dy, q, kernel)

    wanted = run(*inputs, q, weight)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clocks: some 50 ms
        for empty, value in zip((*late[:2], late_weight), (*inputs, weight), strict=True):
            empty.copy_(value)
        for empty, value in zip(late[2].tensors().values(), q.tensors().values(), strict=True):
            empty.copy_(value)
        out = run(*late, late_weight)
    stream.synchronize()
    assert same(out, wanted, uses_cublas(verb, kernel, rows=5))


@pytest.mark.parametrize("kernel", BOTH)
def test_a_second_device_runs_its_own_kernels(kernel):
    """While the first is current; the same result, and the first stays current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    weight, x, dy = torch.randn(300, 520), torch.randn(9, 520).bfloat16(), torch.randn(9, 300).bfloat16()
    results = []
    for device in ("cuda:0", "cuda:1"):
        q = qft.quantize(weight.to(device), "nf4 g64 dq")
        results.append([q.weight, q.dequantize(), kernels.matmul(x.to(device), q, kernel)])
        results[-1] += [kernels.matmul_t(dy.to(device), q), kernels.scale_grad(dy.to(device), x.to(device), q)]
        assert all(str(tensor.device) == device for tensor in results[-1])
        assert torch.cuda.current_device() == 0
    assert all(torch.equal(here(a), here(b)) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------------------- sizes


def need_memory(nbytes):
    free = torch.cuda.mem_get_info()[0]
    if free < nbytes:
        pytest.skip(f"needs {nbytes / GIB:.0f} GiB of free GPU memory, {free / GIB:.0f} GiB are free")


def test_more_than_2_31_weights():
    """Quantized, dequantized at the far end, and multiplied; then x and dy past 2^31 elements."""
    need_memory(16 * GIB)
    out, width = (1 << 31) // 8192 + 40, 8192
    weight = torch.empty(out, width, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02)
    assert weight.numel() > 1 << 31
    q = qft.quantize(weight, "nf4 g64", kernel=OWN)
    last = slice(out - 40, out)
    end = qft.quantize(here(weight[last]), "nf4 g64", kernel="reference")
    assert torch.equal(here(q.weight[last]), end.weight)
    assert torch.equal(here(q.weight_scales[last]), end.weight_scales)
    weight[-1, -3] = float("nan")
    with pytest.raises(ValueError, match=rf"w\[{out - 1}, {width - 3}\] is nan"):
        qft.quantize(weight, "nf4 g64", kernel=OWN, name="w")
    del weight

    part = torch.empty(40, 128, device=DEVICE)
    native.dequantize(q, part, (out - 40, out), (width - 128, width), *kernels._table_of(q.format, OWN))
    dense = reference.dequantize(end.unpack(), end.scales, None, end.format)
    assert torch.equal(here(part), dense[:, -128:])
    whole = kernels.dequantize(q, torch.bfloat16, OWN)
    assert torch.equal(here(whole[last]), dense.bfloat16())
    x = there(torch.randn(1, width).bfloat16())
    for kernel in BOTH:
        y = here(kernels.matmul(x, q, kernel))[:, last]
        assert error(y, here(x).double() @ dense.double().T) <= BOUND[torch.bfloat16]

    small = qft.quantize(torch.randn(64, width) * 0.02, "nf4 g64")
    exact = small.dequantize().double()
    y = kernels.matmul(whole, there(small), OWN)  # the dense weight as an x of more than 2^31 elements
    assert error(here(y[last]), here(whole[last]).double() @ exact.T) <= BOUND[torch.bfloat16]
    total = native.dot_columns(whole, whole, q, *kernels._table_of(q.format, OWN))
    halves = sum((half.float() ** 2).sum(0) for half in whole.split(4096))
    assert error(here(total), here(halves).double()) <= BOUND[torch.float32] * 10  # two orders of 262 thousand terms


# ------------------------------------------------------------------------------------------------- files and models


def test_what_one_device_saves_the_other_loads(tmp_path):
    model, tokens = tiny_lm.model(), torch.arange(24)[None]
    qft.quantize_model(model, "nf4 g64 dq", rank=4)
    qft.save(model, tmp_path / "cpu")
    qft.save(model.to(DEVICE), tmp_path / "gpu")
    on_gpu = qft.load(tmp_path / "cpu").to(DEVICE)
    on_cpu = qft.load(tmp_path / "gpu")
    for name, tensor in on_cpu.state_dict().items():
        assert torch.equal(here(on_gpu.state_dict()[name]), tensor), name
    logits = here(on_gpu(there(tokens)).logits.detach())
    assert error(logits, on_cpu(tokens).logits.detach().double()) <= 10 * BOUND[torch.float32]  # two layers deep


@pytest.mark.parametrize("fmt", ["nf4 g64 f32", "nf2 g64 f32"])
def test_the_demos_model_says_the_same_on_both(fmt):
    model = qft.quantize_model(load_model(DEMO, "float32"), fmt)
    tokens = torch.randint(0, model.config.vocab_size, (2, 128))
    with torch.no_grad():
        on_cpu = model(tokens).logits.double()
        on_gpu = here(model.to(DEVICE)(there(tokens)).logits)
        assert error(on_gpu, on_cpu) <= 20 * BOUND[torch.float32]  # rounding grows from layer to layer
        half = here(model.bfloat16()(there(tokens)).logits)
    assert error(half, on_cpu) <= 10 * BOUND[torch.bfloat16]


def test_importing_leaves_the_gpu_alone(python):
    program = "import qft, qft.nn, qft.ops, torch; print(torch.cuda.is_initialized())"
    assert python(program) == "False\n"


def test_a_product_may_be_the_first_thing_a_process_asks_of_the_device(python):
    program = """
import dataclasses, torch, qft
q = qft.quantize(torch.ones(64, 512), "nf4 g64")
q = dataclasses.replace(q, **{name: tensor.cuda() for name, tensor in q.tensors().items()})
print(qft.kernels.matmul(torch.ones(1, 512).bfloat16().cuda(), q, "cuda")[0, 0].item())"""
    assert python(program) == "512.0\n"
