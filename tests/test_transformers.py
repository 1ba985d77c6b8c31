"""transformers: from_pretrained quantizes while it reads, and opens what save_pretrained and qft.save wrote."""

import copy
import json

import pytest
import tiny_lm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM
from transformers.integrations.accelerate import compute_module_sizes

import qft
from qft.integrations import transformers as integration
from qft.nn.packed import Packed

IDS = torch.arange(40).reshape(2, 20) * 5 % tiny_lm.VOCABULARY
CONFIGS = {
    "plain": {"format": "nf2 g64 dq"},
    "channel": {"format": "nf3 channel bf16"},
    "search": {"format": "int4 g64 bf16 zero", "init": "search"},
    "loftq": {"format": "nf2 g64 f16", "init": "loftq", "rank": 4, "alpha": 2, "iters": 2},
    "loftq alpha r": {"format": "nf2 g64 f16", "init": "loftq", "rank": 4, "alpha": 4},
    "loftq rslora": {"format": "nf3 g32 f16", "init": "loftq", "rank": 4, "alpha": 8, "rslora": True},
    "mixed": {"format": "nf4 channel f32", "formats": {"*.mlp.*": "int8 g64 f16", "lm_head": "int4 g64 f32"}},
    "named only": {"formats": {"q_proj": "nf4 g64 dq"}},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A directory with the tiny Llama, its head tied to the embedding."""
    return tiny_lm.save(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def saved(dense, tmp_path_factory):
    """The same in nf2, read, quantized and written by transformers."""
    directory = tmp_path_factory.mktemp("saved")
    read(dense, qft.QftConfig("nf2 g64 dq")).save_pretrained(directory)
    return directory


def read(directory, config=None, kind=AutoModelForCausalLM, **options):
    """from_pretrained, which takes a None for the saved model's own config."""
    given = {} if config is None else {"quantization_config": config}
    return kind.from_pretrained(directory, **given, **options)


def logits(model):
    """What the model computes; of a base model, its last hidden state."""
    with torch.no_grad():
        return model(IDS)[0]


def packed(model):
    """The packed modules by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Packed)}


def same_weights(one, other):
    """Whether both models hold the same packed layers, bit for bit."""
    mine, theirs = packed(one), packed(other)
    return mine.keys() == theirs.keys() and all(
        mine[path].format == theirs[path].format
        and all(map(torch.equal, mine[path].state_dict().values(), theirs[path].state_dict().values()))
        for path in mine
    )


# ------------------------------------------------------------------------------------------------ quantizing


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_what_is_read_is_what_quantize_model_makes(dense, options):
    config = qft.QftConfig(**options)
    model = read(dense, config)
    torch.manual_seed(0)
    expected = qft.quantize_model(read(dense), config.format, **config.start(), formats=config.formats)
    for layer in packed(model).values():  # A is drawn in another order where B is 0
        if layer.lora_A is not None and not layer.lora_B.any():
            layer.lora_A = None
    assert packed(model)
    assert torch.equal(logits(model), logits(expected))
    assert str(qft.report(model)) == str(qft.report(expected))


def test_a_dense_weight_is_gone_before_the_next_is_read(dense, monkeypatch):
    held, pack = [], integration.QftQuantizer.pack

    def watched(self, name, weight):
        codes = pack(self, name, weight)
        dense_weights = [target.module._parameters["weight"] for target in self.targets.values()]
        held.append(sum(weight is not None and not weight.is_meta for weight in dense_weights))
        return codes

    monkeypatch.setattr(integration.QftQuantizer, "pack", watched)
    read(dense, qft.QftConfig("nf4 g64 f16"))
    assert held == [0] * 14


def test_a_config_serves_several_models_and_is_left_as_it_was(dense):
    config = qft.QftConfig("nf4 g64 f16")
    before = copy.deepcopy(config.to_dict())
    first, second = (read(dense, config, kind=LlamaForCausalLM) for _ in range(2))  # Auto classes copy it
    assert config.to_dict() == before
    assert first.config.quantization_config is not second.config.quantization_config


def test_layers_to_leave_dense_are_named_in_either_way(dense):
    names = ["q_proj", "*.1.mlp.*", "model.layers.0.mlp", r"model\.layers\.1\.self_attn\.[kv]_proj"]
    model = read(dense, qft.QftConfig("nf4 g64 f16", modules_to_not_convert=names))
    assert sorted(packed(model)) == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    reasons = {layer.path: layer.reason for layer in qft.report(model).dense}
    assert reasons["model.layers.0.mlp.up_proj"] == "skipped by name"


def test_the_dtype_asked_for_is_that_of_what_stays_dense(dense):
    model = read(dense, qft.QftConfig("nf4 g64 f16", "loftq", rank=2, iters=1), dtype=torch.bfloat16)
    expected = qft.quantize_model(read(dense, dtype=torch.bfloat16), "nf4 g64 f16", "loftq", 2, iters=1)
    assert model.dtype == torch.bfloat16
    assert same_weights(model, expected)
    assert torch.equal(logits(model), logits(expected))


# ------------------------------------------------------------------------------------------------ saving and opening


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_saved_and_opened_again_it_computes_the_same(dense, tmp_path, options):
    model = read(dense, qft.QftConfig(**options))
    model.save_pretrained(tmp_path)
    again = read(tmp_path)
    assert same_weights(again, model)
    assert torch.equal(logits(again), logits(model))
    assert [layer.lora_scaling for layer in packed(again).values()] == [
        layer.lora_scaling for layer in packed(model).values()
    ]
    assert qft.report(again).quantized == qft.report(model).quantized


def test_shards(dense, tmp_path):
    model = read(dense, qft.QftConfig("nf2 g64 dq", "loftq", rank=4, iters=1))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(read(tmp_path)), logits(model))


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_from_pretrained_opens_what_qft_save_wrote(dense, tmp_path, options):
    config = qft.QftConfig(**options)
    model = qft.quantize_model(read(dense), config.format, **config.start(), formats=config.formats)
    qft.save(model, tmp_path)
    opened = read(tmp_path)
    assert same_weights(opened, model)
    assert torch.equal(logits(opened), logits(qft.load(tmp_path)))
    assert torch.equal(logits(opened), logits(model))


def test_qft_save_writes_what_the_layers_are_now(dense, tmp_path):
    model = read(dense, qft.QftConfig("nf4 g64 dq"))
    qft.train_only(model, "scales")  # holds them in fp32
    model.model.layers[0].mlp.up_proj.add_lora(2)
    for save in (model.save_pretrained, lambda folder: qft.save(model, folder)):
        save(tmp_path)
        opened = read(tmp_path)
        assert {str(layer.format) for layer in packed(opened).values()} == {"nf4 g64 f32"}
        assert opened.model.layers[0].mlp.up_proj.lora_rank == 2
        assert torch.equal(logits(opened), logits(model))
        qft.round_scales(opened)  # remembers that they were double-quantized
        assert {str(layer.format) for layer in packed(opened).values()} == {"nf4 g64 dq"}


def test_a_model_that_was_cast_opens_as_it_was(dense, tmp_path):
    """.to(dtype) casts buffers too, such as the frequencies of positions, and those are in no file."""
    model = qft.quantize_model(read(dense), "nf4 g64 f16").to(torch.bfloat16)
    qft.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        opened = read(tmp_path / name)
        assert opened.model.rotary_emb.inv_freq.dtype == torch.bfloat16
        assert torch.equal(logits(opened), logits(model))
    assert torch.equal(logits(qft.load(tmp_path / "ours")), logits(model))


def test_what_qft_load_gives_is_saved_as_it_is_then(saved, tmp_path):
    qft.save(read(saved), tmp_path / "ours")
    model = qft.load(tmp_path / "ours")
    assert not hasattr(model.config, "quantization_config")
    model.model.layers[0].mlp.up_proj.add_lora(2)
    model.save_pretrained(tmp_path / "theirs")
    assert read(tmp_path / "theirs").model.layers[0].mlp.up_proj.lora_rank == 2


def test_a_dense_model_saved_by_qft_is_dense_for_transformers(saved, tmp_path):
    by_hand = read(saved)
    for path, layer in packed(by_hand).items():
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight.data = layer.dequantize()
        by_hand.set_submodule(path, dense)
    for model in (read(saved).dequantize(), by_hand):
        qft.save(model, tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert torch.equal(logits(read(tmp_path)), logits(model))


def test_the_base_and_the_task_of_a_saved_model(saved):
    model = read(saved)
    base = read(saved, kind=AutoModel)
    task = read(saved, kind=AutoModelForSequenceClassification, num_labels=3)
    assert len(packed(base)) == len(packed(task)) == 14
    assert torch.equal(logits(base), logits(model.model))
    assert torch.equal(logits(task.model), logits(model.model))
    assert type(task.score) is torch.nn.Linear


def test_a_task_model_from_a_saved_base(saved, tmp_path):
    base = read(saved, kind=AutoModel)
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(read(tmp_path, kind=AutoModelForCausalLM).model), logits(base))


def test_dtype_of_a_saved_model_changes_what_is_dense_alone(saved):
    model = read(saved, dtype=torch.float16)
    assert same_weights(model, read(saved))
    assert model.model.embed_tokens.weight.dtype == torch.float16


def test_a_config_beside_a_saved_model_changes_nothing(saved):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = read(saved, qft.QftConfig("int8 g64 f32"))
    assert same_weights(model, read(saved))


def test_a_plain_dictionary_is_a_config(dense):
    model = read(dense, {"quant_method": "qft", "format": "nf4 g64 f16"})
    assert same_weights(model, read(dense, qft.QftConfig("nf4 g64 f16")))


def test_a_config_of_a_later_version_opens(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["of_a_later_qft"] = True
    copied = copy_of(saved, tmp_path)
    (copied / "config.json").write_text(json.dumps(config))
    assert same_weights(read(copied), read(saved))


def copy_of(directory, folder):
    """The directory's files, in another."""
    for file in directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: qft.QftConfig("nf5 g64"), qft.FormatError, "nf5"),
        (lambda: qft.QftConfig("nf4 g64", formats={"lm_head": "q4"}), qft.FormatError, "q4"),
        (lambda: qft.QftConfig("nf4 g64", init="pissa"), ValueError, "init='pissa' is unknown"),
        (lambda: qft.QftConfig("nf4 g64", "cloq"), ValueError, r"init='cloq' needs .* qft\.quantize_model.*qft\.save"),
        (lambda: qft.QftConfig("nf4 g64", qft.loftq), TypeError, r"is no name.* qft\.quantize_model"),
        (lambda: qft.QftConfig("nf4 g64", iters=3), ValueError, "has no turns"),
        (lambda: qft.QftConfig("nf4 g64", bits=4), TypeError, "takes no bits; it takes format, init"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused_where_it_is_written(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def test_a_config_without_a_format_is_refused(dense):
    with pytest.raises(ValueError, match="QftConfig names no format"):
        read(dense, qft.QftConfig())


@pytest.mark.parametrize(
    ("options", "sentence"), [({"rank": -1}, "rank=-1"), ({"rank": 2, "dropout": 2.0}, "dropout=2")]
)
def test_a_lora_that_cannot_be_is_refused(dense, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(dense, qft.QftConfig("nf4 g64 f16", **options))


def test_a_pattern_that_names_nothing_is_refused(dense):
    with pytest.raises(ValueError, match="'qkv' names no layer"):
        read(dense, qft.QftConfig("nf4 g64", formats={"qkv": "nf2 g64"}))
    with pytest.raises(ValueError, match="'vision_tower' names no layer"):
        read(dense, qft.QftConfig("nf4 g64", modules_to_not_convert=["vision_tower"]))


def test_a_model_without_a_layer_to_quantize_is_refused(dense):
    with pytest.raises(ValueError, match="layer to quantize; see"):
        read(dense, qft.QftConfig("nf4 g64", modules_to_not_convert=["*"]))


def test_a_weight_that_is_not_finite_is_named(dense, tmp_path):
    copied = copy_of(dense, tmp_path)
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 7] = float("nan")
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*3.*7"):
        read(copied, qft.QftConfig("nf4 g64"))


@pytest.mark.parametrize("name", ["weight", "weight_scales", "weight_scales_absmax", "weight_format"])
def test_a_missing_tensor_is_named(saved, tmp_path, name):
    copied, gone = copy_of(saved, tmp_path), f"model.layers.0.mlp.up_proj.{name}"
    tensors = load_file(copied / "model.safetensors")
    del tensors[gone]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(qft.FormatError, match=f"the checkpoint holds no {gone},"):
        read(copied)


def test_files_and_config_that_disagree_are_refused(saved, tmp_path):
    copied = copy_of(saved, tmp_path)
    config = json.loads((copied / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers["model.layers.0.mlp.up_proj"]["format"] = "lm2 g64 dq"
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(qft.FormatError, match=r"up_proj\.weight_format spells 'nf2 g64 dq', config\.json 'lm2 g64 dq'"):
        read(copied)
    layers["model.layers.0.mlp.up_proj"]["format"] = "nf4 g64 dq"
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(qft.FormatError, match=r"up_proj\.weight is \[96, 16\], .* promises \[96, 32\]"):
        read(copied)
    del layers["model.layers.0.mlp.up_proj"]["shape"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(qft.FormatError, match=r"config\.json describes its quantized layers wrongly"):
        read(copied)
    config["quantization_config"]["layers"] = {}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(qft.FormatError, match=r"config\.json names no quantized layer"):
        read(copied)


# ------------------------------------------------------------------------------------------------ traps


def test_nothing_stored_trains_after_opening_and_a_lora_does(dense, tmp_path):
    """transformers lets every floating tensor train that it reads."""
    read(dense, qft.QftConfig("int4 g64 f32 zero", "loftq", rank=2, iters=1)).save_pretrained(tmp_path)
    for model in (read(tmp_path), read(dense, qft.QftConfig("int4 g64 f32 zero", rank=2))):
        for layer in packed(model).values():
            trains = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
            assert trains == {"lora_A", "lora_B"}


def test_everything_packed_is_marked_as_read(dense, saved):
    """transformers draws anew what is not, wherever a family's own code initialises parameters by name."""
    for model in (read(dense, qft.QftConfig("int4 g64 dq zero", rank=2)), read(saved)):
        for layer in packed(model).values():
            assert all(parameter._is_hf_initialized for parameter in layer.parameters())


def test_nothing_a_layer_needs_is_left_uninitialised(saved, poisoned):
    """transformers fills buffers that are in no file with whatever was in memory."""
    model = read(saved)
    for layer in packed(model).values():
        for name in layer._non_persistent_buffers_set:
            assert not layer._buffers[name].numel()
    assert logits(model).isfinite().all()


def test_no_flag_puts_other_libraries_on_their_bitsandbytes_branches(saved):
    model = read(saved)
    assert not getattr(model, "is_loaded_in_4bit", False)
    assert not getattr(model, "is_loaded_in_8bit", False)


def test_casting_a_model_leaves_its_scales(saved):
    """transformers refuses .half() and .float() on quantized models, and lets .to(dtype) cast them."""
    model = read(saved)
    before = {path: {k: v.clone() for k, v in layer.state_dict().items()} for path, layer in packed(model).items()}
    model.to(torch.float16)
    assert model.model.norm.weight.dtype == torch.float16
    for path, layer in packed(model).items():
        for name, value in layer.state_dict().items():
            assert value.dtype == before[path][name].dtype
            assert torch.equal(value, before[path][name])
    with pytest.raises(ValueError, match="is not supported for quantized model"):
        model.half()


def test_the_report_counts_weights_where_num_parameters_counts_bytes(dense, saved):
    model = read(saved)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in qft.report(model).quantized)
    expected = sum(module.weight.numel() for module in read(dense).model.modules() if type(module) is torch.nn.Linear)
    assert weights == expected
    assert model.num_parameters() < read(dense).num_parameters()  # transformers' count: packed bytes
    assert model.get_memory_footprint() == qft.report(model).nbytes


# ------------------------------------------------------------------------------------------------ afterwards


def test_dequantize_gives_the_dense_model_that_computes_the_same(dense, tmp_path):
    model = read(dense, qft.QftConfig("nf2 g64 f16", "loftq", rank=4, iters=2, formats={"lm_head": "int8 g64 f16"}))
    expected = logits(model)
    back = model.dequantize()
    assert back is model
    assert not packed(model)
    assert not hasattr(model, "hf_quantizer")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(read(tmp_path)), logits(model))


def test_dequantize_in_a_dtype(saved, tmp_path):
    """The one asked for, or the model's own, which save_pretrained leaves in the config as a name."""
    own = read(saved, dtype=torch.float16)
    own.save_pretrained(tmp_path)
    for model, dtype in ((read(saved).dequantize(torch.bfloat16), torch.bfloat16), (own.dequantize(), torch.float16)):
        dense_layers = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
        assert {m.weight.dtype for m in dense_layers} == {dtype}


def test_generation_with_and_without_a_cache(saved):
    model = read(saved)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(IDS[:, :5], **options)
    assert with_cache.shape[1] > 6
    assert torch.equal(with_cache, model.generate(IDS[:, :5], use_cache=False, **options))
    assert torch.equal(with_cache, model.generate(IDS[:, :5], cache_implementation="static", **options))


def test_what_transformers_asks_of_a_quantizer(saved):
    quantizer = read(saved).hf_quantizer
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    assert quantizer.is_qat_trainable
    assert quantizer.is_compileable


def test_a_whole_model_is_one_graph_as_is_compileable_promises(dense):
    model = read(dense, qft.QftConfig("nf4 g64 dq", formats={"embed_tokens": "int8 g64 f16"}))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), logits(model))


# ------------------------------------------------------------------------------------------------ device maps


def test_a_device_map_is_sized_by_what_will_be_stored(dense, monkeypatch):
    sizes, after = [], integration.QftQuantizer._process_model_before_weight_loading

    def sized(self, model, **options):
        after(self, model, **options)
        sizes.append(compute_module_sizes(model, self)[0][""])
        assert self.quantized_element_size == pytest.approx(qft.Format.parse("nf4 g64 f16").bits_per_weight / 8)

    monkeypatch.setattr(integration.QftQuantizer, "_process_model_before_weight_loading", sized)
    config = qft.QftConfig("nf4 g64 f16", formats={"*.mlp.*": "nf2 g64 dq"})
    model = read(dense, config, device_map="cpu")
    assert sizes[0] == pytest.approx(model.get_memory_footprint(), rel=0.1)  # row padding and spellings aside
    assert model.device.type == "cpu"


def test_without_a_map_the_model_goes_to_the_gpu_if_there_is_one(monkeypatch):
    quantizer = integration.QftQuantizer(qft.QftConfig("nf4 g64 f16"), pre_quantized=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quantizer.update_device_map(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert quantizer.update_device_map(None) == {"": 1}
    assert quantizer.update_device_map("auto") == "auto"


def test_auto_takes_what_fits_once_packed_and_refuses_the_disk(dense, saved):
    room = {"cpu": int(1.5 * read(dense, qft.QftConfig("nf4 g64 f16")).get_memory_footprint())}
    assert room["cpu"] < read(dense).get_memory_footprint()
    model = read(dense, qft.QftConfig("nf4 g64 f16"), device_map="auto", max_memory=room)
    assert same_weights(model, read(dense, qft.QftConfig("nf4 g64 f16")))
    assert same_weights(read(saved, device_map="auto", max_memory=room), read(saved))
    with pytest.raises(ValueError, match="leaves layers on disk"):
        read(dense, qft.QftConfig("nf4 g64 f16"), device_map="auto", max_memory={"cpu": 60_000})


def test_layers_run_while_accelerate_keeps_them_elsewhere(saved):
    from accelerate import cpu_offload

    model = read(saved)
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj._parameters["weight"].is_meta
    assert torch.equal(logits(model), expected)


def test_modules_that_are_replaced_late_keep_accelerates_hooks(dense, monkeypatch):
    """A device map over several devices hangs them on the dense head, which is packed when all has been read."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    after = integration.QftQuantizer._process_model_after_weight_loading

    def hooked(self, model, **options):
        for module in (model.lm_head, model.model.layers[0].mlp.up_proj):
            add_hook_to_module(module, AlignDevicesHook(execution_device=torch.device("cpu")))
        return after(self, model, **options)

    monkeypatch.setattr(integration.QftQuantizer, "_process_model_after_weight_loading", hooked)
    model = read(dense, qft.QftConfig("nf4 g64 f16", formats={"lm_head": "int8 g64 f16"}))
    assert isinstance(model.lm_head, qft.QuantLinear)
    assert isinstance(model.lm_head._hf_hook, AlignDevicesHook)
    expected = logits(model)
    assert isinstance(model.dequantize().model.layers[0].mlp.up_proj._hf_hook, AlignDevicesHook)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_weights_that_accelerate_has_taken_away_are_not_missed(saved, monkeypatch):
    """A device map over GPU and CPU has the layers offloaded before the quantizer sees the model again."""
    from accelerate import cpu_offload

    after, expected = integration.QftQuantizer._process_model_after_weight_loading, logits(read(saved))

    def offloaded(self, model, **options):
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        return after(self, model, **options)

    monkeypatch.setattr(integration.QftQuantizer, "_process_model_after_weight_loading", offloaded)
    model = read(saved)
    assert model.model.layers[0].mlp.up_proj._parameters["weight"].is_meta
    assert torch.equal(logits(model), expected)


# ------------------------------------------------------------------------------------------------ registration


REGISTERED = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('qft' in m)"


def test_qft_first(python):
    program = (
        "import qft, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
        "qft.QftConfig('nf4 g64 dq'); print('transformers.modeling_utils' in sys.modules)\n"
        f"from transformers import AutoModelForCausalLM\n{REGISTERED}"
    )
    assert python(program).split() == ["[]", "False", "True"]


def test_transformers_first(python):
    program = f"from transformers import LlamaForCausalLM\nimport qft\n{REGISTERED}"
    assert python(program).split() == ["True"]


def test_a_model_opened_without_qft_names_it(python, saved):
    program = (
        "import sys, transformers\n"
        "transformers.utils.logging.disable_progress_bar()\n"
        "try:\n"
        f"    transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r})\n"
        "except RuntimeError:\n"
        "    print('refused')\n"
    )
    assert "Unknown quantization type, got qft" in python("import sys; sys.stderr = sys.stdout\n" + program)
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert "import qft" in config["open_with"]
