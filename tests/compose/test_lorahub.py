"""LoraHub: factors are summed before they are multiplied, the search finds a planted mix, codes stay as they are."""

import json
import math
import sys
import threading
from types import SimpleNamespace

import pytest
import tiny_lm
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import qft
from qft import FormatError
from qft.adapters.peft_format import Factors, attach, lora_factors, save_adapter
from qft.compose.library import Library
from qft.compose.lorahub import BOUND, WeightedSums, lorahub
from qft.disk.files import WRITTEN
from qft.training.data import IGNORE, Examples, PaddingCollator
from qft.training.evaluate import perplexity

IN, OUT, RANK, MODULES = 48, 40, 4, 6  # of the planted mix
IDS = torch.arange(24).reshape(2, 12)
ROWS = Examples([{"input_ids": ids, "labels": ids.clone()} for ids in (*IDS, torch.arange(40, 45))])
COLLATE = PaddingCollator(0)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Models of this size are slower with more."""
    threads(1)


class Regression(nn.Module):
    """One packed layer, fitted to targets; called as a transformer is."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(OUT, IN, generator=generator)
        self.layer = qft.QuantLinear.from_quantized(qft.quantize(weight, "nf2 g64 f16"))
        self.unit = 1.0

    def forward(self, x, y, labels):
        return SimpleNamespace(loss=((self.layer(x) - y) / self.unit).square().mean())


def planted(tmp_path, seed):
    """A library of six adapters, and rows whose targets a mix of all of them explains."""
    generator = torch.Generator().manual_seed(100 + seed)
    model = Regression(seed)
    adapters = [
        Factors(torch.randn(RANK, IN, generator=generator), torch.randn(OUT, RANK, generator=generator), alpha=RANK)
        for _ in range(MODULES)
    ]
    for at, factors in enumerate(adapters):
        attach(model, {"layer": factors})
        save_adapter(model, tmp_path / f"module-{at}")
    mix = 2 * torch.rand(MODULES, generator=generator) - 1
    a = sum(w * f.unscaled()[0] for w, f in zip(mix, adapters, strict=True))
    b = sum(w * f.unscaled()[1] for w, f in zip(mix, adapters, strict=True))
    x = torch.randn(64, IN, generator=generator)
    change = x @ a.T @ b.T
    model.unit = change.square().mean().sqrt()  # the loss without any adapter is then 1
    model.layer.remove_lora()
    y = model.layer(x).detach() + change
    rows = [{"x": x[i], "y": y[i], "labels": torch.zeros(1, dtype=torch.int64)} for i in range(len(x))]
    return model, rows


def stack(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_forty_evaluations_find_a_planted_mix_in_four_of_five_seeds(tmp_path):
    drops = []
    for seed in range(5):
        model, rows = planted(tmp_path / str(seed), seed)
        found = lorahub(model, tmp_path / str(seed), rows, stack, batch_size=64, seed=seed)
        assert math.isclose(found.base_loss, 1.0, rel_tol=1e-4)
        assert len(found.objectives) <= 41
        drops.append(found.base_loss / found.loss)
    assert sum(drop >= 5 for drop in drops) >= 4, drops


# --------------------------------------------------------------------------------------------------- what is composed


@pytest.fixture(scope="module")
def adapters():
    """Two adapters of the tiny packed model, of different alpha: a random one, and one trained on the rows."""
    model = packed()
    first = random_factors(model, 1, 4.0)
    attach(model, random_factors(model, 2, 9.0))
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        model(**COLLATE(ROWS)).loss.backward()
        optimizer.step()
    return first, lora_factors(model)


@pytest.fixture
def two(adapters, tmp_path):
    """Both in a library."""
    for name, factors in zip(("task-1", "task-2"), adapters, strict=True):
        model = packed()
        attach(model, factors)
        save_adapter(model, tmp_path / "library" / name)
    return tmp_path / "library"


def random_factors(model, seed, alpha, rank=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        path: Factors(
            torch.randn(rank, m.in_features, generator=generator) / m.in_features**0.5,
            torch.randn(m.out_features, rank, generator=generator) / 8,
            alpha,
        )
        for path, m in model.named_modules()
        if isinstance(m, qft.QuantLinear)
    }


def packed():
    return qft.quantize_model(tiny_lm.model(), "nf2 g64 f16")


def set_weights(model, library, *weights):
    sums = WeightedSums.of(model, Library.open(library))
    sums.attach()
    sums.set(weights)
    return sums


def test_weights_of_zero_are_the_base_bit_for_bit(two):
    model = packed()
    base = model(IDS).logits
    set_weights(model, two, 0.0, 0.0)
    assert torch.equal(model(IDS).logits.view(torch.int32), base.view(torch.int32))


def test_one_adapter_alone_is_that_adapter(two):
    model = packed()
    for name, weights in (("task-1", (1.0, 0.0)), ("task-2", (0.0, 1.0))):
        qft.load_adapter(model, two / name)
        alone = model(IDS).logits
        set_weights(model, two, *weights)
        composed = model(IDS).logits
        assert (composed - alone).norm() <= 1e-5 * alone.norm()


def test_factors_are_summed_before_they_are_multiplied(two):
    model = packed()
    first, second = (Library.open(two).read(name) for name in ("task-1", "task-2"))
    set_weights(model, two, 0.5, -1.25)
    for path, composed in lora_factors(model).items():
        (a, b), (c, d) = first[path].unscaled(), second[path].unscaled()
        squares = 0.25 * b @ a + 1.5625 * d @ c
        cross = -0.625 * (b @ c + d @ a)
        product = composed.shape.scaling * composed.B @ composed.A
        assert composed.shape.scaling == 1
        assert torch.allclose(product, squares + cross, atol=1e-6)
        assert cross.norm() > 0.1 * squares.norm()  # adding products instead would be seen


def test_weights_and_their_negatives_are_one_model(two):
    model = packed()
    set_weights(model, two, 0.5, -1.25)
    one = model(IDS).logits
    set_weights(model, two, -0.5, 1.25)
    assert torch.equal(model(IDS).logits, one)


# ----------------------------------------------------------------------------------------------------- on transformers


def test_a_causal_model_ends_with_the_best_weights_and_its_own_codes(two):
    model = packed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = []
    found = lorahub(model, two, ROWS, COLLATE, evaluations=11, batch_size=2, on_evaluation=lambda *at: told.append(at))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert found.objectives[-1] > min(found.objectives)  # what was tried last is not what is kept
    assert [at[:2] for at in told] == [(done, 11) for done in range(1, 12)]
    assert told[-1][2] == min(found.objectives)
    assert found.weights.keys() == {"task-1", "task-2"}
    assert all(abs(w) <= BOUND for w in found.weights.values())
    penalty = 0.05 * sum(map(abs, found.weights.values())) / 2
    assert penalty > 0.01
    assert math.isclose(min(found.objectives), found.loss + penalty)
    assert math.isclose(perplexity(model, ROWS, COLLATE).loss, found.loss, rel_tol=1e-5)
    fresh = packed()
    assert math.isclose(perplexity(fresh, ROWS, COLLATE).loss, found.base_loss, rel_tol=1e-5)
    assert found.objectives[0] == found.base_loss
    set_weights(fresh, two, *found.weights.values())
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_the_result_is_an_adapter_and_its_weights(two, tmp_path):
    model = packed()
    found = lorahub(model, two, ROWS, COLLATE, evaluations=5)
    found.save(model, tmp_path / "out")
    again = qft.load_adapter(packed(), tmp_path / "out")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    told = json.loads((tmp_path / "out" / "lorahub.json").read_text())
    assert told["weights"] == found.weights
    assert told["objectives"] == list(found.objectives)


def test_a_seed_repeats_its_search(two):
    one, same = (lorahub(packed(), two, ROWS, COLLATE, evaluations=8, seed=7) for _ in range(2))
    assert one == same


def test_the_seed_reaches_nevergrad(two, monkeypatch):
    import nevergrad

    monkeypatch.setattr(nevergrad.optimizers, "NGOpt", nevergrad.optimizers.OnePlusOne)  # one that draws
    runs = [lorahub(packed(), two, ROWS, COLLATE, evaluations=6, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0].objectives != runs[2].objectives


def test_a_sequence_to_sequence_model_composes_too(tmp_path):
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.1,
    )
    model = qft.quantize_model(T5ForConditionalGeneration(config).train(), "nf4 g32 f32")
    for seed in (1, 2, 3):
        attach(model, random_factors(model, seed, 4.0))
        save_adapter(model, tmp_path / f"task-{seed}")
    attach(model, {})
    # inputs and labels of different length, and every label counts: the decoder's first answers the start token
    rows = [
        {"input_ids": torch.arange(1, 8), "labels": torch.tensor([5, 6, 7])},
        {"input_ids": torch.arange(3, 7), "labels": torch.tensor([9, IGNORE])},
        {"input_ids": torch.arange(9, 12), "labels": torch.tensor([11])},
    ]
    found = lorahub(model, tmp_path, rows, COLLATE, evaluations=20, batch_size=2)
    assert found.loss < found.base_loss
    assert model.training
    model.eval()
    with torch.no_grad():
        losses = [model(**COLLATE([row])).loss * (row["labels"] != IGNORE).sum() for row in rows]
    assert math.isclose(sum(losses) / 5, found.loss, rel_tol=1e-5)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_missing_nevergrad_is_said_with_the_way_out(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(OSError, match=r"Nevergrad, which is not installed; run: pip install 'qft\[compose\]'"):
        lorahub(packed(), two, ROWS, COLLATE)


@pytest.mark.parametrize(
    ("keywords", "skip", "message"),
    [
        ({"rank": 2}, (), r"adapter 'zed' has rank 2 at model\.layers\.0\S+, adapter 'task-1' 4; keep adapters of one"),
        ({"rank": 4}, ("o_proj",), r"adapter 'task-1' adapts model\.layers\.0\.self_attn\.o_proj and adapter 'zed' d"),
    ],
)
def test_adapters_that_differ_are_refused_by_name(two, keywords, skip, message):
    save_adapter(qft.quantize_model(tiny_lm.model(), "nf2 g64 f16", skip=skip, **keywords), two / "zed")
    with pytest.raises(FormatError, match=message):
        lorahub(packed(), two, ROWS, COLLATE)


def test_adapters_of_different_features_are_refused(tmp_path):
    for name, features in (("narrow", 64), ("wide", 96)):
        layer = qft.QuantLinear.from_quantized(qft.quantize(torch.randn(64, features), "nf4 g32 f32"))
        layer.add_lora(2)
        save_adapter(nn.ModuleDict({"layer": layer}), tmp_path / name)
    with pytest.raises(
        FormatError, match=r"adapter 'wide' has features \[64, 96\] at layer, adapter 'narrow' \[64, 64\]"
    ):
        Library.open(tmp_path)


def test_a_library_of_another_model_is_refused(two):
    other = qft.quantize_model(tiny_lm.model(), "nf2 g64 f16", skip=["q_proj"])
    with pytest.raises(FormatError, match=r"adapter 'task-1' adapts model\.layers\.0\.self_attn\.q_proj, which is no"):
        lorahub(other, two, ROWS, COLLATE)


def test_folders_without_adapters_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no directory; give a folder that holds adapters"):
        Library.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no adapters; write some with"):
        Library.open(tmp_path)


def test_an_adapter_whose_save_was_interrupted_at_its_end_counts(two):
    (two / "task-1" / WRITTEN).mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (two / "task-1" / name).rename(two / "task-1" / WRITTEN / name)
    assert Library.open(two).names == ("task-1", "task-2")


def test_a_library_is_described_without_its_values(two, monkeypatch):
    monkeypatch.setattr("qft.compose.library.read_factors", None)
    library = Library.open(two)
    assert library.names == ("task-1", "task-2")
    assert [layers["model.layers.0.mlp.up_proj"].alpha for layers in library.adapters.values()] == [4, 9]


@pytest.mark.parametrize(
    ("rows", "keywords", "message"),
    [
        (ROWS, {"evaluations": 0}, "evaluations=0"),
        (ROWS, {"penalty": -1.0}, r"penalty=-1.0"),
        (ROWS, {"batch_size": 0}, "batch_size=0"),
        ([], {}, "hold no token to learn"),
        ([{"input_ids": torch.arange(3), "labels": torch.full((3,), IGNORE)}], {}, "hold no token to learn"),
    ],
)
def test_bad_arguments_are_refused_and_the_model_keeps_its_lora(two, rows, keywords, message):
    model = qft.load_adapter(packed(), two / "task-2")
    before = model(IDS).logits
    with pytest.raises(ValueError, match=message):
        lorahub(model, two, rows, COLLATE, **keywords)
    assert torch.equal(model(IDS).logits, before)
    assert lora_factors(model)["model.layers.0.mlp.up_proj"].alpha == 9


@pytest.mark.parametrize("stopped", [True, False])
def test_no_thread_of_the_search_outlives_it(two, stopped):
    """One that did would keep the process from exiting."""
    before = set(threading.enumerate())

    def on_evaluation(done, total, least):
        if stopped and done == 3:
            raise KeyboardInterrupt

    try:
        lorahub(packed(), two, ROWS, COLLATE, evaluations=5, on_evaluation=on_evaluation)
    except KeyboardInterrupt as interrupt:
        kept = interrupt  # and with it the frames that held the optimizer
        assert stopped
        assert kept.__traceback__ is not None
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in left)


def test_a_base_whose_loss_is_nan_is_refused(two):
    model = packed()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the base's loss on the examples is nan"):
        lorahub(model, two, ROWS, COLLATE)


def test_compositions_that_overflow_are_passed_over(two):
    model = qft.load_adapter(packed(), two / "task-1")
    for factors in lora_factors(model).values():
        factors.B.data.mul_(1e30)
    save_adapter(model, two / "task-1")
    found = lorahub(packed(), two, ROWS, COLLATE, evaluations=8)
    assert math.inf in found.objectives
    assert found.loss <= found.base_loss
