"""ZipLoRA: mergers of 1 are the sum of two adapters; training sets conflicting ones apart."""

import pytest
import tiny_lm
import torch
from transformers import T5Config, T5ForConditionalGeneration

import qft
from qft import FormatError
from qft.adapters.peft_format import Factors, attach, lora_factors, save_adapter
from qft.compose.ziplora import ziplora
from qft.training.data import PaddingCollator

COLLATE = PaddingCollator(0)
FIRST = [{"input_ids": ids, "labels": ids} for ids in torch.arange(60).reshape(5, 12)]
SECOND = [{"input_ids": ids, "labels": ids} for ids in torch.arange(100, 170).reshape(5, 14)]
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Models of this size are slower with more."""
    threads(1)


def packed():
    return qft.quantize_model(tiny_lm.model(), "nf2 g64 f16")


def factors(model, seed, rank=4, alpha=6.0, only=""):
    generator = torch.Generator().manual_seed(seed)
    return {
        path: Factors(
            torch.randn(rank, m.in_features, generator=generator) / m.in_features**0.5,
            torch.randn(m.out_features, rank, generator=generator) / 4,
            alpha,
        )
        for path, m in model.named_modules()
        if isinstance(m, qft.QuantLinear) and only in path
    }


def conflicting(model):
    """Two adapters that undo most of each other."""
    one, noise = factors(model, 1), factors(model, 2)
    other = {path: Factors(f.A + 0.3 * noise[path].A, -f.B + 0.3 * noise[path].B, alpha=6.0) for path, f in one.items()}
    return one, other


def product(entry):
    return (entry.shape.scaling * entry.B @ entry.A).detach()


def test_mergers_of_one_are_the_sum_of_the_adapters():
    model = packed()
    one, other = factors(model, 1, rank=4, alpha=6.0), factors(model, 2, rank=3, alpha=2.0)
    made = ziplora(model, one, other, FIRST, SECOND, COLLATE, steps=0)
    for path, merged in lora_factors(model).items():
        assert merged.shape.rank == 7
        assert torch.allclose(product(merged), product(one[path]) + product(other[path]), atol=1e-6)
    assert made.reconstruction == made.plain
    assert made.overlap == made.plain_overlap == 14


@pytest.mark.parametrize("output", ["logits", "hidden"])
def test_training_sets_conflicting_adapters_apart(output):
    model = packed()
    one, other = conflicting(model)
    codes = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    made = ziplora(
        model,
        one,
        other,
        FIRST,
        SECOND,
        COLLATE,
        steps=25,
        learning_rate=0.06,
        output=output,
        on_step=lambda step, steps, loss: losses.append(loss),
    )
    assert all(after < before for after, before in zip(made.reconstruction, made.plain, strict=True))
    assert made.overlap < 0.9 * made.plain_overlap
    assert len(losses) == 25
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in codes.items())


def test_the_adapter_left_behind_is_what_was_measured():
    model = packed()
    one, other = conflicting(model)
    made = ziplora(model, one, other, FIRST, SECOND, COLLATE, steps=10, learning_rate=0.03, batch_size=2)
    for path, merged in lora_factors(model).items():
        parts = [product(a[path]) * m[path] for a, m in zip((one, other), made.mergers, strict=True)]
        assert torch.allclose(product(merged), sum(parts), atol=1e-6)
        assert merged.A.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    for rows, adapter, measured in ((FIRST, one, 0), (SECOND, other, 1)):
        alone = packed()
        attach(alone, adapter)
        batch = COLLATE(rows)
        difference = (model(**batch).logits - alone(**batch).logits).square().mean()
        assert torch.isclose(difference, torch.tensor(made.reconstruction[measured]), rtol=1e-4)


def test_hidden_states_are_compared_where_asked():
    model = packed()
    one, other = conflicting(model)
    made = ziplora(model, one, other, FIRST, SECOND, COLLATE, steps=0, output="hidden")
    states = [model(**COLLATE(FIRST), output_hidden_states=True).hidden_states[-1]]
    attach(model, one)
    states.append(model(**COLLATE(FIRST), output_hidden_states=True).hidden_states[-1])
    assert made.plain[0] == pytest.approx((states[0] - states[1]).square().mean().item(), rel=1e-4)


def test_the_similarity_term_alone_pulls_the_mergers_apart():
    made = [
        ziplora(packed(), *conflicting(packed()), FIRST, SECOND, COLLATE, steps=10, similarity=weight).overlap
        for weight in (0.0, 100.0)
    ]
    assert made[1] < made[0]


def test_adapters_of_different_layers_merge_into_the_union():
    model = packed()
    one, other = factors(model, 1, only="self_attn"), factors(model, 2, only="mlp")
    made = ziplora(model, one, other, FIRST, SECOND, COLLATE, steps=2)
    assert made.overlap == made.plain_overlap == 0
    assert lora_factors(model).keys() == {*one, *other}


def test_padding_is_not_compared():
    ragged = [*FIRST[:1], {"input_ids": torch.arange(3), "labels": torch.arange(3)}]
    model = packed()
    padded = ziplora(model, *conflicting(model), ragged, SECOND, COLLATE, steps=0, batch_size=2)
    alone = ziplora(model, *conflicting(model), ragged, SECOND, COLLATE, steps=0, batch_size=1)
    assert padded.plain[0] == pytest.approx(alone.plain[0], rel=1e-5)


def test_files_and_seeds(tmp_path):
    model = packed()
    for name, adapter in zip(("one", "other"), conflicting(model), strict=True):
        attach(model, adapter)
        save_adapter(model, tmp_path / name)
    arguments = (tmp_path / "one", str(tmp_path / "other"), FIRST, SECOND, COLLATE)
    runs = [ziplora(packed(), *arguments, steps=3, batch_size=2, seed=seed) for seed in (1, 1, 2)]
    same = [torch.equal(runs[0].mergers[0][path], m) for path, m in runs[1].mergers[0].items()]
    assert all(same)
    assert runs[0].reconstruction != runs[2].reconstruction
    assert ziplora(packed(), *conflicting(model), *arguments[2:], steps=3, batch_size=2, seed=1).plain == runs[0].plain


@pytest.mark.parametrize("output", ["logits", "hidden"])
def test_sequence_to_sequence_models_merge_too(output):
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = qft.quantize_model(T5ForConditionalGeneration(config).train(), "nf4 g32 f32")
    rows = [{"input_ids": torch.arange(1, 8), "labels": torch.tensor([5, 6, 7])}]
    made = ziplora(model, *conflicting(model), rows, rows, COLLATE, steps=20, learning_rate=0.03, output=output)
    assert sum(made.reconstruction) < sum(made.plain)
    assert model.training
    again = ziplora(model, *conflicting(model), rows, rows, COLLATE, steps=0, output=output)
    assert again.plain == made.plain  # dropout, which T5 has in training, is off


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"output": "loss"}, "output='loss' is unknown; use 'logits' or 'hidden'"),
        ({"steps": -1}, "steps=-1"),
        ({"similarity": -0.1}, r"similarity=-0\.1"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"first_rows": []}, "0 and 5 rows; each adapter needs rows of its own task"),
    ],
)
def test_bad_arguments_are_refused(keywords, message):
    model = packed()
    arguments = {"first_rows": FIRST, "second_rows": SECOND, "collate": COLLATE} | keywords
    with pytest.raises(ValueError, match=message):
        ziplora(model, *conflicting(model), **arguments)


def test_an_error_leaves_the_model_with_the_lora_it_had():
    model = packed()
    attach(model, factors(model, 5), dropout=0.5)
    before = model(IDS).logits
    narrow, wide = factors(model, 1, rank=20), factors(model, 2, rank=20)
    with pytest.raises(FormatError, match=r"the merge has rank 40 at model\.layers\.0\.self_attn\.k_proj, which holds"):
        ziplora(model, narrow, wide, FIRST, SECOND, COLLATE)

    def stop(step, steps, loss):
        raise KeyboardInterrupt

    parameter = model.model.layers[0].mlp.up_proj.lora_A
    with pytest.raises(KeyboardInterrupt):
        ziplora(model, *conflicting(packed()), FIRST, SECOND, COLLATE, on_step=stop)
    assert torch.equal(model(IDS).logits, before)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.lora_A is parameter
    assert layer.lora_dropout.p == 0.5


def test_an_adapter_of_another_model_is_named():
    stray = Factors(torch.zeros(2, 64), torch.zeros(64, 2), 2)
    with pytest.raises(FormatError, match=r"the second adapter adapts model\.elsewhere, which is no quantized layer"):
        ziplora(packed(), factors(packed(), 1), {"model.elsewhere": stray}, FIRST, SECOND, COLLATE)
