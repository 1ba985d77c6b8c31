"""GPTQ: against the textbook's loop in float64, its limits, and rounding to nearest."""

import re

import pytest
import torch
from activations import activations, second_moment
from formats import ELEVEN, FORMATS, FOUR, SHAPES, sample

from qft import Format, init, quantize
from qft.init import gptq, output_error
from qft.init.gptq import Feedback

LOW_BIT = (
    *("nf2 g64 f32", "lm2 g64 f16", "int2 g64 f16 zero", f"{FOUR} g32 dq"),
    *("nf3 g64 f32", "lm3 g128 f32", "int3 channel f32"),
    *("nf4 g64 dq", "int4 g64 f16", "int4 channel f32 zero", f"{ELEVEN} g64 bf16"),
)


def textbook(w: torch.Tensor, fmt: str, s: torch.Tensor, damp: float = 0.01, order=None) -> torch.Tensor:
    """Frantar et al., algorithm 1, in float64 and without blocks: Q as the upper Cholesky factor of H⁻¹ tells it.

    With an order, scales are those of the weight as it came (static groups)."""
    spelled = Format.parse(fmt)
    features, size = w.shape[1], spelled.group or w.shape[1]
    turns = torch.arange(features) if order is None else order
    h = s.double() + damp * s.diagonal().double().mean() * torch.eye(features)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[turns][:, turns]), upper=True)
    left, out = w.double()[:, turns].clone(), torch.zeros_like(w).double()
    static = quantize(w, spelled)
    for at, column in enumerate(turns.tolist()):
        group = column // size
        if order is None and column % size == 0:
            scales = quantize(left[:, column : column + size].float(), spelled)
        level = scales if order is None else static
        index = 0 if order is None else group
        scale = level.scales[:, index].double()
        zero = level.zeros[:, index].double() if level.zeros is not None else 0
        values = scale[:, None] * (torch.tensor(spelled.levels).double() - (zero[:, None] if spelled.zero else 0))
        nearest = values.gather(1, (left[:, at, None] - values).abs().argmin(1, keepdim=True))[:, 0]
        out[:, column] = nearest
        error = (left[:, at] - nearest) / upper[at, at]
        left[:, at + 1 :] -= error[:, None] * upper[at, at + 1 :]
    return out


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "fmt", ["int4 g32 f32", "nf3 g64 f16", "int3 g32 f32 zero", "nf2 channel f32", "int8 g128 f32"]
)
def test_it_is_the_textbooks(fmt, act_order):
    w, s = torch.randn(24, 167), second_moment(activations(167)[0])
    order = s.diagonal().argsort(descending=True) if act_order else None
    expected = textbook(w, fmt, s, order=order)
    q, _, _ = gptq(w, fmt, second_moment=s, quantizer="absmax", act_order=act_order)
    differing = (q.dequantize() - expected).abs() > 1e-4
    # a weight within fp32's rounding of a boundary may fall on the other side, and takes the columns after it along
    assert int(differing.any(1).sum()) <= 1, differing.any(1).nonzero()
    assert init.output_error(w, q.dequantize(), second_moment=s) == pytest.approx(
        init.output_error(w, expected, second_moment=s), rel=1e-2
    )


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_leave_plain_rounding(fmt, act_order):
    w, diagonal = sample((33, 100)), torch.rand(100) + 0.1
    q, _, _ = gptq(w, fmt, second_moment=diagonal.diag(), quantizer="absmax", act_order=act_order)
    expected = quantize(w, fmt)
    assert all(torch.equal(value, expected.tensors()[key]) for key, value in q.tensors().items())


@pytest.mark.parametrize("fmt", ["nf2 g32 f32", "int3 g64 f16", "lm2 g64 f16", "int2 g32 dq zero"])
def test_uncorrelated_inputs_leave_the_plain_search(fmt):
    w, diagonal = sample((33, 100)), torch.rand(100) + 0.1
    q, _, _ = gptq(w, fmt, second_moment=diagonal.diag(), damp=0)
    expected = quantize(w, fmt, search=True, importance=Feedback.of(diagonal.diag(), 0).variances)
    assert all(torch.equal(value, expected.tensors()[key]) for key, value in q.tensors().items())


@pytest.mark.parametrize("fmt", ["nf4 g64 f32", "int3 g32 f16 zero"])
def test_much_damping_leaves_plain_rounding(fmt):
    w, s = torch.randn(33, 100), second_moment(activations(100)[0])
    assert torch.equal(gptq(w, fmt, second_moment=s, damp=1e12, quantizer="absmax")[0].codes, quantize(w, fmt).codes)
    assert not torch.equal(gptq(w, fmt, second_moment=s, quantizer="absmax")[0].codes, quantize(w, fmt).codes)


@pytest.mark.parametrize("quantizer", ["absmax", "search"])
@pytest.mark.parametrize("fmt", LOW_BIT)
def test_the_output_is_nearer_than_after_rounding_to_nearest(fmt, quantizer):
    w, (x, fresh) = torch.randn(96, 160), activations(160)
    s, held_out = second_moment(x), second_moment(fresh)
    nearest = quantize(w, fmt, search=quantizer == "search", importance=None if quantizer == "absmax" else s.diagonal())
    for act_order in (False, True):
        q, _, _ = gptq(w, fmt, second_moment=s, quantizer=quantizer, act_order=act_order)
        error = output_error(w, q.dequantize(), second_moment=held_out)
        assert error < 0.95 * output_error(w, nearest.dequantize(), second_moment=held_out), act_order


@pytest.mark.parametrize("fmt", ["nf2 g64 f32", "int3 g64 f16 zero", "nf4 g128 f32"])
def test_a_searched_scale_is_better_than_absmax(fmt):
    w, (x, fresh) = torch.randn(96, 256), activations(256)
    searched, absmax = (
        output_error(w, gptq(w, fmt, second_moment=second_moment(x), quantizer=by)[0].dequantize(),
                     second_moment=second_moment(fresh))
        for by in ("search", "absmax")
    )  # fmt: skip
    assert searched < absmax


def test_the_factorization_of_the_second_moment():
    s = second_moment(activations(50)[0])
    feedback = Feedback.of(s, 0.01)
    unit = feedback.weights.double() + torch.eye(50)
    h = s + 0.01 * s.diagonal().mean() * torch.eye(50)
    assert torch.allclose(unit * feedback.variances.double() @ unit.T, h, atol=1e-6 * float(h.abs().max()))
    assert torch.equal(feedback.weights, feedback.weights.triu(1))


def test_the_error_is_that_of_each_columns_rounding():
    """tr(E H Eᵀ) = Σ_j D_j ‖what rounding column j lost‖²: what the scale search weighs by."""
    w, s = torch.randn(24, 64).double(), second_moment(activations(64)[0])
    feedback = Feedback.of(s, 0.01)
    q, _, _ = gptq(w.float(), "int3 g32 f32", second_moment=s)
    error = w - q.dequantize()
    lost = error @ (feedback.weights.double() + torch.eye(64))
    h = s + 0.01 * s.diagonal().mean() * torch.eye(64)
    assert float((lost.square() * feedback.variances).sum()) == pytest.approx(
        float((error @ h * error).sum()), rel=1e-5
    )


def test_columns_in_another_order_are_stored_where_they_were():
    w, s = torch.randn(24, 96), second_moment(activations(96)[0])
    order = s.diagonal().argsort(descending=True)
    q, _, _ = gptq(w, "int4 channel f32", second_moment=s, act_order=True)
    turned, _, _ = gptq(w[:, order], "int4 channel f32", second_moment=s[order][:, order])
    assert torch.equal(q.unpack()[:, order], turned.unpack())
    grouped, _, _ = gptq(w, "int4 g32 f16", second_moment=s, act_order=True, quantizer="absmax")
    assert torch.equal(grouped.scales, quantize(w, "int4 g32 f16").scales)


@pytest.mark.parametrize("quantizer", ["absmax", "search"])
def test_double_quantized_scales_keep_the_codes_of_exact_ones(quantizer):
    w, s = torch.randn(24, 160), second_moment(activations(160)[0])
    exact, stored = (gptq(w, fmt, second_moment=s, quantizer=quantizer)[0] for fmt in ("lm3 g64 f32", "lm3 g64 dq"))
    assert torch.equal(exact.codes, stored.codes)
    assert torch.allclose(exact.scales, stored.scales, rtol=0.05)


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_are_always_zero_are_rounded_as_they_are(act_order):
    w, x = torch.randn(24, 96), activations(96)[0]
    x[:, 7::10] = 0
    s = second_moment(x)
    for damp in (0.01, 0):
        q, _, _ = gptq(w, "nf3 channel f32", second_moment=s, quantizer="absmax", damp=damp, act_order=act_order)
        assert torch.equal(q.unpack()[:, 7::10], quantize(w, "nf3 channel f32").unpack()[:, 7::10])
    q, _, _ = gptq(w, "nf3 channel f32", second_moment=s * 0, quantizer="absmax", act_order=act_order)
    assert torch.equal(q.codes, quantize(w, "nf3 channel f32").codes)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] < 1000], ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_any_shape(shape, act_order):
    w, s = sample(shape), second_moment(torch.randn(300, shape[1]))
    for fmt in ("nf4 g64 dq", "int3 g32 f16 zero", "int2 channel f32"):
        q, a, b = gptq(w, fmt, second_moment=s, act_order=act_order)
        assert q.shape == shape
        assert q.dequantize().isfinite().all()
        assert (a.shape, b.shape) == ((0, shape[1]), (shape[0], 0))


@pytest.mark.parametrize("shape", [(24, 96), (1, 96), (24, 1)])
def test_the_weight_is_only_read(shape):
    w, s = torch.randn(shape), second_moment(activations(shape[1])[0])
    kept, moment = w.clone(), s.clone()
    gptq(w, "nf3 g32", 4, second_moment=s)
    assert torch.equal(w, kept)
    assert torch.equal(s, moment)


def test_a_second_moment_of_too_few_rows_needs_damping():
    w, s = torch.randn(24, 96), second_moment(torch.randn(20, 96))
    assert gptq(w, "nf3 g32", second_moment=s)[0].dequantize().isfinite().all()
    with pytest.raises(ValueError, match=r"^second_moment with damp=0 is not positive definite; raise damp, such as"):
        gptq(w, "nf3 g32", second_moment=s.float(), damp=0)


@pytest.mark.parametrize("damp", [-0.1, float("nan"), float("inf")])
def test_damping_is_a_number_from_zero(damp):
    with pytest.raises(ValueError, match=re.escape(f"damp={damp} is not a number from 0; GPTQ's is 0.01")):
        gptq(torch.randn(4, 32), "nf3 g32", second_moment=torch.eye(32), damp=damp)


def test_corrections_beyond_fp32_are_refused():
    w, s = torch.full((4, 64), 2e38), torch.ones(64, 64) + 1e-4 * torch.eye(64)
    w[:, 1:32] = 1.1e38  # all of the first group rounds down, and the second is to make up for it
    with pytest.raises(ValueError, match=r"^the corrections to here overflow fp32; raise damp"):
        gptq(w, "nf2 g32 f32", second_moment=s, damp=0, quantizer="absmax", name="here")
