"""The best low-rank correction under a second moment: against the theorem, in float64."""

import math

import pytest
import torch
from activations import activations, second_moment

from qft import init, quantize
from qft.init.factors import balanced_factors
from qft.init.second_moment import output_error
from qft.init.svd import EXACT_BELOW
from qft.init.weighted import weighted_low_rank

SHAPES = [(40, 64), (64, 40), (48, 48)]


def moment(features: int, kind: str) -> torch.Tensor:
    """float64: of correlated inputs, of fewer rows than inputs, with inputs that are always 0, or 0 itself."""
    if kind == "singular":
        return second_moment(torch.randn(features // 4, features))
    full = second_moment(activations(features)[0])
    dead = torch.arange(features) % 5 == 0
    return full * 0 if kind == "zero" else full * ~(dead[:, None] | dead) if kind == "dead inputs" else full


def weighted_square(matrix: torch.Tensor, s: torch.Tensor) -> float:
    """E‖M x‖² in float64."""
    m = matrix.double()
    return float(torch.trace(m @ (s if s.dim() == 2 else s.diag()) @ m.T))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_squared_error_is_the_discarded_eigenvalues(shape, rank):
    residual, s = torch.randn(shape).double(), moment(shape[1], "correlated")
    u, right = weighted_low_rank(residual, s, rank)
    eigenvalues = torch.linalg.eigvalsh(residual @ s @ residual.T).flip(0)
    left = weighted_square(residual - u @ right, s)
    assert left == pytest.approx(float(eigenvalues[rank:].sum()), rel=1e-8, abs=1e-8 * float(eigenvalues.sum()))
    assert torch.allclose(u.T @ u, torch.eye(rank).double(), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_three_routes_agree(shape):
    residual, s = torch.randn(shape).double(), moment(shape[1], "correlated")
    u, right = weighted_low_rank(residual, s, 8)
    values, vectors = torch.linalg.eigh(s)
    for root in (torch.linalg.cholesky(s), vectors * values.sqrt() @ vectors.T):
        left, sizes, turned = torch.linalg.svd(residual @ root, full_matrices=False)
        best = (left[:, :8] * sizes[:8]) @ turned[:8] @ torch.linalg.inv(root)
        assert torch.allclose(u @ right, best, atol=1e-8 * float(best.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_diagonal_is_the_scaled_svd(shape):
    residual, diagonal = torch.randn(shape).double(), moment(shape[1], "correlated").diagonal()
    u, right = weighted_low_rank(residual, diagonal, 8)
    left, sizes, turned = torch.linalg.svd(residual * diagonal.sqrt(), full_matrices=False)
    best = (left[:, :8] * sizes[:8]) @ turned[:8] / diagonal.sqrt()
    assert torch.allclose(u @ right, best, atol=1e-9 * float(best.abs().max()))
    other, _ = weighted_low_rank(residual, diagonal.diag(), 8)
    assert torch.allclose(other @ other.T, u @ u.T, atol=1e-8)


@pytest.mark.parametrize("fmt", ["nf2 g64 f32", "int3 g64 f16 zero", "nf4 g64 dq"])
@pytest.mark.parametrize("start", ["qera_exact", "qera_diag"])
@pytest.mark.parametrize("shape", [(96, 160), (EXACT_BELOW, EXACT_BELOW)])
def test_without_correlation_it_is_loftqs_first_step(start, fmt, shape):
    if max(shape) > 1000 and fmt != "nf2 g64 f32":
        pytest.skip("one large weight is enough")
    w, identity = torch.randn(shape), torch.eye(shape[1])
    q, a, b = getattr(init, start)(w, fmt, 8, second_moment=identity, quantizer="absmax")
    base, base_a, base_b = init.loftq(w, fmt, 8, 1)
    assert torch.equal(q.codes, base.codes)
    if max(shape) < EXACT_BELOW:
        # LoftQ's SVD is fp32: singular vectors turn by its rounding over the gap between their values
        assert float((b @ a - base_b @ base_a).norm()) < 1e-3 * float((base_b @ base_a).norm())
    mine, theirs = (output_error(w, q.dequantize(), *factors) for factors in ((a, b), (base_a, base_b)))
    assert mine == pytest.approx(theirs, rel=1e-6 if max(shape) < EXACT_BELOW else 1e-3)


@pytest.mark.parametrize(("out", "features"), [(EXACT_BELOW, 1100), (1100, EXACT_BELOW)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_subspace_iteration_is_within_half_a_percent(out, features, diagonal):
    s = second_moment(activations(features, 1200)[0]).float()
    s = s.diagonal() if diagonal else s
    w = torch.randn(out, features)
    residual = (w - quantize(w, "nf2 g64").dequantize()).double()
    gram = residual @ (s.double().diag() if diagonal else s.double()) @ residual.T
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0)
    for rank in (1, 64):
        u, right = weighted_low_rank(residual, s, rank)
        left = weighted_square(residual - u @ right, s.double())
        assert math.sqrt(left) <= 1.005 * math.sqrt(float(eigenvalues[rank:].sum()))


@pytest.mark.parametrize("kind", ["singular", "dead inputs", "zero"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", ["qera_diag", "qera_exact", "cloq", "lqlora"])
def test_a_singular_second_moment_breaks_nothing(start, shape, kind):
    w, s = torch.randn(shape), moment(shape[1], kind)
    q, a, b = getattr(init, start)(w, "nf2 g32", 8, second_moment=s)
    assert a.isfinite().all()
    assert b.isfinite().all()
    weights = s.diagonal() if start in ("qera_diag", "lqlora") else s
    adapted = output_error(w, q.dequantize(), a, b, 1.0, weights)
    assert adapted <= output_error(w, q.dequantize(), second_moment=weights) + 1e-6


@pytest.mark.parametrize("size", [EXACT_BELOW, 1200])
def test_subspace_iteration_on_a_residual_of_lower_rank(size):
    residual = torch.randn(size, 3) @ torch.randn(3, 1100)
    u, right = weighted_low_rank(residual, torch.rand(1100), 16)
    assert float((residual - u @ right).norm()) <= 1e-6 * float(residual.norm())


def test_all_of_the_rank_leaves_nothing():
    w, s = torch.randn(40, 64), moment(64, "correlated")
    q, a, b = init.qera_exact(w, "nf2 g64", 40, second_moment=s)
    assert output_error(w, q.dequantize(), a, b, 1.0, s) < 1e-5


def test_factors_are_balanced():
    w, s = torch.randn(40, 64), moment(64, "correlated")
    for start in ("qera_diag", "qera_exact", "cloq", "lqlora"):
        _, a, b = getattr(init, start)(w, "nf2 g64", 8, second_moment=s)
        gram_a, gram_b = a @ a.T, b.T @ b
        assert torch.allclose(gram_a, gram_b, atol=1e-4 * float(gram_a.max())), start
        assert torch.allclose(gram_a, gram_a.diagonal().diag(), atol=1e-4 * float(gram_a.max())), start


@pytest.mark.parametrize("true_rank", [0, 3])
def test_what_the_product_leaves_over_can_train(true_rank):
    left, right = torch.randn(20, 8).double(), torch.randn(8, 30).double()
    left[:, true_rank:] = 0
    a, b = balanced_factors(left, right, 0.5)
    assert torch.allclose(0.5 * (b @ a).double(), left @ right, atol=1e-5)
    assert not b[:, true_rank:].any()
    assert a.norm(dim=1).gt(0.1).all()


@pytest.mark.parametrize("exponent", [-100, 100])
def test_the_weights_size_changes_nothing(exponent):
    w, s = torch.randn(40, 64), moment(64, "correlated")
    expected = output_of(w, s)
    assert output_of(w * 2.0**exponent, s) == pytest.approx(expected, rel=1e-5)


def output_of(w: torch.Tensor, s: torch.Tensor) -> float:
    q, a, b = init.qera_exact(w, "nf2 g64", 8, second_moment=s, quantizer="absmax")  # a search squares in fp32
    return output_error(w.double(), q.dequantize(), a, b, 1.0, s)


# ---------------------------------------------------------------------------------------------- the error of the output


def test_output_error_is_that_of_the_outputs():
    w, (x, _) = torch.randn(24, 40), activations(40)
    q, a, b = init.loftq(w, "nf2 g32", 4, 2, alpha=8)
    lost = x.double() @ (w.double() - q.dequantize().double() - 2.0 * (b.double() @ a.double())).T
    exact = float(lost.norm() / (x.double() @ w.double().T).norm())
    s = second_moment(x)
    assert init.output_error(w, q.dequantize(), a, b, 2.0, s) == pytest.approx(exact, rel=1e-9)
    assert init.output_error(w, q.dequantize(), a, b, 2.0, s.float()) == pytest.approx(exact, rel=1e-4)


def test_output_error_of_a_diagonal_and_of_no_second_moment():
    w, diagonal = torch.randn(1100, 40), torch.rand(40).double()
    q = quantize(w, "nf2 g32").dequantize()
    full = init.output_error(w, q, second_moment=diagonal.diag())
    assert init.output_error(w, q, second_moment=diagonal) == pytest.approx(full, rel=1e-12)
    assert init.output_error(w, q) == pytest.approx(float((w - q).norm() / w.norm()), rel=1e-5)
    assert init.output_error(w, q, second_moment=diagonal * 0) == 0
