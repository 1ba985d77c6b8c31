"""GLoRA on packed weights: every config is one weight and one bias; supernet, search, files."""

import copy
import dataclasses
import itertools
import json
import logging
import math
import pickle

import pytest
import tiny_lm
import torch
from torch import nn

import qft
from qft import kernels, notices
from qft.adapters.glora import PIECES, GLoRAConfig, GLoRALinear, glora_layers
from qft.adapters.glora_file import CONFIG, WEIGHTS, load_glora, save_glora
from qft.adapters.glora_search import _Search, search_glora
from qft.adapters.multilora import MultiLoRALinear
from qft.disk import files
from qft.tensor import QuantTensor

FORMATS = ("int2 g32 f32", "nf2 g64 f16", "lm2 g64 dq", "int3 channel f32 zero")
CONFIGS = [GLoRAConfig(*kinds) for kinds in itertools.product(*PIECES.values())]
NO_BIAS = [config for config in CONFIGS if config.D == "none"]


def layer_of(fmt="nf2 g64 f16", shape=(33, 100), rank=3, bias=True, std=0.3):
    layer = qft.QuantLinear.from_linear(nn.Linear(shape[1], shape[0], bias=bias), fmt)
    GLoRALinear.adopt(layer, rank)
    for name, parameter in layer.named_parameters():
        if std and name.startswith("glora_"):
            nn.init.normal_(parameter, std=std)
    return layer


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def spelled_out(layer, x):
    """f(x) as the paper has it, dense and in fp64, from the parameters by name."""
    p = {name.removeprefix("glora_"): value.double() for name, value in layer.named_parameters() if "glora" in name}
    w, b = layer.dequantize().double(), None if layer.bias is None else layer.bias.double()
    a = {
        "lora": p["Ad"] @ p["Au"], "rows": p["Ad"][:, :1], "columns": p["A_columns"][None], "constant": p["Ad"][0, 0],
        "none": 0,
    }[layer.config.A]  # fmt: skip
    shift = {"lora": p["Bd"] @ p["Bu"], "vector": p["Bd"][:, :1], "constant": p["Bd"][0, 0], "none": 0}[layer.config.B]
    c = {"lora": p["Cd"] @ p["Cu"], "vector": p["Cd"][:, :1], "none": p["Cd"] @ p["Cu"] * 0}[layer.config.C]
    e = {"vector": p["E"], "constant": p["E"][0], "none": 0}[layer.config.E]
    y = x.double() @ (w + w * a + shift + torch.zeros_like(w)).T + (w @ c)[:, 0] + e
    if b is not None:
        y = y + b + b * {"vector": p["D"], "constant": p["D"][0], "none": 0}[layer.config.D]
    return y


# ------------------------------------------------------------------------------------------------------------ layer


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_config_is_what_the_paper_says_and_merges(fmt):
    layer, x = layer_of(fmt), torch.randn(5, 100)
    with torch.no_grad():
        for config in CONFIGS[:: 1 if fmt == FORMATS[0] else 7]:
            layer.use(config)
            y = layer(x)
            assert relative(y.double(), spelled_out(layer, x)) <= 1e-5, config
            weight, bias = layer.merged()
            assert relative(nn.functional.linear(x, weight, bias), y) <= 1e-5, config


def test_a_layer_without_a_bias_gets_one_where_a_term_needs_it():
    layer, x = layer_of(bias=False), torch.randn(2, 3, 100)
    with torch.no_grad():
        for config in NO_BIAS[::2]:
            layer.use(config)
            assert relative(layer(x).double(), spelled_out(layer, x)) <= 1e-5, config
            assert (layer.merged()[1] is None) == (config.C == config.E == "none")
    assert layer.choices()["D"] == ("none",)
    with pytest.raises(ValueError, match="D='vector' scales a bias, which this layer does not have"):
        layer.use(GLoRAConfig(D="vector"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_stay_within_their_rounding(dtype):
    layer, x = layer_of(), torch.randn(5, 100).to(dtype)
    bound = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]  # a few roundings: of each term and of their sum
    with torch.no_grad():
        for config in CONFIGS[::7]:
            layer.use(config)
            y = layer(x)
            assert y.dtype == dtype
            assert relative(y.double(), spelled_out(layer, x)) <= bound, config


@pytest.mark.parametrize("fmt", FORMATS)
def test_it_starts_as_the_base_and_without_terms_is_the_base(fmt):
    layer, x = qft.QuantLinear.from_linear(nn.Linear(100, 33), fmt), torch.randn(5, 100)
    base = layer(x)
    GLoRALinear.adopt(layer, 3)
    assert torch.equal(layer(x), base)
    for config in CONFIGS[::5]:
        layer.use(config)
        assert relative(layer(x), base) <= 1e-6, config
    for name, parameter in layer.named_parameters():
        if name.startswith("glora_"):
            nn.init.normal_(parameter)
    layer.use(GLoRAConfig())
    for dtype in (torch.float32, torch.bfloat16):
        expected = qft.QuantLinear.from_quantized(layer.quant_tensor, layer.bias)(x.to(dtype))
        assert torch.equal(layer(x.to(dtype)), expected)


def test_the_packed_weight_is_multiplied_and_never_made_dense(monkeypatch):
    layer, x = layer_of(), torch.randn(5, 100, requires_grad=True)
    layer.use(GLoRAConfig("lora", "lora", "lora", "vector", "vector"))

    def refuse(*args, **keywords):
        raise AssertionError("a dense weight was made")

    monkeypatch.setattr(kernels, "dequantize", refuse)
    layer(x).sum().backward()
    with pytest.raises(AssertionError, match="dense weight"):
        layer.merged()


@pytest.mark.parametrize(
    "config",
    [
        GLoRAConfig("lora", "lora", "lora", "vector", "vector"),
        GLoRAConfig("rows", "vector", "vector", "constant", "constant"),
        GLoRAConfig("columns", "constant", "lora", "none", "none"),
        GLoRAConfig("constant", "none", "vector", "vector", "none"),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_dense_formula(config):
    layer, x = layer_of(), torch.randn(5, 100, requires_grad=True)
    layer.use(config)
    direction = torch.randn(5, 33)
    trained = {name: p for name, p in layer.named_parameters() if name.startswith("glora_")}
    used = {"glora_" + name for term in PIECES for name in layer.pieces(term)}
    ours = torch.autograd.grad((layer(x) * direction).sum(), [x, *trained.values()], allow_unused=True)
    theirs = torch.autograd.grad((spelled_out(layer, x) * direction).sum(), [x, *trained.values()], allow_unused=True)
    for name, mine, other in zip(("x", *trained), ours, theirs, strict=True):
        if name == "x" or name in used:
            assert relative(mine.double(), other.double()) <= 1e-5, name
        else:
            assert mine is None


def test_sizes_are_those_the_authors_count():
    layer = layer_of(rank=4)
    for config in CONFIGS:
        expected = {
            "A": {"lora": 4 * 133, "rows": 33, "columns": 100, "constant": 1, "none": 0}[config.A],
            "B": {"lora": 4 * 133, "vector": 33, "constant": 1, "none": 0}[config.B],
            "C": {"lora": 4 * 101, "vector": 100, "none": 0}[config.C],
            "D": {"vector": 33, "constant": 1, "none": 0}[config.D],
            "E": {"vector": 33, "constant": 1, "none": 0}[config.E],
        }
        assert layer.size(config) == sum(expected.values())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_compiled_layers_compute_the_same(duplicate):
    layer, x = layer_of(), torch.randn(5, 100)
    layer.use(GLoRAConfig("lora", "lora", "lora", "vector", "vector"))
    twin = duplicate(layer)
    with torch.no_grad():
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(torch.compile(twin, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert "glora_rank=3, A=lora, B=lora, C=lora, D=vector, E=vector" in repr(twin)


def test_a_lora_beside_the_terms_keeps_working_and_stays_when_they_merge():
    layer = qft.QuantLinear.from_linear(nn.Linear(100, 33), "int2 g32 f32")
    layer.add_lora(2, B=torch.randn(33, 2))
    x = torch.randn(5, 100)
    lora = layer(x) - qft.QuantLinear.from_quantized(layer.quant_tensor, layer.bias)(x)
    GLoRALinear.adopt(layer, 2)
    nn.init.normal_(layer.glora_E)
    layer.use(GLoRAConfig(E="vector"))
    y = layer(x)
    assert relative(y, spelled_out(layer, x).float() + lora) <= 1e-5
    assert layer.merge() == 0
    assert layer.lora_rank == 2
    assert relative(layer(x), y) <= 1e-5


# ------------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fmt", FORMATS)
def test_merging_quantizes_anew_and_says_what_it_cost(fmt, bias):
    layer = layer_of(fmt, bias=bias, std=0.05)
    layer.use(GLoRAConfig("lora", "lora", "vector", "none", "vector"))
    weight, wanted = layer.merged()
    error = layer.merge()
    assert type(layer) is qft.QuantLinear
    assert str(layer.format) == fmt
    assert error == pytest.approx(relative(layer.dequantize(), weight), rel=1e-4)
    assert 0 < error < 1
    assert torch.equal(layer.bias, wanted)
    assert not any(name.startswith("glora") for name, _ in layer.named_parameters())
    assert not layer.bias.requires_grad or bias


@pytest.mark.parametrize("kind", ["rows", "constant"])
@pytest.mark.parametrize("fmt", ["int3 g32 f32", "nf3 g64 f32", "int3 channel f32 zero"])
def test_what_only_scales_rows_merges_into_the_scales(fmt, kind):
    """Codes that leave out the extremes, as searched and calibrated ones may: quantizing anew would change them."""
    layer, codes = layer_of(fmt), torch.randint(1, 6, (33, 100), dtype=torch.uint8)
    q = layer.quant_tensor
    layer.set_quantized(QuantTensor.from_codes(codes, q.scales, q.zeros, fmt))
    layer.use(GLoRAConfig(A=kind))
    assert layer.merge() <= 1e-6
    assert torch.equal(layer.quant_tensor.unpack(), codes)


def test_released_and_taken_again_it_is_the_base():
    layer, x = layer_of(), torch.randn(5, 100)
    layer.use(GLoRAConfig(E="vector"))
    layer.release()
    base = layer(x)
    GLoRALinear.adopt(layer, 2)
    assert layer.config == GLoRAConfig()
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("fmt", FORMATS)
def test_searched_scales_store_a_merged_weight_better(fmt):
    layer = layer_of(fmt, (64, 256), std=0.05)
    layer.use(GLoRAConfig(B="lora"))
    twin = copy.deepcopy(layer)
    assert layer.merge() < 0.95 * twin.merge(search=False)


# ------------------------------------------------------------------------------------------------------------ models


def packed(fmt="nf2 g64 f16", **keywords):
    return qft.quantize_model(tiny_lm.model(), fmt, **keywords)


def supernet(rank=2):
    return qft.add_glora(packed(), rank)


def batch():
    return torch.arange(96).reshape(2, 48) * 7 % 256


def loss_of(model):
    return model(input_ids=batch(), labels=batch()).loss


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scatter(model, std=0.05):
    """As if it had trained."""
    for name, parameter in model.named_parameters():
        if "glora_" in name:
            nn.init.normal_(parameter, std=std)
    return model


def test_a_supernet_trains_on_a_packed_base():
    model = qft.prepare_for_training(supernet()).train()
    codes = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 14 * 8
    assert all(name.rpartition(".")[2].startswith("glora_") for name in trainable)
    handle = qft.sample_glora(model, generator())
    optimizer = torch.optim.AdamW(trainable.values(), 2e-2)
    seen, losses = set(), []
    for _ in range(20):
        loss = loss_of(model)
        seen.add(tuple(layer.config for layer in glora_layers(model).values()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(seen) == 20
    assert sum(losses[-5:]) / 5 < losses[0] - 0.02
    assert all(torch.equal(p, codes[name]) for name, p in model.named_parameters() if name in codes)
    before = [layer.config for layer in glora_layers(model).values()]
    model.eval()
    loss_of(model)
    assert [layer.config for layer in glora_layers(model).values()] == before
    handle.remove()
    loss_of(model.train())
    assert [layer.config for layer in glora_layers(model).values()] == before


def test_checkpointed_layers_compute_the_same_config_again():
    model, gradients = scatter(supernet()).train(), []
    for checkpointing in (False, True):
        qft.prepare_for_training(model, gradient_checkpointing=checkpointing)
        handle = qft.sample_glora(model, generator(3))
        model.zero_grad()
        loss_of(model).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        handle.remove()
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 20
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_it_runs_under_autocast():
    model = scatter(supernet()).eval()
    with torch.no_grad():
        for layer in glora_layers(model).values():
            layer.use(GLoRAConfig("lora", "lora", "lora", "none", "vector"))
        exact = model(batch()).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch()).logits
    assert half.dtype == torch.bfloat16
    assert relative(half.float(), exact) < 5e-2


def test_a_narrow_layer_takes_what_it_holds_and_says_so(caplog):
    model = nn.Sequential(qft.QuantLinear.from_linear(nn.Linear(64, 3), "int2 g32"))
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "qft"):
        qft.add_glora(model, 4)
    assert model[0].glora_rank == 3
    assert caplog.messages == ["0 has 3 features on one side: its adapter takes rank 3, not 4"]


def test_merging_a_model_leaves_quantized_layers_that_save(tmp_path):
    model = scatter(supernet())
    for layer in glora_layers(model).values():
        layer.use(GLoRAConfig("rows", "none", "vector", "none", "vector"))
    with torch.no_grad():
        before = model(batch()).logits
        with pytest.raises(TypeError, match=r"is a GLoRALinear; .* save the adapter with qft\.save_glora, or merge it"):
            qft.save(model, tmp_path)
        errors = qft.merge_glora(model)
        assert len(errors) == 14
        assert 0 < max(errors.values()) <= 1e-3  # fp16 scales round
        assert relative(model(batch()).logits, before) <= 1e-2
        qft.save(model, tmp_path)
        skeleton = tiny_lm.model()
        for name, module in list(skeleton.named_modules()):
            if name in errors:
                module.bias = nn.Parameter(torch.zeros(module.out_features))
        assert torch.equal(qft.load(tmp_path, skeleton)(batch()).logits, model(batch()).logits)


# ------------------------------------------------------------------------------------------------------------ search

QUICK = {"population": 12, "generations": 6, "top": 4, "mutations": 6, "crossovers": 4}


class Planted:
    """A fitness that counts how many terms are those of a planted config, and remembers what it saw."""

    def __init__(self, model, seed=5):
        self.layers = glora_layers(model)
        self.wanted = [layer.sample(generator(seed)) for layer in self.layers.values()]
        self.seen, self.model = [], model

    def __call__(self):
        assert not torch.is_grad_enabled()
        assert not self.model.training
        now = tuple(layer.config for layer in self.layers.values())
        self.seen.append(now)
        return float(sum(getattr(a, t) == getattr(b, t) for a, b in zip(now, self.wanted, strict=True) for t in PIECES))


def small_supernet(layers=2, bias=True):
    return nn.Sequential(*(layer_of("int2 g32 f32", (8, 32), 2, bias) for _ in range(layers)))


def test_the_search_climbs_and_never_falls():
    model = small_supernet().train()
    fitness = Planted(model)
    found = search_glora(model, fitness, generator(), **QUICK | {"generations": 20})
    assert list(found.history) == sorted(found.history)
    assert len(found.history) == 21
    assert found.fitness == found.history[-1] > found.history[0]
    assert found.fitness >= 8  # of 10 terms; the first population has 12 random candidates of 540 squared
    assert [layer.config for layer in glora_layers(model).values()] == list(found.configs.values())
    assert model.training
    assert len(fitness.seen) == len(set(fitness.seen)) == found.evaluations
    assert fitness.seen[0] == (GLoRAConfig(), GLoRAConfig())


def test_the_defaults_are_the_papers():
    model = small_supernet(1)
    fitness = Planted(model)
    found = search_glora(model, fitness, generator())
    assert len(found.history) == 21
    assert 540 >= found.evaluations > 400  # all configs of a layer, but those that no draw brought up
    assert found.fitness == 5


def test_equal_generators_search_alike():
    found = []
    for seed in (1, 1, 2):
        model = small_supernet()
        fitness = Planted(model)
        search_glora(model, fitness, generator(seed), **QUICK)
        found.append(fitness.seen)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("limit", [0, 1, 30, 200])
def test_no_candidate_is_over_the_limit(limit):
    model = small_supernet(bias=limit > 1)
    fitness = Planted(model)
    found = search_glora(model, fitness, generator(), most_parameters=limit, **QUICK)
    layers = list(glora_layers(model).values())
    sizes = [sum(layer.size(config) for layer, config in zip(layers, seen, strict=True)) for seen in fitness.seen]
    assert max(sizes) <= limit
    assert found.parameters == sizes[fitness.seen.index(tuple(found.configs.values()))]
    assert len(fitness.seen) == 1 if limit == 0 else len(fitness.seen) > 4
    assert limit < 200 or max(sizes) > 100  # the limit is used


def test_mutants_keep_most_of_one_parent_and_children_mix_two():
    model = nn.Sequential(*(layer_of("int2 g32 f32", (4, 32), 1, std=0) for _ in range(40)))
    search = _Search(glora_layers(model), float, generator(), None)
    first, second = search.random(), search.random()

    def share(candidate, parent):
        same = [getattr(a, t) == getattr(b, t) for a, b in zip(candidate, parent, strict=True) for t in PIECES]
        return sum(same) / len(same)

    assert search.mutated([first], 0.0) == first
    assert 0.75 < share(search.mutated([first], 0.2), first) < 0.95  # 1 - 0.2 x 0.73: a new draw may be the old one
    child = search.crossed([first, second])
    for own, a, b in zip(child, first, second, strict=True):
        assert all(getattr(own, t) in (getattr(a, t), getattr(b, t)) for t in PIECES)
    others = [search.crossed([first, second]) for _ in range(8)]
    assert any(0.5 < share(other, first) < 0.8 for other in others)  # two parents were drawn, not one twice


def test_a_search_that_finds_nothing_keeps_the_base():
    model = small_supernet()
    base = GLoRAConfig()
    fitness = itertools.chain([0.5], itertools.repeat(math.nan))
    found = search_glora(model, lambda: next(fitness), generator(), **QUICK)
    assert (found.fitness, set(found.configs.values()), found.parameters) == (0.5, {base}, 0)


def test_an_error_in_the_fitness_leaves_the_model_as_it_was():
    model = small_supernet().train()
    before = GLoRAConfig("rows", E="vector")
    model[1].use(before)

    def fail():
        if model[0].config != GLoRAConfig():
            raise KeyError("no data")
        return 0.0

    with pytest.raises(KeyError, match="no data"):
        search_glora(model, fail, generator(), **QUICK)
    assert (model[0].config, model[1].config) == (GLoRAConfig(), before)
    assert model.training


def test_a_trained_supernets_search_lowers_the_loss():
    model = scatter(supernet(), std=0.02)
    with torch.no_grad():
        base = loss_of(model.eval()).item()
    found = search_glora(
        model, lambda: -loss_of(model).item(), generator(), most_parameters=2000, **QUICK | {"generations": 1}
    )
    assert found.fitness > -base
    assert found.parameters <= 2000
    with torch.no_grad():
        assert -loss_of(model).item() == found.fitness


# ------------------------------------------------------------------------------------------------------------ files


def found_model():
    model, draws = scatter(supernet()), generator(7)
    for layer in glora_layers(model).values():
        layer.use(layer.sample(draws))
    return model.eval()


def test_the_found_configs_and_their_weights_come_back(tmp_path):
    model = found_model()
    save_glora(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG}
    used = sum(layer.size(layer.config) for layer in glora_layers(model).values())
    stored = json.loads((tmp_path / CONFIG).read_text())["tensors"]
    assert sum(math.prod(entry["shape"]) for entry in stored.values()) == used
    again = load_glora(packed(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(batch()).logits, model(batch()).logits)
        load_glora(again, tmp_path)  # in place of the terms it has
        assert torch.equal(again(batch()).logits, model(batch()).logits)
    assert [layer.config for layer in glora_layers(again).values()] == [
        layer.config for layer in glora_layers(model).values()
    ]
    qft.prepare_for_training(again)
    assert all(p.requires_grad for name, p in again.named_parameters() if "glora_" in name)


def test_the_base_and_its_terms_share_a_directory(tmp_path):
    qft.save(packed(), tmp_path)
    model = found_model()
    save_glora(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_glora(qft.load(tmp_path), tmp_path)(batch()).logits, model(batch()).logits)


def test_an_interrupted_save_leaves_the_older_one(tmp_path, monkeypatch):
    model = found_model()
    save_glora(model, tmp_path)
    older = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    scatter(model, std=1.0)

    def full(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="no space"):
        save_glora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == older


def damage(name, change):
    def apply(directory):
        path = directory / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def reworded(**changes):
    """A change to glora.json with its seal made anew, as by someone who edits it by hand."""
    from qft.adapters.glora_file import _seal

    def apply(directory):
        body = json.loads((directory / CONFIG).read_text())
        del body["sha256"]
        for entry in body["layers"].values():
            entry.update(changes)
        (directory / CONFIG).write_text(json.dumps(body | {"sha256": _seal(body)}))

    return apply


DAMAGED = {
    "no file": (lambda d: (d / CONFIG).unlink(), "holds no glora.json"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), None),
    "cut json": (damage(CONFIG, lambda text: text[:-20]), "glora.json is damaged"),
    "another rank": (damage(CONFIG, lambda text: text.replace(b'"rank": 2', b'"rank": 3')), "glora.json has changed"),
    "a flipped bit": (damage(WEIGHTS, lambda text: text[:-1] + bytes([text[-1] ^ 1])), "has changed since"),
    "cut weights": (damage(WEIGHTS, lambda text: text[:-1]), "glora.safetensors is damaged"),
    "an unknown kind": (reworded(config={"A": "cube"}), "glora.json is damaged"),
    "another config": (reworded(config={"A": "lora"}), "glora.json is damaged"),
    "a larger rank": (reworded(rank=3), "glora.json is damaged"),
    "no rank": (reworded(rank=None), "glora.json is damaged"),
    "no base": (reworded(base=""), "was trained on another base"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_and_the_model_left(case, tmp_path):
    apply, message = DAMAGED[case]
    save_glora(found_model(), tmp_path)
    apply(tmp_path)
    model = packed()
    with pytest.raises(qft.FormatError if message else OSError, match=message):
        load_glora(model, tmp_path)
    assert not any(isinstance(module, GLoRALinear) for module in model.modules())


def test_another_base_is_refused(tmp_path):
    save_glora(found_model(), tmp_path)
    with pytest.raises(qft.FormatError, match=r"was trained on another base: .* differs; load the base it was"):
        load_glora(packed("int2 g64 f16"), tmp_path)
    with pytest.raises(qft.FormatError, match=r"adapts model\.layers\.0\S+, which is no QuantLinear of this model"):
        load_glora(nn.Sequential(layer_of()), tmp_path)
    model = qft.add_multilora(packed(), 2, 2)
    with pytest.raises(qft.FormatError, match="is a MultiLoRALinear, which cannot take GLoRA's terms; merge it first"):
        load_glora(model, tmp_path)
    assert all(type(m) is MultiLoRALinear for m in model.modules() if isinstance(m, qft.QuantLinear))


REFUSED = {
    "an unknown kind": (lambda: GLoRAConfig(C="rows"), "C='rows' is unknown; use one of lora, vector, none"),
    "rank 0": (lambda: layer_of(rank=0), r"rank=0 is no whole number in 1\.\.33"),
    "twice": (lambda: GLoRALinear.adopt(layer_of(), 2), "the layer is a GLoRALinear already"),
    "a model twice": (lambda: qft.add_glora(supernet(), 2), "q_proj is a GLoRALinear already"),
    "no terms": (lambda: glora_layers(packed()), r"holds no GLoRALinear; call qft\.add_glora\(model, rank\) first"),
    "population 0": (lambda: search_glora(supernet(), float, generator(), population=0), "population=0 is less than 1"),
    "a negative limit": (
        lambda: search_glora(supernet(), float, generator(), most_parameters=-1),
        "most_parameters=-1 is less than 0",
    ),
    "a probability of 2": (
        lambda: search_glora(supernet(), float, generator(), mutation_probability=2),
        r"mutation_probability=2 is outside \[0, 1\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_said(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_config_is_five_words():
    assert dataclasses.asdict(GLoRAConfig()) == dict.fromkeys("ABCDE", "none")
