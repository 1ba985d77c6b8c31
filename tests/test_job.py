"""One model directory in, one out, killed at any moment on the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_lm
import torch

import qft
from qft.training import losses
from qft.training.finetune import Recipe
from qft.training.job import Start, open_quantized, tune

DRIVER = Path(__file__).with_name("resume_driver.py")


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("the same few words again and again, and then some others. " * 30)
    return path


def recipe(method="lora", **changed):
    return Recipe(**{"method": method, "steps": 4, "batch_size": 2, "learning_rate": 1e-3, "save_every": 2, **changed})


def contents(directory):
    """Every file below a directory, by relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_killed_at_five_random_moments_a_job_ends_with_the_same_bits(dense, data, tmp_path):
    driver = [sys.executable, str(DRIVER), str(dense), str(data), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(DRIVER.parent.parent)}
    ended = subprocess.run(driver, capture_output=True, text=True, env=environment)
    assert [line[0] for line in ended.stdout.splitlines()] == ["0"] * 5, ended.stderr
    whole = contents(tmp_path / "whole")
    assert not any(name.startswith("run") for name in whole)
    for index in range(5):
        assert contents(tmp_path / str(index)) == whole


def test_a_kill_while_a_checkpoint_is_written_is_named(dense, data, tmp_path, monkeypatch):
    """The moment between a checkpoint's files and its seal, which a random one may miss."""
    from qft.disk import checkpoint

    sealed = []

    def die_before_the_third(directory):
        if len(sealed) == 3:  # the start and two checkpoints
            raise KeyboardInterrupt
        seal(directory)
        sealed.append(directory)

    seal = checkpoint.seal
    monkeypatch.setattr(checkpoint, "seal", die_before_the_third)
    start = Start(dense, "nf4 g64 f32", rank=4)
    job = start, tmp_path / "out", data, recipe(steps=6)
    with pytest.raises(KeyboardInterrupt):
        tune(*job, block_size=32)
    monkeypatch.setattr(checkpoint, "seal", seal)
    done = tune(*job, block_size=32)
    incomplete = tmp_path / "out" / "run" / "checkpoints" / "checkpoint-6"
    assert done["notes"] == [f"{incomplete} is incomplete and was skipped: complete.json is missing"]
    assert done["resumed from step"] == 4
    assert contents(tmp_path / "out") == contents_of_a_whole_run(start, data, tmp_path)


def contents_of_a_whole_run(start, data, tmp_path):
    tune(start, tmp_path / "whole", data, recipe(steps=6), block_size=32)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("method", ["lora", "scales"])
def test_the_tuned_model_is_what_was_trained(dense, data, tmp_path, method):
    done = tune(
        Start(dense, "nf4 g64 f16", rank=4), tmp_path / "out", data, recipe(method), block_size=32, held_out=0.2
    )
    model = qft.load(tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, qft.QuantLinear)]
    assert {layer.lora_rank for layer in layers} == {4 if method == "lora" else 0}
    assert {str(layer.format) for layer in layers} == {"nf4 g64 f16" if method == "lora" else "nf4 g64 f32"}
    assert done["perplexity after"] != done["perplexity before"]
    assert (tmp_path / "out" / "task.safetensors").exists() == (method == "scales")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    run = losses.last_run(tmp_path / "out")
    assert [step for step, _ in run] == [1, 2, 3, 4]
    assert done["training loss"] == pytest.approx(sum(loss for _, loss in run) / 4)


def test_tuned_scales_round_back_on_request(dense, data, tmp_path):
    job = Start(dense, "int4 channel f16"), tmp_path / "out", data, recipe("scales")
    done = tune(*job, block_size=32, rounded=True)
    assert 0 < done["largest rounding error of scales"] <= 2**-11  # half a unit in the last place of fp16
    formats = {str(m.format) for m in qft.load(tmp_path / "out").modules() if isinstance(m, qft.QuantLinear)}
    assert formats == {"int4 channel f16"}


def test_a_task_turns_the_base_into_the_tuned_model(dense, data, tmp_path):
    qft.save(open_quantized(Start(dense, "nf4 g64 f32"), lora=False), tmp_path / "base")
    tiny_lm.tokenizer().save_pretrained(tmp_path / "base")
    tune(Start(tmp_path / "base"), tmp_path / "out", data, recipe("scales"), block_size=32)
    base, tuned = qft.load(tmp_path / "base"), qft.load(tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert not torch.equal(base(ids).logits, tuned(ids).logits)
        qft.load_scales(base, tmp_path / "out" / "task.safetensors")
        assert torch.equal(base(ids).logits, tuned(ids).logits)


def test_a_quantized_model_gets_a_lora_where_it_has_none(dense, tmp_path):
    qft.save(open_quantized(Start(dense, "nf2 g64 f32", "loftq", rank=2), lora=True), tmp_path / "loftq")
    qft.save(open_quantized(Start(dense, "nf2 g64 f32"), lora=False), tmp_path / "bare")
    ranks = {
        name: {m.lora_rank for m in open_quantized(Start(tmp_path / name, rank=4), lora=True).modules()
               if isinstance(m, qft.QuantLinear)}
        for name in ("loftq", "bare")
    }  # fmt: skip
    assert ranks == {"loftq": {2}, "bare": {4}}


def test_rows_that_lost_their_end_are_said(dense, tmp_path, caplog):
    data = tmp_path / "long.jsonl"
    data.write_text('{"text": "longer than eight tokens"}\n{"text": "short"}')
    done = tune(Start(dense, "nf4 g64 f32", rank=4), tmp_path / "out", data, recipe(steps=1), block_size=8)
    assert done["notes"] == ["1 rows were longer than the block size and lost their end"]
    assert done["notes"][0] in caplog.messages


def test_a_full_directory_is_left_alone(dense, data, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; name a new directory"):
        tune(Start(dense, "nf4 g64 f32"), tmp_path, data, recipe(), block_size=32)
    assert contents(tmp_path) == {"precious.txt": b"mine"}


def test_another_start_does_not_go_on(dense, data, tmp_path):
    class StopError(Exception):
        pass

    def stop(what, done, total):
        if (what, done) == ("training", 3):
            raise StopError

    with pytest.raises(StopError):
        tune(Start(dense, "nf4 g64 f32", rank=4), tmp_path / "out", data, recipe(), block_size=32, progress=stop)
    with pytest.raises(ValueError, match="holds a run with format nf4 g64 f32, now nf2 g64 f32"):
        tune(Start(dense, "nf2 g64 f32", rank=4), tmp_path / "out", data, recipe(), block_size=32)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"format": None}, "is not quantized; name a format"),
        ({"format": "nf5 g64 f32"}, "the nearest is 'nf4 g64 f32'"),
        ({"format": "nf4 g64 f32", "init": "svd"}, "init='svd' is unknown"),
        ({"model": Path("nowhere"), "format": "nf4 g64 f32"}, "nowhere is no directory"),
    ],
)
def test_a_start_that_is_none_is_refused(dense, start, message):
    with pytest.raises((ValueError, OSError), match=message):
        open_quantized(Start(**{"model": dense, **start}), lora=True)


def test_rows_beyond_the_models_positions_are_refused(dense, data, tmp_path):
    with pytest.raises(ValueError, match="block size 129 is beyond the model's 128 positions"):
        tune(Start(dense, "nf4 g64 f32", rank=4), tmp_path / "out", data, recipe(), block_size=129)
