"""QuantExperts computes what the dense experts of its family do with its dequantized weights, and trains its scales."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from formats import FORMATS, has_own_kernels
from torch import Tensor, nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import qft
import qft.notices
from qft.disk.described import describe as describe_layers
from qft.disk.manifest import layers_from_json, layers_to_json
from qft.disk.pretrained import describe
from qft.format import Format, FormatError
from qft.nn.experts import QuantExperts, layout_of, oriented, reason_against
from qft.reference import per_weight

COUNT, HIDDEN, INNER = 5, 44, 36  # no multiple of a group or of 16
CONFIG = SimpleNamespace(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    moe_intermediate_size=INNER,
    expert_ffn_hidden_size=INNER,
    num_experts=COUNT,
    num_local_experts=COUNT,
    n_routed_experts=COUNT,
    moe_num_experts=COUNT,
    zero_expert_num=1,
    hidden_act="silu",
    mlp_hidden_act="relu2",
    moe_latent_size=None,
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
    moe_hidden_size=HIDDEN,
    rms_norm_eps=1e-5,
    post_norm_eps=1e-5,
    _experts_implementation="eager",
)
FAMILIES = {
    "qwen3_moe": Qwen3MoeExperts,
    "mixtral": MixtralExperts,
    "gpt_oss": GptOssExperts,  # transposed, biased, gate and up interleaved, a gate of its own
    "aria": AriaExperts,  # transposed
    "nemotron_h": NemotronHExperts,  # no gate
    "muse_spark": MuseSparkExperts,  # a norm after each expert
    "llama4": Llama4TextExperts,  # every expert sees as many tokens
}
READY = [fmt for fmt in FORMATS if has_own_kernels(fmt)]  # others wait for a compiler first
ROUTED = [name for name in FAMILIES if name != "llama4"]


def dense(family: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    experts = FAMILIES[family](CONFIG)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype).eval()


def with_weights_of(experts: nn.Module, packed: QuantExperts) -> nn.Module:
    """The dense module with the packed one's dequantized weights, through its own layout."""
    twin = copy.deepcopy(experts)
    for name, weight in packed.dequantize().items():
        getattr(twin, name).data = weight.transpose(1, 2) if layout_of(experts).transposed else weight
    return twin


def routed(family: str, tokens: int = 9) -> tuple[Tensor, ...]:
    """What the family's forward takes: expert 3 serves nobody."""
    torch.manual_seed(1)
    if family == "llama4":
        return (torch.randn(COUNT * tokens, HIDDEN, requires_grad=True),)
    index = torch.tensor([[0, 2], [4, 1], [2, 4]]).repeat(tokens // 3, 1)
    weights = torch.rand(tokens, 2).requires_grad_()
    return torch.randn(tokens, HIDDEN, requires_grad=True), index, weights


@pytest.mark.parametrize("fmt", ["nf4 g32 f32", "int3 g32 f16 zero", "nf2 g64 dq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_its_dequantized_weights_say(family: str, fmt: str) -> None:
    experts = dense(family)
    packed = QuantExperts.from_experts(experts, fmt)
    twin = with_weights_of(experts, packed)
    given, wanted = routed(family), routed(family)
    out, exact = packed(*given), twin(*wanted)
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)
    seed = torch.randn(out.shape)
    out.backward(seed)
    exact.backward(seed)
    for mine, theirs in zip(given, wanted, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    restored = packed.to_dense()
    assert type(restored) is type(experts)
    torch.testing.assert_close(restored(*given), exact)


@pytest.mark.parametrize("fmt", READY, ids=str)
def test_each_expert_is_a_weight_of_its_own(fmt: Format) -> None:
    experts = dense("gpt_oss")
    packed = QuantExperts.from_experts(experts, fmt)
    for name in packed.code_names:
        stack, whole = packed.stack(name), packed.dequantize()[name]
        for at, (q, weight) in enumerate(zip(stack.matrices(), oriented(experts, name), strict=True)):
            alone = qft.quantize(weight, fmt)
            assert all(torch.equal(mine, alone.tensors()[key]) for key, mine in q.tensors().items())
            assert torch.equal(whole[at], alone.dequantize())
        assert stack.nbytes == sum(q.nbytes for q in stack.matrices())
        assert torch.equal(stack.scales, torch.stack([q.scales for q in stack.matrices()]))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
@pytest.mark.parametrize("fmt", ["nf4 g32 f32", "int4 g32 f32 zero", "int4 channel f32"])
def test_scales_and_zero_points_get_the_gradients_of_dense_experts(family: str, fmt: str) -> None:
    experts = dense(family)
    packed = QuantExperts.from_experts(experts, fmt)
    twin = copy.deepcopy(experts)
    wanted: dict[str, Tensor] = {}
    for name in packed.code_names:
        stack, rows = packed.stack(name), []
        leaf = wanted[f"{name}_scales"] = stack.scales.detach().clone().requires_grad_()
        if stack.zeros is not None:
            wanted[f"{name}_zeros"] = stack.zeros.detach().clone().requires_grad_()
        for at, q in enumerate(stack.matrices()):
            level = torch.tensor(packed.format.levels)[q.unpack().long()]
            if stack.zeros is not None:
                level = level - per_weight(wanted[f"{name}_zeros"][at], packed.format, q.shape[1])
            rows.append(level * per_weight(leaf[at], packed.format, q.shape[1]))
        weight = torch.stack(rows)
        del twin._parameters[name]
        setattr(twin, name, weight.transpose(1, 2) if packed.layout.transposed else weight)
    for name in wanted:
        packed._parameters[name].requires_grad_()
    given = routed(family)
    out = packed(*given)
    seed = torch.randn(out.shape)
    out.backward(seed)
    twin(*given).backward(seed)
    for name, leaf in wanted.items():
        mine = packed._parameters[name].grad
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-3, atol=1e-3)
        if family != "llama4":
            assert not mine[3].any(), "nobody asked expert 3"


def test_an_expert_without_a_token_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, read = QuantExperts.from_experts(dense(), "nf4 g32"), []
    product = torch.ops.qft.matmul
    monkeypatch.setattr(qft.ops, "matmul", lambda x, q: read.append(q.weight.data_ptr()) or product(
        x, *(getattr(q, name) for name in qft.tensor.STORED), str(q.format), q.shape[1]))  # fmt: skip
    packed(*routed("qwen3_moe"))
    idle = {packed._parameters[name][3].data_ptr() for name in packed.code_names}
    assert len(read) == 2 * (COUNT - 1)
    assert idle.isdisjoint(read)


def test_an_index_past_the_last_expert_is_none() -> None:
    """What transformers marks tokens of other ranks with."""
    packed = QuantExperts.from_experts(dense(), "nf4 g32")
    x, index, weights = routed("qwen3_moe")
    elsewhere = index.clone()
    elsewhere[:, 1] = COUNT
    torch.testing.assert_close(packed(x, elsewhere, weights), packed(x, index[:, :1], weights[:, :1]))
    assert not packed(x, torch.full_like(index, COUNT), weights).any()
    assert packed(x[:0], index[:0], weights[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_in_and_goes_out(dtype: torch.dtype) -> None:
    experts = dense("gpt_oss", dtype)
    packed = QuantExperts.from_experts(experts, "int8 g32")
    x, index, weights = routed("gpt_oss")
    out = packed(x.to(dtype), index, weights.to(dtype))
    assert out.dtype == dtype
    exact = with_weights_of(experts.float(), packed)(x, index, weights)
    assert ((out.float() - exact).norm() / exact.norm()).item() < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert packed.float()(x, index, weights).dtype == torch.float32


def test_moving_to_a_dtype_changes_biases_and_nothing_stored() -> None:
    packed = QuantExperts.from_experts(dense("gpt_oss"), "nf4 g32 dq")
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.half()
    for name, tensor in packed.state_dict().items():
        assert tensor.dtype == (torch.float16 if name.endswith("_bias") else before[name].dtype), name
        assert name.endswith("_bias") or torch.equal(tensor, before[name])


def test_a_state_dict_comes_back_and_a_wrong_one_is_refused() -> None:
    experts = dense()
    packed, other = QuantExperts.from_experts(experts, "nf4 g32 dq"), QuantExperts(experts, "nf4 g32 dq")
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    given = routed("qwen3_moe")
    assert torch.equal(other(*given), packed(*given))
    with pytest.raises(FormatError, match=r"a dense torch.float32 gate_up_proj; load it into the model's own experts"):
        other.load_state_dict(experts.state_dict())
    with pytest.raises(FormatError, match="nf2 g32 f32; build the layer with that"):
        other.load_state_dict(QuantExperts.from_experts(experts, "nf2 g32").state_dict())
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(QuantExperts(packed, "nf2 g32")))):
        assert str(twin).startswith("QuantExperts(\n  Qwen3MoeExperts: gate_up_proj [5, 72, 44], down_proj [5, 44, 36]")


# -------------------------------------------------------------------------------------------------- whole models

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "intermediate_size": 40,
    "pad_token_id": 0,
}
TOKENS = torch.arange(24).view(2, 12)


def moe(family: str = "qwen3_moe") -> nn.Module:
    """A mixture of two layers."""
    torch.manual_seed(0)
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if family == "qwen3_moe":
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **experts, num_experts=4)).eval()
    if family == "qwen2_moe":
        config = transformers.Qwen2MoeConfig(
            **SMALL, **experts, num_experts=4, shared_expert_intermediate_size=24, decoder_sparse_step=1
        )
        return transformers.Qwen2MoeForCausalLM(config).eval()
    if family == "mixtral":
        config = transformers.MixtralConfig(**SMALL, num_experts_per_tok=2, num_local_experts=4)
        return transformers.MixtralForCausalLM(config).eval()
    if family == "gpt_oss":
        config = transformers.GptOssConfig(**SMALL, num_experts_per_tok=2, num_local_experts=4)
        return transformers.GptOssForCausalLM(config).eval()
    config = transformers.Llama4TextConfig(
        **SMALL, intermediate_size_mlp=40, num_local_experts=4, num_experts_per_tok=1
    )
    return transformers.Llama4ForCausalLM(config).eval()


WHOLE = ["qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss", "llama4"]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def experts_of(model: nn.Module) -> dict[str, QuantExperts]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantExperts)}


@pytest.mark.parametrize("family", WHOLE)
def test_a_mixture_is_quantized_saved_and_loaded(family: str, tmp_path: Path) -> None:
    original = moe(family)
    model = qft.quantize_model(copy.deepcopy(original), "nf4 g32 f16", formats={"*.1.*experts": "int3 g32 dq zero"})
    found = experts_of(model)
    assert len(found) == 2
    assert [str(module.format) for module in found.values()] == ["nf4 g32 f16", "int3 g32 dq zero"]
    twin = copy.deepcopy(original)
    for path, module in model.named_modules():
        if isinstance(module, qft.QuantLinear):
            twin.get_submodule(path).weight = nn.Parameter(module.dequantize())
        elif isinstance(module, QuantExperts):
            parent, _, name = path.rpartition(".")
            setattr(twin.get_submodule(parent), name, with_weights_of(twin.get_submodule(path), module))
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
    qft.save(model, tmp_path / "m")
    loaded = qft.load(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))
    assert qft.report(loaded).quantized == qft.report(model).quantized == describe(tmp_path / "m").layers
    assert describe(tmp_path / "m").parameters == qft.report(model).parameters
    other = qft.load(tmp_path / "m", loaded)  # over a skeleton that is quantized already
    assert torch.equal(logits(other), logits(model))


def test_the_report_counts_experts_and_every_parameter() -> None:
    dense_model = moe()
    model = qft.quantize_model(copy.deepcopy(dense_model), "nf4 g32 f16")
    report = qft.report(model)
    layers = {layer.path: layer for layer in report.quantized if layer.kind == "experts"}
    assert list(layers) == [
        f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]
    first = layers["model.layers.0.mlp.experts.gate_up_proj"]
    assert first.shape == (4, 48, 32)
    assert first.bits_per_weight == pytest.approx(8 * (16 + 2) / 32)
    assert first.dense_nbytes == 4 * 48 * 32 * 4
    assert 0 < first.errors[0] < 0.15
    assert report.parameters == sum(p.numel() for p in dense_model.parameters())
    assert report.quantized_parameters == sum(
        p.numel() for path, p in dense_model.named_parameters() if "_proj" in path
    )
    assert report.nbytes == report.other_nbytes + sum(layer.nbytes for layer in report.layers if not layer.shares)
    assert "experts.gate_up_proj: nf4 g32 f16, 4x48x32" in str(report)
    assert f"{report.quantized_parameters} of {report.parameters} parameters" in str(report)


class OwnMixture(nn.Module):
    """Experts of a family that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(3, 8, 16))
        self.token = nn.Parameter(torch.randn(1, 8, 16))
        self.convolution = nn.Conv1d(8, 8, 3)
        self.linear = nn.Linear(16, 16)


def test_what_is_left_dense_is_listed_with_a_reason() -> None:
    model = nn.ModuleDict({"own": OwnMixture(), "longcat": LongcatFlashExperts(CONFIG), "qwen": dense()})
    qft.quantize_model(model, "nf4 g32", skip=["qwen"])
    left = {layer.path: (layer.kind, layer.reason) for layer in qft.report(model).dense}
    unknown = "a 3-D parameter of {}, whose forward pass qft does not know"
    assert left == {
        "own.kernels": ("parameter", unknown.format("OwnMixture")),
        "longcat.gate_up_proj": ("parameter", unknown.format("LongcatFlashExperts")),
        "longcat.down_proj": ("parameter", unknown.format("LongcatFlashExperts")),
        "qwen.gate_up_proj": ("experts", "skipped by name"),
        "qwen.down_proj": ("experts", "skipped by name"),
    }
    assert reason_against(model["longcat"]) == "LongcatFlashExperts is no experts module that qft knows"
    with pytest.raises(ValueError, match="these experts cannot be quantized: Linear is no experts module"):
        QuantExperts.from_experts(nn.Linear(2, 2), "nf4 g32")


@pytest.mark.parametrize("init", ["plain", "search", "loftq"])
def test_experts_take_a_starts_codes_and_no_lora(init: str, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[str, int, float]] = []
    qft.notices.say_once.cache_clear()
    model = qft.quantize_model(moe(), "nf2 g32", init, 4, on_step=lambda *step: seen.append(step))
    alone = getattr(qft.init, init)
    for path, module in experts_of(model).items():
        for name in module.code_names:
            weights = oriented(moe().get_submodule(path), name)
            expected = [alone(weight, "nf2 g32", 0)[0] for weight in weights]
            assert torch.equal(module._parameters[name], torch.stack([q.weight for q in expected]))
            assert ((f"{path}.{name}", 0, module.start_errors[name][0])) in seen
    assert "experts take no LoRA; their scales can train" in caplog.text


def test_a_start_with_activations_leaves_experts_to_the_search() -> None:
    model = moe()
    calibration = {path: torch.eye(m.in_features) + 0.5 for path, m in model.named_modules() if type(m) is nn.Linear}
    found = qft.quantize_model(model, "nf2 g32", "gptq", calibration=calibration)
    searched = qft.quantize_model(moe(), "nf2 g32", "search")
    for path, module in experts_of(found).items():
        theirs = experts_of(searched)[path]
        assert all(torch.equal(module._parameters[name], theirs._parameters[name]) for name in module.code_names)


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_replaced() -> None:
    model = moe("gpt_oss")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 5] = float("nan")  # [expert, in, out]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj\[2\]\[5, 3\] is nan"):
        qft.quantize_model(model, "nf4 g32")
    assert not any(isinstance(module, (qft.QuantLinear, QuantExperts)) for module in model.modules())


def test_scales_of_experts_train_round_and_swap(tmp_path: Path) -> None:
    model = qft.quantize_model(moe(), "nf2 g32 f16")
    narrow = qft.report(model)
    start = qft.scales_state(model)
    assert start["model.layers.0.mlp.experts.down_proj"].shape == (4, 32, 1)
    qft.prepare_for_training(qft.train_only(model, "scales")).train()
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    assert "model.layers.1.mlp.experts.gate_up_proj_scales" in trained
    assert all(path.endswith("_scales") and p.dtype == torch.float32 for path, p in trained.items())
    optimizer = torch.optim.Adam(trained.values(), 3e-3)
    losses = []
    for _ in range(5):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    tuned = logits(model)
    qft.save_scales(model, tmp_path / "task")
    qft.load_scales(model, start)
    assert not torch.equal(logits(model), tuned)
    qft.load_scales(model, tmp_path / "task")
    assert torch.equal(logits(model), tuned)
    errors = qft.save(model, tmp_path / "m", round_scales=True)
    assert 0 < errors["model.layers.0.mlp.experts.down_proj"] < 1e-3
    rounded = qft.load(tmp_path / "m")
    assert qft.round_scales(model) == errors
    assert torch.equal(logits(rounded), logits(model))
    assert qft.report(model).nbytes == narrow.nbytes
    other = qft.quantize_model(moe("mixtral"), "nf2 g32 f16")
    with pytest.raises(FormatError, match=r"the codes of .* differ; load the base it was trained on"):
        qft.load_scales(other, tmp_path / "task")


def test_frozen_experts_let_gradients_through_to_the_adapters() -> None:
    model = qft.prepare_for_training(qft.quantize_model(moe(), "nf4 g32", rank=4)).train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in path and p.grad is not None for path, p in trained.items())


def test_peft_is_told_that_packed_experts_take_no_lora() -> None:
    from peft import LoraConfig, get_peft_model

    model = qft.quantize_model(moe(), "nf4 g32")
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(
        ValueError, match=r"experts are packed and take no LoRA; train their scales with qft.train_only"
    ):
        get_peft_model(model, config)


def test_the_cost_of_a_mixture_says_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    from qft.analysis.cost import cost

    qft.notices.say_once.cache_clear()
    model = qft.quantize_model(moe(), "nf4 g32")
    found = cost(model, 4, rows=1, length=8)
    assert "the cost of a mixture leaves its experts' operations out" in caplog.text
    packed = sum(module.stack(name).nbytes for module in experts_of(model).values() for name in module.code_names)
    assert found.weights_nbytes > packed


@pytest.mark.parametrize(
    "damage",
    [
        {"kind": "convolution"},
        {"kind": "linear"},
        {"projections": {}},
        {"projections": {"gate_up_proj": {"shape": [4, 48], "errors": []}}},
        {"shape": [48, 32]},
        {"lora": {"rank": 2, "alpha": 2.0, "scaling": 1.0, "dropout": 0.0}},
        {"kind": "embedding", "shape": [48, 32], "projections": {}, "faces": None},
    ],
)
def test_a_damaged_description_of_experts_is_refused(damage: dict[str, Any]) -> None:
    path = "model.layers.0.mlp.experts"
    entries = layers_to_json(describe_layers(qft.quantize_model(moe(), "nf4 g32")))
    assert layers_from_json(entries, "config.json")[path].projections["down_proj"].shape == (4, 32, 24)
    with pytest.raises(FormatError, match=r"config\.json describes its quantized layers wrongly"):
        layers_from_json({path: entries[path] | damage}, "config.json")


def test_a_description_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    qft.save(qft.quantize_model(moe("gpt_oss"), "nf4 g32", skip=["*_proj"]), tmp_path / "m")
    with pytest.raises(FormatError, match=r"quantizes model\.layers\.0\.mlp\.experts \[4, 80, 32\], which is Qwen3Moe"):
        qft.load(tmp_path / "m", moe())
