"""QuantTensor: what is stored, how many bytes that is, and what quantize refuses."""

import re

import pytest
import torch
from formats import ELEVEN, FORMATS, KERNELS, SHAPES, has_own_kernels, need, sample

import qft
from qft import reference
from qft.format import ZERO_DTYPE, Format
from qft.tensor import QuantTensor


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_what_is_stored(fmt, shape):
    out, in_features = shape
    weight = sample(shape)
    q = qft.quantize(weight, fmt)
    groups = fmt.groups(in_features)
    scale = torch.uint8 if fmt.scale == "dq" else reference.TORCH_DTYPE[fmt.scale]
    expected = {"weight": ((out, fmt.row_bytes(in_features)), torch.uint8), "weight_scales": ((out, groups), scale)}
    if fmt.zero:
        expected["weight_zeros"] = ((out, groups), reference.TORCH_DTYPE[ZERO_DTYPE[fmt.scale]])
    if fmt.scale == "dq":
        expected["weight_scales_absmax"] = ((-(-out * groups // 256),), torch.float32)
        expected["weight_scales_offset"] = ((1,), torch.float32)
    assert {name: (tuple(t.shape), t.dtype) for name, t in q.tensors().items()} == expected
    assert q.nbytes == sum(t.numel() * t.element_size() for t in q.tensors().values())
    assert (q.format, q.shape) == (fmt, shape)
    assert q.codes is q.weight
    assert (q.scales.dtype, tuple(q.scales.shape)) == (torch.float32, (out, groups))
    assert (q.unpack().dtype, tuple(q.unpack().shape)) == (torch.uint8, shape)
    assert q.dequantize().dtype == torch.float32
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16


# Stored bits per weight of 1024 x 4096, companions and padding included.
STORED = {
    "nf4 g64 f32": 4.5,
    "nf4 g64 dq": 4.127,
    "nf3 g64 f32": 3.5,
    "nf2 g64 f32": 2.5,
    "nf2 g64 f16": 2.25,
    "int2 g64 f16": 2.25,
    "int4 g128 f16": 4.125,
    "int3 g128 f16": 3.125,
}


@pytest.mark.parametrize(("text", "bits"), STORED.items())
def test_stored_bits_per_weight(text, bits):
    q = qft.quantize(torch.randn(1024, 4096), text)
    assert 8 * sum(t.nbytes for t in q.tensors().values()) / (1024 * 4096) == pytest.approx(bits, rel=0.01)
    assert q.bits_per_weight == pytest.approx(bits, rel=0.01)
    assert q.format.bits_per_weight == pytest.approx(bits, rel=0.01)


def test_padding_is_counted():
    q = qft.quantize(torch.randn(3, 5), "nf2 g64 f32")
    assert q.nbytes == 3 * 16 + 3 * 4
    assert q.bits_per_weight == 8 * 60 / 15


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded", "offset"])
@pytest.mark.parametrize("text", ["nf4 g64 f32", "int3 g32 f16 zero", "nf4 g64 dq"])
def test_any_layout_gives_the_same_bytes(text, view):
    weight = {
        "transposed": torch.randn(100, 33).T,
        "strided": torch.randn(66, 300)[::2, ::3],
        "expanded": torch.randn(1, 100).expand(33, 100),
        "offset": torch.randn(3301)[1:].view(33, 100),
    }[view]
    for kernel in (None, "reference"):
        of_view = qft.quantize(weight, text, kernel=kernel).tensors()
        of_copy = qft.quantize(weight.clone(memory_format=torch.contiguous_format), text, kernel=kernel).tensors()
        assert all(torch.equal(of_view[name], of_copy[name]) for name in of_copy)


def test_float64_is_rounded_to_fp32_first():
    weight = torch.randn(33, 100, dtype=torch.float64)
    assert torch.equal(qft.quantize(weight, "nf4 g64").weight, qft.quantize(weight.float(), "nf4 g64").weight)


def test_quantizing_leaves_the_weight_alone():
    weight = torch.nn.Parameter(sample((33, 100)))
    before = weight.detach().clone()
    q = qft.quantize(weight, "nf4 g64")
    assert torch.equal(weight, before)
    assert not any(t.requires_grad for t in q.tensors().values())


def test_a_format_or_its_spelling():
    weight = torch.randn(4, 64)
    of_text, of_format = qft.quantize(weight, "nf4 f32 g64"), qft.quantize(weight, Format("nf4", 64))
    assert of_text.format == of_format.format
    assert torch.equal(of_text.weight, of_format.weight)


# ------------------------------------------------------------------------------------------------ codes from elsewhere


@pytest.mark.parametrize("shape", [(33, 100), (3, 4128)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_and_scales_found_elsewhere_are_stored_alike(fmt, shape):
    weight = sample(shape)
    of_codes = QuantTensor.from_codes(*reference.quantize(weight, fmt), fmt)
    quantized = qft.quantize(weight, fmt)
    assert (of_codes.format, of_codes.shape) == (fmt, shape)
    assert of_codes.tensors().keys() == quantized.tensors().keys()
    for name, tensor in quantized.tensors().items():
        assert torch.equal(of_codes.tensors()[name], tensor)


CODES = torch.ones(4, 128, dtype=torch.uint8)
FROM_CODES = {
    "codes of another dtype": (CODES.int(), torch.ones(4, 2), None, "nf2 g64", TypeError, "codes are torch.int32"),
    "no matrix": (CODES[0], torch.ones(4, 2), None, "nf2 g64", ValueError, "codes have shape (128,), expected a"),
    "no weights": (CODES[:0], torch.ones(0, 2), None, "nf2 g64", ValueError, "codes have shape (0, 128), expected"),
    "a code too large": (CODES * 4, torch.ones(4, 2), None, "nf2 g64", ValueError, "code 4 has no level in nf2 g64"),
    "scales of another shape": (CODES, torch.ones(4, 1), None, "nf2 g64", ValueError, "scales have shape (4, 1), exp"),
    "zeros of another shape": (CODES, torch.ones(4, 2), torch.ones(4), "int2 g64 zero", ValueError, "zeros have shape"),
    "no zeros": (CODES, torch.ones(4, 2), None, "int2 g64 zero", ValueError, "int2 g64 f32 zero needs zero points"),
    "zeros": (CODES, torch.ones(4, 2), torch.ones(4, 2), "int2 g64", ValueError, "int2 g64 f32 has no zero points"),
    "an overflow": (CODES, torch.full((4, 2), 7e4), None, "nf2 g64 f16", qft.FormatError, "group 0 exceeds fp16"),
}  # fmt: skip


@pytest.mark.parametrize(("codes", "scales", "zeros", "text", "error", "said"), FROM_CODES.values(), ids=FROM_CODES)
def test_codes_that_are_refused(codes, scales, zeros, text, error, said):
    with pytest.raises(error, match=re.escape(said)):
        QuantTensor.from_codes(codes, scales, zeros, text)


# -------------------------------------------------------------------------------------------------- other scales


def test_the_same_codes_under_other_scales():
    q = qft.quantize(sample((33, 100)), "int4 g32 dq zero")
    wide = q.with_scales(q.scales)
    assert str(wide.format) == "int4 g32 f32 zero"
    assert torch.equal(wide.dequantize(), q.dequantize())
    half = q.with_scales(2 * q.scales, "f16")
    assert str(half.format) == "int4 g32 f16 zero"
    assert torch.equal(half.weight_scales, (2 * q.scales).half())
    assert half.weight_zeros.dtype == torch.float16
    assert half.weight is q.weight


def test_scales_of_another_shape_are_refused():
    q = qft.quantize(torch.randn(4, 128), "nf4 g64")
    with pytest.raises(ValueError, match=re.escape("scales have shape (4, 1), expected (4, 2) for nf4 g64 f32")):
        q.with_scales(torch.ones(4, 1))
    with pytest.raises(
        qft.FormatError, match="the scale of scales, row 3, group 1 exceeds fp16's 65504; use bf16 or f32"
    ):
        q.with_scales(torch.ones(4, 2).index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(7e4)), "f16")


def test_fields_cannot_be_replaced_one_by_one():
    q = qft.quantize(torch.randn(4, 64), "nf4 g64")
    with pytest.raises(AttributeError, match="cannot assign to field"):
        q.weight_scales = q.weight_scales * 2
    assert isinstance(q, QuantTensor)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "panel"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_weight_that_is_not_finite_is_named(kernel, dtype, bad):
    need(kernel)
    fmt = Format.parse(f"{ELEVEN} g64" if kernel == "generic" else "nf4 g64")
    for row, column in ((0, 0), (5, 99), (3, 63), (3, 64)):
        weight = torch.randn(33, 100, dtype=dtype)
        weight[row, column] = bad
        weight[row, column + 1 :] = weight[row + 1 :] = bad
        with pytest.raises(ValueError, match=re.escape(f"layers.3.weight[{row}, {column}] is {bad};")):
            qft.quantize(weight, fmt, kernel=kernel, name="layers.3.weight")


@pytest.mark.parametrize("text", ["nf4 g4096", "int8 channel", "int4 g32 zero", "nf2 g64 dq"])
def test_one_bad_weight_anywhere_is_found(text):
    for column in (0, 15, 16, 31, 32, 4095, 4096, 4999):
        weight = torch.randn(2, 5000)
        weight[1, column] = float("nan")
        with pytest.raises(ValueError, match=re.escape(f"weight[1, {column}] is nan; only finite weights")):
            qft.quantize(weight, text)


@pytest.mark.parametrize(
    ("weight", "kind", "sentence"),
    [
        (torch.ones(4, 64, dtype=torch.int8), TypeError, "weight is torch.int8; quantize takes a floating tensor"),
        (
            torch.ones(4, 64, dtype=torch.complex64),
            TypeError,
            "weight is torch.complex64; quantize takes a floating tensor",
        ),
        ([[1.0, 2.0]], TypeError, "weight is list; quantize takes a floating tensor"),
        (torch.ones(64), ValueError, "weight has shape (64,); quantize takes a matrix [out, in], reshape it first"),
        (torch.ones(2, 3, 64), ValueError, "weight has shape (2, 3, 64); quantize takes a matrix [out, in]"),
        (torch.ones(0, 64), ValueError, "weight has shape (0, 64), which holds no weights"),
        (torch.ones(4, 0), ValueError, "weight has shape (4, 0), which holds no weights"),
        (torch.ones(4, 64, device="meta"), ValueError, "weight is on the meta device, which holds no values"),
    ],
)
def test_what_is_no_weight_is_refused_in_a_sentence(weight, kind, sentence):
    with pytest.raises(kind, match=re.escape(sentence)):
        qft.quantize(weight, "nf4 g64")


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(qft.FormatError, match="the nearest is 'nf4 g64 f32'"):
        qft.quantize(torch.ones(4, 64), "nf5 g64")


OVERFLOWS = {
    "nf4 g64 f16": (7e4, "exceeds fp16's 65504; use bf16 or f32, such as 'nf4 g64 f32'"),
    "int4 g64 f16 zero": (1e6, "exceeds fp16's 65504; use bf16 or f32, such as 'int4 g64 f32 zero'"),
    "nf4 g64 bf16": (3.4e38, "exceeds bf16's 3.39e38; use f32, such as 'nf4 g64 f32'"),
    "[-1e-9 1e-8] g64 f32": (
        1e35,
        "exceeds fp32's 3.4e38; make the weight smaller, or the format's largest level nearer 1",
    ),
    "[-1e-9 1e-8] g64 dq": (1e35, "exceeds fp32's 3.4e38"),
}


@pytest.mark.parametrize(("text", "extreme", "sentence"), [(text, *rest) for text, rest in OVERFLOWS.items()])
def test_a_scale_past_its_dtype_is_refused(text, extreme, sentence):
    weight = torch.randn(3, 128)
    weight[2, 100] = extreme
    for kernel in ("reference", None if has_own_kernels(Format.parse(text)) else "generic"):
        with pytest.raises(qft.FormatError, match=re.escape(f"the scale of weight, row 2, group 1 {sentence}")):
            qft.quantize(weight, text, kernel=kernel)


def test_an_asymmetric_range_wider_than_fp32_is_refused():
    with pytest.raises(qft.FormatError, match=r"the scale of weight, row 0, group 0 exceeds fp32's 3\.4e38"):
        qft.quantize(torch.tensor([[-3e38, 3e38]]), "int4 g64 zero")


def test_scales_at_the_edge_of_fp16_are_kept():
    q = qft.quantize(torch.full((1, 64), 65504.0), "nf4 g64 f16")
    assert torch.equal(q.dequantize(), torch.full((1, 64), 65504.0))
