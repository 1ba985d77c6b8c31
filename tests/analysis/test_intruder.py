"""Intruder dimensions: planted spikes are counted, and taken out as PEFT takes them out of a dense weight."""

import warnings

import peft
import pytest
import tiny_lm
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn

import qft
from qft.adapters.peft_format import Factors, attach, lora_factors
from qft.analysis.intruder import find_intruders, reduce_intruders

OUT, IN = 96, 128


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Matrices of this size are slower with more."""
    threads(1)


def spiked(size, seed=0, fmt="nf2 g64 f16", rank=1, alpha=None, out=OUT, in_features=IN):
    """A packed Gaussian layer with a random rank-1 update of `size` times its largest singular value."""
    generator = torch.Generator().manual_seed(seed)
    weight = qft.quantize(torch.randn(out, in_features, generator=generator), fmt)
    model = nn.ModuleDict({"layer": qft.QuantLinear.from_quantized(weight)})
    u, v = (nn.functional.normalize(torch.randn(n, generator=generator), dim=0) for n in (out, in_features))
    a, b = torch.zeros(rank, in_features), torch.zeros(out, rank)
    a[0], b[:, 0] = v, u * size * torch.linalg.matrix_norm(weight.dequantize(), 2)
    factors = Factors(a, b, rank if alpha is None else alpha)
    attach(model, {"layer": Factors(a, b / factors.shape.scaling, factors.alpha)})
    return model, u, v


def update(model):
    """What the LoRA adds to the weight."""
    factors = lora_factors(model)["layer"]
    return (factors.shape.scaling * factors.B @ factors.A).detach()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(96, 128), (128, 96)])
def test_planted_spikes_are_counted(shape, seed):
    out, in_features = shape
    for size, expected in ((2.0, 1), (0.1, 0), (0.03, 0), (0.01, 0)):
        report = find_intruders(spiked(size, seed, out=out, in_features=in_features)[0])
        assert report.total == expected, size
        assert len(report.layers[0].cosines) == 10
    report = find_intruders(spiked(2.0, seed, out=out, in_features=in_features)[0])
    assert report.layers[0].intruders == (0,)  # twice the largest: it comes first
    assert str(report).endswith("1 intruder dimensions in 1 layers (top 10 singular vectors, |cosine| below 0.5)")


def test_the_base_is_what_the_codes_stand_for():
    model = spiked(0.0)[0]
    report = find_intruders(model)
    values = torch.linalg.svdvals(model["layer"].dequantize())
    assert torch.allclose(torch.tensor(report.layers[0].singular_values), values[:10], rtol=1e-4)
    assert min(report.layers[0].cosines) > 0.99


def test_epsilon_and_k_decide():
    model = spiked(2.0)[0]
    assert find_intruders(model, epsilon=1e-6).total == 0
    assert len(find_intruders(model, top_k=3).layers[0].cosines) == 3
    assert len(find_intruders(model, top_k=1000).layers[0].cosines) == OUT


def test_an_update_along_the_base_is_no_intruder():
    model = spiked(0.0)[0]
    u, s, vt = torch.linalg.svd(model["layer"].dequantize(), full_matrices=False)
    attach(model, {"layer": Factors(vt[:2], 2 * s[0] * u[:, :2], 2)})
    assert find_intruders(model).total == 0


# ---------------------------------------------------------------------------------------------------------- mitigation


@pytest.mark.parametrize("keep_rank", [True, False])
def test_lambda_one_is_the_identity(keep_rank):
    model = spiked(2.0, rank=4, alpha=8)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert reduce_intruders(model, 1.0, keep_rank=keep_rank).total == 1
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert model["layer"].lora_alpha == 8


@pytest.mark.parametrize("lam", [0.0, 0.4, 0.75])
def test_with_ranks_to_spare_the_formula_is_exact(lam):
    model = spiked(2.0, rank=4, alpha=8)[0]
    base, before = model["layer"].dequantize(), update(model)
    u, s, vt = torch.linalg.svd(base + before, full_matrices=False)
    assert reduce_intruders(model, lam, keep_rank=False).total == 1
    expected = before + (lam - 1) * s[0] * u[:, :1] @ vt[:1]
    assert torch.allclose(update(model), expected, atol=1e-4 * s[0].item())
    assert model["layer"].lora_rank == 5
    assert torch.equal(model["layer"].dequantize(), base)


def test_removed_intruders_are_gone():
    model = spiked(2.0, rank=2)[0]
    reduce_intruders(model, 0.0, keep_rank=False)
    assert find_intruders(model).total == 0


def test_a_grown_update_stays_within_what_the_layer_holds():
    model = spiked(2.0, rank=8, out=8)[0]
    before = update(model)
    report = reduce_intruders(model, 0.5, keep_rank=False, epsilon=1.0)
    assert report.total > 0
    assert model["layer"].lora_rank == 8
    assert not torch.allclose(update(model), before)


def test_the_rank_kept_is_the_best_of_that_rank_and_keeps_its_scaling():
    models = [spiked(2.0, rank=2, alpha=6)[0] for _ in range(2)]
    for model, keep_rank in zip(models, (True, False), strict=True):
        model["layer"].lora_dropout = nn.Dropout(0.25)
        reduce_intruders(model, 0.5, keep_rank=keep_rank)
    kept, grown = models
    u, s, vt = torch.linalg.svd(update(grown))
    assert torch.allclose(update(kept), u[:, :2] * s[:2] @ vt[:2], atol=1e-4 * s[0].item())
    layer = kept["layer"]
    assert (layer.lora_rank, layer.lora_alpha, layer.lora_scaling, layer.lora_dropout.p) == (2, 6, 3, 0.25)
    assert grown["layer"].lora_rank == 3
    assert grown["layer"].lora_scaling == pytest.approx(3)


def test_it_does_what_peft_does_on_the_dense_weight(tmp_path):
    """PEFT's own function, on the weights the codes stand for: the same intruders, and the same update."""
    packed, dense = qft.quantize_model(tiny_lm.model(), "nf4 g64 f32"), tiny_lm.model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, module in packed.named_modules():
            if isinstance(module, qft.QuantLinear):
                dense.get_submodule(path).weight.copy_(module.dequantize())
                b = torch.randn(module.out_features, 3, generator=generator)
                module.add_lora(3, alpha=6, A=torch.randn(3, module.in_features, generator=generator), B=b)
    qft.save_adapter(packed, tmp_path)
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for names it has since renamed
        theirs = peft.PeftModel.from_pretrained(dense, tmp_path)
    reduce_intruder_dimension(theirs, mitigation_lambda=0.6, logging_sink=said.append)
    report = reduce_intruders(packed, 0.6)
    counts = [int(line.rpartition(" ")[2]) for line in said if "Intruders: " in line]
    assert report.total == sum(counts) > 0
    for path, factors in lora_factors(packed).items():
        expected = theirs.base_model.model.get_submodule(path).get_delta_weight("intruder_reduced")
        product = factors.shape.scaling * factors.B @ factors.A
        assert (product - expected).norm() <= 1e-4 * expected.norm(), path


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: find_intruders(model, top_k=0), "top_k=0"),
        (lambda model: find_intruders(model, epsilon=0.0), r"epsilon=0\.0"),
        (lambda model: reduce_intruders(model, 1.5), r"lam=1\.5 is outside"),
        (lambda model: find_intruders(nn.Linear(2, 2)), "no QuantLinear of Linear carries a LoRA"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(spiked(2.0)[0])


def test_progress_is_told():
    told = []
    find_intruders(spiked(2.0)[0], on_layer=lambda *at: told.append(at))
    assert told == [(1, 1)]
