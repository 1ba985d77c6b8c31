"""qft calibrate, plan and quantize --plan, from one command to the next."""

import pytest
import tiny_lm

import qft
from qft.measure.calibration import Calibration
from qft.measure.plan import Plan


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
    path.write_text(("the same few words again and again, and then some others. " * 30)[: 54 * 32])
    return path


READ = ("--block-size", 32, "--batch-size", 4)
FORMATS = ("--format", "nf2 g64 f16", "--format", "nf4 g64 f16", "--no-search")


def test_from_a_text_to_a_model_that_fits_the_budget(dense, data, tmp_path, result):
    made = result("calibrate", dense, data, tmp_path / "c", "--rows", 6, "--gradients", *READ)
    assert (made["layers"], made["moments"], made["tokens"]) == (14, 8, 6 * 32)
    assert len(Calibration.load(tmp_path / "c").sensitivity) == 14
    files = ("--output", tmp_path / "p.json", "--figure", tmp_path / "p.png")
    plan = result("plan", dense, "--bits", 3.2, "--calibration", tmp_path / "c", *FORMATS, *files)
    assert plan["bits per weight"] <= 3.2
    assert plan["measure"] == "expected rise of the loss in nats per token, absmax scales"
    assert set(plan["formats"].values()) == {"nf2 g64 f16", "nf4 g64 f16"}
    assert Plan.load(tmp_path / "p.json").formats == plan["formats"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    quantized = result("quantize", dense, tmp_path / "q", "--plan", tmp_path / "p.json")
    packed = {layer["path"]: layer["format"] for layer in quantized["layers"] if layer["format"]}
    assert packed == plan["formats"]
    assert quantized["bits per quantized weight"] == plan["bits per weight"]


def test_what_a_plan_does_not_name_stays_dense_and_what_is_named_beside_it_wins(dense, tmp_path, result):
    plan = tmp_path / "p.json"
    result("plan", dense, "--bits", 4.5, *FORMATS, "--skip", "o_proj", "--output", plan)
    first = "model.layers.0.self_attn.q_proj"
    named = ("--formats", f"{first}=int8 g64 f16", "--formats", "*.1.mlp.*=nf3 g64 f16")
    made = result("quantize", dense, tmp_path / "a", "--plan", plan, *named)
    layers = {layer["path"]: layer for layer in made["layers"]}
    assert layers[first]["format"] == "int8 g64 f16"
    assert layers["model.layers.1.mlp.up_proj"]["format"] == "nf3 g64 f16"
    assert layers["model.layers.0.self_attn.k_proj"]["format"] == "nf4 g64 f16"
    assert layers["model.layers.0.self_attn.o_proj"]["reason"] == "not named in formats"
    made = result("quantize", dense, tmp_path / "b", "--plan", plan, "--format", "nf3 g64 f16")
    layers = {layer["path"]: layer["format"] for layer in made["layers"]}
    assert layers["model.layers.0.self_attn.o_proj"] == "nf3 g64 f16"


def test_the_first_blocks_in_more_bits_as_a_table(dense, run):
    mixed = ("--format", "nf4 g64 f16", "--format", "nf2 g64 f16", "--no-search")
    code, out, _ = run("plan", dense, "--first", 1, *mixed)
    assert code == 0
    assert "error: sum of the relative squared error of the weights, absmax scales" in " ".join(out.split())
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["q_proj"][:2] == ["1", "1"]
    assert rows["all"][:2] == ["7", "7"]


def test_a_calibration_repeated_leaves_the_result_alone_and_other_rows_are_refused(dense, data, tmp_path, result, run):
    words = ("calibrate", dense, data, tmp_path / "c", "--diagonal", "--rows", 3, *READ)
    result(*words)
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    result(*words)
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before
    for other in (("--seed", 1), ("--held-out", 0.5)):
        code, _, err = run(*words, *other)
        assert code == 2
        assert "holds a calibration of other rows" in err
    assert not Calibration.load(tmp_path / "c").full


def test_held_out_text_stays_out(dense, tmp_path, result):
    data = tmp_path / "text.txt"
    data.write_text("a" * 320 + "b" * 320)
    made = result("calibrate", dense, data, tmp_path / "c", "--rows", 0, "--held-out", 0.5, *READ)
    assert made["tokens"] == 320
    (tmp_path / "other.txt").write_text("a" * 320)
    result("calibrate", dense, tmp_path / "other.txt", tmp_path / "d", "--rows", 0, *READ)
    one, other = (Calibration.load(tmp_path / name) for name in "cd")
    assert all((one[path] == other[path]).all() for path in one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan",), "needs --bits or --first, and not both"),
        (("plan", "--bits", 2, "--first", 1), "needs --bits or --first, and not both"),
        (("plan", "--first", 1), "--first 1 needs two formats"),
        (("plan", "--bits", 1.5, *FORMATS), "a budget of 1.5 bits per weight is below 2."),
        (("plan", "--bits", 3, "--calibration", "nowhere"), "nowhere holds no calibration.json"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_a_line(dense, run, words, message):
    code, out, err = run(words[0], dense, *words[1:])
    assert (code, out) == (2, "")
    assert message in err
    assert err.strip().splitlines()[-1].startswith("qft: ")


def test_quantize_needs_a_format_or_a_plan(dense, tmp_path, run):
    code, _, err = run("quantize", dense, tmp_path / "q")
    assert code == 2
    assert "is not quantized; name a format" in err
    (tmp_path / "p.json").write_text("{}")
    code, _, err = run("quantize", dense, tmp_path / "q", "--plan", tmp_path / "p.json")
    assert code == 2
    assert "is no plan" in err


@pytest.mark.parametrize("command", ["calibrate", "plan"])
def test_a_quantized_model_is_refused(dense, data, tmp_path, run, command):
    qft.save(qft.quantize_model(tiny_lm.model(), "nf4 g64 f16"), tmp_path / "q")
    words = (data, tmp_path / "c") if command == "calibrate" else ("--bits", 3)
    code, _, err = run(command, tmp_path / "q", *words)
    assert code == 2
    assert "is quantized already; name the dense model" in err


def test_memory_of_nothing_is_refused(dense, data, tmp_path, run):
    code, _, err = run("calibrate", dense, data, tmp_path / "c", "--memory", 0, *READ)
    assert code == 2
    assert "--memory 0.0 holds no sum" in err
