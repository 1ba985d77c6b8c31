"""Fine-tuning: what trains and what does not, and runs that go on with the bits of one that was never interrupted."""

import json
import math
import resource

import pytest
import tiny_lm
import torch

import qft
from qft.disk import checkpoint
from qft.training.data import Examples, PaddingCollator
from qft.training.finetune import LEARNING_RATES, Recipe, finetune

COLLATE = PaddingCollator(pad_id=0)
# A rate at which 12 steps show; users' defaults are for models of billions.
LEARNS = {"lora": 1e-2, "scales": 1e-3}


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


def rows(count=12, length=16):
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randint(0, 20, (length,), generator=generator) for _ in range(count)]
    return Examples([{"input_ids": ids, "labels": ids.clone()} for ids in drawn])


def quantized(method="lora", fmt="nf4 g64 f32"):
    torch.manual_seed(0)
    return qft.quantize_model(tiny_lm.model(), fmt, rank=4 if method == "lora" else 0)


def recipe(method="lora", **changed):
    usual = {"method": method, "steps": 12, "batch_size": 4, "learning_rate": LEARNS[method], "save_every": 5}
    return Recipe(**{**usual, "gradient_checkpointing": False, **changed})


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", LEARNS)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_only_the_method_trains_and_the_loss_falls(method, gradient_checkpointing):
    model = quantized(method)
    before, losses = state(model), []
    done = finetune(
        model,
        rows(),
        COLLATE,
        recipe(method, gradient_checkpointing=gradient_checkpointing),
        on_step=lambda step, steps, loss: losses.append((step, steps, loss)),
    )
    changed = {
        name.rpartition(".")[2] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"lora": {"lora_A", "lora_B"}, "scales": {"weight_scales"}}[method]
    assert [step[:2] for step in losses] == [(i, 12) for i in range(1, 13)]
    assert losses[-1][2] < losses[0][2]
    assert (done.steps, done.resumed_from, done.skipped) == (12, 0, [])
    assert done.loss == pytest.approx(sum(loss for *_, loss in losses) / 12)


def test_the_seed_decides_the_run():
    first, again, other = quantized(), quantized(), quantized()
    finetune(first, rows(), COLLATE, recipe())
    finetune(again, rows(), COLLATE, recipe())
    finetune(other, rows(), COLLATE, recipe(seed=1))
    assert same(state(first), state(again))
    assert not same(state(first), state(other))


class StopError(Exception):
    pass


def stop_at(step):
    def on_step(at, *_):
        if at == step:
            raise StopError

    return on_step


@pytest.mark.parametrize("method", LEARNS)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, method):
    whole = quantized(method)
    finetune(whole, rows(), COLLATE, recipe(method), tmp_path / "whole")
    with pytest.raises(StopError):
        finetune(quantized(method), rows(), COLLATE, recipe(method), tmp_path / "parts", stop_at(8))
    model = quantized(method)
    done = finetune(model, rows(), COLLATE, recipe(method), tmp_path / "parts")
    assert (done.resumed_from, done.steps) == (5, 12)
    assert same(state(model), state(whole))


def test_dropout_goes_on_where_it_was(tmp_path):
    def dropping():
        torch.manual_seed(0)
        return qft.quantize_model(tiny_lm.model(), "nf4 g64 f32", rank=4, dropout=0.3)

    whole, model = dropping(), dropping()
    finetune(whole, rows(), COLLATE, recipe())
    with pytest.raises(StopError):
        finetune(dropping(), rows(), COLLATE, recipe(), tmp_path, stop_at(8))
    finetune(model, rows(), COLLATE, recipe(), tmp_path)
    assert same(state(model), state(whole))


def test_an_incomplete_checkpoint_is_skipped_named_and_replaced(tmp_path, caplog):
    whole, model = quantized(), quantized()
    finetune(whole, rows(), COLLATE, recipe(), tmp_path)
    (tmp_path / "checkpoint-12" / "complete.json").rename(tmp_path / "checkpoint-12" / "left over")
    done = finetune(model, rows(), COLLATE, recipe(), tmp_path)
    assert done.resumed_from == 10
    assert done.skipped == [f"{tmp_path / 'checkpoint-12'} is incomplete and was skipped: complete.json is missing"]
    assert done.skipped[0] in caplog.messages
    assert same(state(model), state(whole))
    assert checkpoint.damage(tmp_path / "checkpoint-12") == ""
    assert not (tmp_path / "checkpoint-12" / "left over").exists()


@pytest.mark.parametrize("steps", [10, 5], ids=["at the end of an epoch", "within one"])
def test_a_finished_run_is_read_back(tmp_path, steps):
    whole, model = quantized(), quantized()
    first = finetune(whole, rows(), COLLATE, recipe(steps=steps), tmp_path)
    curve = (tmp_path / "losses.csv").read_bytes()
    done = finetune(model, rows(), COLLATE, recipe(steps=steps), tmp_path)
    assert (done.resumed_from, done.steps, done.loss) == (steps, steps, first.loss)
    assert (tmp_path / "losses.csv").read_bytes() == curve
    assert same(state(model), state(whole))


@pytest.mark.parametrize("method", LEARNS)
def test_a_checkpoint_holds_only_what_trains(tmp_path, method):
    from safetensors.torch import load_file

    model = quantized(method)
    finetune(model, rows(), COLLATE, recipe(method), tmp_path)
    directory = tmp_path / "checkpoint-12"
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert same(load_file(directory / "trained.safetensors"), trained)
    assert {path.name for path in directory.iterdir()} == {
        "trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "complete.json",
    }  # fmt: skip
    assert json.loads((directory / "trainer_state.json").read_text())["log_history"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-12",
        "losses.csv",
        "recipe.json",
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 3e-3}, "learning_rate 0.01, now 0.003"),
        ({"steps": 14}, "steps 12, now 14"),
        ({"seed": 3}, "seed 0, now 3"),
    ],
)
def test_another_recipe_does_not_go_on(tmp_path, changed, message):
    finetune(quantized(), rows(), COLLATE, recipe(), tmp_path)
    with pytest.raises(ValueError, match=message):
        finetune(quantized(), rows(), COLLATE, recipe(**changed), tmp_path)


def test_other_rows_do_not_go_on(tmp_path):
    finetune(quantized(), rows(), COLLATE, recipe(), tmp_path)
    with pytest.raises(ValueError, match="rows_sha256"):
        finetune(quantized(), rows(length=17), COLLATE, recipe(), tmp_path)


def test_another_rank_does_not_go_on(tmp_path):
    with pytest.raises(StopError):
        finetune(quantized(), rows(), COLLATE, recipe(), tmp_path, stop_at(8))
    other = qft.quantize_model(tiny_lm.model(), "nf4 g64 f32", rank=2)
    with pytest.raises(qft.FormatError, match="does not hold what this model trains"):
        finetune(other, rows(), COLLATE, recipe(), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = quantized()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lora_B.fill_(math.nan)
    with pytest.raises(ValueError, match="the loss is nan at step 1; lower the learning rate"):
        finetune(model, rows(), COLLATE, recipe(save_every=1), tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.fixture
def small_disk():
    """Let no file grow beyond so many bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10_000, 60_000], ids=["trained", "optimizer"])
def test_a_full_disk_is_an_os_error_and_the_run_goes_on_when_there_is_room(tmp_path, small_disk, size):
    whole, model = quantized(), quantized()
    finetune(whole, rows(), COLLATE, recipe(), tmp_path / "whole")
    trained, optimizer = (
        (tmp_path / "whole" / "checkpoint-12" / name).stat().st_size for name in ("trained.safetensors", "optimizer.pt")
    )
    assert 10_000 < trained < 60_000 < optimizer
    with pytest.raises(StopError):
        finetune(quantized(), rows(), COLLATE, recipe(), tmp_path / "parts", stop_at(8))
    small_disk(size)
    with pytest.raises(OSError, match=r"checkpoint-10 cannot be written \(.*\); make room") as caught:
        finetune(quantized(), rows(), COLLATE, recipe(), tmp_path / "parts")
    assert type(caught.value) is OSError
    small_disk(resource.RLIM_INFINITY)
    done = finetune(model, rows(), COLLATE, recipe(), tmp_path / "parts")
    assert done.resumed_from == 5
    assert same(state(model), state(whole))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "dora"}, "method 'dora' is unknown; use lora or scales"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"steps": -1}, "steps=-1 is too small"),
        ({"epochs": 0.0}, "epochs=0.0 is not a positive number"),
        ({"learning_rate": math.nan}, "rate=nan is not a positive number"),
        ({"warmup": 1.5}, "warmup=1.5 is a share"),
    ],
)
def test_a_recipe_out_of_range_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changed)


def test_the_methods_have_their_own_rates():
    assert {method: Recipe(method=method).rate for method in LEARNING_RATES} == LEARNING_RATES
    assert Recipe(learning_rate=1.0).rate == 1.0


def test_steps_come_from_epochs():
    done = finetune(quantized(), rows(count=10), COLLATE, recipe(steps=0, epochs=2.0, accumulate=2, batch_size=2))
    assert done.steps == 6  # 5 batches, so 3 steps an epoch, the last of one batch
