"""Perplexity against the definition, written out."""

import math

import pytest
import tiny_lm
import torch

from qft.training.data import IGNORE, PaddingCollator
from qft.training.evaluate import perplexity

COLLATE = PaddingCollator(pad_id=0)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_lm.model()


def rows(lengths, ignored=0):
    drawn = [torch.randint(0, tiny_lm.VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    labels = [ids.clone() for ids in drawn]
    for label in labels:
        label[:ignored] = IGNORE
    return [{"input_ids": ids, "labels": label} for ids, label in zip(drawn, labels, strict=True)]


@torch.no_grad()
def by_hand(model, rows):
    total, count = 0.0, 0
    for row in rows:
        logits = model(row["input_ids"][None]).logits[0].double().log_softmax(-1)
        for place in range(1, len(row["labels"])):
            if row["labels"][place] != IGNORE:
                total -= logits[place - 1, row["labels"][place]].item()
                count += 1
    return math.exp(total / count), count


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("ignored", [0, 3])
def test_every_predicted_token_weighs_the_same(model, batch_size, ignored):
    data = rows([40, 7, 23, 4], ignored)
    measured = perplexity(model, data, COLLATE, batch_size)
    value, count = by_hand(model, data)
    # fp32 logits of order 1: the mean loss is good to a few 1e-7, padding or not
    assert measured.value == pytest.approx(value, rel=2e-6)
    assert measured.tokens == count
    assert measured.loss == pytest.approx(math.log(value), rel=2e-6)


def test_measuring_twice_gives_the_same_bits_and_leaves_the_model_as_it_was():
    model = tiny_lm.model().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    before = torch.random.get_rng_state()
    first, second = (perplexity(model, rows([30, 20]), COLLATE) for _ in range(2))
    assert first == second
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_progress_counts_rows(model):
    seen = []
    perplexity(model, rows([5] * 5), COLLATE, 2, on_batch=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_nothing_to_predict_is_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        perplexity(model, rows([5], ignored=5), COLLATE)


def test_a_model_that_says_nan_is_refused():
    broken = tiny_lm.model()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        perplexity(broken, rows([5]), COLLATE)
