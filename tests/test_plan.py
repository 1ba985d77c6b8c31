"""Which layer gets which format: against every other choice there is, and by the bytes really stored."""

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import tiny_lm
import torch
from torch import nn

import qft
from qft.measure.measured_plan import LADDER, measure_formats, plan_bits, plan_first_layers
from qft.measure.plan import Candidate, Plan, Planned, Weight, choose, first_layers
from qft.measure.plan_figure import COLORS, draw_plan
from qft.training.data import PaddingCollator

FORMATS = ("nf2 g64 f16", "nf3 g64 f16", "nf4 g64 f16")
COLLATE = PaddingCollator(pad_id=0)
IDS = torch.randint(0, tiny_lm.VOCABULARY, (6, 20), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_lm.model()


@pytest.fixture(scope="module")
def calibration(model):
    return qft.calibrate(model, ROWS, COLLATE)


@pytest.fixture(scope="module")
def informed(model):
    return qft.calibrate(model, ROWS, COLLATE, gradients=True)


def random_weights(seed, count=5, kinds=3):
    source = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=source))  # noqa: E731
    weights = []
    for at in range(count):
        sizes = sorted(16 * draw(1, 200) for _ in range(kinds))
        errors = sorted((draw(0, 1000) / 7 for _ in range(kinds)), reverse=True)
        made = (Candidate(fmt, *pair) for fmt, *pair in zip(FORMATS, sizes, errors, strict=False))
        weights.append(Weight((f"block.{at}.layer",), (64, draw(10, 100)), tuple(made)))
    return weights


# ------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_within_the_budget_is_better(seed):
    weights = random_weights(seed)
    total = sum(math.prod(weight.shape) for weight in weights)
    sizes = [sum(c.nbytes for c in some) for some in itertools.product(*(w.candidates for w in weights))]
    for budget in (min(sizes), sorted(sizes)[len(sizes) // 3], max(sizes) - 1, max(sizes)):
        plan = choose(weights, 8 * budget / total)  # to the byte: rounding loses none of it
        best = min(
            math.fsum(c.error for c in some)
            for some in itertools.product(*(weight.candidates for weight in weights))
            if sum(c.nbytes for c in some) <= budget
        )
        assert plan.nbytes <= budget
        assert plan.error <= best * (1 + 2e-6)
        assert list(plan.formats) == [weight.paths[0] for weight in weights]


@pytest.mark.parametrize("nbytes", [61, 115, 122])  # floor(8 n / 7 · 7 / 8) is n − 1 for these
def test_the_bits_of_a_plan_are_a_budget_it_fits(nbytes):
    weights = [Weight(("a",), (1, 7), (Candidate("nf4 g64 f16", nbytes, 1.0),))]
    plan = choose(weights, 8 * nbytes / 7)
    assert choose(weights, plan.bits_per_weight) == plan


def test_more_bits_never_cost_more_error():
    weights = random_weights(3, count=40)
    total = sum(math.prod(weight.shape) for weight in weights)
    least = 8 * sum(min(c.nbytes for c in weight.candidates) for weight in weights) / total
    errors = [choose(weights, least + extra).error for extra in (0, 0.5, 1, 2, 4, 1000)]
    assert all(after <= before * (1 + 2e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(sum(min(c.error for c in weight.candidates) for weight in weights))


def test_a_large_model_is_planned_at_once():
    source = torch.Generator().manual_seed(0)
    weights = []
    for at in range(560):  # as many as a model of 80 blocks has
        scale = float(torch.rand((), generator=source)) + 0.1
        sizes = [(bits + 16 / group) for bits in (2, 3, 4) for group in (128, 64, 32)]
        made = (
            Candidate(fmt, int(size * 2**21), scale * 2 ** (-2 * size) * (1 + float(torch.rand((), generator=source))))
            for fmt, size in zip(LADDER, sizes, strict=True)
        )
        weights.append(Weight((f"layers.{at}",), (4096, 4096), tuple(made)))
    plan = choose(weights, 2.6)
    assert 2.599 < plan.bits_per_weight <= 2.6


def test_a_budget_too_small_names_the_smallest():
    weights = random_weights(0)
    with pytest.raises(ValueError, match=r"a budget of 0.01 bits per weight is below (\S+), .* use \1 or more") as e:
        choose(weights, 0.01)
    smallest = float(str(e.value).split("use ")[1].split(" or")[0])
    assert choose(weights, smallest).nbytes == sum(min(c.nbytes for c in weight.candidates) for weight in weights)
    for bits in (smallest - 0.002, -1, float("nan")):
        with pytest.raises(ValueError, match="a budget of"):
            choose(weights, bits)


@pytest.mark.parametrize("error", [-1.0, float("nan"), float("inf")])
def test_an_error_that_is_none_is_refused(error):
    weights = [Weight(("a",), (8, 8), (Candidate("nf4 g64 f16", 100, error),))]
    with pytest.raises(ValueError, match="the error of a as nf4 g64 f16 is"):
        choose(weights, 100)
    with pytest.raises(ValueError, match="at least one weight"):
        choose([], 4)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_first_blocks_are_stored_in_more_bits(model, count):
    plan = plan_first_layers(model, count, "nf4 g64", "nf2 g64", search=False, include=["lm_head"])
    for path, fmt in plan.formats.items():
        first = any(path.startswith(f"model.layers.{at}.") for at in range(count))
        assert fmt == ("nf4 g64 f32" if first else "nf2 g64 f32")
    assert plan.formats["lm_head"] == "nf2 g64 f32"
    assert plan.budget is None


def test_more_blocks_than_there_are_is_refused(model):
    with pytest.raises(ValueError, match="the first 3 of 2 blocks cannot be; use 0 to 2"):
        plan_first_layers(model, 3, "nf4 g64", "nf2 g64", search=False)
    with pytest.raises(ValueError, match=r"block.0.layer was not measured as nf4 g128 f16; it has nf2 g64 f16"):
        first_layers(random_weights(0), 1, "nf4 g128 f16", "nf2 g64 f16")


# ------------------------------------------------------------------------------------------------ what is measured


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("kind", ["none", "full", "diagonal", "gradients"])
def test_errors_are_what_the_plan_says(model, calibration, informed, search, kind):
    diagonals = {path: moment.diagonal() for path, moment in calibration.items()}
    given = {"none": None, "full": calibration, "diagonal": diagonals, "gradients": informed}[kind]
    for weight in measure_formats(model, FORMATS[:2], given, search, skip=["model.layers.1.*"]):
        (path,) = weight.paths
        w = model.get_submodule(path).weight.detach()
        s = torch.eye(w.shape[1], dtype=torch.float64) if given is None else calibration[path].double()
        s = s.diagonal().diag() if kind == "diagonal" else s
        importance = s.diagonal().float() if search and given is not None else None
        for candidate in weight.candidates:
            q = qft.quantize(w, candidate.format, search=search, importance=importance)
            r = w.double() - q.dequantize().double()
            expected = torch.trace(r @ s @ r.T)
            if kind == "gradients":
                expected *= informed.sensitivity[path] / 2
            else:
                expected /= torch.trace(w.double() @ s @ w.double().T)
            assert candidate.error == pytest.approx(expected.item(), rel=1e-4)  # fp32 sums of 96 features
            assert candidate.nbytes == q.nbytes


def test_with_gradients_the_error_is_the_rise_of_the_loss():
    """One linear layer and a squared loss, for which the second order is all there is.

    Labels are its outputs and noise of unit variance: then the Fisher matrix is the Hessian.
    """
    source = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=source) @ torch.randn(64, 64, generator=source) / 8

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 8, bias=False)

        def forward(self, x, labels=None):
            y = self.layer(x)
            if labels is None:
                return y
            loss = (y - labels).square().sum(-1).mean() / 2
            return type("Output", (), {"loss": loss * len(x) / labels.numel()})  # per label, as they are counted

    regression = Regression()
    with torch.no_grad():
        labels = regression(x) + torch.randn(4096, 8, generator=source)
    rows = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    made = qft.calibrate(
        regression, rows, lambda some: {k: torch.stack([r[k] for r in some]) for k in some[0]},
        gradients=True, batch_size=4096,
    )  # fmt: skip
    plan = plan_bits(regression, 2.25, ["nf2 g64 f16"], calibration=made)
    q = qft.quantize(regression.layer.weight, "nf2 g64 f16", search=True, importance=made["layer"].diagonal())
    with torch.no_grad():
        noise = x @ (q.dequantize() - regression.layer.weight).T
    rise = noise.square().sum().item() / 2 / labels.numel()
    assert plan.error == pytest.approx(rise, rel=0.03)  # the noise's own mean square, over 32768 draws
    assert plan.measure == "expected rise of the loss in nats per token, searched scales"


def test_the_plan_is_what_is_stored(calibration):
    dense = tiny_lm.model()
    plan = plan_bits(dense, 3.4, FORMATS, calibration=calibration)
    assert len(set(plan.formats.values())) > 1
    made = qft.report(qft.quantize_model(dense, "nf2 g64 f16", formats=plan.formats))
    assert {layer.path: str(layer.format) for layer in made.quantized} == plan.formats
    assert sum(layer.nbytes for layer in made.quantized) == plan.nbytes
    assert made.bits_per_weight == plan.bits_per_weight <= 3.4


@pytest.mark.parametrize("bits", FORMATS)
def test_at_the_bytes_of_a_uniform_format_the_plan_loses_no_more(model, calibration, bits):
    weights = measure_formats(model, FORMATS, calibration, search=False)
    uniform = [next(c for c in weight.candidates if c.format == bits) for weight in weights]
    stored = 8 * sum(c.nbytes for c in uniform) / sum(math.prod(weight.shape) for weight in weights)
    plan = choose(weights, stored)
    assert plan.nbytes <= sum(c.nbytes for c in uniform)
    assert plan.error <= math.fsum(c.error for c in uniform)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.third = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.other.weight = self.one.weight


def test_a_shared_weight_counts_once_and_has_one_format():
    tied = Tied()
    weights = measure_formats(tied, FORMATS, search=False)
    assert [weight.paths for weight in weights] == [("one", "other"), ("third",)]
    plan = choose(weights, 3.5)
    assert plan.formats["one"] == plan.formats["other"] != plan.formats["third"]
    quantized = qft.quantize_model(tied, "nf2 g64 f16", formats=plan.formats)
    assert quantized.one.weight is quantized.other.weight
    assert plan.nbytes == sum(quantized.get_submodule(path).quant_tensor.nbytes for path in ("one", "third"))


def test_what_cannot_be_measured_is_refused(model, calibration):
    with pytest.raises(ValueError, match=r"the calibration lacks 1 of 15 weights, such as that of lm_head; calibrate"):
        plan_bits(model, 3, FORMATS, calibration=calibration, include=["lm_head"])
    with pytest.raises(ValueError, match="at least one format"):
        plan_bits(model, 3, ())
    with pytest.raises(qft.FormatError, match="the nearest is"):
        plan_bits(model, 3, ("nf5 g64",))
    with pytest.raises(ValueError, match="holds no linear layer to plan"):
        plan_bits(nn.Sequential(nn.ReLU()), 3)
    broken = tiny_lm.model()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight\[3, 5\] is nan"):
        plan_bits(broken, 3, FORMATS, search=False)


def test_the_model_is_only_looked_at(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan_bits(model, 3, FORMATS, search=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {layer.reason for layer in qft.report(model).dense} == {"not asked for"}


# ------------------------------------------------------------------------------------------------ files and pictures


@pytest.fixture(scope="module")
def plan(model):
    return plan_bits(model, 3.4, FORMATS, search=False)


def test_a_plan_survives_its_file(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert "3.4" in str(plan)
    assert f"{plan.bits_per_weight:.3f} bits per weight of 3.4 asked for" in str(plan)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no plan; write one with qft plan"),
        ("[]", "is no plan; write one"),
        ('{"weights": []}', "is no plan; write one"),
        (
            '{"budget": 2, "measure": "", "weights": [{"paths": ["a"], "shape": [1, 2], "format": "nf9 g64", '
            '"nbytes": 1, "error": 0}]}',
            "is no plan: 'nf9 g64' is no format",
        ),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(qft.FormatError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_every_width_has_a_colour_of_its_own():
    codes = ("[-1 1]", "nf2", "nf3", "nf4", "int8")
    assert {qft.Format.parse(f"{code} g64").bits for code in codes} == set(COLORS)
    assert len(set(COLORS.values())) == len(COLORS)


@pytest.mark.parametrize("count", [3, 200])
def test_the_picture_shows_every_weight(plan, tmp_path, monkeypatch, count):
    from matplotlib.axes import Axes
    from matplotlib.image import imread

    drawn = []
    bar = Axes.bar
    monkeypatch.setattr(
        Axes, "bar", lambda axis, *given, **named: drawn.append((given, named)) or bar(axis, *given, **named)
    )
    made = tuple(
        Planned((f"layers.{at}.w",), (64, 64), ("nf2 g64 f16", "int8 g64 f16")[at % 2], 512 * (1 + at % 2), 0.1)
        for at in range(count)
    )
    draw_plan(Plan(made, 20.0), tmp_path / "plan.png")
    (_, heights, _), named = drawn[0]
    assert heights == [1 + at % 2 for at in range(count)]
    assert named["color"] == [COLORS[2], COLORS[8]] * (count // 2) + [COLORS[2]] * (count % 2)
    picture = imread(tmp_path / "plan.png")
    assert picture.shape[:2] == (704, 1680)
    assert picture[..., :3].std() > 0.05


# ------------------------------------------------------------------------------------------------ what was measured


@pytest.fixture(scope="module")
def bench():
    folder = Path(__file__).parent.parent / "bench"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("bench_plan", folder / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plan_beats_what_takes_the_same_bytes(bench):
    rows = json.loads(bench.RESULT.read_text())["rows"]
    for bits in {row["bits"] for row in rows}:
        same = [row for row in rows if row["bits"] == bits]
        (plan,) = (row for row in same if row["name"] == f"plan by {bench.BEST}")
        others = [row for row in same if row is not plan]
        assert others
        for domain in ("new", "own"):
            assert all(plan[domain] < row[domain] for row in others), (bits, domain)
        assert all(plan["bytes"] <= row["bytes"] for row in others if not row["name"].startswith("plan"))


def test_the_page_shows_the_results(bench):
    page = bench.PAGE.read_text()
    assert bench.replace_block(page, "measured", bench.tables(json.loads(bench.RESULT.read_text()))) == page
