"""A saved model is the model, bit for bit; a directory that is anything else is refused in one sentence."""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_lm
import torch
import transformers
from formats import FORMATS, FOUR
from torch import Tensor, nn

import qft
from qft.adapters.scales import round_scales, train_only
from qft.disk import files, manifest, tensor_file
from qft.disk.io import load, save
from qft.disk.manifest import Manifest
from qft.disk.tensor_file import Stored
from qft.format import Format, FormatError
from qft.model.surgery import quantize_model
from qft.nn.linear import FloatFacingQuantLinear, QuantLinear

OUT, IN = 33, 100


class Net(nn.Module):
    """Everything a module can hold: dense and quantized layers, tied weights, buffers that are and are not saved."""

    def __init__(self, width: int = OUT) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, IN)
        self.up = nn.Linear(IN, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.block = nn.ModuleDict({"down": nn.Linear(width, IN)})
        self.head = nn.Linear(IN, 12, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mean", torch.randn(IN))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("angles", torch.arange(IN) / 7, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.mean + self.angles.sin()
        x = self.norm(self.up(x)) * self.steps
        return self.head(self.block["down"](x))


SKIP = ("head",)


def quantized(fmt: Format | str = "nf4 g64 f32", rank: int = 0, **options) -> Net:
    return quantize_model(Net(), fmt, rank=rank, skip=SKIP, **options)


def skeleton(width: int = OUT) -> Net:
    """The same architecture, with values that show wherever they stay."""
    net = Net(width)
    with torch.no_grad():
        for tensor in (*net.parameters(), net.mean):
            tensor.fill_(torch.nan)
        net.steps.fill_(-1)
    return net


IDS = torch.arange(12).view(2, 6)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def tensors(model: nn.Module) -> dict[str, tuple[str, torch.dtype, tuple[int, ...]]]:
    """Content, dtype and memory order of every tensor, buffers that are not saved included."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: (Stored.of(tensor).sha256, tensor.dtype, tensor.stride()) for name, tensor in named}


def assert_same(model: nn.Module, other: nn.Module) -> None:
    assert tensors(other) == tensors(model)
    layers = [{p: m for p, m in net.named_modules() if isinstance(m, QuantLinear)} for net in (model, other)]
    assert layers[0].keys() == layers[1].keys()
    for path, mine in layers[0].items():
        theirs = layers[1][path]
        assert type(theirs) is type(mine)
        assert repr(theirs) == repr(mine)
        assert (theirs.lora_scaling, theirs.lora_alpha) == (mine.lora_scaling, mine.lora_alpha)


# ------------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("rank", [0, 3], ids=["bare", "lora"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_model_comes_back_bit_for_bit(fmt: Format, rank: int, tmp_path: Path) -> None:
    model = quantized(fmt, rank, **({"init": "loftq", "iters": 1} if rank else {})).eval()
    save(model, tmp_path / "m")
    net = skeleton()
    assert load(tmp_path / "m", net) is net
    assert_same(model, net)
    assert torch.equal(logits(net), logits(model))


def with_dropout() -> Net:
    return quantized(rank=4, dropout=0.25, alpha=7)


def with_rslora() -> Net:
    return quantized("int3 g32 f16 zero", rank=4, alpha=16, rslora=True)


def in_bf16() -> Net:
    return quantized("nf4 g64 dq", rank=2).to(torch.bfloat16)


def facing() -> Net:
    model = quantized("nf4 g64 f16", rank=2)
    FloatFacingQuantLinear.adopt(model.up, torch.bfloat16)
    return model


def one_weight_for_two() -> Net:
    model = Net()
    model.again = nn.Linear(IN, OUT)
    model.again.weight = model.up.weight
    return quantize_model(model, "nf4 g64 dq", rank=2, skip=SKIP)


def one_layer_for_two() -> Net:
    model = Net()
    model.again = model.block
    return quantize_model(model, "nf4 g64 dq", skip=SKIP)


def mixed() -> Net:
    return quantized("nf4 g64 f32", formats={"up": f"{FOUR} channel f16"})


def tied_head_quantized() -> Net:
    return quantize_model(Net(), "nf4 g64 f32", formats={"head": "int8 g32 f32"})


def tuned() -> Net:
    model = train_only(quantized("nf4 g64 dq", rank=2), ("scales", "lora"))
    with torch.no_grad():
        model.up.weight_scales.mul_(1.01)
    return model


def transposed() -> Net:
    model = quantized(rank=3)
    model.norm.weight = nn.Parameter(torch.randn(OUT, 2)[:, 0])  # has gaps: comes back without them
    model.up.lora_A = nn.Parameter(torch.randn(IN, 3).T)
    return model


KINDS = [
    with_dropout,
    with_rslora,
    in_bf16,
    facing,
    one_weight_for_two,
    one_layer_for_two,
    mixed,
    tied_head_quantized,
    tuned,
]


def shape_of(build: Callable[[], Net]) -> Net:
    """A skeleton for what `build` makes."""
    net = skeleton()
    if build is one_weight_for_two:
        net.again = nn.Linear(IN, OUT)
    if build is one_layer_for_two:
        net.again = net.block
    return net


@pytest.mark.parametrize("build", KINDS)
def test_every_kind_of_layer_comes_back(build: Callable[[], Net], tmp_path: Path) -> None:
    model = build().eval()
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", shape_of(build))
    assert_same(model, loaded)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("build", KINDS)
def test_saving_what_was_loaded_writes_the_same_bytes(build: Callable[[], Net], tmp_path: Path) -> None:
    save(build(), tmp_path / "a")
    save(load(tmp_path / "a", shape_of(build)), tmp_path / "b")
    for name in ("model.safetensors", "qft.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_memory_order_of_a_tensor_comes_back(tmp_path: Path) -> None:
    """Matrix products round differently on a transposed factor; loftq's factors are such."""
    model = transposed()
    assert not model.up.lora_A.is_contiguous()
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", skeleton())
    assert loaded.up.lora_A.stride() == model.up.lora_A.stride()
    assert loaded.norm.weight.stride() == (1,)
    assert torch.equal(loaded.norm.weight, model.norm.weight)
    assert torch.equal(logits(loaded), logits(model))


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    save(one_weight_for_two(), tmp_path / "m")
    made = Manifest.read(tmp_path / "m")
    dq = ("weight", "weight_scales", "weight_scales_absmax", "weight_scales_offset")
    assert made.tied["head.weight"] == "embed.weight"
    assert {name for name in made.tied if name.startswith("again.")} == {
        f"again.{n}" for n in (*dq, "lora_A", "lora_B")
    }
    loaded = load(tmp_path / "m", shape_of(one_weight_for_two))
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.again._parameters["weight"] is loaded.up._parameters["weight"]
    assert loaded.again.lora_A is loaded.up.lora_A
    stored = {name for name, _ in loaded.named_parameters()}
    assert "again.weight_scales" not in stored


def test_a_skeleton_may_be_tied_or_quantized_otherwise(tmp_path: Path) -> None:
    model = quantized("nf3 g32 f16", rank=2).eval()
    save(model, tmp_path / "m")
    untied = skeleton()
    untied.head.weight = nn.Parameter(torch.randn(12, IN))
    for net in (quantized("int8 channel f32", rank=5), untied, model):
        wanted = logits(model)
        assert torch.equal(logits(load(tmp_path / "m", net)), wanted)


def test_a_layer_that_is_the_whole_model(tmp_path: Path) -> None:
    layer = QuantLinear.from_linear(nn.Linear(IN, OUT), "nf4 g64 f32")
    save(layer, tmp_path / "m")
    loaded = load(tmp_path / "m", nn.Linear(IN, OUT))
    assert torch.equal(loaded(torch.ones(1, IN)), layer(torch.ones(1, IN)))


def test_what_trains_after_a_load(tmp_path: Path) -> None:
    model = quantized(rank=2)
    train_only(model, "scales")
    save(model.train(), tmp_path / "m")
    loaded = load(tmp_path / "m", skeleton())
    assert not any(module.training for module in loaded.modules())
    frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen == {f"{layer}.{name}" for layer in ("up", "block.down") for name in ("weight", "weight_scales")}


def test_what_a_layer_stored_before_it_trained_is_remembered(tmp_path: Path) -> None:
    model = tuned()
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", skeleton())
    round_scales(loaded)
    assert {str(loaded.up.format), str(loaded.block["down"].format)} == {"nf4 g64 dq"}


def test_saving_rounds_the_scales_on_request_and_leaves_the_model_its_own(tmp_path: Path) -> None:
    model = tuned()
    before = tensors(model)
    errors = save(model, tmp_path / "m", round_scales=True)
    assert tensors(model) == before
    loaded = load(tmp_path / "m", skeleton())
    assert errors == round_scales(model)
    assert 0 < errors["up"] < 2**-5
    assert_same(model, loaded)
    assert save(model, tmp_path / "m") == {}


def test_loading_neither_uses_nor_moves_the_global_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize_model(tiny_lm.model(), "nf4 g64 f32", rank=2)
    save(model, tmp_path / "m")
    build = transformers.LlamaForCausalLM.__init__

    def drawing(self: nn.Module, config: transformers.LlamaConfig) -> None:
        torch.rand(1)  # as the constructors of some architectures do
        build(self, config)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", drawing)
    torch.manual_seed(5)
    wanted = torch.randn(3)
    torch.manual_seed(5)
    load(tmp_path / "m")
    assert torch.equal(torch.randn(3), wanted)


def test_the_start_s_errors_and_the_dense_size_stay_in_the_report(tmp_path: Path) -> None:
    model = quantized("nf2 g64 f32", rank=4, init="loftq", iters=2)
    save(model, tmp_path / "m")
    mine, theirs = (qft.report(net) for net in (model, load(tmp_path / "m", skeleton())))
    assert theirs.quantized == mine.quantized
    assert len(theirs.quantized[0].errors) == 3


# ------------------------------------------------------------------------------------------------------ transformers


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return transformers.BertForMaskedLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32, **ends)
    )


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, state_size=8)
    )


ARCHITECTURES = {
    "llama": (tiny_lm.model, {}),
    "llama, head quantized": (tiny_lm.model, {"lm_head": "int8 g32 f16"}),
    "bert": (bert, {}),
    "t5": (t5, {}),
    "gpt2": (gpt2, {}),
    "mamba": (mamba, {}),
    "mamba, head quantized": (mamba, {"lm_head": "nf3 g64 dq"}),
}


def answer(model: nn.Module) -> Tensor:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("build", "formats"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_transformers_model_builds_itself(
    build: Callable[[], nn.Module], formats: dict[str, str], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = quantize_model(build().to(dtype).eval(), "nf4 g64 dq", rank=2, formats=formats)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.lora_B.normal_()
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same(model, loaded)
    assert torch.equal(answer(loaded), answer(model))
    assert loaded.dtype == model.dtype
    assert loaded.config.architectures == [type(model).__name__]
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert hasattr(loaded, "generation_config") == hasattr(model, "generation_config")


def test_the_generation_settings_come_back(tmp_path: Path) -> None:
    model = quantize_model(tiny_lm.model(), "nf4 g64 f32")
    model.generation_config.max_new_tokens = 3
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.generate(IDS[:1], do_sample=False).shape == (1, IDS.shape[1] + 3)


class OwnLlama(transformers.LlamaForCausalLM):
    """A class that transformers does not have."""


def test_a_class_of_ones_own_needs_its_skeleton(tmp_path: Path) -> None:
    model = quantize_model(OwnLlama(tiny_lm.model().config).eval(), "nf4 g64 f32")
    save(model, tmp_path / "m")
    with pytest.raises(
        FormatError, match=r"holds a OwnLlama, which its files cannot build; call load\(directory, model"
    ):
        load(tmp_path / "m")
    assert torch.equal(answer(load(tmp_path / "m", OwnLlama(model.config))), answer(model))


def test_a_tokenizer_travels_and_stays_until_another_comes(tmp_path: Path) -> None:
    model = quantize_model(tiny_lm.model(), "nf4 g64 f32")
    save(model, tmp_path, tokenizer=tiny_lm.tokenizer())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("ab").input_ids == tiny_lm.tokenizer()("ab").input_ids
    (tmp_path / "notes").write_text("the user's")
    (tmp_path / "task").mkdir()
    save(model, tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()

    class Other:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "other.model").write_text("")

    save(model, tmp_path, tokenizer=Other())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "notes", "other.model", "qft.json", "task",
    ]  # fmt: skip


def test_a_model_without_a_config_leaves_none_behind(tmp_path: Path) -> None:
    save(quantize_model(tiny_lm.model(), "nf4 g64 f32"), tmp_path)
    save(quantized(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "qft.json"]


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = quantize_model(tiny_lm.model(), "nf4 g64 dq", rank=2, formats={"*.o_proj": "int4 g32 f16 zero"})
    directory = tmp_path_factory.mktemp("saved") / "m"
    save(model, directory)
    return directory


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def rewrite(directory: Path, change: Callable[[dict], None]) -> None:
    """Change qft.json and seal it again, as one who means harm would."""
    body = json.loads((directory / "qft.json").read_bytes())
    del body["sha256"]
    change(body)
    body["sha256"] = manifest._digest(body)
    (directory / "qft.json").write_text(json.dumps(body))


def retensor(directory: Path, change: Callable[[dict[str, Tensor]], None], also: bool = True) -> None:
    """Change model.safetensors, and qft.json's digests with it."""
    held = tensor_file.read(directory / "model.safetensors", Manifest.read(directory).tensors)
    change(held)
    written = tensor_file.write(directory / "model.safetensors", held, {})
    if also:
        entries = {n: {"dtype": s.dtype, "shape": list(s.shape), "sha256": s.sha256} for n, s in written.items()}
        rewrite(directory, lambda body: body.update(tensors=entries))


Q = "model.layers.0.self_attn.q_proj"
ENTRY = lambda body: body["layers"][Q]  # noqa: E731  a name for a path into qft.json


def spell(held: dict[str, Tensor], fmt: str) -> None:
    held[f"{Q}.weight_format"] = torch.tensor(list(fmt.encode()), dtype=torch.uint8)


def regroup(directory: Path, fmt: str) -> None:
    """Change the format's spelling everywhere it stands."""
    retensor(directory, lambda held: spell(held, fmt))
    rewrite(directory, lambda body: ENTRY(body).update(format=fmt))


def relora(directory: Path, **changes: float) -> None:
    rewrite(directory, lambda body: ENTRY(body)["lora"].update(changes))


WEIGHTS, JSON = "model.safetensors", "qft.json"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights missing": (lambda d: (d / WEIGHTS).unlink(), r"model\.safetensors is missing"),
    "qft.json missing": (lambda d: (d / JSON).unlink(), r"holds weights but no qft\.json: it is a dense model"),
    "config missing": (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    "generation config missing": (lambda d: (d / "generation_config.json").unlink(), "_config.json is missing"),
    "weights cut": (lambda d: cut(d / WEIGHTS, 0.5), r"model\.safetensors is damaged"),
    "weights empty": (lambda d: cut(d / WEIGHTS, 0), r"model\.safetensors is damaged"),
    "qft.json cut": (lambda d: cut(d / JSON, 0.5), r"qft\.json is damaged"),
    "qft.json empty": (lambda d: cut(d / JSON, 0), r"qft\.json is damaged"),
    "config cut": (lambda d: cut(d / "config.json", 0.5), r"config\.json has changed"),
    "a bit of the weights": (lambda d: flip(d / WEIGHTS, -1), r" in .*model\.safetensors has changed"),
    "a bit of qft.json": (
        lambda d: (d / JSON).write_text((d / JSON).read_text().replace('"rank": 2', '"rank": 3')),
        r"qft\.json has changed",
    ),
    "a bit of the config": (lambda d: flip(d / "config.json", 20), r"config\.json has changed"),
    "a huge header": (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 200), r"model\.safetensors is damaged"),
    "a tensor less": (
        lambda d: retensor(d, lambda held: held.pop(f"{Q}.lora_A"), also=False),
        rf"model\.safetensors lacks {Q}\.lora_A",
    ),
    "a tensor less everywhere": (
        lambda d: retensor(d, lambda held: held.pop(f"{Q}.lora_A")),
        rf"holds no {Q}\.lora_A, which the model needs",
    ),
    "a tensor more": (
        lambda d: retensor(d, lambda held: held.update(evil=torch.ones(1)), also=False),
        r"model\.safetensors holds evil, which does not belong",
    ),
    "a tensor more everywhere": (
        lambda d: retensor(d, lambda held: held.update(evil=torch.ones(1))),
        "holds evil, for which the model has no place",
    ),
    "codes of another width": (
        lambda d: retensor(d, lambda held: held.update({f"{Q}.weight": held[f"{Q}.weight"][:, :-16].contiguous()})),
        rf"{Q}\.weight in .*model\.safetensors is U8 \[64, 16\], the model needs U8 \[64, 32\]",
    ),
    "codes of another dtype": (
        lambda d: retensor(d, lambda held: held.update({f"{Q}.weight": held[f"{Q}.weight"].to(torch.int8)})),
        rf"{Q}\.weight in .* is I8 \[64, 32\], the model needs U8",
    ),
    "a dense weight for codes": (
        lambda d: retensor(d, lambda held: held.update({f"{Q}.weight": torch.ones(64, 64)})),
        rf"{Q}\.weight in .* is F32 \[64, 64\], the model needs U8 \[64, 32\]",
    ),
    "another group": (lambda d: regroup(d, "nf4 g32 dq"), rf"{Q}\.weight_scales in .* needs U8 \[64, 2\]"),
    "another scale": (lambda d: regroup(d, "nf4 g64 f16"), rf"holds {Q}\.weight_scales_(absmax|offset), for which"),
    "another code": (lambda d: regroup(d, "nf2 g64 dq"), rf"{Q}\.weight in .* needs U8 \[64, 16\]"),
    "no format": (lambda d: regroup(d, "nf5 g64 dq"), r"qft\.json: 'nf5 g64 dq' is no format; the nearest is"),
    "another spelling in the weights": (
        lambda d: retensor(d, lambda held: spell(held, "fp4 g64 dq")),
        rf"{Q}\.weight_format in .* spells 'fp4 g64 dq', qft.json 'nf4 g64 dq'",
    ),
    "another shape": (
        lambda d: rewrite(d, lambda body: ENTRY(body).update(shape=[32, 64])),
        rf"quantizes {Q} \[32, 64\], which is Linear \[64, 64\] in the model",
    ),
    "a layer that is not there": (
        lambda d: rewrite(d, lambda body: body["layers"].update({"model.x": ENTRY(body)})),
        r"quantizes model\.x, which the model does not have",
    ),
    "a layer that is not linear": (
        lambda d: rewrite(d, lambda body: body["layers"].update({"model.norm": ENTRY(body)})),
        r"quantizes model\.norm .* which is LlamaRMSNorm in the model",
    ),
    "a tie to nothing": (
        lambda d: rewrite(d, lambda body: body["tied"].update({"lm_head.weight": "nothing"})),
        r"qft\.json ties lm_head\.weight to nothing",
    ),
    "a rank too high": (lambda d: relora(d, rank=65), r"qft\.json is damaged"),
    "a dropout of 2": (lambda d: relora(d, dropout=2.0), r"qft\.json is damaged"),
    "a scaling of NaN": (lambda d: relora(d, scaling=float("nan")), r"qft\.json is damaged"),
    "a size beyond numbers": (
        lambda d: rewrite(d, lambda body: ENTRY(body).update(shape=[10**30, 64])),
        "which is Linear",
    ),
    "a later layout": (lambda d: rewrite(d, lambda body: body.update(layout=3)), "has layout 3, this qft reads 2;"),
    "a list": (lambda d: (d / JSON).write_text("[1]"), r"qft\.json is damaged"),
    "a pickle": (lambda d: (d / JSON).write_bytes(b"\x80\x04]\x94."), r"qft\.json is damaged"),
    "nested": (lambda d: (d / JSON).write_text("[" * 100_000), r"qft\.json is damaged"),
    "a file elsewhere": (
        lambda d: rewrite(d, lambda body: body["files"].update({"../x": "0"})),
        r"qft\.json lists \.\./x, which is no file of a model",
    ),
    "a tokenizer elsewhere": (
        lambda d: rewrite(d, lambda body: body.update(tokenizer=["../precious"])),
        r"qft\.json is damaged",
    ),
    "a class of no model": (
        lambda d: rewrite(d, lambda body: body.update(architecture="AutoTokenizer")),
        "holds a AutoTokenizer, which transformers .* does not have",
    ),
    "a class that is abstract": (
        lambda d: rewrite(d, lambda body: body.update(architecture="PreTrainedModel")),
        r"config\.json builds no PreTrainedModel",
    ),
    "a class of another config": (
        lambda d: rewrite(d, lambda body: body.update(architecture="GPT2LMHeadModel")),
        "the model|builds no GPT2LMHeadModel",
    ),
    "nothing": (lambda d: [path.unlink() for path in d.iterdir()], r"holds no qft\.json; give a directory written by"),
}  # fmt: skip


@pytest.mark.parametrize(("harm", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_in_one_sentence_with_its_name(
    harm: Callable[[Path], object], message: str, saved: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "m"
    shutil.copytree(saved, directory)
    harm(directory)
    with pytest.raises(FormatError, match=message) as refusal:
        load(directory)
    assert str(directory) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("harm", [harm for harm, _ in DAMAGE.values()], ids=DAMAGE)
def test_saving_over_damage_repairs_it(harm: Callable[[Path], object], saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "m")
    harm(tmp_path / "m")
    save(quantized(), tmp_path / "m")
    load(tmp_path / "m", skeleton())


def test_any_flipped_bit_is_refused_or_harmless(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(saved, directory)
    wanted, places = tensors(load(directory)), random.Random(0)
    refused = 0
    for path in sorted(directory.iterdir()):
        good = path.read_bytes()
        for _ in range(12):
            position = places.randrange(len(good))
            path.write_bytes(
                good[:position] + bytes([good[position] ^ 1 << places.randrange(8)]) + good[position + 1 :]
            )
            try:
                assert tensors(load(directory)) == wanted  # a blank in qft.json
            except FormatError:
                refused += 1
        path.write_bytes(good)
    assert refused >= 40
    assert tensors(load(directory)) == wanted


UNFIT = {
    "narrower": (lambda: skeleton(width=32), r"quantizes up \[33, 100\], which is Linear \[32, 100\] in the model"),
    "without a layer": (lambda: nn.Sequential(nn.Linear(2, 2)), "quantizes up, which the model does not have"),
    "with more": (
        lambda: nn.ModuleDict({**skeleton()._modules, "more": nn.Linear(2, 2)}),
        r"holds (no )?(more|mean|steps)",
    ),
    "quantized more": (lambda: quantize_model(Net(), "nf4 g64 f32", formats={"head": "nf4 g64 f32"}), r"head\.weight_"),
}


@pytest.mark.parametrize(("build", "message"), UNFIT.values(), ids=UNFIT)
def test_a_skeleton_that_does_not_fit_is_refused_and_untouched(
    build: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    save(quantized(), tmp_path / "m")
    net = build()
    before = tensors(net)
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "m", net)
    assert tensors(net) == before


def test_damage_leaves_the_skeleton_untouched(tmp_path: Path) -> None:
    save(quantized(), tmp_path / "m")
    flip(tmp_path / "m" / "model.safetensors", -1)
    net = Net()
    before = tensors(net)
    with pytest.raises(FormatError, match="has changed"):
        load(tmp_path / "m", net)
    assert tensors(net) == before


def test_modules_shared_in_the_skeleton_alone_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.LayerNorm(4), "b": nn.LayerNorm(4)})
    save(model, tmp_path / "m")
    norm = nn.LayerNorm(4)
    with pytest.raises(FormatError, match=r"b\.weight shares its module in the model"):
        load(tmp_path / "m", nn.ModuleDict({"a": norm, "b": norm}))


def test_a_buffer_that_nothing_can_fill_is_refused(tmp_path: Path) -> None:
    save(quantized(), tmp_path / "m")
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ValueError, match="angles of the skeleton is on the meta device and in no file"):
        load(tmp_path / "m", net)


def test_a_skeleton_without_values_will_do(tmp_path: Path) -> None:
    model = quantized().eval()
    save(model, tmp_path / "m")
    with torch.device("meta"):
        net = Net()
    net.angles = Net().angles
    assert torch.equal(logits(load(tmp_path / "m", net)), logits(model))


def test_a_dense_directory_says_so(tmp_path: Path) -> None:
    tiny_lm.save(tmp_path / "dense")
    with pytest.raises(FormatError, match=r"it is a dense model.* from_pretrained and call qft\.quant"):
        load(tmp_path / "dense")


def test_no_directory_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no directory"):
        load(tmp_path / "nowhere")


class WithState(nn.Linear):
    def get_extra_state(self) -> str:
        return "text"


class OwnQuantLinear(QuantLinear):
    pass


UNSAVABLE = {
    "meta": (lambda: quantized().to("meta"), ValueError, "is on the meta device, which holds no values"),
    "complex": (
        lambda: nn.ParameterDict({"a": torch.ones(2, dtype=torch.complex64)}),
        ValueError,
        r"a is torch\.complex64",
    ),
    "extra state": (lambda: nn.Sequential(WithState(2, 2)), ValueError, "0 keeps extra state in a WithState"),
    "a class of one's own": (lambda: OwnQuantLinear(64, 2, "nf4 g64 f32"), TypeError, "is a OwnQuantLinear"),
    "scales that do not fit": (lambda: overflowing(), FormatError, r"up: the scale of .* exceeds fp16's 65504"),
}


def overflowing() -> Net:
    model = train_only(quantized("nf4 g64 f16"), "scales")
    with torch.no_grad():
        model.up.weight_scales[0, 0] = 1e6
    return model


@pytest.mark.parametrize(("build", "kind", "message"), UNSAVABLE.values(), ids=UNSAVABLE)
def test_what_cannot_be_saved_is_refused_and_nothing_is_left(
    build: Callable[[], nn.Module], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    save(quantized(), tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    for directory in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(kind, match=message):
            save(build(), directory, round_scales=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_code_that_a_config_names_is_never_loaded(tmp_path: Path) -> None:
    model = quantize_model(tiny_lm.model(), "nf4 g64 f32")
    model.config.auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    save(model, tmp_path / "m")
    (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "evil.Model" in (tmp_path / "m" / "config.json").read_text()
    assert torch.equal(answer(load(tmp_path / "m")), answer(model))
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------ interruptions

# Saves one of two models over the other until it is killed, many times; prints what the directory then was.
KILLER = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import torch
from torch import nn
torch.set_num_threads(1)  # a forked child has no other
from qft.disk.io import load, save
from qft.nn.linear import QuantLinear

def model(value):
    linear = nn.Linear(512, 512)
    with torch.no_grad():
        linear.weight.fill_(value)
    return nn.Sequential(QuantLinear.from_linear(linear, "nf4 g64 f32"), nn.Linear(512, 512).requires_grad_(False))

directory, models = Path(sys.argv[1]), [model(1.0), model(2.0)]
wanted = [m[1].weight.sum().item() for m in models]
rounds = random.Random(0)
save(models[0], directory)
started = time.perf_counter()
save(models[0], directory)
seconds = time.perf_counter() - started
seen, interrupted = [], 0
for turn in range(42):
    done, report = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            for m in models:
                save(m, directory)
                os.write(report, b".")
    for _ in range(turn % 3):  # saves to wait for
        os.read(done, 1)
    time.sleep(rounds.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(done), os.close(report)
    interrupted += any(p.name.startswith(".") for p in directory.iterdir())
    loaded = load(directory, nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)))
    which = int(loaded[0].dequantize()[0, 0].item()) - 1
    seen.append([which, loaded[1].weight.sum().item() == wanted[which]])
    left = sorted(p.name for p in directory.iterdir() if p.name != ".qft-writing")
    assert left == ["model.safetensors", "qft.json"], left

# A disk that takes no more than 100 kB of a file.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
before = {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    save(models[0], directory)
    full = "saved"
except OSError as error:
    full = error.errno
after = {p.name: p.read_bytes() for p in directory.iterdir()}
print(json.dumps({"seen": seen, "interrupted": interrupted, "full": full, "intact": after == before}))
"""


def test_a_kill_at_any_moment_or_a_full_disk_leaves_a_whole_model(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path / "m")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout)
    assert all(whole for _, whole in outcome["seen"])
    assert {which for which, _ in outcome["seen"]} == {0, 1}
    assert outcome["interrupted"] >= 5
    assert outcome["full"] == errno.EFBIG
    assert outcome["intact"]


def test_an_interrupted_save_is_completed_by_the_next_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = quantized("nf4 g64 f32").eval(), quantized("nf3 g64 f16", rank=2).eval()
    save(old, tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(files, "settle", lambda directory: None)  # as if killed right after the rename
        save(new, tmp_path / "m")
    assert (tmp_path / "m" / files.WRITTEN).is_dir()
    assert torch.equal(logits(load(tmp_path / "m", skeleton())), logits(new))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["model.safetensors", "qft.json"]
