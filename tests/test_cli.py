"""The command: every verb on a small model, and every bad input as one line on stderr with exit code 2."""

import json
import math
import subprocess
import sys

import pytest
import tiny_lm

from qft.cli import app, output


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("the same few words again and again, and then some others. " * 30)
    return path


@pytest.fixture
def quantized(dense, tmp_path, result):
    result("quantize", dense, tmp_path / "q", "--format", "nf4 g64 f32")
    return tmp_path / "q"


TRAIN = ("--steps", 3, "--batch-size", 2, "--block-size", 32, "--learning-rate", 1e-3)


def test_quantize_says_what_it_made(dense, tmp_path, result, run):
    made = result("quantize", dense, tmp_path / "a", "--format", "nf2 g64 f32", "--init", "loftq", "--rank", 4)
    layers = [layer for layer in made["layers"] if layer["format"]]
    assert {layer["format"] for layer in layers} == {"nf2 g64 f32"}
    assert len(layers) == 14
    assert all(len(layer["errors"]) >= 2 and min(layer["errors"]) < layer["errors"][0] for layer in layers)
    code, out, _ = run("quantize", dense, tmp_path / "b", "--format", "nf2 g64 f32", "--skip", "q_proj")
    assert code == 0
    assert "q_proj is dense: skipped by name" in out
    assert "nf2 g64 f32" in out


def test_layers_can_have_formats_of_their_own(dense, tmp_path, result):
    formats = ("--formats", "*.mlp.*=int4 channel", "--formats", "lm_head=int8 g64")
    made = result("quantize", dense, tmp_path / "q", "--format", "nf2 g64 f32", *formats)
    spelled = {layer["path"].rpartition(".")[2]: layer["format"] for layer in made["layers"]}
    assert (spelled["q_proj"], spelled["up_proj"], spelled["lm_head"]) == (
        "nf2 g64 f32", "int4 channel f32", "int8 g64 f32",
    )  # fmt: skip


def test_finetune_learns_and_eval_measures_the_same(dense, data, tmp_path, result):
    done = result(
        "finetune", dense, tmp_path / "t", "--data", data, "--format", "nf4 g64 f32", "--rank", 4,
        "--held-out", 0.2, *TRAIN,
    )  # fmt: skip
    assert done["steps"] == 3
    assert done["perplexity after"] < done["perplexity before"]
    measured = result("eval", tmp_path / "t", "--data", data, "--held-out", 0.2, "--block-size", 32)
    # the same rows; LoRA is stored in the dtype it trained in
    assert measured["perplexity"] == pytest.approx(done["perplexity after"], rel=1e-6)


def test_a_task_of_scales_turns_its_base_into_the_tuned_model(quantized, data, tmp_path, result):
    result("finetune", quantized, tmp_path / "t", "--data", data, "--method", "scales", *TRAIN)
    task = tmp_path / "t" / "task.safetensors"
    plain, tuned, loaded = (
        result("eval", *words, "--data", data, "--block-size", 32)["perplexity"]
        for words in ((quantized,), (tmp_path / "t",), (quantized, "--task", task))
    )
    assert loaded == tuned
    assert loaded < plain
    assert result("info", task)["layers"] == 14


def test_a_command_repeated_after_its_end_leaves_the_result_alone(dense, data, tmp_path, run):
    words = ("finetune", dense, tmp_path / "t", "--data", data, "--format", "nf4 g64 f32", "--rank", 4, *TRAIN)
    assert run(*words)[0] == 0
    code, _, err = run(*words)
    assert code == 2
    assert "is not empty" in err


def test_generate_goes_on_from_the_prompt(quantized, result, run):
    written = result("generate", quantized, "abc", "--tokens", 5)
    assert written["prompt"] == "abc"
    assert 1 <= written["tokens"] <= 5
    assert run("generate", quantized, "abc", "--tokens", 5)[1].strip() == ("abc" + written["completion"]).strip()
    drawn = [result("generate", quantized, "abc", "--tokens", 5, "--temperature", 1, "--seed", s) for s in (0, 0, 1)]
    assert drawn[0]["completion"] == drawn[1]["completion"] != drawn[2]["completion"]


def test_progress_goes_to_stderr_and_the_table_to_stdout(dense, data, run):
    _, out, err = run("eval", dense, "--data", data, "--block-size", 32, "--rows", 9)
    assert "measuring" in err
    assert "9/9" in err
    assert "perplexity" in out
    assert "measuring" not in out


def test_eval_measures_the_rows_it_is_told_to(dense, data, result):
    whole = result("eval", dense, "--data", data, "--block-size", 32)
    some = result("eval", dense, "--data", data, "--block-size", 32, "--rows", 2)
    assert (some["rows"], some["tokens"]) == (2, 62)
    assert whole["rows"] > 2


def test_info_describes_the_machine_a_model_and_a_dense_one(dense, quantized, result, run):
    machine = result("info")
    assert machine["threads"] >= 1
    assert machine["instruction sets"]
    assert result("info", quantized)["bits per quantized weight"] == pytest.approx(
        4.5, rel=0.3
    )  # 96 columns are padded
    assert result("info", dense)["bits per quantized weight"] == 0
    for words in ((), (quantized,), (dense,)):
        assert run("info", *words)[0] == 0


def test_explain_names_a_kernel_per_verb(result, run):
    chosen = result("explain", "nf4 g64 f32", 64, 64, "--rows", 1)
    assert list(chosen) == ["quantize", "dequantize", "matmul", "matmul_t", "scale_grad"]
    code, out, _ = run("explain", "nf4 g64 f32")
    assert code == 0
    assert chosen["matmul"]["kernel"] in out


def test_help_is_quick_and_every_command_has_it(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in ("quantize", "finetune", "eval", "generate", "info", "explain", "bench", "demo"):
        assert name in out
        assert run(name, "--help")[0] == 0
    loaded = "import sys, qft.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "[]\n"


def test_runs_as_a_module():
    words = [sys.executable, "-m", "qft", "finetune", "nowhere", "out", "--data", "none.txt", "--format", "nf4 g64"]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "qft: nowhere is no directory; give one written by save_pretrained or by qft quantize\n"


def test_what_json_cannot_hold_is_null(capsys):
    output.print_result({"loss": math.nan, "list": [math.inf, 1.0], "nested": {"a": -math.inf}}, True, None)
    assert json.loads(capsys.readouterr().out) == {"loss": None, "list": [None, 1.0], "nested": {"a": None}}


def test_a_message_of_several_lines_is_one(monkeypatch, run):
    def fail(**_):
        raise ValueError("first line\n  second line")

    monkeypatch.setattr(app, "app", fail)
    assert run("info") == (2, "", "qft: first line second line\n")


def test_an_interrupt_says_so(monkeypatch, run):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "app", interrupt)
    assert run("info") == (130, "", "qft: interrupted\n")


BAD = {
    "no such command": (["dream"], "No such command 'dream'"),
    "no such option": (["info", "--colour"], "No such option: --colour"),
    "a word for a number": (["explain", "nf4 g64 f32", "many"], "Invalid value"),
    "no model": (["eval", "{tmp}/none", "--data", "{data}"], "is no directory"),
    "an empty model": (["eval", "{tmp}", "--data", "{data}"], "holds no config.json"),
    "no data": (["eval", "{dense}", "--data", "{tmp}/none.txt"], "none.txt"),
    "empty data": (["eval", "{dense}", "--data", "{empty}"], "is empty"),
    "bad JSON": (["eval", "{dense}", "--data", "{broken}"], "line 2: not JSON"),
    "unknown format": (["quantize", "{dense}", "{tmp}/q", "--format", "nf4 q64"], "the nearest is 'nf4 g64 f32'"),
    "unknown start": (["quantize", "{dense}", "{tmp}/q", "--format", "nf4 g64", "--init", "svd"], "init="),
    "loftq without a rank": (["quantize", "{dense}", "{tmp}/q", "--format", "nf4 g64", "--init", "loftq"], "--rank"),
    "rank beyond any layer": (["quantize", "{dense}", "{tmp}/q", "--format", "nf4 g64", "--rank", "-1"], "rank=-1"),
    "nothing of that name": (["quantize", "{dense}", "{tmp}/q", "--format", "nf4 g64", "--skip", "x"], "names no"),
    "a format of no layer": (["quantize", "{dense}", "{tmp}/q", "--format", "nf4 g64", "--formats", "nf2"], "no layer"),
    "onto a file": (["quantize", "{dense}", "{empty}", "--format", "nf4 g64"], "is not empty"),
    "a dense model": (["finetune", "{dense}", "{tmp}/t", "--data", "{data}"], "is not quantized; name a format"),
    "unknown method": (["finetune", "{dense}", "{tmp}/t", "--data", "{data}", "--method", "dora"], "method 'dora'"),
    "unknown dtype": (["eval", "{dense}", "--data", "{data}", "--dtype", "int8"], "dtype 'int8'"),
    "too long a row": (["eval", "{dense}", "--data", "{data}", "--block-size", "500"], "128 positions"),
    "a small vocabulary": (["eval", "{narrow}", "--data", "{data}", "--block-size", "9"], "vocabulary mismatch"),
    "in the prompt too": (["generate", "{narrow}", "hello"], "the prompt: tokenizer/vocabulary mismatch"),
    "an empty prompt": (["generate", "{dense}", ""], "the prompt is empty"),
    "damaged weights": (["eval", "{damaged}", "--data", "{data}"], "damaged"),
    "a task that is none": (
        ["eval", "{dense}", "--data", "{data}", "--task", "{data}"], "no quantized layer|no task|damaged",
    ),
    "no examples": (["demo", "--examples", "{tmp}"], "clone the repository"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(dense, data, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty.txt").touch()
    (tmp / "broken.jsonl").write_text('{"text": "fine"}\n{"text": ')
    damaged = tiny_lm.save(tmp / "damaged")
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp / "tmp").mkdir()
    return {
        "dense": dense,
        "data": data,
        "empty": tmp / "empty.txt",
        "broken": tmp / "broken.jsonl",
        "damaged": damaged,
        "narrow": tiny_lm.save(tmp / "narrow", vocabulary=40),
        "tmp": tmp / "tmp",
    }


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(run, places, words, message):
    code, out, err = run(*(word.format(**places) for word in words))
    assert (code, out) == (2, "")
    assert err.startswith("qft: ")
    assert err.count("\n") == 1
    assert any(part in err for part in message.split("|")), err
    assert not any(places["tmp"].iterdir()), "something was left behind"
