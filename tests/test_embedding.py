"""QuantEmbedding is a drop-in nn.Embedding: rows of its dequantized weight, gradients of scales, life in a model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
import torch
import transformers
from formats import FORMATS, ODD, has_own_kernels, sample
from torch import Tensor, nn

import qft
from qft import kernels, notices
from qft.disk.pretrained import describe
from qft.format import Format, FormatError
from qft.nn.embedding import QuantEmbedding
from qft.reference import per_weight

READY = [fmt for fmt in FORMATS if has_own_kernels(fmt)]  # others wait for a compiler first
ROWS, WIDTH = ODD
IDS = torch.tensor([[0, 5, 5, ROWS - 1], [2, 0, 7, 1]])


def dense(padding: int | None = None, dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(0)
    embedding = nn.Embedding(ROWS, WIDTH, padding_idx=padding, dtype=dtype)
    with torch.no_grad():
        embedding.weight.copy_(sample(ODD))
    return embedding


def packed(fmt: Format | str = "nf4 g64 f32", **options: Any) -> QuantEmbedding:
    return QuantEmbedding.from_embedding(dense(**options), fmt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", READY, ids=str)
def test_a_lookup_gives_the_rows_of_the_dequantized_weight(fmt: Format, dtype: torch.dtype) -> None:
    layer = packed(fmt, dtype=dtype)
    table = layer.dequantize(dtype)
    for ids in (IDS, IDS.int(), IDS[0, 0], IDS[:0]):
        rows = layer(ids)
        assert rows.dtype == dtype
        assert torch.equal(rows, nn.functional.embedding(ids, table))


@pytest.mark.parametrize("fmt", ["nf4 g32 dq", "int3 g64 dq zero"])
def test_double_quantized_scales_are_those_of_the_rows_own_blocks(fmt: str) -> None:
    table = nn.Embedding(301, WIDTH)
    layer = QuantEmbedding.from_embedding(table, fmt)
    assert layer.quant_tensor.weight_scales_absmax.numel() > 2  # whose blocks begin and end inside a row
    ids = torch.arange(301).flip(0)
    assert torch.equal(layer(ids), layer.dequantize()[ids])


def test_a_lookup_decodes_the_rows_it_was_asked_for_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, decoded = packed("nf2 g32 dq"), []
    whole = kernels.dequantize
    monkeypatch.setattr(kernels, "dequantize", lambda q, dtype: decoded.append(q.shape) or whole(q, dtype))
    layer(IDS)
    assert decoded == [(IDS.numel(), WIDTH)]


def oracle(layer: QuantEmbedding, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The dense table, differentiable in scales and zero points."""
    level = torch.tensor(layer.format.levels)[layer.quant_tensor.unpack().long()]
    if zeros is not None:
        level = level - per_weight(zeros, layer.format, WIDTH)
    return level * per_weight(scales, layer.format, WIDTH)


@pytest.mark.parametrize("padding", [None, 5])
@pytest.mark.parametrize("fmt", [fmt for fmt in READY if fmt.scale == "f32"], ids=str)
def test_scales_and_zero_points_get_the_gradients_of_a_dense_table(fmt: Format, padding: int | None) -> None:
    layer = packed(fmt, padding=padding)
    scales = layer.quant_tensor.scales.detach().clone().requires_grad_()
    zeros = layer.quant_tensor.zeros
    zeros = None if zeros is None else zeros.detach().clone().requires_grad_()
    layer.weight_scales.requires_grad_()
    if zeros is not None:
        layer._parameters["weight_zeros"].requires_grad_()
    weight = torch.randn(*IDS.shape, WIDTH)
    (layer(IDS) * weight).sum().backward()
    (nn.functional.embedding(IDS, oracle(layer, scales, zeros), padding_idx=padding) * weight).sum().backward()
    torch.testing.assert_close(layer.weight_scales.grad, scales.grad, rtol=1e-4, atol=1e-4)
    if padding is not None:
        assert not layer.weight_scales.grad[padding].any()
    if zeros is not None:
        torch.testing.assert_close(layer._parameters["weight_zeros"].grad, zeros.grad)


def test_the_operator_passes_torchs_own_checks() -> None:
    layer = packed("int4 g64 f32 zero")
    q = layer.quant_tensor
    stored = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in q.tensors().values()]
    torch.library.opcheck(torch.ops.qft.dequantize, (*stored, None, None, str(q.format), WIDTH, torch.float32))
    rest = (*map(Tensor.detach, stored), None, None, str(q.format), WIDTH)
    for operator in (torch.ops.qft.level_grad, torch.ops.qft.shift_grad):
        torch.library.opcheck(operator, (torch.randn(ODD), *rest))
    absmax = torch.rand(ROWS, 2)
    torch.library.opcheck(torch.ops.qft.decode_scales, (absmax.mul(255).byte(), absmax, torch.rand(1)))


def test_a_lookup_compiles_as_one_graph() -> None:
    layer = packed("nf4 g64 dq", padding=5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS), layer(IDS))


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_moving_to_a_dtype_changes_what_comes_out_and_nothing_stored(move: Callable) -> None:
    layer = packed("int3 g32 f16 zero")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    wanted = move(nn.Linear(1, 1)).weight.dtype
    assert move(layer)(IDS).dtype == wanted
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)


def test_a_state_dict_comes_back_and_a_wrong_one_is_refused() -> None:
    layer, other = packed("nf4 g64 dq"), QuantEmbedding(ROWS, WIDTH, "nf4 g64 dq")
    assert not other(IDS).any()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(IDS), layer(IDS))
    with pytest.raises(FormatError, match=r"a dense torch.float32 weight; load it into nn.Embedding"):
        other.load_state_dict(dense().state_dict())
    with pytest.raises(FormatError, match="nf2 g64 f32; build the layer with that"):
        other.load_state_dict(packed("nf2 g64").state_dict())


def test_copies_and_pickles_are_whole() -> None:
    layer = packed("nf3 g32 f16", padding=3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(IDS), layer(IDS))
        assert str(twin) == str(layer) == f"QuantEmbedding({ROWS}, {WIDTH}, nf3 g32 f16, padding_idx=3)"


def test_indices_are_checked() -> None:
    layer = packed()
    with pytest.raises(TypeError, match=r"QuantEmbedding got torch.float32 indices; convert them with .long\(\)"):
        layer(IDS.float())
    with pytest.raises(IndexError):
        layer(torch.tensor([ROWS]))


# -------------------------------------------------------------------------------------------------- scaled embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma3", "bart"])
def test_a_scaled_word_embedding_scales_as_it_did(family: str, dtype: torch.dtype) -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    kind = {"gemma3": Gemma3TextScaledWordEmbedding, "bart": BartScaledWordEmbedding}[family]
    scaled = kind(ROWS, WIDTH, 0, embed_scale=50.596).to(dtype)  # which bf16 rounds to 50.5
    layer = QuantEmbedding.from_embedding(scaled, "int4 g32 f16")
    with torch.no_grad():
        scaled.weight.copy_(layer.dequantize(dtype))
    assert torch.equal(layer(IDS), scaled(IDS))
    twin = QuantEmbedding.without_values(layer, layer.format)
    assert (twin.embed_scale, twin.scale_rounds, twin.padding_idx) == (layer.embed_scale, family == "gemma3", 0)


class Shifted(nn.Embedding):
    """An embedding of its own mind."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        (Shifted(ROWS, WIDTH), "a Shifted, which does more than look up and scale"),
        (nn.Embedding(ROWS, WIDTH, max_norm=1.0), "max_norm=1.0 renormalizes its weight at every lookup"),
    ],
)
def test_an_embedding_that_does_more_stays_dense(embedding: nn.Embedding, reason: str) -> None:
    model = nn.ModuleDict({"table": embedding, "linear": nn.Linear(WIDTH, WIDTH)})
    qft.quantize_model(model, "nf4 g64", formats={"table": "int8 g64"})
    assert model["table"] is embedding
    (left,) = qft.report(model).dense
    assert left.reason == reason
    with pytest.raises(ValueError, match="this embedding cannot be quantized"):
        QuantEmbedding.from_embedding(embedding, "nf4 g64")


# -------------------------------------------------------------------------------------------------- whole models


TOKENS = torch.arange(24).view(2, 12)
BOTH = {"embed_tokens": "int8 g32 f16", "lm_head": "int8 g32 f16"}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_an_embedding_is_left_dense_unless_it_is_named() -> None:
    model = qft.quantize_model(tiny_lm.model(), "nf4 g64")
    assert type(model.model.embed_tokens) is nn.Embedding
    reasons = {layer.path: layer.reason for layer in qft.report(model).dense}
    assert reasons["model.embed_tokens"] == "an embedding; name it in formats to quantize it"


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("init", ["plain", "loftq", "search"])
def test_a_tied_head_and_embedding_share_one_packed_weight(init: str, rank: int) -> None:
    model = qft.quantize_model(tiny_lm.model(), "nf4 g64", init, rank, formats=BOTH)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert all(head._parameters[name] is embedding._parameters[name] for name in embedding.stored)
    assert model.config.tie_word_embeddings
    assert head.lora_rank == rank
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)
    twin = tiny_lm.model()
    for path, module in model.named_modules():
        if isinstance(module, qft.QuantLinear):
            weight = module.dequantize() + (module.lora_scaling * module.lora_B @ module.lora_A if rank else 0)
            twin.get_submodule(path).weight = nn.Parameter(weight)
    twin.model.embed_tokens.weight = nn.Parameter(embedding.dequantize())
    torch.testing.assert_close(before, logits(twin), rtol=1e-4, atol=1e-4)
    report = qft.report(model)
    shares = {layer.path: layer.shares for layer in report.layers if layer.shares}
    assert shares == {"lm_head": "model.embed_tokens"}
    assert report.nbytes == report.other_nbytes + report.quantized_nbytes
    assert report.quantized_parameters == sum(
        p.numel() for path, p in tiny_lm.model().named_parameters() if "norm" not in path
    )
    adapters = sum(p.numel() for path, p in model.named_parameters() if "lora_" in path)
    assert report.parameters == sum(p.numel() for p in tiny_lm.model().parameters()) + adapters


@pytest.mark.parametrize(
    "formats",
    [{"embed_tokens": "int8 g32"}, {"embed_tokens": "int8 g32", "lm_head": "nf4 g64"}, {"lm_head": "int8 g32"}],
)
def test_what_does_not_share_is_tied_no_more(formats: dict[str, str]) -> None:
    model = qft.quantize_model(tiny_lm.model(), "nf4 g64", formats=formats)
    before = logits(model)
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert torch.equal(logits(model), before)
    assert isinstance(model.lm_head, qft.QuantLinear) == ("lm_head" in formats)
    assert isinstance(model.model.embed_tokens, QuantEmbedding) == ("embed_tokens" in formats)


@pytest.mark.parametrize("formats", [BOTH, {"embed_tokens": "nf4 g64 dq"}, {**BOTH, "lm_head": "nf3 g64"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_the_same_logits(tmp_path: Path, formats: dict[str, str], dtype: torch.dtype) -> None:
    model = qft.quantize_model(tiny_lm.model().to(dtype), "nf2 g64 f16", formats=formats)
    qft.save(model, tmp_path / "m")
    loaded = qft.load(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.model.embed_tokens(TOKENS).dtype == dtype
    tied = model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    assert (loaded.lm_head._parameters["weight"] is loaded.model.embed_tokens._parameters["weight"]) == tied
    assert qft.report(loaded).quantized == qft.report(model).quantized
    theirs, ours = describe(tmp_path / "m"), qft.report(model)
    assert theirs.layers == ours.quantized
    assert (theirs.quantized_nbytes, theirs.parameters) == (ours.quantized_nbytes, ours.parameters)
    over = qft.load(tmp_path / "m", qft.quantize_model(tiny_lm.model(), "nf4 g64", formats=BOTH) if tied else None)
    assert torch.equal(logits(over), logits(model))  # over a skeleton that is quantized already


def test_scales_of_a_tied_pair_train_round_and_swap_as_one(tmp_path: Path) -> None:
    model = qft.quantize_model(tiny_lm.model(), "nf2 g64 f16", formats=BOTH)
    narrow = qft.report(model)
    qft.prepare_for_training(qft.train_only(model, "scales"), gradient_checkpointing=False).train()
    embedding, head = model.model.embed_tokens, model.lm_head
    assert embedding.weight_scales is head.weight_scales
    assert embedding.weight_scales.dtype == torch.float32
    start = qft.scales_state(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(4):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(start["model.embed_tokens"], embedding.weight_scales)
    qft.save_scales(model, tmp_path / "task")
    tuned = logits(model.eval())
    qft.load_scales(model, start)
    assert not torch.equal(logits(model), tuned)
    qft.load_scales(model, tmp_path / "task")
    assert torch.equal(logits(model), tuned)
    qft.save(model, tmp_path / "m", round_scales=True)
    rounded = qft.load(tmp_path / "m")
    assert qft.report(rounded).nbytes == narrow.nbytes  # stored once, and in fp16 again
    qft.round_scales(model)
    assert torch.equal(logits(rounded), logits(model))
    assert embedding.weight_scales is head.weight_scales


def test_embeddings_over_one_weight_are_one() -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=ROWS)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    shared = qft.quantize_model(copy.deepcopy(model), None, formats={"shared": "int8 g32"})
    tables = {id(m.weight) for m in shared.modules() if isinstance(m, QuantEmbedding)}
    assert len(tables) == 1
    assert sum(isinstance(m, QuantEmbedding) for m in shared.modules()) > 0
    assert (
        type(shared.encoder.embed_tokens) is type(shared.decoder.embed_tokens) is type(shared.shared) is QuantEmbedding
    )
    out = shared(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
    torch.testing.assert_close(out, model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits, rtol=0.1, atol=0.1)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = tiny_lm.model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = float("inf")
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight\[7, 3\] is inf"):
        qft.quantize_model(model, "nf4 g64", formats=BOTH)
    assert type(model.model.embed_tokens) is nn.Embedding


def test_starts_with_activations_leave_the_embedding_to_the_search(caplog: pytest.LogCaptureFixture) -> None:
    calibration = {
        path: torch.eye(m.in_features) + 0.5 for path, m in tiny_lm.model().named_modules() if type(m) is nn.Linear
    }
    formats = {"embed_tokens": "nf2 g64"}
    notices.say_once.cache_clear()
    found = qft.quantize_model(tiny_lm.model(), "nf2 g64", "gptq", calibration=calibration, formats=formats)
    searched = qft.quantize_model(tiny_lm.model(), "nf2 g64", "search", formats=formats)
    assert torch.equal(found.model.embed_tokens.weight, searched.model.embed_tokens.weight)
    assert "they start as init='search' does, not 'gptq'" in caplog.text


# -------------------------------------------------------------------------------------------------- PEFT


def tuned(base: nn.Module, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], **options))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning")
def test_pefts_lora_trains_over_a_packed_embedding_and_comes_back(tmp_path: Path) -> None:
    from peft import PeftModel

    def base() -> nn.Module:
        return qft.quantize_model(tiny_lm.model(), "nf4 g64", formats={"embed_tokens": "int8 g64"})

    before = logits(base())
    model = tuned(base())
    assert torch.equal(logits(model), before)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    assert {path.rpartition("lora_")[1] for path in trained} == {"lora_"}
    assert all(p.grad is not None for p in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) / 10)
    moved = logits(model)
    assert not torch.equal(moved, before)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), moved)
    with pytest.raises(ValueError, match="PEFT cannot merge an adapter into a packed embedding"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), moved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA reads the dense embedding, this one is packed"),
        ({"trainable_token_indices": [1]}, "PEFT's TrainableTokensLayer reads the dense embedding"),
    ],
)
def test_what_reads_the_dense_embedding_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuned(qft.quantize_model(tiny_lm.model(), "nf4 g64", formats={"embed_tokens": "int8 g64"}), **options)
