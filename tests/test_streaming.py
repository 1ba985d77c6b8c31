"""What is streamed is what quantize_model and save write, bit for bit, whatever interrupts it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny_lm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import qft
from qft.disk import files, manifest, shards, streaming, tensor_file
from qft.disk.dense_checkpoint import DenseCheckpoint, Entry
from qft.disk.io import load, save
from qft.disk.manifest import Manifest
from qft.disk.pretrained import load_model, load_tokenizer
from qft.disk.read_ahead import BUFFERS, ReadAhead
from qft.disk.streaming import quantize_checkpoint
from qft.format import FormatError

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import streaming as bench
import streaming_page

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
SMALL = 20_000  # bytes of a shard: several of them
IDS = torch.arange(20)[None]


def llama(**changes) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, "intermediate_size": 96, **changes}))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def qwen2() -> nn.Module:
    """With biases, in half precision."""
    config = transformers.Qwen2Config(**TINY, intermediate_size=96, tie_word_embeddings=False)
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def mixtral() -> nn.Module:
    """Whose experts are many tensors in a file and two in memory."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TINY, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)
    )


def mamba() -> nn.Module:
    """Whose head faces its parent with a dtype."""
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=96, state_size=8)
    )


HEAD = {"lm_head": "int8 g64"}
CASES = {
    "plain": (llama, {"fmt": "nf4 g64 f32"}),
    "lora": (llama, {"fmt": "nf4 g64 dq", "rank": 4, "alpha": 8, "dropout": 0.1, "rslora": True}),
    "loftq": (qwen2, {"fmt": "nf2 g64 f16", "init": "loftq", "rank": 4, "iters": 2}),
    "search, asymmetric": (qwen2, {"fmt": "int3 g32 f16 zero", "init": "search"}),
    "plan": (llama, {"fmt": None, "formats": {"*.0.*": "nf3 g64", "down_proj": "int8 g64"}}),
    "skip": (llama, {"fmt": "nf4 g64", "skip": ["q_proj", "*.1.mlp.*"]}),
    "tied head": (lambda: llama(tie_word_embeddings=True), {"fmt": "nf4 g64", "rank": 2, "formats": HEAD}),
    "tied head and embedding": (
        lambda: llama(tie_word_embeddings=True),
        {"fmt": "nf4 g64", "rank": 2, "formats": {**HEAD, "embed_tokens": "int8 g64"}},
    ),
    "conv1d": (gpt2, {"fmt": "nf4 g64 f16", "rank": 2}),
    "experts": (mixtral, {"fmt": "nf4 g64 dq", "rank": 2}),
    "dense experts": (mixtral, {"fmt": "nf4 g64", "skip": ["experts"]}),
    "a face": (mamba, {"fmt": "nf4 g64", "formats": HEAD}),
}


def dense(build: Callable[[], nn.Module], folder: Path, **how) -> Path:
    torch.manual_seed(1)
    build().save_pretrained(folder, **how)
    return folder


def in_memory(source: Path, out: Path, dtype: str = "auto", **how) -> nn.Module:
    torch.manual_seed(2)
    model = qft.quantize_model(load_model(source, dtype), **how)
    save(model, out)
    return model


def streamed(source: Path, out: Path, **how):
    torch.manual_seed(2)
    return quantize_checkpoint(source, out, **{"shard_bytes": SMALL, **how})


def assert_same(one: Path, other: Path) -> None:
    """The same model, tensor for tensor and word for word, in however many files."""
    a, b = Manifest.read(one), Manifest.read(other)
    for name in ("tensors", "layers", "tied", "orders", "buffers", "files", "architecture", "builds_itself"):
        assert getattr(a, name) == getattr(b, name), name
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return dense(llama, tmp_path_factory.mktemp("source") / "dense")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """What a call that nothing interrupts writes."""
    out = tmp_path_factory.mktemp("whole") / "q"
    streamed(source, out, fmt="nf4 g64 f32", rank=4)
    return out


# ------------------------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("name", CASES)
def test_what_is_streamed_is_what_is_quantized_in_memory(name: str, tmp_path: Path) -> None:
    build, how = CASES[name]
    source = dense(build, tmp_path / "dense", max_shard_size="60KB")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    report = streamed(source, tmp_path / "a", **how)
    model = in_memory(source, tmp_path / "b", **how)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert report == qft.report(model)
    loaded = load(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_what_stays_dense_is_that_asked_for(dtype: str, tmp_path: Path) -> None:
    source = dense(qwen2, tmp_path / "dense")
    streamed(source, tmp_path / "a", fmt="nf4 g64", dtype=dtype)
    in_memory(source, tmp_path / "b", dtype, fmt="nf4 g64")
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_calibrated_start_is_the_same(source: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": torch.randint(0, 96, (12,)), "labels": torch.randint(0, 96, (12,))} for _ in range(8)]

    def collate(batch):
        return {"input_ids": torch.stack([row["input_ids"] for row in batch])}

    moments = qft.calibrate(load_model(source), rows, collate, directory=tmp_path / "c")
    how = {"fmt": "nf3 g64 f32", "init": "qera_exact", "rank": 4}
    streamed(source, tmp_path / "a", calibration=tmp_path / "c", **how)
    in_memory(source, tmp_path / "b", calibration=moments, **how)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_the_memory_order_of_what_is_converted_is_kept(tmp_path: Path, monkeypatch) -> None:
    made = Entry.made

    def turned(entry, model, tensors):
        found = made(entry, model, tensors)
        return {name: tensor.mT.contiguous().mT if tensor.dim() == 3 else tensor for name, tensor in found.items()}

    monkeypatch.setattr(Entry, "made", turned)
    source = dense(mixtral, tmp_path / "dense")
    streamed(source, tmp_path / "a", fmt="nf4 g64", skip=["experts"])
    assert Manifest.read(tmp_path / "a").orders["model.layers.1.mlp.experts.down_proj"] == (0, 2, 1)
    in_memory(source, tmp_path / "b", fmt="nf4 g64", skip=["experts"])
    assert Manifest.read(tmp_path / "a").tensors == Manifest.read(tmp_path / "b").tensors


def test_pieces_of_large_tensors_are_the_same(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "PIECE", 1 << 9)
    monkeypatch.setattr(shards, "SMALL", 1 << 7)
    streamed(source, tmp_path / "a", fmt="nf4 g64")
    in_memory(source, tmp_path / "b", fmt="nf4 g64")
    assert_same(tmp_path / "a", tmp_path / "b")


def test_names_of_a_bare_base_model_are_understood(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    old = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(old, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    streamed(tmp_path / "dense", tmp_path / "a", fmt="nf4 g64")
    in_memory(source, tmp_path / "b", fmt="nf4 g64")
    assert Manifest.read(tmp_path / "a").tensors == Manifest.read(tmp_path / "b").tensors


@pytest.mark.parametrize("equal", [True, False])
def test_what_the_files_hold_twice_is_tied_if_it_is_equal(equal: bool, tmp_path: Path) -> None:
    source = dense(lambda: llama(tie_word_embeddings=True), tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.0 if equal else 0.5)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    streamed(source, tmp_path / "a", fmt="nf4 g64")
    in_memory(source, tmp_path / "b", fmt="nf4 g64")
    made = Manifest.read(tmp_path / "a")
    assert made.tensors == Manifest.read(tmp_path / "b").tensors
    assert ("lm_head.weight" in made.tied) is equal


# ------------------------------------------------------------------------------------------------------ the directory


def test_files_are_small_indexed_and_summed(whole: Path) -> None:
    made = Manifest.read(whole)
    index = json.loads((whole / "model.safetensors.index.json").read_bytes())
    assert len(made.shards) > 2
    held = {}
    for file, shard in made.shards.items():
        assert hashlib.sha256((whole / file).read_bytes()).hexdigest() == shard.sha256
        tensors = load_file(whole / file)
        assert tensors.keys() == set(shard.tensors)
        held.update(dict.fromkeys(tensors, file))
        assert sum(tensor.nbytes for tensor in tensors.values()) <= SMALL or len({n.rsplit(".", 1)[0] for n in held})
    assert index["weight_map"] == held
    assert not any(path.name.startswith(".") for path in whole.iterdir())


def test_one_file_needs_no_index(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "q", "nf4 g64", tokenizer=tiny_lm.tokenizer())
    assert (tmp_path / "q" / "model.safetensors").is_file()
    assert not (tmp_path / "q" / "model.safetensors.index.json").exists()
    assert load_tokenizer(tmp_path / "q").eos_token == "<end>"
    assert "tokenizer.json" in Manifest.read(tmp_path / "q").tokenizer
    load(tmp_path / "q")


def test_transformers_opens_it(whole: Path) -> None:
    opened = transformers.AutoModelForCausalLM.from_pretrained(whole)
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, load(whole)(IDS).logits)


def test_saving_over_it_leaves_no_file_behind(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "q")
    model = load(tmp_path / "q")
    save(model, tmp_path / "q")
    assert [path.name for path in (tmp_path / "q").glob("model*")] == ["model.safetensors"]
    assert Manifest.read(tmp_path / "q").tensors == Manifest.read(whole).tensors


def test_a_file_that_is_missing_or_changed_is_named(whole: Path, tmp_path: Path) -> None:
    second = sorted(whole.glob("model-*"))[1].name
    shutil.copytree(whole, tmp_path / "q")
    content = bytearray((tmp_path / "q" / second).read_bytes())
    content[-1] ^= 1
    (tmp_path / "q" / second).write_bytes(content)
    with pytest.raises(FormatError, match=rf"in \S+{second} has changed since it was written"):
        load(tmp_path / "q")
    (tmp_path / "q" / second).unlink()
    with pytest.raises(FormatError, match=rf"{second} is missing; copy the directory again"):
        load(tmp_path / "q")


def rewritten(whole: Path, out: Path, change: Callable[[dict], None]) -> Path:
    """With another qft.json, sealed."""
    shutil.copytree(whole, out)
    body = json.loads((out / "qft.json").read_bytes())
    del body["sha256"]
    change(body)
    (out / "qft.json").write_text(json.dumps(body | {"sha256": manifest._digest(body)}))
    return out


@pytest.mark.parametrize(
    "change",
    [
        lambda body: next(iter(body["shards"].values()))["tensors"].pop(),
        lambda body: body["shards"].update({"../x.safetensors": {"sha256": "", "tensors": []}}),
        lambda body: body["shards"].update({"x.safetensors": {"sha256": "", "tensors": ["lm_head.weight"]}}),
        lambda body: body.update(shards=[1]),
    ],
    ids=["a tensor in no file", "outside", "a tensor in two files", "a list"],
)
def test_files_that_cannot_be_are_refused(change: Callable[[dict], None], whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"qft\.json is damaged"):
        load(rewritten(whole, tmp_path / "q", change))


# ------------------------------------------------------------------------------------------------------ interruptions

# Starts a call again and again, each time in a child that is killed a few jobs later; prints what it then left.
KILLER = """
import json, os, signal, sys, time
from pathlib import Path
import accelerate, torch
torch.set_num_threads(1)  # a forked child has no other
from transformers import LlamaForCausalLM
from qft.format import FormatError
from qft.disk.io import load
from qft.disk.streaming import quantize_checkpoint

source, out = sys.argv[1], Path(sys.argv[2])
journal = out / ".qft-streaming" / "journal.jsonl"

def lines():
    return journal.read_bytes().splitlines(keepends=True) if journal.is_file() else []

seen = []
for seed in (2, 3, 4):  # another state of the generator each time: the journal has the one that counts
    before = len(lines())
    child = os.fork()
    if child == 0:
        torch.manual_seed(seed)
        quantize_checkpoint(source, out, "nf4 g64 f32", rank=4, shard_bytes=20_000)
        os._exit(0)
    while len(lines()) < before + 4 and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        said = str(load(out))
    except FormatError as error:
        said = str(error)
    seen.append([ended, said, [line.decode() for line in lines() if line.endswith(b"\\n")]])
print(json.dumps(seen))
"""


def test_killed_and_repeated_it_goes_on_where_it_was(source: Path, whole: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-c", KILLER, str(source), str(tmp_path / "q")]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kept: list[str] = []
    for ended, said, lines in json.loads(run.stdout):
        assert ended == -signal.SIGKILL
        assert said.endswith("holds a model that qft quantize has not finished; repeat that command, and it goes on")
        assert lines[: len(kept)] == kept
        assert len(lines) >= len(kept) + 3
        kept = lines
    streamed(source, tmp_path / "q", fmt="nf4 g64 f32", rank=4)
    assert {path.name: path.read_bytes() for path in (tmp_path / "q").iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


class StoppedError(Exception):
    pass


def interrupted(source: Path, out: Path, monkeypatch, after: int, error: type[Exception] = StoppedError, **how) -> int:
    """Stop a call after that many jobs; how many lines its journal then has."""
    store, calls = streaming._Run._store, []

    def stop(*arguments) -> None:
        calls.append(1)
        if len(calls) > after:
            raise error("no space left")
        store(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(streaming._Run, "_store", stop)
        with pytest.raises(error) as caught:  # which keeps the call's frames alive
            streamed(source, out, **{"fmt": "nf4 g64 f32", "rank": 4, **how})
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("qft-")], caught
    journal = out / files.STREAMING / streaming.JOURNAL
    return len(journal.read_bytes().splitlines())


@pytest.mark.parametrize("after", [0, 1, 5, 13, 20])
def test_an_error_leaves_what_is_done(after: int, source: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    assert interrupted(source, tmp_path / "q", monkeypatch, after, OSError) == 1 + after
    done: list[str] = []
    store = streaming._Run._store

    def note(run, writer, journal, values, line, release) -> None:
        done.extend(values)
        store(run, writer, journal, values, line, release)

    monkeypatch.setattr(streaming._Run, "_store", note)
    drawn: list[str] = []
    monkeypatch.setattr(streaming, "bar", lambda wanted, total: nullcontext(drawn.append))
    torch.manual_seed(9)
    report = quantize_checkpoint(source, tmp_path / "q", "nf4 g64 f32", rank=4, shard_bytes=SMALL)
    assert_same(tmp_path / "q", whole)
    made = Manifest.read(tmp_path / "q")
    assert drawn == [*made.layers]  # what was done before counts
    assert len(done) < len(made.tensors) if after else len(done) == len(made.tensors)
    assert [layer.errors for layer in report.quantized] == [
        weight.errors for layer in made.layers.values() for weight in layer.weights.values()
    ]


def test_what_changed_on_the_disk_is_written_again(source: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    lines = interrupted(source, tmp_path / "q", monkeypatch, 9)
    first = sorted((tmp_path / "q" / files.STREAMING / streaming.FILES).iterdir())[0]
    content = bytearray(first.read_bytes())
    content[-200] ^= 1
    first.write_bytes(content)
    with open(tmp_path / "q" / files.STREAMING / streaming.JOURNAL, "ab") as journal:
        journal.write(b'{"job": "half a li')
    assert interrupted(source, tmp_path / "q", monkeypatch, 0) < lines
    streamed(source, tmp_path / "q", fmt="nf4 g64 f32", rank=4)
    assert_same(tmp_path / "q", whole)
    assert {p.name for p in (tmp_path / "q").iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.parametrize("step", ["write_description", "commit", "rmtree"])
def test_the_last_steps_can_be_repeated(step: str, source: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    home = {"write_description": streaming.io, "commit": files, "rmtree": streaming.shutil}[step]

    def stop(*arguments, **options) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(home, step, stop)
        with pytest.raises(StoppedError):
            streamed(source, tmp_path / "q", fmt="nf4 g64 f32", rank=4, tokenizer=tiny_lm.tokenizer())
    how = {"fmt": "nf4 g64 f32", "rank": 4, "tokenizer": tiny_lm.tokenizer()}
    if step == "rmtree":  # it is whole already
        load(tmp_path / "q")
        with pytest.raises(FileExistsError, match="is not empty"):
            streamed(source, tmp_path / "q", **how)
    else:
        streamed(source, tmp_path / "q", **how)
    assert_same(tmp_path / "q", whole)
    assert "tokenizer.json" in Manifest.read(tmp_path / "q").tokenizer
    assert not (tmp_path / "q" / files.STREAMING).exists()


def test_other_settings_do_not_go_on(source: Path, tmp_path: Path, monkeypatch) -> None:
    interrupted(source, tmp_path / "q", monkeypatch, 3)
    with pytest.raises(ValueError, match="holds a run with format nf4 g64 f32, now nf3 g64 f32; use its settings"):
        streamed(source, tmp_path / "q", fmt="nf3 g64", rank=4)
    shutil.copytree(source, tmp_path / "dense")
    interrupted(tmp_path / "dense", tmp_path / "r", monkeypatch, 3)
    os.utime(tmp_path / "dense" / "model.safetensors")
    with pytest.raises(ValueError, match="holds a run with files"):
        streamed(tmp_path / "dense", tmp_path / "r", fmt="nf4 g64 f32", rank=4)


def test_a_full_directory_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine").touch()
    with pytest.raises(FileExistsError, match="is not empty; name a new directory"):
        streamed(source, tmp_path / "q", fmt="nf4 g64")
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["mine"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(source: Path, tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    streamed(source, tmp_path / "first", fmt="nf4 g64")
    needed = sum(path.stat().st_size for path in (tmp_path / "first").glob("*.safetensors"))
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(OSError, match=r"q needs 0\.000 GB and its disk has 0\.000 GB free; make room"):
        streamed(source, tmp_path / "q", fmt="nf4 g64")
    assert not (tmp_path / "q").exists()
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: usage(0, 0, needed))
    streamed(source, tmp_path / "q", fmt="nf4 g64")


# A disk that takes no more than 30 kB of a file, in the middle of a run whose reader waits for a buffer.
FULL = """
import resource, signal, sys
from qft import cli
from qft.disk import streaming
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write = streaming._Run.write

def limited(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    write(*arguments)

streaming._Run.write = limited
cli.main()
"""


@pytest.mark.slow
def test_a_full_disk_ends_the_command_in_a_line_and_it_goes_on_with_room(source: Path, tmp_path: Path, result) -> None:
    words = ["quantize", str(source), str(tmp_path / "q"), "--format", "nf4 g64 f32"]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL, *words], capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "File too large" in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "q" / "qft.json").exists()
    made = result(*words)
    assert made["out"] == str(tmp_path / "q")
    in_memory(source, tmp_path / "b", fmt="nf4 g64 f32")
    assert_same(tmp_path / "q", tmp_path / "b")


def test_the_command_takes_plans_patterns_and_a_dtype(source: Path, tmp_path: Path, result) -> None:
    how = ("--formats", "down_proj=int8 g64", "--skip", "q_proj", "--dtype", "bfloat16", "--rank", 2, "--init", "loftq")
    result("quantize", source, tmp_path / "q", "--format", "nf2 g64", *how)
    options = {"fmt": "nf2 g64", "formats": {"down_proj": "int8 g64"}, "skip": ["q_proj"], "rank": 2, "init": "loftq"}
    in_memory(source, tmp_path / "b", "bfloat16", **options)
    assert_same(tmp_path / "q", tmp_path / "b")


# ------------------------------------------------------------------------------------------------------ bad sources


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def with_value(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def with_config(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def shortened(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def indexed(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BAD = {
    "a tensor is missing": (
        without("model.norm.weight"),
        r"holds no model\.norm\.weight, which LlamaForCausalLM needs",
    ),
    "not a number": (with_value(torch.nan), r"model\.layers\.1\.mlp\.up_proj\.weight\[3, 5\] is nan"),
    "another shape": (with_config(intermediate_size=128), r"proj\.weight in \S+ is \[.*needs \[.*128"),
    "shortened": (shortened, r"model\.safetensors is damaged"),
    "a file is missing": (indexed("other.safetensors"), "other.safetensors is missing, which"),
    "outside": (indexed("../other.safetensors"), r"index\.json is damaged"),
    "pickled": (pickled, "pickled weights are not read, save them with save_pretrained first"),
    "quantized": (with_config(quantization_config={"quant_method": "gptq"}), "is quantized already, by gptq"),
    "a sequence to a sequence": (with_config(model_type="t5"), "this command needs a causal model"),
    "no causal model": (with_config(model_type="vit"), "transformers knows as no causal model"),
}


@pytest.mark.parametrize(("harm", "message"), BAD.values(), ids=BAD)
def test_a_source_that_is_no_model_is_one_sentence(
    harm: Callable[[Path], None], message: str, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "dense")
    harm(tmp_path / "dense")
    with pytest.raises((ValueError, OSError), match=message) as refusal:
        streamed(tmp_path / "dense", tmp_path / "q", fmt="nf4 g64")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "q" / "qft.json").exists()


OPTIONS = {
    "no format": ({"fmt": None}, "name a format"),
    "no such start": ({"init": "svd"}, "init='svd' is unknown"),
    "turns of none": ({"iters": 3}, "has no turns"),
    "no activations": ({"init": "gptq"}, "needs the layers' activations"),
    "no such layer": ({"skip": ["x"]}, "'x' names no layer"),
    "no such dtype": ({"dtype": "int8"}, "dtype 'int8' is unknown"),
    "a negative rank": ({"rank": -1}, "rank=-1 is negative"),
    "no room in a file": ({"shard_bytes": 0}, "shard_bytes=0 holds no tensor"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_bad_options_are_refused_before_anything_is_written(
    options: dict, message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        streamed(source, tmp_path / "q", **{"fmt": "nf4 g64", **options})
    assert not (tmp_path / "q").exists()


def test_tensors_without_a_place_are_named(source: Path, tmp_path: Path, caplog) -> None:
    shutil.copytree(source, tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    more = {"a.stray": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file({**tensors, **more}, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    streamed(tmp_path / "dense", tmp_path / "q", fmt="nf4 g64")
    assert "holds a.stray, for which LlamaForCausalLM has no place: left out" in caplog.text
    assert "inv_freq" not in caplog.text


# ------------------------------------------------------------------------------------------------------ the parts


def test_tensors_are_read_into_few_buffers_and_an_error_arrives(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(100 + i) for i in range(40)}
    tensor_file.write(tmp_path / "f", tensors, {})
    places = tensor_file.places(tmp_path / "f")
    spans = [[(places[name], 0, places[name].nbytes)] for name in tensors]
    homes, held = set(), []
    for (values, release), wanted in zip(ReadAhead(spans), tensors.values(), strict=True):
        assert torch.equal(values[0], wanted)
        homes.add(values[0].untyped_storage().data_ptr())
        held.append(release)
        if len(held) == BUFFERS - 1:
            held.pop(0)()
    assert len(homes) == BUFFERS
    part = ReadAhead([[(places["t0"], 8, 20)]])
    assert torch.equal(next(iter(part))[0][0], tensors["t0"][2:5])
    last = max(places.values(), key=lambda place: place.start)
    os.truncate(tmp_path / "f", (tmp_path / "f").stat().st_size - 4)
    with pytest.raises(FormatError, match="ends before its tensors do"):
        next(iter(ReadAhead([[(last, 0, last.nbytes)]])))


def test_leaving_early_ends_the_thread(tmp_path: Path) -> None:
    tensor_file.write(tmp_path / "f", {"t": torch.ones(4)}, {})
    place = tensor_file.places(tmp_path / "f")["t"]

    def leave() -> None:
        for number, _ in enumerate(ReadAhead([[(place, 0, place.nbytes)]] * 9)):
            if number == BUFFERS - 2:
                time.sleep(0.1)  # no buffer was given back, and one read waits for one by now
                return

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_every_tensor_lies_at_a_multiple_of_its_element() -> None:
    groups = [
        {f"{i}.odd": (torch.uint8, (11,)), f"{i}.half": (torch.float16, (3,)), f"{i}.wide": (torch.float32, (5, 2))}
        for i in range(9)
    ]
    layouts = shards.lay_out(groups, 200)
    assert len(layouts) == 3
    for layout in layouts:
        assert layout.size - len(layout.head) <= 200
        ends = [len(layout.head), *(stop for _, stop in layout.spans.values())]
        assert [start for start, _ in layout.spans.values()] == ends[:-1]
        for name, (start, _) in layout.spans.items():
            described = next(group[name] for group in groups if name in group)
            assert start % described[0].itemsize == 0
    assert len(shards.lay_out(groups, 1)) == 9
    assert [layout.name for layout in shards.lay_out(groups, 10**6)] == ["model.safetensors"]


def test_a_dense_model_without_values_is_what_transformers_builds(tmp_path: Path) -> None:
    source = dense(qwen2, tmp_path / "dense")
    empty, full = DenseCheckpoint(source).model, load_model(source)
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in full.named_parameters()
    }
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.config.to_json_string() == full.config.to_json_string()


# ------------------------------------------------------------------------------------------------------ the benchmark


@pytest.mark.slow
def test_the_benchmark_measures_a_run_and_its_page_says_what_it_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "SHARD", 100_000)
    config = {**bench.LLAMA_7B, **TINY, "intermediate_size": 96}
    run = bench.measured(tmp_path / "run", config, "nf4 g64 f32")
    assert run["files_read"] > 1
    assert run["bytes_read"] > run["bytes_written"] > 0
    assert run["peak"] > run["resident_before"] > 1e8
    assert run["targets"]["memory"]["met"] is (run["peak"] <= bench.MOST_MEMORY)
    assert run["share"] == pytest.approx(100 * run["bytes_read"] / run["seconds"] / run["disk_rate"])
    source = load_model(tmp_path / "run" / "dense")
    assert_same_values(load(tmp_path / "run" / "packed"), qft.quantize_model(source, "nf4 g64 f32"))
    about = {"cpu": "a cpu", "cores": 4, "threads": 4}
    report = {**run, "machine": about, "versions": {"torch": "2"}, "load_before": 0.25, "load_after": 1.0}
    report |= {"command": "python bench/streaming.py", "date": "2026-11-22", "commit": "abc", "share": 59.96}
    (tmp_path / "streaming.json").write_text(json.dumps(report))
    page = streaming_page.section(tmp_path)
    assert "| share of it | 60.0 % | at least 60 % | **missed** |" in page
    assert f"{run['peak'] / 1e9:.2f} GB | at most 2 GB | met |" in page
    assert "not measured yet" in streaming_page.section(tmp_path / "nowhere")


def assert_same_values(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
