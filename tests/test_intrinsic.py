"""Intrinsic dimension: the Fastfood map, training inside it on a packed base, and finding d90."""

import copy
import math
import weakref

import pytest
import tiny_lm
import torch

import qft
from qft.analysis import intrinsic
from qft.analysis.intrinsic import Fastfood, confine, find_d90, release, walsh_hadamard
from qft.training.data import Examples, PaddingCollator
from qft.training.finetune import Recipe, run


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


def hadamard(n):
    """Sylvester's construction."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def vector(n, seed=1):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(projection):
    """P `[n, d]`, column by column."""
    return torch.stack([projection.apply(column) for column in torch.eye(projection.d, dtype=torch.float64)], dim=1)


# ------------------------------------------------------------------------------------------------ the map


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_fast_transform_is_the_matrix(n):
    x = torch.stack([vector(n, seed) for seed in range(3)])
    torch.testing.assert_close(walsh_hadamard(x), x @ hadamard(n), atol=1e-12, rtol=0)


def test_a_length_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="of 12 values does not exist"):
        walsh_hadamard(torch.zeros(12))


SHAPES = [(5, 1000), (1, 10), (256, 256), (300, 700), (40, 3)]


@pytest.mark.parametrize(("d", "n"), SHAPES)
def test_it_is_linear_to_the_last_digit(d, n):
    projection = Fastfood(d, n, 7, math.sqrt(n))
    x, y = vector(d, 1), vector(d, 2)
    out = projection.apply(2.5 * x - 3 * y)
    difference = out - (2.5 * projection.apply(x) - 3 * projection.apply(y))
    # fp64 sums of up to 512 terms twice over: log2(512) roundings each, in random directions
    assert difference.norm() / out.norm() < 4 * 18**0.5 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize(("d", "n"), SHAPES)
def test_the_transpose_is_the_transpose(d, n):
    projection = Fastfood(d, n, 7, 1.0)
    out, back = vector(n, 3), vector(d, 4)
    left, right = (out * projection.apply(back)).sum(), (projection.apply_t(out) * back).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-10)


def test_lengths_are_kept_on_average():
    ratios = []
    for seed in range(20):
        theta = vector(64, seed)
        ratios.append((Fastfood(64, 4096, seed, 64.0).apply(theta).norm() / theta.norm()).item())
    assert sum(ratios) / 20 == pytest.approx(1.0, abs=0.03)


def test_entries_are_spread_like_independent_ones():
    """Columns of a map of full rank, nearly orthogonal: mean cosine of 1/sqrt(n), as random ones have."""
    matrix = dense(Fastfood(48, 4096, 3, 64.0))
    unit = matrix / matrix.norm(dim=0)
    cosines = (unit.T @ unit - torch.eye(48, dtype=torch.float64)).abs()
    assert torch.linalg.matrix_rank(matrix) == 48
    assert cosines.max() < 5 / 64
    assert matrix.std().item() == pytest.approx(1 / 64, rel=0.05)


def test_the_seed_decides_the_map_and_no_global_generator_is_touched():
    theta, state = vector(30), torch.get_rng_state()
    first, again, other = (Fastfood(30, 500, seed, 1.0).apply(theta) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_chunks_do_not_change_the_map(monkeypatch):
    projection, theta = Fastfood(20, 5000, 1, 1.0), vector(20)
    whole = projection.apply(theta)
    transposed = projection.apply_t(whole)
    monkeypatch.setattr(intrinsic, "CHUNK", 1024)
    in_chunks = Fastfood(20, 5000, 1, 1.0)
    assert in_chunks.apply(theta).shape == whole.shape
    back = in_chunks.apply_t(in_chunks.apply(theta))
    assert back.isfinite().all()
    assert torch.equal(in_chunks.apply(theta), in_chunks.apply(theta))
    assert (transposed @ theta).item() == pytest.approx(whole.square().sum().item(), rel=1e-10)
    assert (back @ theta).item() == pytest.approx(in_chunks.apply(theta).square().sum().item(), rel=1e-10)


# ------------------------------------------------------------------------------------------------ a confined model


def packed(fmt="nf2 g64 f16"):
    torch.manual_seed(0)
    return qft.quantize_model(tiny_lm.model(), fmt)


def batch(rows=4, length=12):
    ids = torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_theta_zero_is_the_base_to_the_bit():
    model = packed()
    before = model(**batch()).logits
    confine(model, 100)
    assert torch.equal(model(**batch()).logits, before)


def test_only_d_numbers_train_and_they_count_the_layers_scales():
    model = packed()
    subspace = confine(model, 100)
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"subspace.theta": (86,), "subspace.scales": (14,)}
    assert subspace.d == 100
    release(model)
    assert confine(model, 100, said=False).d == 100
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"subspace.theta"}


def test_the_layers_compute_with_the_offset_of_the_formula():
    layer = qft.QuantLinear.from_linear(torch.nn.Linear(40, 24), "int4 g32 f32")
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Linear(24, 8))
    subspace = confine(model, 12)
    with torch.no_grad():
        subspace.theta.normal_()
        subspace.scales.copy_(torch.tensor([0.5, 2.0]))
    x = torch.randn(5, 40)
    offsets = [
        scale * subspace.projections[path].apply(subspace.theta).view(shape)
        for path, shape, scale in (("0", (24, 40), 0.5), ("2", (8, 24), 2.0))
    ]
    hidden = torch.relu(x @ (layer.dequantize() + offsets[0]).T + layer.bias)
    torch.testing.assert_close(
        model(x), hidden @ (model[2].weight + offsets[1]).T + model[2].bias, atol=1e-5, rtol=1e-5
    )
    sizes = sum(offset.square().sum() / scale**2 for offset, scale in zip(offsets, (0.5, 2.0), strict=True))
    assert (sizes.sqrt() / subspace.theta.norm()).item() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("said", [True, False])
def test_gradients_are_those_of_finite_differences(said):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    subspace = confine(model, 6, said=said).double()
    start = 0.5 * vector(len(subspace.theta))
    x = vector(12).view(2, 6).requires_grad_()

    def run_at(x, theta, scales):
        state = {"subspace.theta": theta, "subspace.scales": scales}
        return torch.func.functional_call(model, state, (x,))

    scales = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=said)
    assert torch.autograd.gradcheck(run_at, (x, start.requires_grad_(), scales))


def test_no_dense_offset_outlives_its_layers_pass(monkeypatch):
    model, made, alive = packed(), [], []
    real = intrinsic._dense

    def note(*given):
        alive.append(sum(reference() is not None for reference in made))
        offset = real(*given)
        made.append(weakref.ref(offset))
        return offset

    monkeypatch.setattr(intrinsic, "_dense", note)
    confine(model, 100)
    loss = model.train()(**batch()).loss
    assert len(made) == 14
    loss.backward()
    assert 14 < len(made) <= 28  # made anew for the gradient of what the layer read, where that is wanted
    assert set(alive) == {0}
    assert model.subspace.theta.grad.norm() > 0


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_in_the_subspace_learns_and_leaves_the_base_packed(gradient_checkpointing):
    model = packed()
    qft.prepare_for_training(model, gradient_checkpointing)
    confine(model, 400)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = Examples([{"input_ids": ids, "labels": ids.clone()} for ids in batch(8)["input_ids"]])
    losses = []
    recipe = Recipe(steps=10, batch_size=8, learning_rate=0.3, gradient_checkpointing=gradient_checkpointing)
    run(model, rows, PaddingCollator(0), recipe, on_step=lambda step, steps, loss: losses.append(loss))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"subspace.theta", "subspace.scales"}
    assert losses[-1] < losses[0] - 0.1


def test_a_released_model_is_the_base_and_a_copy_is_its_own():
    model = packed()
    before = model(**batch()).logits
    subspace = confine(model, 50)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        subspace.theta.normal_()
    assert not torch.allclose(model(**batch()).logits, before, atol=1e-3)
    assert torch.equal(twin(**batch()).logits, before)
    release(model)
    assert torch.equal(model(**batch()).logits, before)
    assert "subspace.theta" not in model.state_dict()


def test_what_cannot_be_confined_is_refused():
    with pytest.raises(ValueError, match="d=14 leaves no dimension to train, 14 of them scale the layers; use 15"):
        confine(packed(), 14)
    with pytest.raises(ValueError, match="d=0 leaves no dimension"):
        confine(packed(), 0, said=False)
    with pytest.raises(ValueError, match="targets nothing name no linear layer"):
        confine(packed(), 100, targets=["nothing"])
    model = packed()
    confine(model, 100)
    with pytest.raises(ValueError, match="has a subspace already"):
        confine(model, 100)


# ------------------------------------------------------------------------------------------------ d90


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_d90_of_a_regression_is_the_dimension_that_was_planted(kind):
    """24 numbers decide the loss: 6 inputs, 4 of 16 outputs. A random subspace of d explains d / 24 of them."""
    planted = 24
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 16)
    x, wanted = torch.randn(6, 32), 3 * torch.randn(6, 4)

    def layer():
        return copy.deepcopy(linear) if kind == "dense" else qft.QuantLinear.from_linear(linear, "nf2 g32 f32")

    def loss(model):
        return (model(x)[:, :4] - wanted).square().mean()

    def score(d):
        model = torch.nn.Sequential(layer())
        confine(model, d, seed=d, said=False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.LBFGS(parameters, max_iter=60, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            return value

        optimizer.step(closure)
        return loss(model).item()

    found = find_d90(score, start=loss(layer()).item(), full=0.0)
    assert planted / 2 <= found.d90 <= 1.5 * planted
    assert found.scores[found.d90] <= 0.1 * loss(layer()).item()


@pytest.mark.parametrize("threshold", [1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_search_finds_the_least_that_reaches_and_measures_few(threshold, sign):
    calls = []

    def score(d):
        calls.append(d)
        return sign * (10.0 if d >= threshold else 8.9)

    found = find_d90(score, start=0.0, full=sign * 10.0)
    assert found.d90 == threshold
    assert set(found.scores) == set(calls)
    assert len(calls) == len(set(calls)) <= 2 * math.log2(threshold + 1) + 2


def test_a_search_within_a_range_and_one_that_finds_nothing():
    assert find_d90(lambda d: float(d), 0.0, 100.0, least=15, most=200).d90 == 90
    found = find_d90(lambda d: float(d), 0.0, 100.0, least=15, most=50)
    assert found.d90 is None
    assert max(found.scores) == 50


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start": 1.0, "full": 1.0}, "leaves no gain"),
        ({"start": 1.0, "full": math.nan}, "leaves no gain"),
        ({"least": 0}, "least=0"),
        ({"share": 1.5}, r"share=1.5"),
    ],
)
def test_a_search_without_a_gain_or_a_range_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        find_d90(lambda d: 1.0, **{"start": 0.0, "full": 1.0, **wrong})
