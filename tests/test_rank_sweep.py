"""The cost table against counts by hand and by torch, and the sweep over ranks."""

import gc
import json

import pytest
import tiny_lm
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import qft
from qft.analysis import cost as rooms
from qft.analysis.cost import cost, peak_memory
from qft.recipes.rank_sweep import rank_sweep
from qft.training.data import Examples, PaddingCollator
from qft.training.evaluate import perplexity
from qft.training.finetune import LEARNING_RATES, Recipe

# (out, in) of the tiny Llama's two blocks: q, k, v, o, gate, up, down
BLOCK = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
LAYERS = 2 * BLOCK
VOCABULARY, HIDDEN = 257, 64


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


def packed(rank=0, fmt="nf2 g64 f16", alpha=None):
    torch.manual_seed(0)
    return qft.quantize_model(tiny_lm.model(), fmt, rank=rank, alpha=alpha)


# ------------------------------------------------------------------------------------------------ by hand


def test_parameters_and_bytes_by_hand():
    rank4, scales = cost(packed(), 4), cost(packed(), method="scales")
    assert rank4.trainable == 4 * sum(out + into for out, into in LAYERS) == 4 * 2 * 928
    # one scale per 64 weights of a row: 96 inputs take two
    assert scales.trainable == 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64 * 2) == 1024
    codes = sum(out * (16 if into == 64 else 32) for out, into in LAYERS)  # 2 bits, rows padded to 16 bytes
    dense = 4 * (VOCABULARY * HIDDEN + 5 * HIDDEN)  # the tied embedding once, and the norms
    assert rank4.weights_nbytes == codes + 2 * 1024 + dense + rank4.adapter_nbytes
    assert scales.weights_nbytes == codes + 4 * 1024 + dense  # scales are fp32 while they train
    for price in (rank4, scales):
        assert price.adapter_nbytes == price.gradient_nbytes == 4 * price.trainable
        assert price.optimizer_nbytes == 8 * price.trainable
        assert price.peak_nbytes == price.weights_nbytes + 12 * price.trainable + price.activation_nbytes


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_operations_by_hand(gradient_checkpointing):
    length, rank = 15, 4
    weights, head = sum(out * into for out, into in LAYERS), VOCABULARY * HIDDEN
    lora = rank * sum(out + into for out, into in LAYERS)
    attention = 2 * 2 * (length + 1) / 2 * 64 * 2  # two products, 8 tokens on average, width 64, two layers
    again = 2 * weights + 2 * lora + attention if gradient_checkpointing else 0
    price = cost(packed(), rank, length=length, gradient_checkpointing=gradient_checkpointing)
    assert price.forward_flops == 2 * (weights + head) + 2 * lora + attention
    assert price.backward_flops == 2 * (weights + head) + 4 * lora + 2 * attention + again
    assert price.flops == price.forward_flops + price.backward_flops


def test_a_frozen_base_takes_four_operations_a_weight_and_full_tuning_six():
    price = cost(packed(), 1, length=1, gradient_checkpointing=False)
    weights = sum(out * into for out, into in LAYERS) + VOCABULARY * HIDDEN
    assert price.flops / weights == pytest.approx(4, abs=0.3)
    groups = cost(packed(), method="scales", length=1, gradient_checkpointing=False)
    channels = cost(packed(fmt="int4 channel f32"), method="scales", length=1, gradient_checkpointing=False)
    assert groups.flops / weights == pytest.approx(4 + 2 * 0.75, abs=0.3)  # no scales in the head, a quarter of all
    assert channels.flops / weights == pytest.approx(4, abs=0.1)


def test_forward_operations_are_those_torch_counts():
    length = 24
    model = tiny_lm.model()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 20, (2, length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counted = counter.get_total_flops() / ids.numel()
    causal, whole = 2 * (length + 1) * 64 * 2, 4 * length * 64 * 2  # eager computes what it then masks
    bare = cost(model, method="scales", fmt="nf2 g64 f16", length=length).forward_flops
    rotations = counted - (bare - causal + whole)
    assert 0 <= rotations < 0.001 * counted  # the angles of rotary positions are products too


@pytest.mark.parametrize(("method", "rank"), [("lora", 4), ("lora", 40), ("scales", 0)])
def test_weights_and_parameters_are_those_of_a_real_model(method, rank):
    """Of rank 40 the layers of 32 outputs take 32."""
    for fmt in ("nf2 g64 f16", "nf4 g64 dq", "int3 g32 f16 zero", "int4 channel f32"):
        price = cost(packed(fmt=fmt), rank, method=method)
        model = qft.train_only(packed(rank, fmt), method)
        assert price.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert price.weights_nbytes == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(("method", "rank"), [("lora", 4), ("lora", 32), ("scales", 0)])
def test_activations_are_near_what_autograd_keeps(method, rank):
    model = qft.prepare_for_training(qft.train_only(packed(rank), method), gradient_checkpointing=False).train()
    ids = torch.randint(0, 20, (4, 32))
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(ids, labels=ids)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    price = cost(model, rank, method=method, rows=4, length=32, gradient_checkpointing=False)
    assert 0.7 < saved / price.activation_nbytes < 1.1
    less = cost(model, rank, method=method, rows=4, length=32)
    assert less.activation_nbytes < price.activation_nbytes


def test_a_packed_head_is_counted_once():
    model = qft.quantize_model(tiny_lm.model(), "nf2 g64 f16", formats={"lm_head": "int8 g64"})
    dense, head = cost(packed(), 4, gradient_checkpointing=False), cost(model, 4, gradient_checkpointing=False)
    assert head.trainable - dense.trainable == 4 * (VOCABULARY + HIDDEN)
    assert head.forward_flops - dense.forward_flops == 2 * 4 * (VOCABULARY + HIDDEN)


# ------------------------------------------------------------------------------------------------ the paper's shapes

LLAMA = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "30B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}


def llama(size):
    hidden, inner, blocks, heads = LLAMA[size]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        vocab_size=32000, dtype=torch.float16,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).half()


@pytest.mark.parametrize(("size", "millions"), [("7B", 1.36), ("13B", 2.13), ("30B", 4.15), ("65B", 6.80)])
def test_peqas_scale_parameters_per_channel(size, millions):
    price = cost(llama(size), method="scales", fmt="int4 channel f32")
    assert round(price.trainable / 1e6, 2) == millions


def test_llama_7b_at_four_bits():
    model = llama("7B")
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    price = cost(model, method="scales", fmt="int4 channel f32", rows=1, length=2048)
    norms = 2 * (2 * 32 + 1) * 4096
    assert price.weights_nbytes == weights // 2 + 4 * price.trainable + norms + 2 * 2 * 32000 * 4096
    assert weights / 2 / 1e9 == pytest.approx(3.2, abs=0.05)  # PEQA's table: 4-bit linear weights of 7B
    assert cost(model, 16, fmt="nf4 g64 dq").trainable == 32 * 16 * (4 * 8192 + 3 * 15104)
    assert not any(not p.is_meta for p in model.parameters())


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "dora"}, "method 'dora' is unknown"),
        ({"rank": 0}, "rank=0 does not fit method lora"),
        ({"rank": 4, "method": "scales"}, "rank=4 does not fit method scales"),
        ({"rank": 4, "rows": 0}, "a batch of 0 rows"),
    ],
)
def test_a_cost_that_is_none_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        cost(packed(), **asked)


def test_a_model_that_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="holds no quantized layer; name the fmt"):
        cost(tiny_lm.model(), 4)
    layer = torch.nn.Sequential(qft.QuantLinear(64, 64, "nf4 g64 f32"))
    with pytest.raises(ValueError, match="lacks num_hidden_layers"):
        cost(layer, 4)


# ------------------------------------------------------------------------------------------------ measured memory


def test_memory_is_seen_to_rise():
    def take():
        torch.ones(256 << 20, dtype=torch.uint8)  # freed again before it is measured
        return 7

    gc.collect()  # what earlier tests left must not be freed meanwhile
    result, rise = peak_memory(take, torch.device("cpu"))
    assert result == 7
    if rise is None:
        pytest.skip("this system does not let a process count its largest resident set")
    assert 240 << 20 < rise < 480 << 20
    assert peak_memory(lambda: 7, torch.device("cpu"))[1] < 8 << 20


def test_memory_that_cannot_be_measured_is_none(monkeypatch):
    monkeypatch.setattr(rooms.sys, "platform", "darwin")
    assert peak_memory(lambda: 7, torch.device("cpu")) == (7, None)


# ------------------------------------------------------------------------------------------------ the sweep

COLLATE = PaddingCollator(pad_id=0)


def rows(count=8, length=12):
    drawn = torch.randint(0, 20, (count, length), generator=torch.Generator().manual_seed(7))
    return Examples([{"input_ids": ids, "labels": ids.clone()} for ids in drawn])


def recipe(**changed):
    usual = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "gradient_checkpointing": False}
    return Recipe(**{**usual, **changed})


def test_a_sweep_tunes_each_rank_from_the_same_start():
    started, told = [], []

    def start(rank, alpha):
        started.append((rank, alpha))
        return packed(rank, alpha=alpha or None)

    made = rank_sweep(
        start, rows(), rows(), COLLATE, recipe(), [2, 8], scales=True, scales_learning_rate=1e-3, alpha_per_rank=2.0,
        on_step=lambda run, step, steps: told.append((run, step, steps)),
    )  # fmt: skip
    assert started == [(2, 4.0), (8, 16.0), (0, 0.0)]
    runs = [(row.cost.method, row.cost.rank, row.alpha) for row in made]
    assert runs == [("lora", 2, 4.0), ("lora", 8, 16.0), ("scales", 0, 0.0)]
    assert told == [(run, step, 6) for run in ("rank 2", "rank 8", "scales") for step in range(1, 7)]
    untuned = perplexity(packed(), rows(), COLLATE, 4).value
    for row in made:
        assert row.before == pytest.approx(untuned, rel=1e-6)
        assert row.after < row.before
        batch = {"rows": 4, "length": 12, "gradient_checkpointing": False}
        assert row.cost == cost(packed(), row.cost.rank, method=row.cost.method, **batch)
    assert made[1].after < made[0].after
    assert json.loads(json.dumps([row.as_dict() for row in made]))[1]["peak_nbytes"] == made[1].cost.peak_nbytes


def test_a_sweep_that_was_killed_goes_on(tmp_path):
    def stop(run, step, steps):
        if (run, step) == ("rank 8", 5):
            raise KeyboardInterrupt

    def again(directory, on_step=None):
        saving = recipe(save_every=2)
        start = lambda rank, alpha: packed(rank, alpha=alpha or None)  # noqa: E731
        return rank_sweep(start, rows(), rows(), COLLATE, saving, [2, 8], directory=directory, on_step=on_step)

    whole = again(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        again(tmp_path / "parts", stop)
    steps = []
    parts = again(tmp_path / "parts", lambda *told: steps.append(told))
    assert steps == [("rank 8", 5, 6), ("rank 8", 6, 6)]
    assert [row.after for row in parts] == [row.after for row in whole]
    assert [row.loss for row in parts] == [row.loss for row in whole]  # those before the kill included


def test_scales_have_a_rate_of_their_own(monkeypatch):
    seen = []

    def note(model, train, collate, given, *_):
        seen.append((given.method, given.rate))
        raise StopIteration

    monkeypatch.setattr("qft.recipes.rank_sweep.finetune", note)
    for ranks, scales in (([2], False), ([], True)):
        with pytest.raises(StopIteration):
            rank_sweep(lambda rank, alpha: packed(rank), rows(), rows(), COLLATE, recipe(), ranks, scales=scales)
    assert seen == [("lora", 1e-2), ("scales", LEARNING_RATES["scales"])]


@pytest.mark.parametrize(
    ("ranks", "how", "message"),
    [
        ([], {}, "nothing to sweep"),
        ([2, 2], {}, "ranks 2, 2 must be 1 or more, each named once"),
        ([0], {}, "ranks 0 must be 1 or more"),
        ([2], {"alpha_per_rank": 0.0}, "alpha_per_rank=0.0"),
    ],
)
def test_a_sweep_over_nothing_is_refused(ranks, how, message):
    with pytest.raises(ValueError, match=message):
        rank_sweep(lambda rank, alpha: packed(rank), rows(), rows(), COLLATE, recipe(), ranks, **how)


def test_a_start_that_brings_another_lora_is_refused():
    with pytest.raises(ValueError, match=r"start\(2, 2\) gave a model with 7424 LoRA parameters, rank 2 has 3712"):
        rank_sweep(lambda rank, alpha: packed(4), rows(), rows(), COLLATE, recipe(), [2])
    with pytest.raises(ValueError, match="scales has 0"):
        rank_sweep(lambda rank, alpha: packed(4), rows(), rows(), COLLATE, recipe(), [], scales=True)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_and_writes_the_table(tmp_path, monkeypatch, capsys):
    from qft.cli import main

    base = tiny_lm.save(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 60)
    words = [
        "sweep", str(base), str(tmp_path / "out"), "--data", str(text), "--format", "nf2 g64 f16", "--ranks", "2,4",
        "--steps", "2", "--batch-size", "4", "--block-size", "16", "--alpha-per-rank", "2",
    ]  # fmt: skip

    def command(*more):
        monkeypatch.setattr("sys.argv", ["qft", *words, *more])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr()

    code, printed = command("--json")
    assert code == 0
    made = json.loads(printed.out)
    assert [(row["rank"], row["alpha"]) for row in made["rows"]] == [(2, 4.0), (4, 8.0), (0, 0.0)]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"][0]["trainable"] == 2 * 2 * 928
    code, printed = command()  # every run is finished: the table is made again
    assert code == 0
    assert "3,712" in printed.out
    assert "scales" in printed.out
    code, printed = command("--ranks", "2,x")
    assert code == 2
    assert "--ranks '2,x' is no list of whole numbers" in printed.err
