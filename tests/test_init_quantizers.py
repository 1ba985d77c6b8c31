"""LoftQ's other quantizers: a searched scale, and the uniform grid of its own code."""

import re

import pytest
import torch

from qft import FormatError, QuantLinear, loftq, quantize
from qft.init import output_error
from qft.init.uniform import uniform

UNIFORM = "int2 channel f32 zero"


def errors(w: torch.Tensor, fmt: str, rank: int, iters: int, **options) -> list[float]:
    steps = []
    loftq(w, fmt, rank, iters, on_step=lambda _, error: steps.append(error), **options)
    return steps


# Relative errors at T = 0, 1, 5 of an implementation in numpy, Gaussian 512x512, rank 32.
def test_loftq_with_its_own_uniform_quantizer():
    steps = errors(torch.randn(512, 512), UNIFORM, 32, 5, quantizer="uniform")
    assert [steps[0], steps[1], steps[5]] == pytest.approx((0.3931, 0.3495, 0.3201), rel=0.03)
    assert steps == sorted(steps, reverse=True)


# The same, Gaussian 1024x1024, rank 16, T = 0, 1.
def test_loftq_with_a_searched_scale():
    steps = errors(torch.randn(1024, 1024), "lm2 g64 f32", 16, 1, quantizer="search")
    assert steps == pytest.approx((0.3341, 0.3242), rel=0.03)


@pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
@pytest.mark.parametrize(
    ("fmt", "quantizer"), [("nf2 g64 f16", "search"), ("int3 g32 dq", "search"), ("int3 channel f32 zero", "uniform")]
)
def test_never_worse_than_its_quantizer_alone_and_alpha_changes_nothing(fmt, quantizer, order):
    w = torch.randn(60, 100)
    steps = errors(w, fmt, 8, 4, quantizer=quantizer, order=order)
    q, a, b = loftq(w, fmt, 8, 4, alpha=32, quantizer=quantizer, order=order)
    assert output_error(w, q.dequantize(), a, b, 4.0) == pytest.approx(min(steps), rel=1e-5)
    assert min(steps) < steps[0]
    alone = uniform(w, fmt) if quantizer == "uniform" else quantize(w, fmt, search=True)
    assert steps[0] == pytest.approx(output_error(w, alone.dequantize()), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_is_one_grid_clipped_at_two_deviations(bits):
    w = torch.randn(64, 96) + 0.3
    q = uniform(w.bfloat16(), f"int{bits} channel f32 zero")
    w = w.bfloat16().double()
    low, high = float(w.mean() - 2 * w.std(correction=0)), float(w.mean() + 2 * w.std(correction=0))
    step = (high - low) / (2**bits - 1)
    expected = ((w.clamp(low, high) - low) / step).round() * step + low
    assert torch.allclose(q.dequantize().double(), expected, atol=1e-5)
    assert len(q.scales.unique()) == len(q.zeros.unique()) == 1
    assert float(q.zeros[0]) != round(float(q.zeros[0]))


def test_uniform_spans_no_more_than_the_weights():
    w = torch.full((4, 32), -1.0)
    w[:, ::2] = 1  # two deviations reach beyond
    assert torch.allclose(uniform(w, UNIFORM).dequantize(), w, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 2.5, -3.0])
def test_uniform_keeps_a_constant(value):
    assert torch.equal(uniform(torch.full((3, 40), value), UNIFORM).dequantize(), torch.full((3, 40), value))


def test_a_layer_computes_with_a_real_zero_point():
    w, x = torch.randn(48, 96), torch.randn(5, 96)
    q = uniform(w, UNIFORM)
    assert torch.allclose(QuantLinear.from_quantized(q)(x), x @ q.dequantize().T, atol=1e-4)


@pytest.mark.parametrize("fmt", ["nf2 g64 f32", "int2 g64 f32 zero", "int2 channel f32", "int2 channel f16 zero"])
def test_uniform_needs_the_format_that_stores_it(fmt):
    message = "LoftQ's uniform quantizer has one scale and a real zero point; use 'int2 channel f32 zero', not "
    with pytest.raises(FormatError, match=f"^{re.escape(message)}'{re.escape(fmt)}'$"):
        loftq(torch.randn(16, 64), fmt, 4, quantizer="uniform")


def test_an_unknown_quantizer_is_refused():
    with pytest.raises(ValueError, match=r"^quantizer='best' is unknown; use 'absmax' or 'search' or 'uniform'$"):
        loftq(torch.randn(16, 64), "nf4 g64", 4, quantizer="best")


@pytest.mark.parametrize(("value", "kind"), [(torch.ones(4, 32).int(), TypeError), (torch.ones(32), ValueError)])
def test_uniform_refuses_what_is_no_weight(value, kind):
    with pytest.raises(kind, match=r"^layer has shape|^layer is torch"):
        uniform(value, UNIFORM, "layer")
