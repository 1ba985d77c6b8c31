"""LoRA layers that read the same tensor: one product for all, the same results and gradients."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qft
from qft import notices
from qft.adapters.shared_input import SharedInput


class Attention(nn.Module):
    """q, k and v of one input, then an output layer of their sum: the input's readers as a transformer has them."""

    def __init__(self, ranks=(4, 2, 8), dropout=0.0, fmt="nf4 g64"):
        super().__init__()
        self.q, self.k, self.v, self.o = (qft.QuantLinear.from_linear(nn.Linear(96, 96), fmt) for _ in range(4))
        for layer, rank in zip((self.q, self.k, self.v, self.o), (*ranks, 4), strict=True):
            layer.add_lora(rank, alpha=3, dropout=dropout, B=torch.randn(96, rank))

    def forward(self, x, other=None):
        return self.o(self.q(x) * self.k(x) + self.v(x if other is None else other))


class SkinnyProducts(TorchDispatchMode):
    """Counts products of an input 96 wide with few columns, and transposed ones."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default and args[1].shape[0] == 96 and args[1].shape[1] < 32:
            self.shapes.append(args[1].shape[1])
        return function(*args, **(kwargs or {}))


def gradients(model, x):
    for parameter in model.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 96)])
def test_one_product_serves_all_readers_with_the_same_results(shape, dtype):
    model = Attention()
    x = torch.randn(shape).to(dtype)
    alone = gradients(model, x)
    with SkinnyProducts() as before, torch.no_grad():
        model(x)
    assert qft.share_inputs(model, x) == 1
    assert model.q.shared_input is model.k.shared_input is model.v.shared_input
    assert model.o.shared_input is None
    with SkinnyProducts() as after, torch.no_grad():
        model(x)
    assert (sorted(before.shapes), sorted(after.shapes)) == ([2, 4, 4, 8], [4, 14])
    together = gradients(model, x)
    assert len(alone) == len(together)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # gradients of x are summed in another order, in x's dtype
    for a, b in zip(alone, together, strict=True):
        assert (a - b).norm() <= tolerance * a.norm()


def test_a_new_step_sees_new_factors_and_inputs_changed_in_place():
    model, x = Attention(), torch.randn(5, 96)
    qft.share_inputs(model, x)
    with torch.no_grad():
        model(x)
        model.q.lora_A.mul_(2)
        shared = model(x)
        x.mul_(0.5)
        model.q(x)  # asked alone: the others' parts wait, for an input that then changes
        x.mul_(2)
        again = model(x)
        for layer in (model.q, model.k, model.v):
            layer.shared_input = None
        alone = model(x)
    assert torch.allclose(shared, alone, rtol=1e-4, atol=1e-4)
    assert torch.allclose(again, alone, rtol=1e-4, atol=1e-4)


def test_readers_that_turn_out_different_share_no_longer_and_say_so(caplog):
    model, x = Attention(), torch.randn(5, 96)
    qft.share_inputs(model, x)
    other = torch.randn(5, 96)
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "qft"), torch.no_grad():
        apart = model(x, other)
    assert caplog.messages == ["layers that shared their LoRA's input were given different ones; they share no longer"]
    assert model.q.shared_input is model.v.shared_input is None
    with torch.no_grad():
        assert torch.allclose(model(x, other), apart, rtol=1e-4, atol=1e-4)


def test_an_aborted_pass_leaves_nothing_behind():
    model = Attention()
    qft.share_inputs(model, torch.randn(5, 96))
    with torch.no_grad():
        model.q(torch.randn(5, 96))  # freed at once, with the parts of k and v waiting
        x = torch.randn(5, 96)
        y = model(x)
    assert isinstance(model.q.shared_input, SharedInput)
    for layer in (model.q, model.k, model.v):
        layer.shared_input = None
    assert torch.allclose(y, model(x), rtol=1e-4, atol=1e-4)


def test_dropout_draws_for_each_layer():
    model, x = Attention(dropout=0.5), torch.randn(5, 96)
    qft.share_inputs(model, x)
    with SkinnyProducts() as products, torch.no_grad():
        model(x)
    assert sorted(products.shapes) == [2, 4, 4, 8]


def test_a_layer_that_lost_its_lora_ends_the_sharing_until_it_has_one_again():
    model, x = Attention(), torch.randn(5, 96)
    qft.share_inputs(model, x)
    model.k.remove_lora()
    with SkinnyProducts() as products, torch.no_grad():
        model(x)
    assert sorted(products.shapes) == [4, 4, 8]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_among_themselves(duplicate):
    model, x = Attention(), torch.randn(5, 96)
    qft.share_inputs(model, x)
    twin = duplicate(model)
    assert twin.q.shared_input is twin.v.shared_input is not model.q.shared_input
    assert {id(layer) for layer in twin.q.shared_input.layers} == {id(twin.q), id(twin.k), id(twin.v)}
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


def test_compiled_models_multiply_apart():
    model, x = Attention(), torch.randn(5, 96)
    qft.share_inputs(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_nothing_to_share_is_said():
    with pytest.raises(ValueError, match="no layer of this model has a LoRA"):
        qft.share_inputs(nn.Linear(3, 3), torch.randn(1, 3))
    model = nn.ModuleList([Attention(), nn.Identity()])
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="the call reached no layer with a LoRA"):
        qft.share_inputs(model, torch.randn(1, 96))
