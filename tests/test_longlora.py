"""Shifted sparse attention: what it attends to, what it must not see, and training through it on a packed model."""

import copy
from functools import partial

import pytest
import tiny_lm
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import qft
from qft.recipes.longlora import attended_pairs, borders, longlora, shifted_sparse_attention
from qft.training.data import Examples, PaddingCollator
from qft.training.finetune import Recipe, run


class Layer(torch.nn.Module):
    """What the interface reads of an attention layer."""

    def __init__(self, heads=4, key_heads=4):
        super().__init__()
        self.num_key_value_groups, self.is_causal = heads // key_heads, True


def block_mask(length, group, heads):
    """[heads, length, length], bool: the definition, one pair at a time."""
    mask = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        shift = 0 if head < (heads + 1) // 2 else group - group // 2  # the second half's first group is G // 2 long
        for i in range(length):
            for j in range(i + 1):
                mask[head, i, j] = (i + shift) // group == (j + shift) // group
    return mask


def drawn(heads=4, key_heads=4, length=20, rows=2):
    generator = torch.Generator().manual_seed(3)
    shapes = (rows, heads, length, 8), (rows, key_heads, length, 8), (rows, key_heads, length, 8)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def dense(query, key, value, mask):
    """Softmax attention under a bool mask, in obvious torch."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    logits = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1).nan_to_num() @ value).transpose(1, 2)


@pytest.mark.parametrize(("length", "group"), [(16, 4), (20, 8), (21, 6), (19, 5), (7, 2), (9, 8), (8, 8), (5, 9)])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 2), (4, 1), (3, 3), (1, 1)])
def test_equals_dense_attention_under_the_block_mask(length, group, heads, key_heads):
    query, key, value = drawn(heads, key_heads, length)
    out, weights = shifted_sparse_attention(Layer(heads, key_heads), query, key, value, None, group=group)
    mask = block_mask(length, group, heads) if group < length else torch.ones(length, length).tril().bool()
    torch.testing.assert_close(out, dense(query, key, value, mask), atol=1e-12, rtol=0)
    assert weights is None


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked(side, additive):
    query, key, value = drawn(key_heads=2, length=20)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, :7] = False
    real = real if side == "left" else real.flip(1)
    allowed = torch.ones(20, 20).tril().bool() & real[:, None, None, :]
    given = torch.where(allowed, 0.0, -torch.inf).double() if additive else allowed
    out, _ = shifted_sparse_attention(Layer(4, 2), query, key, value, given, group=8)
    expected = dense(query, key, value, allowed & block_mask(20, 8, 4))
    torch.testing.assert_close(out[real], expected[real], atol=1e-12, rtol=0)


def test_the_halves_differ_and_the_groups_do_not_wrap_around():
    assert borders(32, 8) == ([0, 8, 16, 24, 32], [0, 4, 12, 20, 28, 32])
    assert borders(21, 8) == ([0, 8, 16, 21], [0, 4, 12, 20, 21])
    assert borders(8, 8) == ([0, 8], [0, 8])


def test_a_quarter_of_the_row_costs_a_quarter_of_the_pairs(monkeypatch):
    """Counted in what is really multiplied: query and key lengths of every call, causal halves alike."""
    counted = []
    real = torch.nn.functional.scaled_dot_product_attention

    def count(query, key, *args, **keywords):
        counted.append(query.shape[1] * query.shape[2] * (key.shape[2] + 1) / 2)
        return real(query, key, *args, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    shifted_sparse_attention(Layer(), *drawn(length=32, rows=1), None)
    assert sum(counted) / (4 * 32 * 33 / 2) == pytest.approx(0.258, abs=1e-3)
    assert sum(counted) / 4 == attended_pairs(32, 8) == attended_pairs(32) == block_mask(32, 8, 4).sum() / 4
    assert attended_pairs(8192) / (8192 * 8193 / 2) == pytest.approx(15 / 64, abs=1e-3)  # (1/4 + 7/32) / 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"softcap": 30.0}, "no softcap"), ({"s_aux": torch.zeros(4)}, "no s_aux")],
)
def test_what_it_does_not_compute_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        shifted_sparse_attention(Layer(), *drawn(), None, **asked)


def test_an_encoder_is_refused():
    layer = Layer()
    layer.is_causal = False
    with pytest.raises(ValueError, match="not causal"):
        shifted_sparse_attention(layer, *drawn(), None)


# ------------------------------------------------------------------------------------------------ whole models


def packed(fmt="nf2 g64 f16", seed=0):
    torch.manual_seed(seed)
    return qft.quantize_model(tiny_lm.model(), fmt, rank=4)


def tokens(rows=2, length=24):
    return torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(5))


def test_no_output_sees_a_later_token():
    model = longlora(packed(), 8, gradient_checkpointing=False).train()
    ids = tokens()
    before = model(ids).logits
    for t in range(24):
        changed = ids.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 7) % 20
        torch.testing.assert_close(model(changed).logits[:, : t + 1], before[:, : t + 1], atol=1e-6, rtol=0)
    assert not torch.allclose(model(changed + 1).logits, before)


@pytest.mark.parametrize("reference", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_one_group_is_full_attention(reference, padded):
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(2, 24, dtype=torch.int64)}
    if padded:
        batch["attention_mask"][1, 17:] = 0
    real = batch["attention_mask"].bool()
    model = longlora(packed(), 24, gradient_checkpointing=False).train()
    one_group = model(**batch).logits[real]
    model.set_attn_implementation(reference)
    torch.testing.assert_close(one_group, model(**batch).logits[real], atol=1e-6, rtol=0)


def test_inference_is_full_attention():
    model = longlora(packed(), 8, gradient_checkpointing=False)
    ids = tokens()
    training, inference = model.train()(ids).logits, model.eval()(ids).logits
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    model.train()
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    last = model(ids[:, -1:], past_key_values=cache).logits  # one query, 24 keys: full, though the model trains
    model.eval().set_attn_implementation("sdpa")
    torch.testing.assert_close(last, model(ids[:, -1:], past_key_values=twin).logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(inference, model(ids).logits, atol=1e-6, rtol=0)
    full = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, full)
    assert (training - inference).abs().max() > 1e-3


def test_lora_embeddings_and_norms_train_and_nothing_else():
    model = longlora(packed())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {name for name, _ in model.named_parameters()}
    assert trained == {name for name in names if "lora_" in name or "norm" in name or "embed" in name}
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied: it trains too
    assert sum("norm" in name for name in trained) == 5
    assert sum("embed" in name for name in trained) == 1


def test_gpt2s_norms_are_known_by_their_class():
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = qft.quantize_model(GPT2LMHeadModel(config), "nf4 g32 f32", rank=2)
    longlora(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name}
    block = {f"transformer.h.0.ln_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    ends = {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert trained == block | ends
    model.train()(torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()


def test_embeddings_in_half_precision_train_and_are_named(caplog):
    model = longlora(qft.quantize_model(tiny_lm.model().bfloat16(), "nf2 g64 f16", rank=4)).train()
    assert "embeddings and norms train in torch.bfloat16, which rounds small steps away" in caplog.text
    model(tokens(), labels=tokens()).loss.backward()
    assert model.model.embed_tokens.weight.grad.isfinite().all()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trains_on_a_packed_two_bit_base(gradient_checkpointing):
    model = longlora(packed(), gradient_checkpointing=gradient_checkpointing)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = Examples([{"input_ids": ids, "labels": ids.clone()} for ids in tokens(8, 23)])
    losses = []
    recipe = Recipe(steps=12, batch_size=4, learning_rate=1e-2, gradient_checkpointing=gradient_checkpointing)
    run(model, rows, PaddingCollator(0), recipe, on_step=lambda step, steps, loss: losses.append(loss))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {n for n in before if "lora_" in n or "norm" in n or "embed" in n or n == "lm_head.weight"}
    assert losses[-1] < losses[0] - 0.3


def test_checkpointing_changes_no_gradient():
    def gradients(gradient_checkpointing):
        model = longlora(packed(), 8, gradient_checkpointing=gradient_checkpointing).train()
        ids, mask = tokens(), torch.ones(2, 24, dtype=torch.int64)
        mask[0, :5] = 0  # left padding leaves whole groups without a token to attend to
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, recomputed[name], atol=1e-6, rtol=1e-5, msg=name)


# ------------------------------------------------------------------------------------------------ positions


def test_interpolated_positions_are_the_models_own_at_a_fraction():
    model = longlora(packed(), factor=2.0).eval()
    stretched = torch.arange(0, 48, 2)[None]  # position 2p under factor 2 is position p
    ids = tokens(rows=1)
    torch.testing.assert_close(model(ids, position_ids=stretched).logits, packed()(ids).logits, atol=1e-5, rtol=0)
    assert model.config.max_position_embeddings == 256
    longlora(model, factor=2.0)
    assert model.config.rope_parameters["factor"] == 4.0
    assert model.config.max_position_embeddings == 512


def test_interpolation_is_saved_with_the_model(tmp_path):
    model = longlora(packed(), factor=4.0).eval()
    qft.save(model, tmp_path / "long")
    ids = tokens(length=40)
    torch.testing.assert_close(qft.load(tmp_path / "long")(ids).logits, model(ids).logits, atol=1e-6, rtol=0)


def test_other_rotary_positions_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=1, rope_parameters=rope)
    model = qft.quantize_model(LlamaForCausalLM(config), "nf4 g32 f32", rank=2)
    with pytest.raises(ValueError, match="rope_type 'dynamic' has no linear factor"):
        longlora(model, factor=2.0)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(longlora, group=1), "group=1 is no group of tokens"),
        (partial(longlora, factor=0.5), "factor=0.5 would push positions apart"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(packed())


def test_a_model_without_lora_or_without_transformers_is_refused():
    with pytest.raises(ValueError, match="holds no lora to train"):
        longlora(qft.quantize_model(tiny_lm.model(), "nf4 g64 f32"))
    plain = qft.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), "nf4 g64 f32", rank=2)
    with pytest.raises(ValueError, match="no transformers model"):
        longlora(plain)
