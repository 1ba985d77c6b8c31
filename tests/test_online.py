"""Online-LoRA: when it switches, that switching changes nothing, and what it remembers."""

import copy
import io
import math

import pytest
import tiny_lm
import torch

import qft
from qft.recipes.online import HardBuffer, OnlineLora, PlateauDetector
from qft.training.data import PaddingCollator

COLLATE = PaddingCollator(pad_id=0)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


def never():
    return PlateauDetector(mean=-1.0)


def packed(rank=0, **keywords):
    """Two bits, and logits wide enough that its adapters alone can learn a task in a few steps."""
    torch.manual_seed(0)
    dense = tiny_lm.model()
    with torch.no_grad():
        dense.model.norm.weight.mul_(10)
    return qft.quantize_model(dense, "nf2 g64 f16", rank=rank, **keywords)


def cycle(first, count=6, length=16):
    """Rows of a task: the alphabet first..first+7 in one order, entered at any place."""
    order = torch.randperm(8, generator=torch.Generator().manual_seed(first)) + first
    rows = [order.roll(-i).repeat(length // 8) for i in range(count)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in rows]


def loss_of(model, rows):
    model.eval()
    with torch.no_grad():
        return model(**COLLATE(rows)).loss.item()


# ------------------------------------------------------------------------------------------------ the detector


def fired(losses, detector):
    return [index for index, loss in enumerate(losses) if detector.update(loss)]


def two_plateaus():
    """Two tasks: each falls from 5 towards 1 and stays there."""
    task = [1 + 4 * math.exp(-step / 6) for step in range(60)]
    return task + task


def test_it_fires_once_on_each_of_two_plateaus():
    losses = two_plateaus()
    places = fired(losses, PlateauDetector(mean=1.5, variance=0.02))

    def settled(index):
        window = torch.tensor(losses[index - 4 : index + 1], dtype=torch.float64)
        return window.mean() < 1.5 and window.var(correction=0) < 0.02

    first = next(index for index in range(4, 120) if settled(index))
    second = next(index for index in range(64, 120) if settled(index))
    assert places == [first, second]
    assert first < 60 < second


def test_a_long_plateau_a_slow_slope_and_noise_do_not_fire_again():
    assert len(fired([1.0] * 100, PlateauDetector(mean=1.5))) == 1
    assert fired([3.0] * 100, PlateauDetector(mean=1.5)) == []  # flat, but not low
    assert fired([1.0, 2.0] * 50, PlateauDetector(mean=1.8, variance=0.02)) == []  # low, but not flat
    assert fired([1.0] * 4, PlateauDetector(mean=1.5)) == []  # no whole window yet


def test_the_second_plateau_needs_a_peak_higher_than_the_firings_deviation():
    noisy = [1.0, 1.1, 1.0, 1.1, 1.0]  # mean 1.04, standard deviation 0.049
    assert fired(noisy + [1.08] * 20, PlateauDetector(mean=1.5)) == [4]
    assert len(fired(noisy + [1.10] * 20, PlateauDetector(mean=1.5))) == 2


def test_a_detector_goes_on_from_its_state():
    losses = two_plateaus()
    whole, first = PlateauDetector(mean=1.5), PlateauDetector(mean=1.5)
    places = fired(losses[:30], first)
    second = PlateauDetector(mean=1.5)
    second.load_state_dict(first.state_dict())
    assert places + [30 + index for index in fired(losses[30:], second)] == fired(losses, whole)


@pytest.mark.parametrize(("wrong", "message"), [({"window": 1}, "window=1"), ({"variance": 0.0}, "variance=0.0")])
def test_a_detector_that_could_not_fire_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PlateauDetector(mean=1.0, **wrong)


# ------------------------------------------------------------------------------------------------ the buffer


def test_the_buffer_holds_the_hardest():
    buffer = HardBuffer(3)
    buffer.offer(["a", "b"], [1.0, 5.0])
    assert (buffer.rows, buffer.losses) == (["b", "a"], [5.0, 1.0])
    buffer.offer(["c", "d", "e"], [3.0, 0.5, 5.0])
    assert (buffer.rows, buffer.losses) == (["b", "e", "c"], [5.0, 5.0, 3.0])


def test_a_stream_keeps_its_hardest_rows():
    online = OnlineLora(packed(), COLLATE, never(), learning_rate=1e-6)
    rows = cycle(0) + cycle(40)
    alone = [loss_of(online.model, [row]) for row in rows]
    for first in range(0, 12, 3):
        online.step(rows[first : first + 3])
    hardest = sorted(range(12), key=lambda i: -alone[i])[:4]
    assert {id(row) for row in online.buffer.rows} == {id(rows[i]) for i in hardest}
    assert sorted(online.buffer.losses) == pytest.approx(sorted(alone[i] for i in hardest), abs=1e-3)


def test_a_rows_loss_in_the_buffer_is_kept_up_to_date():
    online = OnlineLora(packed(), COLLATE, never(), learning_rate=1e-2)
    rows = cycle(0, 4)
    for _ in range(30):
        online.step(rows)
    last = online.buffer.losses
    assert max(last) < 0.7 * loss_of(packed(), rows)


# ------------------------------------------------------------------------------------------------ the switch


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def outputs(model):
    model.eval()
    with torch.no_grad():
        return model(torch.arange(16)[None]).logits.double()


def test_switching_changes_no_output_while_ranks_are_free():
    online = OnlineLora(packed(), COLLATE, never(), rank=4, limit=12, learning_rate=1e-2)
    base = outputs(online.model)
    for task in range(3):
        for _ in range(6):
            online.step(cycle(20 * task))
        before = outputs(online.model)
        assert online.switch() == 0.0
        assert not online.optimizer.state  # a new pair does not move by the old one's momentum
        # Only the order of fp32 sums may differ: logits reach 10 here, so this is a few units in their last place.
        assert (outputs(online.model) - before).abs().max() < 1e-6 * before.abs().max()
    assert (before - base).abs().max() > 0.1
    assert set(online.used.values()) == {12}
    for layer in online.layers.values():
        assert not layer.lora_B[:, 12:].any()
        assert layer.lora_A[12:].any()  # B = 0 with A = 0 would never train again


def test_without_a_free_rank_the_frozen_ones_are_recompressed_to_the_best_product():
    online = OnlineLora(packed(), COLLATE, never(), rank=4, limit=4, alpha=8, learning_rate=1e-2)
    for task in range(2):
        for _ in range(6):
            online.step(cycle(20 * task))
        products = {path: layer.lora_B.double() @ layer.lora_A.double() for path, layer in online.layers.items()}
        lost = online.switch()
        assert (lost > 0) == (task == 1)
    squares = [torch.linalg.svdvals(product).square() for product in products.values()]
    share = sum(s[4:].sum() for s in squares) / sum(s.sum() for s in squares)
    assert lost == pytest.approx(share.sqrt().item(), rel=1e-4)
    for path, layer in online.layers.items():
        u, s, vt = torch.linalg.svd(products[path])
        best = u[:, :4] * s[:4] @ vt[:4]
        torch.testing.assert_close((layer.lora_B @ layer.lora_A).double(), best, atol=1e-5, rtol=0)


def test_frozen_ranks_keep_their_bits_and_new_ones_train():
    online = OnlineLora(packed(), COLLATE, never(), rank=2, limit=4, learning_rate=1e-2)
    for _ in range(4):
        online.step(cycle(0))
    online.switch()
    before = factors(online.model)
    for _ in range(6):
        online.step(cycle(40))
    for name, now in factors(online.model).items():
        frozen = (slice(4),) if name.endswith("lora_A") else (slice(None), slice(4))
        new = (slice(4, None),) if name.endswith("lora_A") else (slice(None), slice(4, None))
        assert torch.equal(now[frozen], before[name][frozen])
        assert not torch.equal(now[new], before[name][new])


def test_a_plateau_switches():
    online = OnlineLora(packed(), COLLATE, PlateauDetector(mean=1.5), rank=4, limit=8, learning_rate=1e-2)
    steps = [online.step(cycle(0)) for _ in range(60)]
    assert [step.switched for step in steps].count(True) == online.switches >= 1
    first = next(index for index, step in enumerate(steps) if step.switched)
    assert sum(step.loss for step in steps[first - 4 : first + 1]) / 5 < 1.5 < steps[0].loss
    assert steps[first + 1].loss < steps[first].loss + 0.2  # the stream goes on where it was


def test_an_attached_lora_is_taken_over_as_frozen_ranks():
    model = packed(rank=3, init="loftq", alpha=6)
    before = outputs(model)
    online = OnlineLora(model, COLLATE, never(), rank=2, limit=8)
    assert (outputs(model) - before).abs().max() < 1e-5
    assert set(online.used.values()) == {3}
    assert {layer.lora_rank for layer in online.layers.values()} == {10}


# ------------------------------------------------------------------------------------------------ the penalty


def test_importance_is_the_running_mean_of_squared_gradients_of_the_own_prediction():
    online = OnlineLora(packed(), COLLATE, never(), rank=2, limit=6, targets=["q_proj"], learning_rate=1e-2)
    means = []
    for task in range(2):
        for _ in range(4):
            online.step(cycle(20 * task))
        squares = []
        for row in online.buffer.rows:
            online.model.zero_grad()
            logits = online.model(input_ids=row["input_ids"][None]).logits[0, :-1]
            logits.log_softmax(-1).max(-1).values.mean().backward()
            layer = next(iter(online.layers.values()))
            squares.append(layer.lora_B.grad[:, 6:].square())
        means.append(torch.stack(squares).mean(0))
        online.switch()
    omega = next(iter(online.importance.values()))[1]
    torch.testing.assert_close(omega, (means[0] + means[1]) / 2, atol=1e-9, rtol=1e-4)
    assert omega.max() > 0


def test_a_steps_gradient_is_that_of_batch_buffer_and_penalty():
    online = OnlineLora(packed(), COLLATE, never(), rank=2, limit=4, learning_rate=1e-2, weight=1e5)
    for rows in (cycle(0), cycle(20)):
        online.step(rows)
    online.switch()
    online.step(cycle(0))
    batch, buffer = cycle(40), list(online.buffer.rows)
    online.model.zero_grad()
    penalty = sum(
        (omega * new.square()).sum()
        for path, both in online.importance.items()
        for omega, new in zip(both, (online.layers[path].lora_A[4:], online.layers[path].lora_B[:, 4:]), strict=True)
    )
    (online.model(**COLLATE(batch)).loss + online.model(**COLLATE(buffer)).loss + 1e5 / 2 * penalty).backward()
    expected = {name: p.grad.clone() for name, p in online.model.named_parameters() if p.requires_grad}
    assert penalty > 0
    online.step(batch)
    for name, parameter in online.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_the_penalty_is_in_the_loss_and_holds_new_factors_back():
    def moved(weight):
        online = OnlineLora(packed(), COLLATE, never(), rank=2, limit=6, learning_rate=1e-2, weight=weight)
        for _ in range(4):
            online.step(cycle(0))
        online.switch()
        for _ in range(10):
            online.step(cycle(40))
        return sum(layer.lora_B[:, 6:].square().sum().item() for layer in online.layers.values())

    assert moved(1e7) < 0.5 * moved(0.0)


# ------------------------------------------------------------------------------------------------ forgetting


def test_a_stream_of_two_tasks_is_forgotten_less_than_by_plain_lora(record_property):
    first, second = cycle(0), cycle(40)

    def forgotten(online):
        for _ in range(40):
            online.step(first)
        learned = loss_of(online.model, first)
        assert learned < 0.7
        for _ in range(40):
            online.step(second)
        assert loss_of(online.model, second) < 1.5
        return loss_of(online.model, first) - learned

    plain = OnlineLora(packed(), COLLATE, never(), learning_rate=1e-2)
    plain.buffer = HardBuffer(0)  # with neither buffer nor switch it is LoRA on a stream
    ours = OnlineLora(packed(), COLLATE, PlateauDetector(mean=1.0, variance=0.02), learning_rate=1e-2)
    rises = {"plain": forgotten(plain), "online": forgotten(ours)}
    record_property("rise of the first task's loss", str(rises))
    assert ours.switches >= 1
    assert rises["online"] < 0.7 * rises["plain"], rises


# ------------------------------------------------------------------------------------------------ state


def test_a_stream_goes_on_from_its_state_with_the_same_bits():
    def fresh():
        return OnlineLora(packed(), COLLATE, PlateauDetector(mean=1.5), rank=2, limit=4, learning_rate=1e-2)

    def learn(online, steps):
        for step in steps:
            online.step(cycle(0) if step < 20 else cycle(40))
            if step in (5, 30):  # a switch before the state was saved, and one after
                online.switch()

    whole, first, second = fresh(), fresh(), fresh()
    learn(whole, range(40))
    learn(first, range(25))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.detector.state_dict() == first.detector.state_dict()
    learn(second, range(25, 40))
    assert whole.switches == second.switches >= 2
    assert all(
        torch.equal(a, b) for a, b in zip(factors(whole.model).values(), factors(second.model).values(), strict=True)
    )
    assert whole.buffer.losses == second.buffer.losses


def test_the_tuned_model_is_an_ordinary_lora_in_a_file(tmp_path):
    online = OnlineLora(packed(), COLLATE, never(), rank=2, limit=4, learning_rate=1e-2)
    for _ in range(4):
        online.step(cycle(0))
    online.switch()
    qft.save(online.model, tmp_path / "tuned")
    again = qft.load(tmp_path / "tuned")
    assert torch.equal(outputs(again), outputs(online.model))


def test_another_streams_state_is_refused():
    state = OnlineLora(packed(), COLLATE, never(), rank=2, limit=4).state_dict()
    other = OnlineLora(packed(), COLLATE, never(), rank=2, limit=6)
    before = copy.deepcopy(factors(other.model))
    with pytest.raises(ValueError, match=r"rank and limit \[2, 4\] on 14 layers, this stream of \[2, 6\] on 14"):
        other.load_state_dict(state)
    assert all(torch.equal(now, before[name]) for name, now in factors(other.model).items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 4, "limit": 2}, "limit=2 frozen ranks cannot hold"),
        ({"buffer": 0}, "buffer=0"),
        ({"weight": -1.0}, r"weight=-1.0"),
        ({"targets": ["nothing"]}, "targets nothing name no quantized layer"),
        ({"rank": 40}, "limit=16 frozen ranks cannot hold a pair of rank=40"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        OnlineLora(packed(), COLLATE, never(), **wrong)


def test_a_loss_that_is_not_finite_changes_nothing():
    online = OnlineLora(packed(), COLLATE, never())
    with torch.no_grad():
        online.model.model.norm.weight[0] = math.nan
    before = factors(online.model)
    with pytest.raises(ValueError, match="the loss is nan at this batch"):
        online.step(cycle(0))
    assert all(torch.equal(now, before[name]) for name, now in factors(online.model).items())
    assert online.buffer.rows == []
