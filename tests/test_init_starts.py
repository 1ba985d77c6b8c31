"""What every calibrated start promises: the ladder of output errors, any format, and refusals in one sentence."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from activations import activations, second_moment
from formats import FORMATS, sample

from qft import QuantLinear, init, quantize
from qft.init import cloq, gptq, loftq, lqlora, output_error, qera_diag, qera_exact

CALIBRATED = ("search", "lqlora", "qera_diag", "qera_exact", "gptq", "cloq")
FITTED = ("lqlora", "qera_diag", "qera_exact", "cloq")
EXACT = ("qera_exact", "gptq", "cloq")


def find(start: str, *arguments, **options):
    """A start by name, its codes under absmax scales where it has a choice: searches take most of the time."""
    if start != "search":
        options.setdefault("quantizer", "absmax")
    return getattr(init, start)(*arguments, **options)


def layer(out: int = 96, features: int = 160) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the second moment to calibrate with and the one to measure by, float64."""
    x, fresh = activations(features, 600)
    return torch.randn(out, features), second_moment(x), second_moment(fresh)


def same(p, q) -> bool:
    stored = q[0].tensors()
    return all(torch.equal(value, stored[key]) for key, value in p[0].tensors().items()) and all(
        torch.equal(x, y) for x, y in zip(p[1:], q[1:], strict=True)
    )


def error_of(w, start, s, scaling=1.0) -> float:
    q, a, b = start
    return output_error(w, q.dequantize(), a, b, scaling, s)


# ---------------------------------------------------------------------------------------------- the ladder


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fmt", ["nf2 g64 f32", "lm2 g64 f16", "int3 g64 f16 zero"])
def test_the_ladder_of_output_errors_on_fresh_inputs(fmt, seed):
    torch.manual_seed(seed)
    w, s, held_out = layer(96, 192)
    ladder = {
        "plain": init.plain(w, fmt, 12),
        "loftq": loftq(w, fmt, 12, 5),
        "qera_diag": qera_diag(w, fmt, 12, second_moment=s),
        "qera_exact": qera_exact(w, fmt, 12, second_moment=s),
        "cloq": cloq(w, fmt, 12, second_moment=s),
    }
    errors = {name: error_of(w, start, held_out) for name, start in ladder.items()}
    assert list(errors.values()) == sorted(errors.values(), reverse=True), errors
    assert errors["cloq"] < 0.5 * errors["loftq"]


@pytest.mark.parametrize("fmt", ["nf2 g64 f32", "nf3 g64 f32", "int4 g64 f16"])
def test_on_the_same_codes_more_of_the_second_moment_is_better(fmt):
    w, s, held_out = layer(128, 256)
    starts = (
        loftq(w, fmt, 16, 1),
        qera_diag(w, fmt, 16, second_moment=s.diagonal(), quantizer="absmax"),
        qera_exact(w, fmt, 16, second_moment=s, quantizer="absmax"),
    )
    assert all(torch.equal(start[0].codes, starts[0][0].codes) for start in starts)
    for measured in (s, held_out):
        errors = [error_of(w, start, measured) for start in starts]
        assert errors == sorted(errors, reverse=True)
    weight = [error_of(w, start, None) for start in starts]
    assert weight == sorted(weight)  # and worse for the weight itself


@pytest.mark.parametrize("fmt", ["nf2 g64 f32", "int3 g64 f16 zero", "nf4 g64 dq"])
def test_gptq_and_the_best_adapter_are_better_than_either(fmt):
    w, s, held_out = layer()
    both = error_of(w, cloq(w, fmt, 16, second_moment=s), held_out)
    assert both < 0.97 * error_of(w, gptq(w, fmt, second_moment=s), held_out)
    assert both < 0.97 * error_of(w, qera_exact(w, fmt, 16, second_moment=s), held_out)


@pytest.mark.parametrize("start", CALIBRATED)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_any_format_is_no_worse_than_plain(start, fmt):
    w, s = sample((33, 100)), second_moment(activations(100)[0])
    measured = s if start in EXACT else s.diagonal()
    options = (
        {"quantizer": "search"} if start == "gptq" else {}
    )  # which promises nothing about absmax on a poor codebook
    q, a, b = find(start, w, fmt, 4, second_moment=s, **options)
    assert q.format == fmt
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((4, 100), (33, 4), torch.float32, torch.float32)
    plain = output_error(w, quantize(w, fmt).dequantize(), second_moment=measured)
    # double quantization rounds searched scales and absmax scales by different amounts
    assert error_of(w, (q, a, b), measured) <= (1.05 if fmt.scale == "dq" else 1 + 1e-5) * plain


# ---------------------------------------------------------------------------------------------- cloq


def test_more_turns_are_never_worse_and_the_best_is_kept():
    w, s, _ = layer(64, 96)
    steps, options = [], {"second_moment": s, "quantizer": "absmax"}
    cloq(w, "nf3 g32", 4, iters=6, on_step=lambda *step: steps.append(step), **options)
    assert [turn for turn, _ in steps] == list(range(7))
    errors = [error for _, error in steps]
    assert errors[1] > min(errors) < errors[-1], "these turns tell the best from the first or the last no more"
    kept = [error_of(w, cloq(w, "nf3 g32", 4, iters=turns, **options), s) for turns in range(7)]
    assert kept == pytest.approx([min(errors[: turns + 1]) for turns in range(7)], rel=1e-4)
    assert all(after <= before for before, after in itertools.pairwise(kept))


def test_the_first_turn_has_gptqs_codes_and_the_exact_fit():
    w, s, _ = layer()
    reported = []
    q, a, b = cloq(w, "int3 g32 f16", 8, alpha=4, second_moment=s, on_step=lambda *step: reported.append(step))
    expected, _, _ = gptq(w, "int3 g32 f16", second_moment=s)
    assert torch.equal(q.codes, expected.codes)
    residual = (w - q.dequantize()).double()
    eigenvalues = torch.linalg.eigvalsh(residual @ s @ residual.T).flip(0)
    whole = float((w.double() @ s * w).sum())
    least = math.sqrt(float(eigenvalues[8:].sum()) / whole)
    assert error_of(w, (q, a, b), s, 0.5) == pytest.approx(least, rel=1e-5)
    assert reported == [
        (0, pytest.approx(output_error(w, q.dequantize(), second_moment=s), rel=1e-5)),
        (1, pytest.approx(least, rel=1e-5)),
    ]


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_svd_first_rounds_what_the_adapter_does_not_hold(alpha):
    """A weight whose leading part under S is too large for the format to hold beside the rest."""
    w, s, held_out = layer(64, 96)
    w += 8 * torch.randn(64, 4) @ torch.randn(4, 96)
    scaling = 1.0 if alpha is None else alpha / 4
    options = {"alpha": alpha, "second_moment": s, "quantizer": "absmax"}
    first, then = cloq(w, "nf2 g32", 4, **options), cloq(w, "nf2 g32", 4, order="svd-first", **options)
    assert error_of(w, then, held_out, scaling) < 0.5 * error_of(w, first, held_out, scaling)
    root = torch.linalg.cholesky(s)
    u, values, vt = torch.linalg.svd(w.double() @ root)
    leading = (u[:, :4] * values[:4]) @ torch.linalg.solve_triangular(root, vt[:4], upper=False, left=False)
    expected, _, _ = gptq((w - leading).float(), "nf2 g32", second_moment=s, quantizer="absmax")
    assert (then[0].unpack() == expected.unpack()).double().mean() > 0.99  # but on a decision's boundary


@pytest.mark.parametrize(("rank", "iters"), [(0, 3), (4, 0), (0, 0)])
def test_without_rank_or_turns_cloq_is_gptq(rank, iters):
    w, s, _ = layer(33, 100)
    steps = []
    q, a, b = cloq(w, "nf3 g32", rank, second_moment=s, iters=iters, on_step=lambda *step: steps.append(step))
    assert torch.equal(q.codes, gptq(w, "nf3 g32", second_moment=s)[0].codes)
    assert (a.shape, b.shape) == ((rank, 100), (33, rank))
    assert not b.any()
    assert [turn for turn, _ in steps] == [0]


# ---------------------------------------------------------------------------------------------- lqlora


@pytest.mark.parametrize("fmt", ["nf2 g64 f32", "nf4 g64 f32"])
def test_without_weights_lqlora_is_loftqs_svd_first(fmt):
    w, ours, theirs = torch.randn(96, 160), [], []
    ones = torch.ones(160)
    lqlora(w, fmt, 8, second_moment=ones, iters=4, quantizer="absmax", on_step=lambda _, e: ours.append(e))
    loftq(w, fmt, 8, 4, order="svd-first", on_step=lambda _, e: theirs.append(e))
    assert ours == pytest.approx(theirs[: len(ours)], rel=2e-3)  # of codes on a decision's boundary


def test_lqlora_stops_where_the_error_rises_and_keeps_the_best():
    w, s, _ = layer(64, 96)
    steps = []
    start = lqlora(
        w, "nf2 g32", 16, second_moment=s, iters=100, quantizer="absmax", on_step=lambda *step: steps.append(step)
    )
    errors = [error for _, error in steps]
    assert 3 < len(steps) < 100
    assert errors[-1] >= errors[-2]
    assert all(after < before for before, after in itertools.pairwise(errors[1:-1]))
    assert error_of(w, start, s.diagonal()) == pytest.approx(min(errors), rel=1e-4)


def test_lqloras_fisher_weights():
    w, s, _ = layer(64, 96)
    gradients = torch.randn(64, 1).exp() * s.diagonal().sqrt().float() * torch.randn(64, 96)
    fisher, errors = gradients.square(), {}
    for name, weights in {
        "fisher": fisher,
        "columns": fisher.mean(0).expand_as(fisher),
        "none": torch.ones(64, 96),
    }.items():
        q, a, b = lqlora(w, "nf3 g32", 8, fisher=weights, quantizer="absmax")
        remaining = w - q.dequantize() - b @ a
        errors[name] = float((fisher * remaining.square()).sum() / (fisher * w.square()).sum()) ** 0.5
    assert errors["fisher"] < errors["columns"] < errors["none"]
    rows, reported = torch.rand(64, 1), []
    q, a, b = lqlora(
        w, "nf3 g32", 8, fisher=rows * s.diagonal(), quantizer="absmax", on_step=lambda _, e: reported.append(e)
    )
    weighed = w * rows.sqrt()
    remaining = weighed - rows.sqrt() * (q.dequantize() + b @ a)
    assert output_error(weighed, weighed - remaining, second_moment=s.diagonal()) == pytest.approx(
        min(reported), rel=1e-4
    )


def test_rows_without_fisher_weight_are_left_to_the_codes():
    w, _, _ = layer(64, 96)
    fisher = torch.rand(64, 96)
    fisher[::4] = 0
    _, a, b = lqlora(w, "nf3 g32", 8, fisher=fisher, quantizer="absmax")
    assert a.isfinite().all()
    assert float(b[::4].abs().max()) < 1e-12 * float(b.abs().max())
    assert lqlora(w, "nf3 g32", 8, fisher=fisher * 0, iters=1)[1].isfinite().all()


# ---------------------------------------------------------------------------------------------- in and out


@pytest.mark.parametrize("start", CALIBRATED)
def test_rank_zero_is_codes_and_scales_alone(start):
    w, s, _ = layer(33, 100)
    q, a, b = find(start, w, "int3 g32 f16 zero", 0, second_moment=s)
    assert (a.shape, b.shape) == ((0, 100), (33, 0))
    assert error_of(w, (q, a, b), s.diagonal()) < 1


@pytest.mark.parametrize("start", FITTED)
@pytest.mark.parametrize("alpha", [1, 16.0, np.float32(37.5)])
def test_the_result_does_not_depend_on_alpha(start, alpha):
    w, s, _ = layer()
    base, base_a, base_b = find(start, w, "nf2 g64", 8, second_moment=s)
    q, a, b = find(start, w, "nf2 g64", 8, alpha, second_moment=s)
    packed = QuantLinear.from_quantized(q)
    packed.add_lora(8, alpha, A=a, B=b)
    product = base_b @ base_a
    assert torch.allclose(packed.lora_scaling * (b @ a), product, atol=1e-4 * float(product.abs().max()))
    assert torch.equal(base.codes, q.codes)


@pytest.mark.parametrize("start", CALIBRATED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_weight_is_computed_alike(start, dtype):
    w, s, _ = layer()
    w = w.to(dtype)
    torch.manual_seed(1)
    result = find(start, w, "nf2 g64", 8, second_moment=s)
    torch.manual_seed(1)
    assert same(result, find(start, w.float(), "nf2 g64", 8, second_moment=s))


@pytest.mark.parametrize("start", CALIBRATED)
def test_layout_autocast_and_grad_mode_change_nothing(start):
    w, s, _ = layer()
    kept, moment = w.clone(), s.clone()

    def run(weight, matrix=s):
        torch.manual_seed(1)
        return find(start, weight, "nf2 g64", 8, second_moment=matrix)

    base = run(w)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(run(w), base)
    assert same(run(torch.nn.Parameter(w)), base)
    assert same(run(w.T.contiguous().T), base)
    assert not run(torch.nn.Parameter(w), s.clone().requires_grad_())[1].requires_grad
    assert torch.equal(w, kept)
    assert torch.equal(s, moment)


@pytest.mark.parametrize("start", FITTED)
def test_the_same_weight_gives_the_same_start_and_the_global_generator_stays(start):
    w, s, _ = layer()
    before = torch.get_rng_state()
    first = find(start, w, "nf2 g64", 8, second_moment=s)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, find(start, w, "nf2 g64", 8, second_moment=s))


@pytest.mark.parametrize("start", ["search", "gptq"])
def test_an_idle_adapter_is_drawn_from_the_generator_it_is_given(start):
    w, s, _ = layer(33, 100)
    drawn = [
        find(start, w, "nf4 g64", 4, second_moment=s, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][1], drawn[2][1])
    assert not drawn[0][2].any()


@pytest.mark.parametrize("start", CALIBRATED)
def test_an_exact_weight_keeps_an_adapter_that_can_train(start):
    s = second_moment(activations(100)[0])
    w = quantize(torch.randn(33, 100), "int4 g64").dequantize()
    q, a, b = find(start, w, "int4 g64", 4, second_moment=s)
    assert torch.equal(q.dequantize(), w)
    assert not b.any()
    assert a.abs().amax(1).gt(0).all()


def test_search_without_a_second_moment_is_unweighted():
    w, s, _ = layer()
    weighed, alike = init.search(w, "nf2 g64", second_moment=s), init.search(w, "nf2 g64")
    assert torch.equal(alike[0].codes, quantize(w, "nf2 g64", search=True).codes)
    assert error_of(w, alike, None) <= error_of(w, weighed, None)
    assert error_of(w, weighed, s.diagonal()) < error_of(w, alike, s.diagonal())
    assert same(weighed, init.search(w, "nf2 g64", second_moment=s.diagonal()))


def test_needs_are_true():
    w, s = torch.randn(8, 32), torch.eye(32)
    given = {"none": None, "diagonal": torch.ones(32), "full": s}
    levels = list(given)
    assert set(init.NEEDS) == set(init.__all__) - {"NEEDS", "output_error"}
    for start, needed in init.NEEDS.items():
        for level in levels:
            options = {} if level == "none" else {"second_moment": given[level]}
            if levels.index(level) < levels.index(needed):
                with pytest.raises(ValueError, match="second_moment"):
                    getattr(init, start)(w, "nf4 g32", 2, **options)
            elif start not in ("plain", "loftq"):
                assert getattr(init, start)(w, "nf4 g32", 2, **options)[1].shape == (2, 32)


# ---------------------------------------------------------------------------------------------- refusals

BAD_MOMENTS = {
    "a third of it": (torch.eye(8), ValueError, "second_moment has shape (8, 8) and the weight reads 32 inputs; give"),
    "of another layer": (torch.ones(31), ValueError, "second_moment has shape (31,) and the weight reads 32 inputs;"),
    "NaN": (torch.full((32, 32), math.nan), ValueError, "second_moment holds NaN or Inf; leave out the rows of x"),
    "Inf": (torch.eye(32).fill_diagonal_(math.inf), ValueError, "second_moment holds NaN or Inf; leave out the rows"),
    "negative": (-torch.eye(32), ValueError, "second_moment of input 0 is -1.0; a mean of squares is 0 or more"),
    "integers": (torch.eye(32).int(), TypeError, "second_moment is torch.int32; give a floating tensor [32, 32]"),
    "a list": ([1.0] * 32, TypeError, "second_moment is list; give a floating tensor [32, 32]"),
}  # fmt: skip


@pytest.mark.parametrize("start", CALIBRATED)
@pytest.mark.parametrize(("moment", "kind", "message"), BAD_MOMENTS.values(), ids=BAD_MOMENTS)
def test_a_bad_second_moment_is_refused_in_one_sentence(start, moment, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        getattr(init, start)(torch.randn(16, 32), "nf4 g32", 4, second_moment=moment)


@pytest.mark.parametrize("start", [name for name, needed in init.NEEDS.items() if needed != "none"])
def test_a_missing_second_moment_is_refused(start):
    with pytest.raises(ValueError, match=rf"^{start} needs second_moment, E\[x xᵀ\] of the layer's inputs; measure it"):
        getattr(init, start)(torch.randn(16, 32), "nf4 g32", 4)


@pytest.mark.parametrize("start", EXACT)
def test_a_diagonal_is_not_the_whole(start):
    with pytest.raises(ValueError, match=rf"^second_moment is a diagonal \[32\] and {start} needs all of E\[x xᵀ\]; "):
        getattr(init, start)(torch.randn(16, 32), "nf4 g32", 4, second_moment=torch.ones(32))


REFUSED = {
    "rank too high": ({"rank": 17}, ValueError, "rank=17 exceeds the weight's shorter side; use rank=16 or less"),
    "negative rank": ({"rank": -1}, ValueError, "rank=-1 is negative; use rank=0 or more"),
    "alpha of zero": ({"alpha": 0}, ValueError, "alpha=0 is not a positive number; leave it out"),
    "quantizer": ({"quantizer": "best"}, ValueError, "quantizer='best' is unknown; use 'search' or 'absmax'"),
    "a vector": ({"w": torch.randn(32)}, ValueError, "layer.3 has shape (32,); quantize takes a matrix"),
    "a NaN": ({"w": torch.full((16, 32), math.nan)}, ValueError, "layer.3[0, 0] is nan; only finite weights quantize"),
    "format": ({"fmt": "nf5 g64"}, ValueError, "'nf5 g64' is no format; the nearest is 'nf4 g64 f32'"),
}  # fmt: skip


@pytest.mark.parametrize("start", CALIBRATED)
@pytest.mark.parametrize(("given", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_in_one_sentence(start, given, kind, message):
    idle = start in ("search", "gptq")  # alpha changes nothing there, and any rank is a LoRA
    if (idle and ("alpha" in given or given.get("rank") == 17)) or (start == "search" and "quantizer" in given):
        pytest.skip(f"{start} takes this")
    arguments = {
        "w": torch.randn(16, 32),
        "fmt": "nf4 g32",
        "rank": 4,
        "second_moment": torch.eye(32),
        "name": "layer.3",
    }
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        getattr(init, start)(**(arguments | given))


BAD_FISHERS = {
    "of another shape": (torch.rand(16, 31), ValueError, "fisher has shape (16, 31), expected (16, 32)"),
    "negative": (torch.randn(16, 32), ValueError, "fisher holds what is negative, NaN or Inf"),
    "NaN": (torch.full((16, 32), math.nan), ValueError, "fisher holds what is negative, NaN or Inf"),
    "a list": ([0.0], TypeError, "fisher is list; give a floating tensor [16, 32]"),
}  # fmt: skip


@pytest.mark.parametrize(("fisher", "kind", "message"), BAD_FISHERS.values(), ids=BAD_FISHERS)
def test_a_bad_fisher_is_refused_in_one_sentence(fisher, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        lqlora(torch.randn(16, 32), "nf4 g32", 4, fisher=fisher)


@pytest.mark.parametrize("start", ["lqlora", "cloq"])
def test_steps_are_a_whole_number(start):
    with pytest.raises(ValueError, match=r"^iters=-2 is negative; use iters=0 or more$"):
        getattr(init, start)(torch.randn(16, 32), "nf4 g32", 4, second_moment=torch.eye(32), iters=-2)
