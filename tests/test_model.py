"""Whole models: what is replaced, what is left dense and why, and that the result computes what its weights say."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import qft
from qft.model.targets import matches
from qft.nn.linear import FloatFacingQuantLinear, QuantLinear

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


def llama(tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**TINY, intermediate_size=96))


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    )


def mamba() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=96, state_size=8)
    )


MODELS = {"llama": llama, "bert": bert, "t5": t5, "gpt2": gpt2, "mamba": mamba}
TOKENS = torch.arange(24).view(2, 12) % 90


def outputs(model: nn.Module) -> torch.Tensor:
    extra = {"decoder_input_ids": TOKENS} if isinstance(model, transformers.T5ForConditionalGeneration) else {}
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, **extra)[0]


def dense_twin(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """The dense model with each quantized layer's dequantized weight put back."""
    twin = copy.deepcopy(model)
    for path, layer in quantized.named_modules():
        if isinstance(layer, QuantLinear):
            module = twin.get_submodule(path)
            weight = layer.dequantize()
            module.weight = nn.Parameter(weight if isinstance(module, nn.Linear) else weight.T.contiguous())
    return twin


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_model_computes_what_its_dequantized_weights_say(name: str) -> None:
    model = MODELS[name]()
    quantized = qft.quantize_model(copy.deepcopy(model), "nf4 g64")
    assert qft.report(quantized).quantized
    expected = outputs(dense_twin(model, quantized))
    torch.testing.assert_close(outputs(quantized), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "mamba"])
def test_a_head_or_layer_read_for_its_dtype_faces_float(name: str) -> None:
    model = MODELS[name]()
    formats = {"lm_head": "nf4 g64"} if name == "mamba" else None
    quantized = qft.quantize_model(copy.deepcopy(model), "nf4 g64", formats=formats)
    facing = [layer for layer in quantized.modules() if isinstance(layer, FloatFacingQuantLinear)]
    assert facing
    assert all(layer.weight.dtype == torch.float32 for layer in facing)
    torch.testing.assert_close(outputs(quantized), outputs(dense_twin(model, quantized)), rtol=1e-4, atol=1e-4)
    quantized.to(torch.bfloat16)
    assert all(layer.weight.dtype == torch.bfloat16 for layer in facing)
    assert outputs(quantized).dtype in (torch.bfloat16, torch.float32)


def test_the_tied_head_stays_dense_and_says_why() -> None:
    model = qft.quantize_model(llama(), "nf2 g64")
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding, head = qft.report(model).dense
    assert "output head" in head.reason
    assert (embedding.kind, "an embedding" in embedding.reason) == ("embedding", True)
    assert head.shares == embedding.path


def test_a_tied_head_is_quantized_when_named_and_the_embedding_is_not_touched() -> None:
    model = llama()
    embedding = model.model.embed_tokens.weight.clone()
    qft.quantize_model(model, "nf4 g64", formats={"lm_head": "int8 channel"})
    assert str(model.lm_head.format) == "int8 channel f32"
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    model.tie_weights()
    assert isinstance(model.lm_head, QuantLinear), "tying again must not undo it"
    assert model.lm_head._parameters["weight"].dtype == torch.uint8


def test_linears_that_share_a_weight_share_the_packed_one() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    qft.quantize_model(model, "nf4 g64", rank=4)
    assert model[0].weight is model[2].weight
    assert model[0].lora_A is model[2].lora_A
    assert model[0].bias is not model[2].bias
    assert qft.report(model).nbytes < 2 * model[0].quant_tensor.nbytes + 8 * 64 * 8


def test_a_module_used_in_two_places_is_replaced_in_both() -> None:
    linear = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)})
    qft.quantize_model(model, "nf4 g64")
    assert isinstance(model["a"], QuantLinear)
    assert model["a"] is model["b"][0]


def test_layers_whose_parent_reads_the_weight_itself_stay_dense() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 1, enable_nested_tensor=False
    )
    model = nn.Sequential(model, nn.Linear(64, 64))
    before = model.eval()(torch.ones(1, 3, 64))
    qft.quantize_model(model, "int8 channel")
    reasons = {layer.path: layer.reason for layer in qft.report(model).dense}
    assert "reads linear1.weight itself" in reasons["0.layers.0.linear1"]
    assert "NonDynamicallyQuantizableLinear" in reasons["0.layers.0.self_attn.out_proj"]
    torch.testing.assert_close(model(torch.ones(1, 3, 64)), before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("model.layers.0.mlp.up_proj", "up_proj", True),
        ("model.layers.0.mlp.up_proj", "*.mlp.*", True),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.up_proj", "proj", False),
        ("model.layers.10.q_proj", "model.layers.1.*", False),
    ],
)
def test_patterns(path: str, pattern: str, expected: bool) -> None:
    assert matches(path, pattern) is expected


def test_formats_and_skip_by_pattern() -> None:
    model = qft.quantize_model(
        llama(), "nf2 g64", skip=["k_proj"], formats={"*.mlp.*": "nf4 g64 dq", "q_proj": "int3 g32 zero"}
    )
    spelled = {layer.path.rpartition(".")[2]: str(layer.format) for layer in qft.report(model).layers}
    assert spelled["k_proj"] == "None"
    assert spelled["down_proj"] == "nf4 g64 dq"
    assert spelled["q_proj"] == "int3 g32 f32 zero"
    assert spelled["v_proj"] == "nf2 g64 f32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip": ["no_such"]}, "'no_such' names no layer"),
        ({"formats": {"no_such": "nf4 g64"}}, "'no_such' names no layer"),
        ({"init": "lofq"}, "init='lofq' is unknown; use one of plain, search, loftq"),
        ({"init": "cloq", "rank": 4}, "init='cloq' needs the layers' activations; pass calibration=qft.calibrate"),
        ({"init": "cloq", "calibration": {}}, "the calibration holds nothing of "),
        ({"init": "search", "iters": 3}, "init='search' has no turns, and iters=3 was given"),
        ({"rank": -1}, "rank=-1 is negative"),
        ({"skip": ["*"]}, "holds no layer to quantize"),
        ({"fmt": "nf5 g64"}, "nearest is 'nf4 g64 f32'"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        qft.quantize_model(llama(), **{"fmt": "nf4 g64", **arguments})


def test_a_weight_that_is_not_finite_leaves_the_model_as_it_was() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight\[3, 5\] is nan"):
        qft.quantize_model(model, "nf4 g64")
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_the_report_counts_the_bytes_really_stored() -> None:
    model = qft.quantize_model(llama(), "nf4 g64 f16", rank=4)
    report = qft.report(model)
    total = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    assert report.nbytes == total
    assert sum(layer.nbytes for layer in report.quantized) == sum(
        layer.quant_tensor.nbytes for layer in model.modules() if isinstance(layer, QuantLinear)
    )
    assert report.nbytes == report.other_nbytes + sum(layer.nbytes for layer in report.layers if not layer.shares)
    dense = llama()
    adapters = sum(p.numel() for path, p in model.named_parameters() if "lora_" in path)
    assert report.parameters == sum(p.numel() for p in dense.parameters()) + adapters
    assert report.quantized_parameters == sum(
        module.weight.numel() for path, module in dense.named_modules() if "_proj" in path
    )
    assert report.bits_per_weight == pytest.approx(4.25, rel=0.01)
    assert "nf4 g64 f16" in str(report)


def test_loftq_records_the_error_of_every_step_and_calls_back() -> None:
    seen: list[tuple[str, int, float]] = []
    model = qft.quantize_model(
        llama(), "nf2 g64", init="loftq", rank=8, iters=3, on_step=lambda *step: seen.append(step)
    )
    for layer in qft.report(model).quantized:
        assert layer.errors == tuple(error for path, _, error in seen if path == layer.path)
        assert layer.errors[0] > layer.errors[1]
        assert layer.rank == 8


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 4.0, 32.0])
def test_the_start_does_not_depend_on_the_scaling(alpha: float | None, rslora: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96)
    nn.init.normal_(linear.weight)
    weight = linear.weight.detach().clone()
    (layer,) = qft.quantize_model(nn.Sequential(linear), "nf3 g64", init="loftq", rank=8, alpha=alpha, rslora=rslora)
    assert layer.lora_scaling == pytest.approx((alpha or 8) / (8**0.5 if rslora else 8))
    product = layer.lora_scaling * layer.lora_B @ layer.lora_A
    error = ((weight - layer.dequantize() - product).norm() / weight.norm()).item()
    assert error == pytest.approx(min(layer.init_errors), rel=1e-4)
    assert error < layer.init_errors[0]


def test_narrow_layers_take_the_rank_they_can_hold() -> None:
    model = qft.quantize_model(nn.Sequential(nn.Linear(64, 2)), "nf4 g64", rank=16)
    assert model[0].lora_rank == 2


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_prepared_models_train_their_adapters_and_nothing_else(name: str) -> None:
    model = qft.prepare_for_training(qft.quantize_model(MODELS[name](), "nf2 g64", rank=4)).train()
    dtypes = {p: p.dtype for p in model.parameters()}
    extra = {"decoder_input_ids": TOKENS} if name == "t5" else {}
    for _ in range(2):
        model(input_ids=TOKENS, **extra)[0].float().square().mean().backward()
    trained = {path for path, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in path for path in trained)
    assert all(p.grad is not None for path, p in model.named_parameters() if path in trained and "pooler" not in path)
    assert all(p.grad is None for path, p in model.named_parameters() if path not in trained)
    assert all(p.dtype == dtype for p, dtype in dtypes.items()), "nothing is upcast"
    assert not model._forward_hooks, "the check takes its hooks away"


def test_training_nothing_is_said_at_the_first_forward() -> None:
    model = qft.prepare_for_training(qft.quantize_model(llama(), "nf2 g64")).train()
    with pytest.raises(ValueError, match="nothing in LlamaForCausalLM trains"):
        model(input_ids=TOKENS)


def test_a_dense_model_cannot_be_prepared() -> None:
    with pytest.raises(ValueError, match=r"holds no quantized layer; call qft\.quantize_model first"):
        qft.prepare_for_training(llama())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
def test_a_tasks_new_head_stays_dense_and_trains_with_an_adapter() -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    config = transformers.LlamaConfig(**TINY, intermediate_size=96, num_key_value_heads=2, num_labels=3, pad_token_id=0)
    model = qft.quantize_model(transformers.LlamaForSequenceClassification(config), "nf2 g64 f16")
    head = qft.report(model).dense[-1]
    assert (head.path, "output head" in head.reason) == ("score", True)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.SEQ_CLS))
    before = tuned.base_model.model.score.modules_to_save["default"].weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 1e-2)
    ids, labels = torch.randint(1, 96, (8, 12)), torch.arange(8) % 3
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(before, tuned.base_model.model.score.modules_to_save["default"].weight)


def test_turns_reach_every_start_that_has_some() -> None:
    model, seen = llama(), []
    layer = model.model.layers[0].self_attn.q_proj
    moment = torch.eye(64) + 0.5
    calibration = {path: torch.eye(m.in_features) + 0.5 for path, m in model.named_modules() if type(m) is nn.Linear}
    for init in ("cloq", "lqlora"):
        for turns in (None, 4):
            packed = qft.quantize_model(copy.deepcopy(model), "nf2 g32", init, 4, iters=turns, calibration=calibration)
            options = {} if turns is None else {"iters": turns}
            q, a, b = getattr(qft.init, init)(layer.weight, "nf2 g32", 4, second_moment=moment, **options)
            found = packed.model.layers[0].self_attn.q_proj
            assert torch.equal(found.quant_tensor.codes, q.codes)
            assert torch.equal(found.lora_A, a)
            seen.append(b)
    assert not torch.equal(seen[0], seen[1])
