"""Models that cast activations to `layer.weight.dtype`: a layer whose codes are uint8 must not turn them into integers.

transformers' T5 family does so before `wo`, Mamba's before `lm_head`.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from formats import BOUND, error
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

import qft
from qft.format import FormatError
from qft.nn.linear import FloatFacingQuantLinear, QuantLinear

VOCABULARY = 64


def t5(feed_forward: str) -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=80,
        num_heads=4,
        num_layers=2,
        feed_forward_proj=feed_forward,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def mamba() -> PreTrainedModel:
    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        state_size=4,
        num_hidden_layers=2,
        tie_word_embeddings=False,
        time_step_rank=4,
    )
    return MambaForCausalLM(config)


@dataclass(frozen=True)
class Case:
    """A model with random weights, the layers whose dtype their parent reads, and what is quantized only when named."""

    build: Callable[[], PreTrainedModel]
    facing: str
    named: tuple[str, ...] = ()

    def quantized(self, dense: PreTrainedModel, fmt: str = "nf4 g64 f32", rank: int = 0) -> PreTrainedModel:
        return qft.quantize_model(copy.deepcopy(dense), fmt, rank=rank, formats=dict.fromkeys(self.named, fmt))


CASES = {
    "T5 DenseActDense": Case(lambda: t5("relu"), "*.DenseReluDense.wo"),
    "T5 DenseGatedActDense": Case(lambda: t5("gated-gelu"), "*.DenseReluDense.wo"),
    "Mamba lm_head": Case(mamba, "lm_head", ("lm_head",)),
}
FORMATS = ("nf4 g64 f32", "int4 g32 bf16 zero", "nf3 channel f32")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def dense(case: Case) -> PreTrainedModel:
    return case.build().eval()


def facing_layers(model: nn.Module, pattern: str) -> list[FloatFacingQuantLinear]:
    layers = [module for path, module in model.named_modules() if qft.model.targets.matches(path, pattern)]
    assert layers
    return layers


def dense_twin(dense: PreTrainedModel, packed: nn.Module) -> PreTrainedModel:
    """The dense model with every quantized weight in its dequantized, fp32 form."""
    twin = copy.deepcopy(dense)
    for path, layer in packed.named_modules():
        if isinstance(layer, QuantLinear):
            twin.get_submodule(path).weight = nn.Parameter(layer.dequantize())
    return twin


def logits(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(0, VOCABULARY, (2, 12), generator=generator)}
    if hasattr(model, "decoder"):
        inputs["decoder_input_ids"] = torch.randint(0, VOCABULARY, (2, 7), generator=generator)
    return model(**inputs).logits


@pytest.mark.parametrize("fmt", FORMATS)
def test_logits_equal_those_of_the_dequantized_weights(case: Case, dense: PreTrainedModel, fmt: str) -> None:
    packed = case.quantized(dense, fmt)
    assert all(type(layer) is FloatFacingQuantLinear for layer in facing_layers(packed, case.facing))
    with torch.no_grad():
        assert error(logits(packed), logits(dense_twin(dense, packed)).double()) <= BOUND[torch.float32]


@pytest.mark.parametrize("fmt", FORMATS)
def test_bf16_logits_are_as_good_as_the_dense_model_s(case: Case, dense: PreTrainedModel, fmt: str) -> None:
    """Both models round at the same places; how roundings fall differs, their size does not."""
    packed = case.quantized(dense, fmt)
    twin = dense_twin(dense, packed)
    with torch.no_grad():
        exact = logits(copy.deepcopy(twin).double())
        packed.to(torch.bfloat16)
        assert all(layer.weight.dtype == torch.bfloat16 for layer in facing_layers(packed, case.facing))
        mine, theirs = logits(packed), logits(twin.to(torch.bfloat16))
    assert mine.dtype == theirs.dtype
    assert error(mine, exact) <= 1.5 * error(theirs, exact)


def test_a_bf16_model_is_quantized_facing_bf16(case: Case, dense: PreTrainedModel) -> None:
    packed = case.quantized(dense.to(torch.bfloat16))
    for layer in facing_layers(packed, case.facing):
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight_scales.dtype == torch.float32
    assert logits(packed).isfinite().all()


def test_a_facing_layer_of_another_dtype_than_its_model() -> None:
    """transformers keeps T5's `wo` in fp32 where the rest is fp16 or bf16: `keep_in_fp32`."""
    model = t5("relu").eval().to(torch.bfloat16)
    for path, module in model.named_modules():
        if path.endswith(".wo"):
            module.float()
    packed = qft.quantize_model(copy.deepcopy(model), "nf4 g64 f32")
    assert all(layer.weight.dtype == torch.float32 for layer in facing_layers(packed, "*.wo"))
    seen: list[torch.dtype] = []
    for layer in facing_layers(packed, "*.wo"):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    mine, theirs = logits(packed), logits(model)
    assert set(seen) == {torch.float32}
    assert mine.dtype == theirs.dtype


def test_without_facing_the_cast_is_refused_and_not_computed(case: Case, dense: PreTrainedModel) -> None:
    """What the class is for: a plain QuantLinear gets the integers its parent made, and says so."""
    packed = case.quantized(dense)
    for layer in facing_layers(packed, case.facing):
        layer.__class__ = QuantLinear
    with pytest.raises(TypeError, match=r"QuantLinear got torch\.uint8 input; convert it with"):
        logits(packed)


def test_a_model_s_state_dict_loads_strictly_both_ways(case: Case, dense: PreTrainedModel) -> None:
    packed, other = case.quantized(dense), case.quantized(dense)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = packed.state_dict()
    assert not [name for name in state if "dense_dtype" in name], "the face is no part of the file"
    other.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(logits(other), logits(packed))
    with pytest.raises(FormatError, match="stores nf4 g64 f32, but the state_dict holds int4 g64 f32"):
        packed.load_state_dict(case.quantized(dense, "int4 g64 f32").state_dict())
    with pytest.raises(
        FormatError, match=r"stores nf4 g64 f32, but the state_dict holds a dense torch\.float32 weight"
    ):
        packed.load_state_dict(dense.state_dict())


def test_a_facing_model_trains_its_adapters(case: Case, dense: PreTrainedModel) -> None:
    packed = case.quantized(dense, rank=4).train()
    for parameter in packed.parameters():
        parameter.requires_grad_(False)
    layers = facing_layers(packed, case.facing)
    for layer in layers:
        layer.lora_A.requires_grad_()
        layer.lora_B.requires_grad_()
    logits(packed).square().sum().backward()
    assert all((layer.lora_B.grad != 0).any() for layer in layers)
    assert all(layer._parameters["weight"].grad is None for layer in layers)


def test_transformers_counts_casts_and_names_its_parameters(case: Case, dense: PreTrainedModel) -> None:
    packed = case.quantized(dense)
    names = dict(packed.named_parameters())
    for path, layer in packed.named_modules():
        if isinstance(layer, QuantLinear):
            assert names[f"{path}.weight"].dtype == torch.uint8
            assert names[f"{path}.weight"] is layer._parameters["weight"]
    assert packed.num_parameters() == sum(parameter.numel() for parameter in names.values())
    stored = {name: value.clone() for name, value in packed.state_dict().items() if "weight_" in name}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert packed.to(dtype) is packed
        assert packed.dtype == dtype
        assert all(layer.weight.dtype == dtype for layer in facing_layers(packed, case.facing))
    assert all(torch.equal(packed.state_dict()[name], value) for name, value in stored.items())


# ---------------------------------------------------------------------------------------------- the layer alone


def facing(dtype: torch.dtype = torch.float32, fmt: str = "nf4 g64 dq") -> FloatFacingQuantLinear:
    layer = QuantLinear.from_linear(nn.Linear(100, 33), fmt)
    layer.add_lora(4, B=torch.randn(33, 4))
    FloatFacingQuantLinear.adopt(layer, dtype)
    return layer


class Casting(nn.Module):
    """The parent's pattern on its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_face_is_an_empty_tensor_of_the_dense_dtype(dtype: torch.dtype) -> None:
    layer, x = facing(dtype), torch.randn(3, 100)
    plain = copy.deepcopy(layer)
    plain.__class__ = QuantLinear
    assert layer.weight.numel() == 0
    assert layer.weight.device == layer.weight_scales.device
    assert not layer.weight.requires_grad
    assert torch.equal(Casting(layer)(x), plain(x.to(dtype)))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert layer.to("meta").weight.is_meta


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file])
def test_a_copy_faces_as_the_original_does(way) -> None:
    module, x = Casting(facing(torch.bfloat16)), torch.randn(3, 100)
    other = way(module)
    assert type(other.layer) is FloatFacingQuantLinear
    assert other.layer.weight.dtype == torch.bfloat16
    assert torch.equal(other(x), module(x))


def test_a_facing_layer_takes_new_codes_and_a_state_dict_by_assignment() -> None:
    layer, x = facing(), torch.randn(3, 100)
    other = facing()
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x), layer(x))
    other.set_quantized(qft.quantize(torch.ones(33, 100), "int8 channel f32"))
    assert other.weight.dtype == torch.float32
    assert torch.equal(other.dequantize(), torch.ones(33, 100))


def test_a_facing_layer_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    module = Casting(facing(torch.bfloat16))
    x = torch.randn(3, 100, requires_grad=True)
    wanted = module(x)
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert error(got.detach(), wanted.detach().double()) <= BOUND[torch.bfloat16]
    got.sum().backward()
    assert x.grad.isfinite().all()
