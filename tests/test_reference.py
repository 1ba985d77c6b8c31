"""The oracle itself: layouts as literal bytes, rules of encoding, exact decoding, and gradients against autograd."""

import pytest
import torch
from formats import FORMATS, FOUR, SHAPES, TWO, error, sample

from qft import reference
from qft.format import INTEGERS, Format

WIDTHS = {1: f"{TWO} g64", 2: "nf2 g64", 3: "nf3 g64", 4: "nf4 g64", 8: "int8 g64"}


# ------------------------------------------------------------------------------------------------------ layout


@pytest.mark.parametrize(("bits", "text"), WIDTHS.items())
@pytest.mark.parametrize("shape", [*SHAPES, (2, 31), (2, 33), (5, 257)], ids=str)
def test_packing_loses_nothing(bits, text, shape):
    fmt = Format.parse(text)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = reference.pack(codes, fmt)
    assert packed.shape == (shape[0], fmt.row_bytes(shape[1]))
    assert packed.dtype == torch.uint8
    assert torch.equal(reference.unpack(packed, fmt, shape[1]), codes)


# The checkpoint's bytes. Little-endian, first code in the lowest bits; a row is padded with zeros to 16 bytes.
LAYOUT = {
    "eight bits": ("int8 g64", [1, 2, 255], "01 02 ff" + 13 * " 00"),
    "four bits": ("nf4 g64", [1, 2, 3, 4, 15], "21 43 0f" + 13 * " 00"),
    "two bits": ("nf2 g64", [1, 2, 3, 0, 3], "39 03" + 14 * " 00"),
    "one bit": (f"{TWO} g64", [1, 0, 0, 0, 0, 0, 1, 1, 1], "c1 01" + 14 * " 00"),
    # Three words of eight nibbles, low three bits a code: codes 0-7, 8-15, 16-23. The top bits of word i are bit i of
    # codes 24-31: 1 2 4 0 7 0 0 5 puts 1000'1001, 0100'1000 and 0010'1001 (code 24 first) on the three words.
    "three bits": (
        "nf3 g64",
        [1, 2, 3, 4, 5, 6, 7, 0, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 4, 0, 7, 0, 0, 5],
        "29 43 6d 87  e7 45 2b 01  00 08 08 90  00 00 00 00",
    ),
    "three bits, short row": ("nf3 g64", [5, 6, 7], "65 07" + 14 * " 00"),
    "three bits, from code 24 on": ("nf3 g64", 24 * [0] + [7], "08 00 00 00  08 00 00 00  08 00 00 00" + 4 * " 00"),
}


@pytest.mark.parametrize(("text", "codes", "layout"), LAYOUT.values(), ids=LAYOUT)
def test_the_layout_is_pinned(text, codes, layout):
    packed = reference.pack(torch.tensor([codes], dtype=torch.uint8), Format.parse(text))
    assert bytes(packed[0].tolist()).hex() == bytes.fromhex(layout).hex()


# ---------------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_other_code_is_nearer(fmt, shape):
    weight = sample(shape)
    codes, scales, zeros = reference.quantize(weight, fmt)
    chosen = (reference.dequantize(codes, scales, zeros, fmt).double() - weight).abs()
    tie = 1e-6 * weight.abs().max()
    every = [torch.full_like(codes, code) for code in range(len(fmt.levels))]
    for other in every if fmt.bits < 8 else [codes.clamp(min=1) - 1, codes.clamp(max=254) + 1]:
        assert (chosen <= (reference.dequantize(other, scales, zeros, fmt).double() - weight).abs() + tie).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_columns_of_one_group_encode_as_the_whole_row_does(fmt):
    weight = sample((7, 129))
    codes, scales, zeros = reference.quantize(weight, fmt)
    assert torch.equal(reference.encode(weight, scales, zeros, fmt), codes)
    for first in range(0, 129, size := min(fmt.group or 129, 43)):
        part, group = slice(first, min(first + size, 129)), first // (fmt.group or 129)
        if (part.stop - 1) // (fmt.group or 129) > group:
            continue
        own = [None if values is None else values[:, group : group + 1] for values in (scales, zeros)]
        assert torch.equal(reference.encode(weight[:, part], *own, fmt), codes[:, part])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zeros_take_the_code_nearest_zero(fmt):
    codes, scales, zeros = reference.quantize(torch.zeros(2, 100), fmt)
    assert not scales.any()
    level = torch.tensor(fmt.levels)[codes.long()] - (0 if zeros is None else reference.per_weight(zeros, fmt, 100))
    assert (level.abs() == min(abs(x) for x in fmt.levels)).all()
    if fmt.code == "fp4":
        assert not codes.any()  # of fp4's two zeros, the first


@pytest.mark.parametrize("code", INTEGERS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_signed_extreme_lies_on_the_lowest_level(code, sign):
    weight = sample((5, 128))
    weight[:, 77] = sign * 1.5 * weight.abs().amax(1).clamp(min=1)
    codes, scales, _ = reference.quantize(weight, Format.parse(f"{code} channel"))
    assert (codes[:, 77] == 0).all()
    assert (scales.sign() == -sign).all()


def test_between_equal_extremes_the_negative_one_leads():
    codes, scales, _ = reference.quantize(torch.tensor([[2.0, -2.0]]), Format.parse("int4 g64"))
    assert scales.item() == 0.25
    assert codes.tolist() == [[15, 0]]


def test_the_extreme_lies_on_the_level_of_largest_magnitude():
    weight = torch.tensor([[0.5, -2.0, 1.0], [0.5, 2.0, -1.0]])
    codes, scales, _ = reference.quantize(weight, Format.parse(f"{TWO} channel"))  # levels -0.4 and 1
    assert scales.tolist() == [[-2.0], [2.0]]
    assert codes[:, 1].tolist() == [1, 1]
    codes, scales, _ = reference.quantize(weight, Format.parse(f"{FOUR} channel"))  # -1 and 1 mirror each other
    assert scales.tolist() == [[2.0], [2.0]]
    assert codes[:, 1].tolist() == [0, 3]


def test_codebook_ties_take_the_lower_level_and_integers_the_even_one():
    halves = torch.tensor([[-1.0, 0.5, -0.5, 1.0]])
    codes, _, _ = reference.quantize(halves, Format.parse("[-1 0 1] g64"))
    assert codes.tolist() == [[0, 1, 0, 2]]
    halves = torch.tensor([[-8.0, 0.5, 1.5, 2.5]])
    codes, _, _ = reference.quantize(halves, Format.parse("int4 g64"))
    assert (codes - 8.0).tolist() == [[-8, 0, 2, 2]]


@pytest.mark.parametrize("scale", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("group", ["g32", "channel"])
@pytest.mark.parametrize("code", INTEGERS)
def test_quantizing_symmetric_integers_again_changes_nothing(code, group, scale):
    fmt = Format.parse(f"{code} {group} {scale}")
    for shape in SHAPES:
        codes, scales, _ = reference.quantize(sample(shape), fmt)
        once = reference.dequantize(codes, scales, None, fmt)
        again, scales_again, _ = reference.quantize(once, fmt)
        assert torch.equal(again, codes)
        assert torch.equal(scales_again, scales)


@pytest.mark.parametrize("group", ["g32", "channel"])
@pytest.mark.parametrize("code", INTEGERS)
def test_quantizing_asymmetric_integers_again_moves_a_scale_by_an_ulp(code, group):
    fmt = Format.parse(f"{code} {group} f32 zero")  # a scale that 16 bits round up can leave a range one step short
    for shape in SHAPES:
        codes, scales, zeros = reference.quantize(sample(shape), fmt)
        once = reference.dequantize(codes, scales, zeros, fmt)
        again, scales_again, zeros_again = reference.quantize(once, fmt)
        assert ((scales_again - scales).abs() <= torch.finfo(torch.float32).eps * scales).all()
        assert torch.equal(again, codes)
        assert torch.equal(zeros_again, zeros)


def test_the_lowest_and_highest_weight_span_an_asymmetric_range_that_holds_zero():
    fmt = Format.parse("int4 channel zero")
    codes, scales, zeros = reference.quantize(torch.tensor([[-1.0, 2.0], [1.0, 3.0], [-3.0, -1.0]]), fmt)
    assert torch.equal(scales, torch.tensor([[3 / 15], [3 / 15], [3 / 15]]))
    assert zeros.tolist() == [[5.0], [0.0], [15.0]]
    assert codes.tolist() == [[0, 15], [5, 15], [0, 10]]


@pytest.mark.parametrize("scale", reference.TORCH_DTYPE)
def test_scales_are_rounded_before_codes_are_chosen(scale):
    fmt = Format.parse(f"nf4 g32 {scale}")
    weight = sample((16, 256))
    _, scales, _ = reference.quantize(weight, fmt)
    assert torch.equal(scales, weight.view(16, 8, 32).abs().amax(2).to(reference.TORCH_DTYPE[scale]).float())


def test_a_scale_without_a_reciprocal_is_a_scale_of_zero():
    for tiny in (1e-39, 1e-45):
        codes, scales, _ = reference.quantize(torch.tensor([[tiny, -tiny]]), Format.parse("nf4 g64"))
        assert scales.tolist() == [[0.0]]
        assert codes.tolist() == [[7, 7]]


# Relative Frobenius error on N(0, 1) in groups of 64, from an independent implementation of the papers' formulas.
GAUSSIAN = {
    "nf4 g64": 0.0919,
    "nf3 g64": 0.2016,
    "nf2 g64": 0.5640,
    "int4 g64 zero": 0.091,
    "int3 g64 zero": 0.195,
    "int2 g64 zero": 0.458,
}


@pytest.mark.parametrize(("text", "expected"), GAUSSIAN.items())
def test_gaussian_weights_lose_what_they_should(text, expected):
    fmt, weight = Format.parse(text), torch.randn(256, 4096)
    lost = error(reference.dequantize(*reference.quantize(weight, fmt), fmt), weight.double())
    assert lost == pytest.approx(expected, rel=0.03)


# ---------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_weight_is_level_times_scale_in_fp32_rounded_once(fmt, dtype):
    codes, scales, zeros = reference.quantize(sample((7, 129)), fmt)
    size = fmt.group or 129
    dense = reference.dequantize(codes, scales, zeros, fmt, dtype)
    assert dense.dtype == dtype
    for row, column in ((0, 0), (2, 31), (3, 32), (4, 63), (5, 64), (6, 128)):
        level = torch.tensor(fmt.levels[codes[row, column]])
        if zeros is not None:
            level = level - zeros[row, column // size]
        assert dense[row, column] == (level * scales[row, column // size]).to(dtype)


# --------------------------------------------------------------------------------------------------- gradients


class Product(torch.autograd.Function):
    """y = x Wt, with the backward pass that qft's layers take: the reference's verbs."""

    @staticmethod
    def forward(ctx, x, scales, zeros, codes, fmt):
        level = torch.tensor(fmt.levels, dtype=x.dtype)[codes.long()]
        if zeros is not None:
            level = level - reference.per_weight(zeros, fmt, codes.shape[1])
        weight = level * reference.per_weight(scales, fmt, codes.shape[1])
        ctx.save_for_backward(x, scales, zeros, codes, weight)
        ctx.fmt = fmt
        return reference.matmul(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, scales, zeros, codes, weight = ctx.saved_tensors
        ds = reference.scale_grad(dy, x, codes, zeros, ctx.fmt).to(dy.dtype)
        dz = None if zeros is None else reference.zero_grad(dy, x, scales, ctx.fmt).to(dy.dtype)
        return reference.matmul_t(dy, weight), ds, dz, None, None


GRADIENTS = ("nf4 g32", "nf3 channel", "int4 g32 zero", "int2 channel zero", f"{TWO} g32")


@pytest.mark.parametrize("text", GRADIENTS)
def test_gradcheck(text):
    fmt = Format.parse(text)
    codes, scales, zeros = reference.quantize(torch.randn(3, 35), fmt)
    x = torch.randn(2, 35, dtype=torch.float64, requires_grad=True)
    scales = scales.double().requires_grad_()
    zeros = None if zeros is None else zeros.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: Product.apply(*inputs, codes, fmt), (x, scales, zeros))


@pytest.mark.parametrize("text", GRADIENTS)
def test_gradients_are_those_of_autograd(text):
    fmt = Format.parse(text)
    codes, scales, zeros = reference.quantize(torch.randn(33, 100), fmt)
    x, dy = torch.randn(7, 100), torch.randn(7, 33)
    for trained in [scales] + ([] if zeros is None else [zeros]):
        trained.requires_grad_()
    (reference.matmul(x, reference.dequantize(codes, scales, zeros, fmt)) * dy).sum().backward()
    with torch.no_grad():
        assert error(reference.scale_grad(dy, x, codes, zeros, fmt), scales.grad.double()) < 1e-6
        if zeros is not None:
            assert error(reference.zero_grad(dy, x, scales, fmt), zeros.grad.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_products_keep_the_activations_dtype(dtype):
    weight = torch.randn(33, 100)
    x, dy = torch.randn(7, 100).to(dtype), torch.randn(7, 33).to(dtype)
    assert reference.matmul(x, weight).dtype == reference.matmul_t(dy, weight).dtype == dtype
    codes, _, _ = reference.quantize(weight, Format.parse("nf4 g64"))
    assert reference.scale_grad(dy, x, codes, None, Format.parse("nf4 g64")).dtype == torch.float32
