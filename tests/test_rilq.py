"""RILQ: adapters trained together bring the model's last hidden state back to the dense one's."""

import pytest
import tiny_lm
import torch

import qft
from qft.recipes.rilq import rilq
from qft.training.data import Examples, PaddingCollator
from qft.training.finetune import Recipe

COLLATE = PaddingCollator(tiny_lm.END)
RECIPE = Recipe(steps=100, batch_size=8, learning_rate=5e-3, gradient_checkpointing=False)


def rows(seed, count=24):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in torch.randint(8, 20, (count,), generator=generator).tolist():
        ids = torch.randint(0, 256, (length,), generator=generator)
        made.append({"input_ids": ids, "labels": ids.clone()})
    return Examples(made)


def divergence(model, teacher):
    """Mean KL(teacher || model) per token of rows that were not matched on."""
    batch = COLLATE(rows(7))
    with torch.no_grad():
        log_p, log_q = (m(**batch).logits.log_softmax(-1) for m in (teacher, model))
    kept = batch["attention_mask"].bool()
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[kept].mean().item()


def dense():
    """Random weights large enough for the layers to matter, and for logits to differ."""
    model = tiny_lm.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return model


def started(rank=4):
    model = dense()
    qft.quantize_model(model, "nf2 g32", init="loftq", rank=rank)
    return qft.train_only(model, "lora")


def test_comes_closer_to_the_dense_model_than_layer_by_layer_fits():
    teacher, model = dense(), started()
    codes = [layer.quant_tensor.codes.clone() for layer in model.modules() if isinstance(layer, qft.QuantLinear)]
    before = divergence(model, teacher)
    done = rilq(model, teacher, rows(0, 400), COLLATE, RECIPE, cross_entropy=0)  # the text is noise
    assert done.steps == 100
    assert divergence(model, teacher) < 0.8 * before
    after = [layer.quant_tensor.codes for layer in model.modules() if isinstance(layer, qft.QuantLinear)]
    assert all(map(torch.equal, codes, after))
    for mine, theirs in zip(teacher.parameters(), dense().parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.grad is None


def test_the_loss_is_the_papers():
    """Distance of the last hidden states at tokens that are no padding, relative to the dense ones, and the CE."""
    from qft.recipes.rilq import _Matching

    teacher, model, batch = dense(), started(), COLLATE(rows(3, 5))
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        loss = _Matching(model, teacher, 0.25, 2.0)(**batch)["loss"]
        wanted, found = (m.model(**{k: batch[k] for k in ("input_ids", "attention_mask")})[0] for m in (teacher, model))
        cross_entropy = model(**batch).loss
    distance = (found[kept] - wanted[kept]).norm() / wanted[kept].norm()
    torch.testing.assert_close(loss, 0.25 * distance + 2 * cross_entropy)


@pytest.mark.parametrize(("hidden", "cross_entropy"), [(-1, 1), (0, 0)])
def test_refuses_weights_of_no_loss(hidden, cross_entropy):
    with pytest.raises(ValueError, match="weigh the losses"):
        rilq(started(), dense(), rows(0), COLLATE, RECIPE, hidden=hidden, cross_entropy=cross_entropy)
