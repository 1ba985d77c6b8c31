"""`qft merge`: an adapter's directory into a packed model, what it says of it, and what it refuses."""

import json

import peft
import pytest
import tiny_lm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import qft
from qft.integrations.peft_merge import merge_adapter
from qft.nn.linear import QuantLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft reads it


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


FORMAT = "int4 g32 f16 zero"
TARGETS = ["q_proj", "down_proj"]
METHODS = {
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "patterns": lambda: LoraConfig(
        r=4, target_modules=TARGETS, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.*down_proj": 32}
    ),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
}


def packed(**more):
    return qft.quantize_model(tiny_lm.model(), FORMAT, **more)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(40).reshape(2, 20) % tiny_lm.VOCABULARY).logits


def tuned(config, base=None):
    """A model with an adapter as if it had been trained."""
    model = get_peft_model(packed() if base is None else base, config)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".default" in name:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "base"
    qft.save(packed(), directory, tokenizer=tiny_lm.tokenizer())
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters") / "lora"
    tuned(METHODS["lora"]()).save_pretrained(directory)
    return directory


@pytest.fixture
def broken(adapter, tmp_path):
    """A copy of the adapter to be spoiled."""
    for file in adapter.iterdir():
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "bad"


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_what_pefts_merge_makes(method, base, tmp_path, result):
    model = tuned(METHODS[method]())
    model.save_pretrained(tmp_path / "adapter")
    done = result("merge", base, tmp_path / "adapter", tmp_path / "out")
    merged = model.merge_and_unload()
    loaded = qft.load(tmp_path / "out")
    for path, layer in merged.named_modules():
        if isinstance(layer, QuantLinear):
            again = loaded.get_submodule(path)
            assert type(again) is QuantLinear
            assert again.lora_rank == 0
            assert str(again.format) == FORMAT
            assert torch.allclose(again.dequantize(), layer.dequantize(), atol=1e-6)
    assert (logits(loaded) - logits(merged)).abs().max() < 1e-4
    errors = {layer["path"]: layer["error"] for layer in done["layers"]}
    assert errors == {
        path: pytest.approx(layer.init_errors[-1], rel=1e-4)
        for path, layer in merged.named_modules()
        if path.rpartition(".")[2] in TARGETS
    }
    assert all(0 < error < 0.2 for error in errors.values())
    assert done["mean error"] == pytest.approx(sum(errors.values()) / len(errors))


def test_the_error_is_the_one_of_rounding_the_exact_sum(base, adapter):
    exact = PeftModel.from_pretrained(qft.load(base), adapter)
    merged, errors = merge_adapter(qft.load(base), adapter)
    for path, error in errors.items():
        tuner = exact.base_model.model.get_submodule(path)
        weight = tuner.get_base_layer().dequantize() + tuner.get_delta_weight("default")
        stored = merged.get_submodule(path).dequantize()
        assert error == pytest.approx(((weight - stored).norm() / weight.norm()).item(), rel=1e-4)
        assert torch.equal(stored, qft.quantize(weight, FORMAT).dequantize())


def test_the_table_names_every_layer_and_the_tokenizer_comes_along(base, adapter, tmp_path, run):
    code, out, _ = run("merge", base, adapter, tmp_path / "out")
    assert code == 0
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert path in out
    assert "4 layers merged" in " ".join(out.split())
    assert "k_proj" not in out
    assert run("generate", tmp_path / "out", "abc", "--tokens", 3)[0] == 0


def test_a_start_that_the_adapter_contains_is_not_added_twice(tmp_path, result):
    start = packed(init="loftq", rank=4)
    qft.save(start, tmp_path / "base")
    model = tuned(METHODS["lora"](), start)
    model.save_pretrained(tmp_path / "adapter")
    result("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    loaded, merged = qft.load(tmp_path / "out"), model.merge_and_unload()
    assert (logits(loaded) - logits(merged)).abs().max() < 1e-4
    ranks = {path.rpartition(".")[2]: layer.lora_rank for path, layer in loaded.named_modules()
             if isinstance(layer, QuantLinear)}  # fmt: skip
    assert ranks == {name: 0 if name in TARGETS else 4 for name in ranks}


def test_what_qft_adapter_takes_out_can_be_merged(base, tmp_path, result):
    model = packed(rank=4)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape)
    qft.save(model, tmp_path / "tuned")
    result("adapter", tmp_path / "tuned", tmp_path / "adapter")
    for name in (base, tmp_path / "tuned"):  # beside the same codes, or the very model that it was taken from
        done = result("merge", name, tmp_path / "adapter", tmp_path / "out" / name.name)
        assert len(done["layers"]) == 14
        loaded = qft.load(tmp_path / "out" / name.name)
        for path, layer in model.named_modules():
            if isinstance(layer, QuantLinear):
                weight = layer.dequantize() + layer.lora_scaling * layer.lora_B @ layer.lora_A
                again = loaded.get_submodule(path)
                assert again.lora_rank == 0
                assert torch.allclose(again.dequantize(), qft.quantize(weight, FORMAT).dequantize(), atol=1e-6)


def test_dense_layers_are_merged_too(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], modules_to_save=["norm"])
    base = packed(skip=["k_proj"])
    before = base.model.layers[0].self_attn.k_proj.weight.clone()
    model = tuned(config, base)
    model.save_pretrained(tmp_path)
    merged, errors = merge_adapter(packed(skip=["k_proj"]), tmp_path)
    assert {path.rpartition(".")[2] for path in errors} == {"q_proj"}
    attention = model.base_model.model.model.layers[0].self_attn
    wanted = before + attention.k_proj.get_delta_weight("default")
    assert torch.allclose(merged.model.layers[0].self_attn.k_proj.weight, wanted, atol=1e-6)
    assert torch.equal(merged.model.norm.weight, model.base_model.model.model.norm.modules_to_save["default"].weight)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_weight_that_an_embedding_shares_is_left_alone(base, tmp_path):
    tuned(LoraConfig(r=4, target_modules=["lm_head"])).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(qft.FormatError, match=r"changes lm_head, whose weight an embedding shares; quantize it"):
        merge_adapter(qft.load(base), tmp_path)
    untied = packed(formats={"lm_head": "int8 g32"})
    assert list(merge_adapter(untied, tmp_path)[1]) == ["lm_head"]


def test_the_merged_model_is_the_base_of_another_adapter(base, adapter, tmp_path, result):
    result("merge", base, adapter, tmp_path / "out")
    model = PeftModel.from_pretrained(qft.load(tmp_path / "out"), adapter).eval()
    assert not torch.equal(logits(model), logits(qft.load(tmp_path / "out")))


# ------------------------------------------------------------------------------------------------ refusals


def config_with(**values):
    def spoil(directory):
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def tensors_with(change):
    def spoil(directory):
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, next(name for name in tensors if "lora_B" in name))
        save_file(tensors, path)

    return spoil


def rename(tensors, name):
    tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)


def shorten(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


def truncate(directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


SPOILED = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "half a config": (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "LO'), "config.json is damaged"),
    "a list": (lambda d: (d / "adapter_config.json").write_text("[]"), "config.json is damaged"),
    "a type of the future": (config_with(peft_type="HYPER"), "config.json is damaged, or of a newer PEFT"),
    "half the weights": (truncate, "adapter_model.safetensors is damaged"),
    "another rank": (config_with(r=3), "does not fit this model: size mismatch for base_model.model.model.layers.0"),
    "another width": (tensors_with(shorten), "does not fit this model: size mismatch"),
    "other layers": (config_with(target_modules=["query"]), "does not fit this model: .*query.*not found"),
    "fewer layers": (config_with(target_modules=["q_proj"]), "down_proj.lora_A.weight, for which this model has no"),
    "more layers": (config_with(target_modules=["q_proj", "v_proj", "down_proj"]), "holds no .*v_proj.lora_A.weight"),
    "a stray layer": (tensors_with(rename), "layers.7.*for which this model has no place"),
    "one missing": (tensors_with(lambda t, name: t.pop(name)), "holds no .*lora_B.weight; save the adapter anew"),
    "NaN": (tensors_with(lambda t, name: t[name].fill_(float("nan"))), r"cannot be merged into model.layers.0.*NaN"),
    "too large": (tensors_with(lambda t, name: t[name].fill_(1e9)), r"cannot be merged into model.layers.0.*65504"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_bad_adapter_is_refused_in_one_sentence(what, base, broken, tmp_path, run):
    spoil, words = SPOILED[what]
    spoil(broken)
    code, out, err = run("merge", base, broken, tmp_path / "out")
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if "merging rounds" not in line]
    assert len(line) < 500
    with pytest.raises((OSError, ValueError), match=words):
        merge_adapter(qft.load(base), broken)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "PROMPT_TUNING, which no weight can"),
        (peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "PREFIX_TUNING, which no weight can"),
        (peft.HRAConfig(r=2, target_modules=TARGETS), "PEFT's hra reads the dense weight at every step"),
    ],
)
def test_a_method_that_has_no_merge_is_refused(config, words, base, tmp_path, run):
    get_peft_model(tiny_lm.model(), config).save_pretrained(tmp_path / "adapter")
    code, _, err = run("merge", base, tmp_path / "adapter", tmp_path / "out")
    assert code == 2
    assert words in err


def test_a_dense_model_and_a_full_folder_are_refused(base, adapter, tmp_path, run):
    dense = tiny_lm.save(tmp_path / "dense")
    code, _, err = run("merge", dense, adapter, tmp_path / "out")
    assert code == 2
    assert "is not quantized; merge in PEFT and quantize the result" in err
    code, _, err = run("merge", base, adapter, dense)
    assert code == 2
    assert "is not empty" in err
