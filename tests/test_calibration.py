"""Second moments of activations against the definition, in bounded memory, and through kills."""

import gc

import pytest
import tiny_lm
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import qft
from qft.disk.files import WRITTEN
from qft.measure.activations import SecondMoment, Source
from qft.measure.calibration import NAME, Calibration, calibrate
from qft.training.data import PaddingCollator

COLLATE = PaddingCollator(pad_id=7)
LARGEST = 8 * 96 * 96  # bytes of the tiny model's largest sum: down_proj reads 96 features


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_lm.model()


def rows(*lengths, seed=0):
    source = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, tiny_lm.VOCABULARY, (n,), generator=source) for n in lengths]
    return [{"input_ids": i, "labels": i} for i in ids]


ROWS = rows(20, 3, 33, 11, 8)


def by_hand(model, inputs, paths):
    """Σ x xᵀ / n in float64, each row run alone, so that there is no padding."""
    sums, counts = {}, {}

    def note(path):
        def hook(module, given):
            x = given[0].detach().double().flatten(0, -2)
            sums[path] = sums.get(path, 0) + x.T @ x
            counts[path] = counts.get(path, 0) + len(x)

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    with torch.no_grad():
        for given in inputs:
            model(**given)
    for handle in handles:
        handle.remove()
    return {path: total / counts[path] for path, total in sums.items()}


def alone(data):
    return [{"input_ids": row["input_ids"][None]} for row in data]


def apart(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def contents(directory):
    """Every file below a directory, by relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[path], other[path]) for path in one)


# ------------------------------------------------------------------------------------------------ what is measured


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_moments_are_those_of_the_definition_and_padding_does_not_count(model, full, batch_size):
    made = calibrate(model, ROWS, COLLATE, full=full, batch_size=batch_size)
    expected = by_hand(model, alone(ROWS), made)
    assert len(made) == 14
    assert made.tokens == 75
    assert made.full == full
    for path, moment in made.items():
        wanted = expected[path] if full else expected[path].diagonal()
        assert moment.dtype == torch.float32
        assert moment.shape == wanted.shape
        # products of fp32 activations and their sum over a batch's 75 positions, rounded once more at the end
        assert apart(moment, wanted) < 1e-6
        assert not full or torch.equal(moment, moment.T)


def test_layers_that_read_the_same_tensor_share_one_moment(model, tmp_path):
    made = calibrate(model, ROWS, COLLATE, directory=tmp_path / "c")
    block = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
             ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]  # fmt: skip
    assert made.groups == tuple(
        tuple(f"model.layers.{at}.{name}" for name in names) for at in range(2) for names in block
    )
    files = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert files == [f"{at:04}.safetensors" for at in range(8)] + [NAME]
    assert torch.equal(made["model.layers.0.self_attn.q_proj"], made["model.layers.0.self_attn.v_proj"])
    assert not torch.equal(made["model.layers.0.self_attn.q_proj"], made["model.layers.0.self_attn.o_proj"])
    assert equal(made, calibrate(model, ROWS, COLLATE))


def test_the_layers_are_those_that_would_be_quantized(model):
    assert "lm_head" not in calibrate(model, ROWS[:1], COLLATE)
    made = calibrate(model, ROWS, COLLATE, skip=["*.mlp.*", "o_proj"], include=["lm_head"])
    assert {path.rpartition(".")[2] for path in made} == {"q_proj", "k_proj", "v_proj", "lm_head"}
    assert apart(made["lm_head"], by_hand(model, alone(ROWS), ["lm_head"])["lm_head"]) < 1e-6
    assert not hasattr(tiny_lm.model().model.layers[0].mlp.up_proj, "qft_reason")
    assert {layer.reason for layer in qft.report(model).dense} == {"not asked for"}  # looked at, and left alone


class Several(nn.Module):
    """A layer used twice, two layers with one weight, one that reads what another has changed, and one never used."""

    def __init__(self):
        super().__init__()
        self.twice, self.one, self.other, self.before, self.after, self.idle = (nn.Linear(8, 8) for _ in range(6))
        self.other.weight = self.one.weight

    def forward(self, x):
        first = self.twice(x)
        second = self.twice(first)
        changed = self.one(x) + self.other(x) + self.other(second)
        self.one(changed)
        self.before(changed)
        return self.after(changed.mul_(3))


def test_a_weight_has_the_moment_of_all_it_reads(caplog):
    several = Several()
    x = torch.randn(6, 5, 8)
    with torch.no_grad():
        first = several.twice(x)
        second = several.twice(first)
        changed = several.one(x) + several.other(x) + several.other(second)

    def moment(*tensors):
        every = torch.cat([tensor.reshape(-1, 8) for tensor in tensors]).double()
        return every.T @ every / len(every)

    def stack(some):
        return {"x": torch.stack([row["x"] for row in some])}

    made = calibrate(several, [{"x": row} for row in x], stack, batch_size=2)
    assert made.groups == (("twice",), ("one", "other"), ("before",), ("after",))
    assert made.tokens == 6  # rows: they are no text
    read = {"twice": (x, first), "one": (x, second, changed), "before": (changed,), "after": (3 * changed,)}
    for path, tensors in read.items():
        assert apart(made[path], moment(*tensors)) < 1e-6
    assert "1 layers read nothing in the first batch and are not calibrated: idle" in caplog.messages
    with pytest.raises(KeyError, match="idle has no second moment"):
        made["idle"]


def test_an_encoder_counts_every_first_token_of_its_pooler():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=tiny_lm.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=64,
        )  # fmt: skip
        bert = BertModel(config).eval()
    made = calibrate(bert, ROWS, COLLATE, batch_size=3)
    expected = by_hand(bert, alone(ROWS), made)
    assert len(made) == 13
    for path, moment in made.items():
        assert apart(moment, expected[path]) < 1e-6


class Flat(nn.Module):
    """Positions of all rows in one dimension, as models that pack them have."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(tiny_lm.VOCABULARY, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        return self.layer(self.embedding(input_ids).flatten(0, 1))


def test_padding_does_not_count_where_rows_are_flattened():
    flat = Flat()
    every = flat.embedding(torch.cat([row["input_ids"] for row in ROWS])).detach().double()
    assert apart(calibrate(flat, ROWS, COLLATE)["layer"], every.T @ every / len(every)) < 1e-6


def test_conv1d_reads_as_a_linear_layer_does():
    config = GPT2Config(vocab_size=tiny_lm.VOCABULARY, n_positions=64, n_embd=32, n_layer=1, n_head=2,
                        bos_token_id=None, eos_token_id=tiny_lm.END)  # fmt: skip
    gpt2 = GPT2LMHeadModel(config).eval()
    made = calibrate(gpt2, ROWS, COLLATE)
    assert {path: moment.shape[0] for path, moment in made.items()} == {
        "transformer.h.0.attn.c_attn": 32, "transformer.h.0.attn.c_proj": 32,
        "transformer.h.0.mlp.c_fc": 32, "transformer.h.0.mlp.c_proj": 128,
    }  # fmt: skip


def test_sensitivity_is_the_mean_square_of_the_gradient(model):
    outputs, squares = {}, {}
    made = calibrate(model, ROWS, COLLATE, gradients=True, batch_size=1)
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _, __, y, path=path: outputs.update({path: y}))
        for path in made
    ]
    for row in ROWS:
        ids = row["input_ids"][None]
        # transformers' loss is the mean over all labels but the first; it is to count for all of them
        loss = nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]) * ids.numel()
        for path, gradient in zip(outputs, torch.autograd.grad(loss, [*outputs.values()]), strict=True):
            squares[path] = squares.get(path, 0.0) + gradient.double().square().mean(-1).sum().item()
    for hook in hooks:
        hook.remove()
    assert made.sensitivity == pytest.approx({path: square / made.tokens for path, square in squares.items()}, rel=1e-5)
    padded = calibrate(model, ROWS, COLLATE, gradients=True).sensitivity
    # in a batch of its own a label counts n / (n − 1) of a row of n: at most 3 / 2 here, for 3 of 75 labels
    assert padded == pytest.approx(made.sensitivity, rel=0.2)


def test_gradients_leave_the_model_and_the_moments_alone(model):
    one = calibrate(model, ROWS[2:3], COLLATE, gradients=True)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    without = calibrate(model, ROWS[2:3], COLLATE)
    assert without.sensitivity == {}
    assert equal(one, without)


def test_gradients_can_follow_later_and_are_kept(model, tmp_path):
    calibrate(model, ROWS, COLLATE, directory=tmp_path)
    assert Calibration.load(tmp_path).sensitivity == {}
    made = calibrate(model, ROWS, COLLATE, directory=tmp_path, gradients=True)
    assert Calibration.load(tmp_path).sensitivity == made.sensitivity != {}
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    for gradients in (True, False):
        again = calibrate(model, ROWS, COLLATE, directory=tmp_path, gradients=gradients)
        assert again.sensitivity == made.sensitivity
    hook.remove()
    assert not calls


def test_gradients_need_a_loss_of_labels(model):
    given = {"input": torch.ones(1, 4), "labels": torch.ones(1, 4)}
    with pytest.raises(ValueError, match="Lossless computes no loss of labels"):
        calibrate(Lossless(), [given], lambda some: some[0], gradients=True)
    unlabelled = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in ROWS]
    with pytest.raises(ValueError, match="the rows hold no labels"):
        calibrate(model, unlabelled, COLLATE, gradients=True)


class Lossless(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, input, labels=None):
        return self.layer(input)


# ------------------------------------------------------------------------------------------------ memory and passes


def test_sums_stay_within_the_memory_and_the_result_does_not_depend_on_it(model):
    one = calibrate(model, ROWS, COLLATE, batch_size=2)
    held = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda *_: held.append(sum(t.nbytes for t in gc.get_objects() if _is_sum(t)))
    )
    many = calibrate(model, ROWS, COLLATE, batch_size=2, memory=LARGEST)
    hook.remove()
    assert 0 < max(held) <= LARGEST
    assert len(held) == 1 + 3 * 6  # the survey, then 3 batches of 6 passes: 64² + 64² fit together, 96² alone
    assert equal(one, many)


def _is_sum(thing):
    square = type(thing) is torch.Tensor and thing.dim() == 2 and thing.shape[0] == thing.shape[1]
    return square and thing.dtype == torch.float64


def test_a_pass_ends_with_the_last_layer_it_serves(model):
    ran = []
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
        for path in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head")
    ]
    calibrate(model, ROWS, COLLATE, memory=LARGEST)
    for hook in hooks:
        hook.remove()
    counts = [ran.count(path) for path in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head")]
    assert counts == [4, 1, 1]  # the survey, and 3 of 6 passes; none needs what the last layer makes


def test_a_sum_that_cannot_fit_is_refused(model):
    with pytest.raises(ValueError, match=r"down_proj takes 73728 bytes, more than memory=73727; give it that much"):
        calibrate(model, ROWS, COLLATE, memory=LARGEST - 1)
    calibrate(model, ROWS, COLLATE, memory=LARGEST - 1, full=False)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("calls", "passes", "parts"), [(1, 0, 0), (3, 0, 0), (4, 1, 2), (9, 2, 3), (18, 5, 7)], ids=str
)
def test_killed_and_resumed_it_ends_with_the_same_bits(model, tmp_path, calls, passes, parts):
    """After so many forward calls: a survey, then passes of 3, over q with o, gate, and down of each block."""
    options = {"batch_size": 2, "memory": LARGEST}
    calibrate(model, ROWS, COLLATE, directory=tmp_path / "whole", **options)
    made = []

    def die(*_):
        if len(made) == calls:
            raise Killed
        made.append(1)

    hook = model.register_forward_pre_hook(die)
    with pytest.raises(Killed):
        calibrate(model, ROWS, COLLATE, directory=tmp_path / "killed", **options)
    hook.remove()
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == parts
    with pytest.raises(ValueError, match=f"holds {parts} of the 8 parts of a calibration that was interrupted"):
        Calibration.load(tmp_path / "killed")
    made.clear()
    hook = model.register_forward_pre_hook(lambda *_: made.append(1))
    calibrate(model, ROWS, COLLATE, directory=tmp_path / "killed", **options)
    hook.remove()
    assert len(made) == 3 * (6 - passes)  # no second survey, no pass twice
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_calibration_is_not_made_again(model, tmp_path):
    made = calibrate(model, ROWS, COLLATE, directory=tmp_path / "c")
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = calibrate(model, ROWS, COLLATE, directory=tmp_path / "c")
    hook.remove()
    assert not calls
    loaded = Calibration.load(tmp_path / "c")
    assert equal(again, made)
    assert equal(loaded, made)
    assert (loaded.tokens, loaded.full, loaded.groups) == (made.tokens, made.full, made.groups)


@pytest.mark.parametrize("opened", ["load", "calibrate"])
def test_a_kill_while_files_are_moved_to_their_places_loses_none(model, tmp_path, opened):
    made = calibrate(model, ROWS, COLLATE, directory=tmp_path)
    (tmp_path / WRITTEN).mkdir()
    for name in (NAME, "0003.safetensors"):
        (tmp_path / name).rename(tmp_path / WRITTEN / name)
    if opened == "calibrate":
        calibrate(model, ROWS, COLLATE, directory=tmp_path)
    assert equal(Calibration.load(tmp_path), made)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"rows": rows(20, 3, 33, 11, 8, seed=1)}, "other rows"),
        ({"rows": ROWS[:4]}, "other rows"),
        ({"model": tiny_lm.model(seed=1)}, "a model with other weights"),
        ({"skip": ["o_proj"]}, "a model with other layers, or of another choice of them"),
        ({"full": False}, "whole matrices"),
    ],
    ids=["rows", "fewer", "weights", "layers", "diagonal"],
)
def test_a_directory_of_another_calibration_is_refused(model, tmp_path, changed, reason):
    calibrate(model, ROWS, COLLATE, directory=tmp_path)
    before = contents(tmp_path)
    given = {"model": model, "rows": ROWS, **changed}
    with pytest.raises(ValueError, match=f"holds a calibration of {reason}; name another directory"):
        calibrate(given.pop("model"), given.pop("rows"), COLLATE, directory=tmp_path, **given)
    assert contents(tmp_path) == before


def test_a_directory_of_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        calibrate(model, ROWS, COLLATE, directory=tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"holds no calibration.json; give a directory written by qft calibrate"
    ):
        Calibration.load(tmp_path)
    assert contents(tmp_path) == {"precious.txt": b"mine"}


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"sources": 1}'])
def test_a_damaged_description_is_named(model, tmp_path, text):
    calibrate(model, ROWS[:1], COLLATE, directory=tmp_path)
    (tmp_path / NAME).write_text(text)
    for use in (lambda: Calibration.load(tmp_path), lambda: calibrate(model, ROWS[:1], COLLATE, directory=tmp_path)):
        with pytest.raises(qft.FormatError, match=r"calibration.json is damaged; delete"):
            use()


def test_a_damaged_moment_is_named_where_it_is_read(model, tmp_path):
    calibrate(model, ROWS[:1], COLLATE, directory=tmp_path)
    part = tmp_path / "0001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    loaded = Calibration.load(tmp_path)
    loaded["model.layers.0.self_attn.q_proj"]
    with pytest.raises(qft.FormatError, match=r"0001.safetensors has changed"):
        loaded["model.layers.0.self_attn.o_proj"]
    part.unlink()
    with pytest.raises(qft.FormatError, match=r"0001.safetensors is missing"):
        loaded["model.layers.0.self_attn.o_proj"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_is_named(value):
    broken = tiny_lm.model()
    with torch.no_grad():
        broken.model.layers[1].input_layernorm.weight[5] = value
    with pytest.raises(ValueError, match=r"input of model.layers.1.self_attn.q_proj is NaN or infinite in rows 0 to 1"):
        calibrate(broken, ROWS, COLLATE, batch_size=2)


class Fickle(nn.Module):
    """Two layers that share their input for rows of ones alone."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.one(x) + self.other(x if (x == 1).all() else x + 1)


def test_layers_that_stop_sharing_are_refused():
    given = [{"x": torch.ones(1, 4)}, {"x": torch.zeros(1, 4)}]
    with pytest.raises(
        ValueError, match=r"one, other: 2 calls read 2 tensors in rows 1 to 1, and 2 read 1 in the first"
    ):
        calibrate(Fickle(), given, lambda some: some[0], batch_size=1)


def test_nothing_to_calibrate_is_refused(model):
    with pytest.raises(ValueError, match="holds no linear layer to calibrate"):
        calibrate(nn.Sequential(nn.ReLU()), ROWS, COLLATE)
    with pytest.raises(ValueError, match="at least one row"):
        calibrate(model, [], COLLATE)
    with pytest.raises(ValueError, match="batch_size=0"):
        calibrate(model, ROWS, COLLATE, batch_size=0)
    with pytest.raises(ValueError, match="'nowhere' names no layer"):
        calibrate(model, ROWS, COLLATE, skip=["nowhere"])
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"every position that .*q_proj reads is padding"):
        calibrate(model, ROWS[:2], lambda some: {"input_ids": ids, "attention_mask": torch.zeros_like(ids)})


# ------------------------------------------------------------------------------------------------ what is left behind


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    used = tiny_lm.model().train()
    used.model.layers[0].eval()
    used.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    modes = {name: module.training for name, module in used.named_modules()}
    if fails:
        used.model.layers[1].input_layernorm.weight.data[5] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            calibrate(used, ROWS, COLLATE)
    else:
        calibrate(used, ROWS, COLLATE)
    assert {name: module.training for name, module in used.named_modules()} == modes
    assert not any(module._forward_pre_hooks for module in used.modules())
    assert torch.is_grad_enabled()
    assert [name for name, p in used.named_parameters() if not p.requires_grad] == ["model.layers.1.mlp.up_proj.weight"]
    assert all(p.grad is None for p in used.parameters())


def test_dropout_and_labels_stay_out_of_it():
    class Learner(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.layer = nn.Dropout(0.5), nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.drop(x))  # takes no labels

    given = [{"x": torch.ones(4), "labels": torch.ones(4)}]
    made = calibrate(Learner(), given, lambda some: {name: torch.stack([r[name] for r in some]) for name in some[0]})
    assert torch.equal(made["layer"], torch.ones(4, 4))


def test_a_product_whose_halves_round_apart_is_made_symmetric():
    """As some libraries' do at some shapes; a start may read either half."""
    moment = SecondMoment(Source(("layer",), 1, 1, 2), full=True)
    moment.total, moment.rows = torch.tensor([[4.0, 2.0], [2.5, 8.0]], dtype=torch.float64), 2
    assert torch.equal(moment.mean(), torch.tensor([[2.0, 1.25], [1.25, 4.0]]))
