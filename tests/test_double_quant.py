"""Scales in 8 bits: nearest entries, an exact offset, and no scale on the wrong side of 0."""

import pytest
import torch
from formats import FORMATS, SHAPES, error, sample

import qft
from qft import double_quant, reference
from qft.format import DQ_BLOCK, Format

DQ = [fmt for fmt in FORMATS if fmt.scale == "dq"]

# The map's coarsest step, 0.9 / 64 of the block's absmax: an entry is at most half of it away, and a code that moves to
# a neighbour to keep its scale's sign at most all of it. 1 % on top for a block whose absmax was widened.
STEP = 0.9 / 64 * 1.01


def scales_of(kind: str, count: int) -> torch.Tensor:
    """Adversarial rows of scales."""
    scales = torch.rand(1, count) + 0.5
    return {
        "gaussian weights": torch.randn(count, 64).abs().amax(1)[None],
        "both signs": torch.randn(1, count),
        "twelve decades": torch.randn(1, count) * 10 ** (-12 * torch.rand(1, count)),
        "one just above 0": scales.index_fill(1, torch.tensor([count // 2]), 1e-30),
        "one just below 0": scales.index_fill(1, torch.tensor([count // 2]), -1e-30),
        "negative, one just above 0": -scales.index_fill(1, torch.tensor([count // 2]), -1e-30),
        "negative, one just below 0": -scales.index_fill(1, torch.tensor([count // 2]), 1e-30),
        "nearly constant, one just above 0": (1 + 1e-3 * scales).index_fill(1, torch.tensor([count // 2]), 1e-20),
        "nearly constant and negative, one just above 0": (-1 - 1e-3 * scales).index_fill(
            1, torch.tensor([count // 2]), 1e-20
        ),
        "constant": torch.full((1, count), 0.37),
        "constant, negative": torch.full((1, count), -0.37),
        "one large": scales.index_fill(1, torch.tensor([count // 2]), 1e6),
        "one large, negative": scales.index_fill(1, torch.tensor([count // 2]), -1e6),
        "smallest normal": torch.full((1, count), 1.1754944e-38) * (1 + scales),
    }[kind]


KINDS = (
    "gaussian weights",
    "both signs",
    "twelve decades",
    "one just above 0",
    "one just below 0",
    "negative, one just above 0",
    "negative, one just below 0",
    "nearly constant, one just above 0",
    "nearly constant and negative, one just above 0",
    "constant",
    "constant, negative",
    "one large",
    "one large, negative",
    "smallest normal",
)
COUNTS = (1, 3, 255, 256, 257, 1000)


def test_the_map():
    table = double_quant.dynamic_map()
    assert table.shape == (256,)
    assert (table[1:] > table[:-1]).all()
    assert table[-1] == 1
    assert (table == 0).sum() == 1
    assert torch.equal(
        table[table < 0].flip(0), -table[(table > 0) & (table < 1)]
    )  # 127 entries and their mirror images


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_scale_changes_sign(kind, count):
    for seed in range(5):
        torch.manual_seed(seed)
        scales = scales_of(kind, count)
        decoded = double_quant.decode(*double_quant.encode(scales))
        assert decoded.isfinite().all()
        assert torch.equal(decoded.sign(), scales.sign())


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_the_nearest_entry_or_next_to_it_for_the_signs_sake(kind, count):
    scales = scales_of(kind, count)
    codes, absmax, offset = double_quant.encode(scales)
    table = double_quant.dynamic_map().double()
    spread = absmax.repeat_interleave(DQ_BLOCK)[:count]
    target = (scales - offset)[0].double() / torch.where(spread > 0, spread, 1).double()
    nearest = (target[:, None] - table).abs().argmin(1)
    plain = double_quant.decode(nearest.to(torch.uint8)[None], absmax, offset)
    turns = (plain.sign() != scales.sign())[0]
    chosen = codes[0].long()
    distance = (target - table[chosen]).abs() - (target - table[nearest]).abs()
    assert (distance[~turns] <= 1e-15).all()
    assert ((chosen - nearest)[turns].abs() == 1).all()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_offset_and_absmax_are_torchs(kind, count):
    scales = scales_of(kind, count)
    codes, absmax, offset = double_quant.encode(scales)
    assert (codes.dtype, codes.shape) == (torch.uint8, scales.shape)
    assert torch.equal(offset, scales.mean().view(1))
    exact = torch.stack([block.abs().max() for block in (scales - offset).flatten().split(DQ_BLOCK)])
    widened = absmax > exact  # only where a block's extreme scale would otherwise land on the wrong side of 0
    assert torch.equal(absmax[~widened], exact[~widened])
    assert (absmax[widened] <= 1.01 * exact[widened]).all()
    if kind in ("gaussian weights", "constant", "one large"):
        assert not widened.any()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_moves_by_at_most_a_step_of_its_block(kind, count):
    scales = scales_of(kind, count)
    _, absmax, offset = coded = double_quant.encode(scales)
    bound = STEP * absmax.repeat_interleave(DQ_BLOCK)[:count] + 2 * torch.finfo(torch.float32).eps * offset.abs()
    assert ((double_quant.decode(*coded) - scales).abs() <= bound).all()


def test_a_constant_scale_is_kept_exactly():
    for scales in (torch.full((4, 100), 0.37), torch.full((1, 1), -2.0), torch.zeros(3, 3)):
        assert torch.equal(double_quant.decode(*double_quant.encode(scales)), scales)


def test_the_mean_is_over_scales_in_row_major_order():
    weight = sample((64, 256))
    _, scales, _ = reference.quantize(weight, Format.parse("nf4 g32"))
    assert torch.equal(qft.quantize(weight, "nf4 g32 dq").weight_scales_offset, scales.mean().view(1))


def test_gaussian_weights_hardly_notice():
    weight = torch.randn(512, 4096)
    plain, nested = qft.quantize(weight, "nf4 g64"), qft.quantize(weight, "nf4 g64 dq")
    assert torch.equal(plain.weight, nested.weight)
    assert ((nested.scales - plain.scales).abs() / plain.scales).max() < 0.015
    assert error(nested.dequantize(), weight.double()) < 1.001 * error(plain.dequantize(), weight.double())


@pytest.mark.parametrize("fmt", DQ, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_quantized_weight_carries_its_coded_scales(fmt, shape):
    weight = sample(shape)
    q = qft.quantize(weight, fmt)
    _, scales, zeros = reference.quantize(weight, fmt)
    codes, absmax, offset = double_quant.encode(scales)
    assert torch.equal(q.weight_scales, codes)
    assert torch.equal(q.weight_scales_absmax, absmax)
    assert torch.equal(q.weight_scales_offset, offset)
    assert torch.equal(q.scales, double_quant.decode(codes, absmax, offset))
    assert (zeros is None) == (q.zeros is None)


def test_eight_bit_codes_are_refused():
    with pytest.raises(qft.FormatError, match="write f32, f16 or bf16 after int8"):
        qft.quantize(torch.randn(4, 64), "int8 g64 dq")
