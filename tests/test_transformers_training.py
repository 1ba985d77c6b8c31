"""Trainer and its optimizers on models that from_pretrained quantized: adapters, scales, the layers' own LoRA."""

import pytest
import tiny_lm
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import qft

OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_8bit", "paged_adamw_32bit"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),  # they run, not paged
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A directory with the tiny Llama."""
    return tiny_lm.save(tmp_path_factory.mktemp("dense"))


def read(directory, config=None, **options):
    """from_pretrained."""
    given = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(directory, **given, **options)


def trainer(model, out, **arguments):
    """Trainer on one sentence."""
    tokenizer = tiny_lm.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = [tokenizer("the quick brown fox jumps over the lazy dog")] * 16
    given = {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no"} | arguments
    settings = TrainingArguments(
        out, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, per_device_train_batch_size=4, **given
    )
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate)


def losses(done):
    """Training losses, step by step."""
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def layers(model):
    """The packed linear layers."""
    return [module for module in model.modules() if isinstance(module, qft.QuantLinear)]


def codes(model):
    """Copies of all codes."""
    return [layer._parameters["weight"].clone() for layer in layers(model)]


def logits(model):
    """What the model computes of ten tokens."""
    with torch.no_grad():
        return model.eval()(torch.arange(20).reshape(2, 10)).logits


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("what", ["scales", "lora"])
def test_optimizers(dense, tmp_path, optim, what):
    rate = {"sgd": 1.0 if what == "lora" else 0.02}.get(optim, 2e-2 if what == "lora" else 2e-3)
    model = read(dense, qft.QftConfig("nf4 g32 f16"))
    before, scales = codes(model), [layer.quant_tensor.scales.clone() for layer in layers(model)]
    if what == "scales":
        qft.train_only(model, "scales")
    else:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    done = trainer(model, tmp_path, optim=optim, learning_rate=rate)
    done.train()
    assert losses(done)[-1] < losses(done)[0] - 1e-3
    assert all(map(torch.equal, codes(model), before))
    moved = [not torch.equal(layer.quant_tensor.scales, was) for layer, was in zip(layers(model), scales, strict=True)]
    assert all(moved) if what == "scales" else not any(moved)


def test_scale_only_training_saves_and_resumes(dense, tmp_path):
    model = qft.train_only(read(dense, qft.QftConfig("nf2 g64 dq")), "scales")
    done = trainer(model, tmp_path / "run", save_strategy="steps", save_steps=2, learning_rate=2e-3)
    done.train()
    opened = read(tmp_path / "run" / "checkpoint-4")
    assert {str(layer.format) for layer in layers(opened)} == {"nf2 g64 f32"}
    assert torch.equal(logits(opened), logits(model))
    again = qft.train_only(read(dense, qft.QftConfig("nf2 g64 dq")), "scales")
    resumed = trainer(again, tmp_path / "run", save_strategy="steps", save_steps=2, learning_rate=2e-3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(logits(again), logits(model))


def test_the_layers_own_lora_trains_without_peft(dense, tmp_path):
    model = read(dense, qft.QftConfig("nf2 g64 f16", "loftq", rank=4, alpha=8, iters=1))
    qft.prepare_for_training(model)
    trains = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {"lora_A", "lora_B"}
    done = trainer(model, tmp_path)
    done.train()
    assert losses(done)[-1] < losses(done)[0] - 0.1
    done.save_model(tmp_path / "saved")
    assert torch.equal(logits(read(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("alpha", [2, 4, 8])
def test_peft_begins_from_the_starting_factors(dense, alpha):
    """PEFT's adapter takes the place of the layers' factors, whatever its own scaling."""
    model = read(dense, qft.QftConfig("nf2 g64 f16", "loftq", rank=4, alpha=4, iters=2))
    expected = logits(model)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert all(value.any() for name, value in model.named_parameters() if value.requires_grad)  # PEFT's B begins at 0


def test_pefts_kbit_helper_leaves_scales_and_switches_checkpointing_on(dense):
    model = read(dense, qft.QftConfig("nf4 g64 f16"), dtype=torch.bfloat16)
    before = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers(model)]
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer, was in zip(layers(model), before, strict=True):
        for name, value in layer.state_dict().items():
            assert value.dtype == was[name].dtype
            assert torch.equal(value, was[name])
    assert model.is_gradient_checkpointing
    assert not getattr(model, "is_loaded_in_4bit", False)


def test_a_merged_adapter_is_saved_as_a_packed_model(dense, tmp_path):
    model = get_peft_model(read(dense, qft.QftConfig("int4 g32 f16")), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(read(tmp_path)), logits(merged))


def test_an_adapter_in_the_way_says_what_to_do(dense, tmp_path):
    model = get_peft_model(read(dense, qft.QftConfig("nf4 g64 f16")), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"call merge_and_unload\(\) or unload\(\) first"):
        model.dequantize()
    with pytest.raises(ValueError, match=r"call merge_and_unload\(\) or unload\(\) first"):
        model.base_model.model.save_pretrained(tmp_path)


def test_an_adapter_is_read_onto_a_model_that_was_saved_packed(dense, tmp_path):
    read(dense, qft.QftConfig("nf2 g64 dq")).save_pretrained(tmp_path / "base")
    model = get_peft_model(read(tmp_path / "base"), LoraConfig(r=2, target_modules="all-linear"))
    trainer(model, tmp_path / "run").train()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(read(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_several_gpus_in_one_process_are_refused_with_the_way_out(dense):
    """Trainer wraps such a model in nn.DataParallel, which replicates module by module."""
    layer = layers(read(dense, qft.QftConfig("nf4 g64 f16")))[0]
    with pytest.raises(ValueError, match="start a process per GPU"):
        layer._replicate_for_data_parallel()


def test_transformers_own_adapter_methods(dense, tmp_path):
    config = qft.QftConfig("nf2 g64 f16")
    model = read(dense, config)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    done = trainer(model, tmp_path / "run")
    done.train()
    assert losses(done)[-1] < losses(done)[0]
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_model.safetensors"}
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = read(dense, config)
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
