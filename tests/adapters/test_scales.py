"""Scales alone train, a task is a file of them, and the base comes back bit for bit."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from formats import FORMATS, ODD, sample
from safetensors import safe_open
from torch import Tensor, nn

from qft import notices
from qft.adapters.scales import load_scales, read_task, round_scales, save_scales, scales_state, train_only
from qft.disk import tensor_file
from qft.format import Format, FormatError
from qft.nn.linear import FloatFacingQuantLinear, QuantLinear
from qft.tensor import STORED, quantize

SCALES = ("f32", "f16", "bf16", "dq")
OUT, IN = ODD


class Net(nn.Module):
    """Two quantized layers around a norm; the second has a bias."""

    def __init__(self, fmt: Format | str, rank: int = 0) -> None:
        super().__init__()
        fmt = Format.parse(fmt)
        self.first = QuantLinear.from_quantized(quantize(sample((OUT, IN)) / 10, fmt))
        self.norm = nn.LayerNorm(OUT)
        self.last = QuantLinear.from_quantized(quantize(sample((4, OUT)), fmt), nn.Parameter(torch.randn(4)))
        if rank:
            self.last.add_lora(rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def logits(model: nn.Module) -> Tensor:
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(x)


def codes(model: Net) -> list[Tensor]:
    return [layer._parameters["weight"].detach().clone() for layer in (model.first, model.last)]


def zeros(model: Net) -> list[Tensor]:
    return [layer.weight_zeros.float() for layer in (model.first, model.last) if layer.weight_zeros is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def tune(model: nn.Module, steps: int = 5, rate: float = 1e-2) -> list[float]:
    """Adam towards a fixed target; the loss at each step."""
    generator = torch.Generator().manual_seed(4)
    x, target = torch.randn(32, IN, generator=generator), torch.randn(32, 4, generator=generator)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(fmt: Format | str) -> Net:
    model = Net(fmt)
    tune(train_only(model, "scales"))
    return model


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_making_scales_trainable_changes_nothing_but_their_type(fmt: Format) -> None:
    model = Net(fmt)
    before, stored = logits(model), (codes(model), zeros(model))
    assert train_only(model, "scales") is model
    assert torch.equal(logits(model), before)
    assert same(codes(model), stored[0])
    assert same(zeros(model), stored[1])
    for layer in (model.first, model.last):
        assert layer.format == replace(fmt, scale="f32")
        assert layer.weight_scales.dtype == torch.float32
        assert bytes(layer.weight_format.tolist()).decode() == str(layer.format)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("group", ["g64", "channel"])
@pytest.mark.parametrize("zero", ["", " zero"])
def test_every_scale_type_trains_at_a_small_rate(scale: str, group: str, zero: str) -> None:
    model = train_only(Net(f"int3 {group} {scale}{zero}"), "scales")
    start, stored = scales_state(model), (codes(model), zeros(model))
    losses = tune(model, steps=30, rate=1e-5)
    assert losses[-1] < losses[0]
    for path, scales in scales_state(model).items():
        layer = model.get_submodule(path)
        alive = layer.weight_scales.grad != 0
        assert scales.isfinite().all()
        assert alive.any()
        assert (scales != start[path])[alive].all(), f"scales of {path} stood still"
    assert same(codes(model), stored[0])
    assert same(zeros(model), stored[1])


TRAINS = {
    "scales": {"first.weight_scales", "last.weight_scales"},
    "lora": {"last.lora_A", "last.lora_B"},
    "bias": {"norm.bias", "last.bias"},
}


@pytest.mark.parametrize("what", ["scales", "lora", "bias", ("scales", "lora"), ["lora", "bias"], ("bias", "scales")])
def test_only_what_is_named_trains(what: str | tuple[str, ...]) -> None:
    model = Net("nf4 g64 f16", rank=2)
    train_only(model, "scales")  # what trained before does not any more
    train_only(model, what)
    wanted = set().union(*(TRAINS[word] for word in ([what] if isinstance(what, str) else what)))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted


def test_scales_that_need_no_change_keep_their_parameter_and_their_silence(caplog: pytest.LogCaptureFixture) -> None:
    model = Net("nf4 g64 f32")
    parameter = model.first.weight_scales
    train_only(model, "lora" if model.last.lora_rank else "scales")
    assert model.first.weight_scales is parameter
    assert not caplog.records


@pytest.mark.parametrize("scale", ["f16", "bf16", "dq"])
def test_what_fp32_scales_cost_is_said_once(scale: str, caplog: pytest.LogCaptureFixture) -> None:
    notices.say_once.cache_clear()
    model = Net(f"nf4 g64 {scale}")
    stored = [layer.quant_tensor for layer in (model.first, model.last)]
    before = 8 * sum(q.nbytes for q in stored) / sum(q.shape[0] * q.shape[1] for q in stored)
    with caplog.at_level(logging.WARNING, "qft"):
        for _ in range(2):
            train_only(copy.deepcopy(model), "scales")
    (record,) = caplog.records
    train_only(model, "scales")
    after = 8 * sum(layer.quant_tensor.nbytes for layer in (model.first, model.last)) / (OUT * IN + 4 * OUT)
    assert f"stored as {scale} " in record.getMessage()
    assert f"{before:.3f} -> {after:.3f} bits per weight" in record.getMessage()


def bare() -> nn.Module:
    return nn.Sequential(QuantLinear.from_linear(nn.Linear(8, 8, bias=False), "nf4 g64 f16"))


REFUSED = {
    "no QuantLinear": (
        lambda: train_only(nn.Linear(2, 2), "scales"),
        "Linear holds no quantized layer; call qft.quantize",
    ),
    "no LoRA": (lambda: train_only(bare(), ("scales", "lora")), "Sequential holds no lora to train; call add_lora"),
    "no bias": (lambda: train_only(bare(), "bias"), "holds no bias to train; train scales"),
    "another word": (lambda: train_only(bare(), "zeros"), "does not know 'zeros'; name one or several of scales, lora"),
    "nothing": (lambda: train_only(bare(), ()), "was given nothing to train; name"),
    "state of none": (lambda: scales_state(nn.Linear(2, 2)), "holds no quantized layer"),
    "rounding none": (lambda: round_scales(nn.Linear(2, 2)), "holds no quantized layer"),
}


@pytest.mark.parametrize(("run", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(run: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run()


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = bare()
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="holds no lora"):
        train_only(model, ("scales", "lora"))
    assert str(model[0].format) == "nf4 g64 f16"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains


def test_layers_over_one_weight_stay_over_one() -> None:
    model = nn.ModuleList([QuantLinear.from_linear(nn.Linear(64, 8), "nf4 g64 dq") for _ in range(2)])
    for name in STORED:
        model[1]._parameters[name] = model[0]._parameters[name]
    for change in (lambda: train_only(model, "scales"), lambda: round_scales(model)):
        change()
        assert all(getattr(model[0], name) is getattr(model[1], name) for name in STORED)
        assert model[0].format == model[1].format


# ------------------------------------------------------------------------------------------------------ tasks


def swap(model: Net, state: dict[str, Tensor], way: str, folder: Path) -> None:
    """Load a task from memory or through a file."""
    if way == "memory":
        load_scales(model, state)
        return
    carrier = copy.deepcopy(model)
    load_scales(carrier, state)
    save_scales(carrier, folder / "task")
    load_scales(model, folder / "task")


@pytest.mark.parametrize("way", ["memory", "file"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_swap_and_back_restores_every_bit(fmt: Format, way: str, tmp_path: Path) -> None:
    base = Net(fmt)
    before, stored, start = logits(base), (codes(base), zeros(base)), scales_state(base)
    tuned = copy.deepcopy(base)
    tune(train_only(tuned, "scales"))
    assert not torch.equal(logits(tuned), before)
    swap(base, scales_state(tuned), way, tmp_path)
    tuned.norm, tuned.last.bias = base.norm, base.last.bias
    assert torch.equal(logits(base), logits(tuned))
    swap(base, start, way, tmp_path)
    assert torch.equal(logits(base), before)
    assert same(codes(base), stored[0])
    assert same(zeros(base), stored[1])


@pytest.mark.parametrize("scale", SCALES)
def test_a_base_that_loads_its_own_scales_stays_as_it_is(scale: str) -> None:
    model = Net(f"nf4 g64 {scale}")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_scales(model, scales_state(model))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)


def test_a_swap_keeps_the_parameter_an_optimizer_holds() -> None:
    model = train_only(Net("nf4 g64 f16"), "scales")
    parameter, state = model.first.weight_scales, scales_state(model)
    tune(model)
    load_scales(model, state)
    assert model.first.weight_scales is parameter
    assert parameter.requires_grad
    assert torch.equal(parameter, state["first"])


def test_a_zero_keeps_its_sign() -> None:
    model = Net("nf4 channel f32")
    state = scales_state(model)
    state["first"][3] = 0.0
    load_scales(model, state)
    state["first"][3] = -0.0
    load_scales(model, state)
    assert model.first.weight_scales[3].signbit().all()


def test_a_state_is_a_detached_copy() -> None:
    model = train_only(Net("nf4 g64 f32"), "scales")
    state = scales_state(model)
    assert {path: (scales.dtype, tuple(scales.shape), scales.requires_grad) for path, scales in state.items()} == {
        "first": (torch.float32, (OUT, 2), False),
        "last": (torch.float32, (4, 1), False),
    }
    kept = state["first"].clone()
    state["first"].zero_()
    assert torch.equal(model.first.weight_scales, kept)


def test_a_task_file_holds_scales_only_and_says_whose(tmp_path: Path) -> None:
    model = trained("int4 g64 dq zero")
    save_scales(model, tmp_path / "task")
    with safe_open(tmp_path / "task", "pt") as file:
        held = {name: file.get_tensor(name) for name in scales_state(model)}
        assert sorted(file.keys()) == sorted(held)
        described = json.loads(file.metadata()["qft_task"])
    state = scales_state(model)
    assert held.keys() == state.keys()
    assert all(torch.equal(held[path], state[path]) for path in state)
    assert {path: entry["format"] for path, entry in described["layers"].items()} == dict.fromkeys(
        state, "int4 g64 dq zero"
    )
    layers = read_task(tmp_path / "task")
    assert layers["first"].format == Format.parse("int4 g64 dq zero")
    assert layers["first"].stored.shape == (OUT, 2)


BASE = "int4 g64 f16 zero"


def other_code(model: Net) -> None:
    model.last._parameters["weight"][0, 0] ^= 1


def other_zero(model: Net) -> None:
    model.last.weight_zeros[0, 0] += 1


def other_format(model: Net) -> None:
    q = model.last.quant_tensor
    model.last.set_quantized(
        replace(q, format=Format.parse("[-1 -0.25 0.3 0.5 0.6 0.7 0.8 0.9 1] g64 f16"), weight_zeros=None)
    )


def other_width(model: Net) -> None:
    model.last = QuantLinear.from_linear(nn.Linear(200, 4), BASE)


def layer_more(model: Net) -> None:
    model.extra = QuantLinear.from_linear(nn.Linear(8, 8), BASE)


OTHER_BASES = {
    "code": (other_code, "was trained on another base: the codes of last differ"),
    "zero point": (other_zero, "was trained on another base: the codes of last differ"),
    "format": (other_format, r"another base: last has int4 g64 f16 zero there and \[-1 .* here"),
    "width": (other_width, "another base: the codes of last differ"),
    "layer less": (
        lambda model: setattr(model, "last", nn.Identity()),
        "holds scales for last, which is no quantized layer",
    ),
    "layer more": (layer_more, "holds no scales for extra"),
}


@pytest.mark.parametrize(("change", "message"), OTHER_BASES.values(), ids=OTHER_BASES)
def test_a_task_file_is_refused_on_another_base_by_name(change: Callable, message: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = Net(BASE)
    save_scales(base, tmp_path / "task")
    tuned = copy.deepcopy(base)
    tune(train_only(tuned, "scales"))
    save_scales(tuned, tmp_path / "task")
    change(base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(FormatError, match=message) as refusal:
        load_scales(base, tmp_path / "task")
    assert str(tmp_path / "task") in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_task_fits_its_base_whatever_type_that_stores_its_scales_in(tmp_path: Path) -> None:
    base = Net("int4 g64 f16 zero")
    tuned = copy.deepcopy(base)
    tune(train_only(tuned, "scales"))
    save_scales(tuned, tmp_path / "task")
    for fresh in (base, copy.deepcopy(tuned)):
        load_scales(fresh, tmp_path / "task")
        assert torch.equal(fresh.first.dequantize(), tuned.first.dequantize())


BAD_STATES = {
    "missing": (lambda s: s.pop("last"), "holds no scales for last"),
    "unknown": (lambda s: s.update(more=torch.ones(1)), "holds scales for more, which is no quantized layer"),
    "shape": (lambda s: s.update(last=torch.ones(4, 2)), r"holds scales \(4, 2\) for last, which needs \(4, 1\)"),
    "NaN": (lambda s: s["last"].fill_(torch.nan), "holds scales of last that are not finite"),
    "integer": (
        lambda s: s.update(last=torch.ones(4, 1, dtype=torch.int32)),
        "holds scales of last that are not finite",
    ),
}


@pytest.mark.parametrize(("harm", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_bad_state_is_refused_by_name_and_changes_nothing(harm: Callable, message: str) -> None:
    model = Net("nf4 g64 f16")
    before = logits(model)
    state = {path: scales * 2 for path, scales in scales_state(model).items()}
    harm(state)
    with pytest.raises(FormatError, match=message):
        load_scales(model, state)
    assert torch.equal(logits(model), before)
    assert str(model.first.format) == "nf4 g64 f16"


def test_a_flipped_bit_in_a_task_file_is_refused_wherever_it_is(tmp_path: Path) -> None:
    path, model = tmp_path / "task", nn.Sequential(QuantLinear.from_linear(nn.Linear(8, 2), "nf4 g64 f32"))
    save_scales(model, path)
    good, wanted, refused = path.read_bytes(), scales_state(model), 0
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        try:
            load_scales(model, path)
        except FormatError:
            refused += 1
        assert torch.equal(model[0].weight_scales, wanted["0"])
    assert refused >= 0.9 * len(good)  # what is left: padding, the version, names no one reads


FILES = {
    "a model's file": ({"format": "pt"}, "is no task file; give one written by qft.save_scales"),
    "no JSON": ({"qft_task": "{"}, "is damaged"),
    "no layers": ({"qft_task": "[]"}, "is damaged"),
    "a layer of nothing": ({"qft_task": '{"layers": {"0": {}}}'}, "is damaged"),
    "a bad format": (
        {"qft_task": '{"layers": {"0": {"format": "nf5", "codes": "", "shape": [], "sha256": ""}}}'},
        "damaged",
    ),
    "nested": ({"qft_task": "[" * 50_000}, "is damaged"),
}


@pytest.mark.parametrize(("metadata", "message"), FILES.values(), ids=FILES)
def test_what_is_no_task_file_is_refused(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    tensor_file.write(tmp_path / "task", {"0": torch.ones(2, 1)}, metadata)
    with pytest.raises(FormatError, match=message):
        load_scales(bare(), tmp_path / "task")


def test_a_task_that_is_not_there_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_scales(bare(), tmp_path / "nowhere")


def test_a_failed_save_keeps_the_older_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = Net("nf4 g64 f32"), tmp_path / "task"
    save_scales(model, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file.hashlib, "sha256", full)
    tune(train_only(model, "scales"))
    with pytest.raises(OSError, match="No space"):
        save_scales(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rounding_goes_back_to_the_stored_format_and_reports_the_error(fmt: Format) -> None:
    model = trained(fmt)
    fine, stored = scales_state(model), (codes(model), zeros(model))
    errors = round_scales(model)
    coarse = scales_state(model)
    assert errors.keys() == fine.keys()
    for path, error in errors.items():
        layer = model.get_submodule(path)
        assert layer.format == fmt
        assert error == pytest.approx(float((coarse[path] - fine[path]).norm() / fine[path].norm()), rel=1e-6)
        assert not layer.weight_scales.requires_grad
        # f16 and bf16 keep 11 and 8 bits; the map of dq has steps of at most 1/64 of a block's absmax
        assert error <= {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "dq": 2**-5}[fmt.scale]
        assert (error > 0) == (fmt.scale != "f32")
    assert same(codes(model), stored[0])
    assert same(zeros(model), stored[1])
    assert round_scales(model) == dict.fromkeys(errors, 0.0)


def through_pickle(model: Net) -> Net:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: Net) -> Net:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch])
def test_a_copy_remembers_what_it_stored(way: Callable[[Net], Net]) -> None:
    model = way(trained("nf4 g64 dq"))
    round_scales(model)
    assert {str(layer.format) for layer in (model.first, model.last)} == {"nf4 g64 dq"}


def test_a_facing_layer_trains_and_rounds() -> None:
    model = Net("nf4 g64 dq")
    FloatFacingQuantLinear.adopt(model.last, torch.bfloat16)
    tune(train_only(model, "scales"))
    assert model.last.weight.dtype == torch.bfloat16
    round_scales(model)
    assert str(model.last.format) == "nf4 g64 dq"


@pytest.mark.parametrize(
    ("scale", "value", "message"),
    [
        ("f16", 1e6, "last: the scale of .* exceeds fp16's 65504"),
        ("bf16", 3.4e38, "last: the scale of .* exceeds bf16's"),
        ("dq", torch.inf, "last holds scales that are not finite, so dq cannot store them"),
        ("f16", torch.nan, "last holds scales that are not finite, so f16 cannot store them"),
    ],
)
def test_scales_that_do_not_fit_are_refused_and_nothing_is_rounded(scale: str, value: float, message: str) -> None:
    model = train_only(Net(f"nf4 g64 {scale}"), "scales")
    with torch.no_grad():
        model.last.weight_scales[2, 0] = value
    with pytest.raises(FormatError, match=message):
        round_scales(model)
    assert {str(layer.format) for layer in (model.first, model.last)} == {"nf4 g64 f32"}
