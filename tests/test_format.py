"""A format is data with one spelling: parsing, spelling, arithmetic, and a clear sentence for everything refused."""

import itertools
import math
import random
import re
import struct

import pytest
import torch
from formats import ELEVEN, FORMATS
from scipy.optimize import brentq
from scipy.stats import norm

from qft.format import CODEBOOKS, GROUPS, INTEGERS, SCALE_BITS, Format, FormatError, spell_f32, to_f32


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_spelling_reads_back_as_the_same_format(fmt):
    assert Format.parse(str(fmt)) == fmt
    assert str(Format.parse(str(fmt))) == str(fmt)
    assert Format.parse(fmt) is fmt


def test_every_format_of_named_codes_round_trips():
    for code, group, scale, zero in itertools.product((*CODEBOOKS, *INTEGERS), (*GROUPS, 0), SCALE_BITS, (False, True)):
        if (zero and code in CODEBOOKS) or (code == "int8" and scale == "dq"):
            continue
        fmt = Format(code, group, scale, zero)
        assert Format.parse(str(fmt)) == fmt


CANONICAL = {
    "nf4 g64": "nf4 g64 f32",
    " nf4   f16\tg64\n": "nf4 g64 f16",
    "int3 zero f16 g128": "int3 g128 f16 zero",
    "int4 channel": "int4 channel f32",
    "nf4 g64 f32 dq": "nf4 g64 dq",
    "nf4 dq f32 g64": "nf4 g64 dq",
    "[-1,-.25,.30, 1] g64": "[-1 -0.25 0.3 1] g64 f32",
    "[-1.0 -0 1e0] g64 bf16": "[-1 0 1] g64 bf16",
    "[1e-05 123456792] g32": "[1e-5 1.2345679e8] g32 f32",
    "[0 3.4028235e38] g32": "[0 3.4028235e38] g32 f32",
}


@pytest.mark.parametrize(("text", "spelling"), CANONICAL.items())
def test_one_spelling_per_format(text, spelling):
    assert str(Format.parse(text)) == spelling


@pytest.mark.parametrize("words", [*itertools.permutations(("g128", "f16", "zero"))], ids=" ".join)
def test_words_after_the_code_come_in_any_order(words):
    assert Format.parse(" ".join(("int3", *words))) == Format("int3", 128, "f16", True)


def test_equal_levels_are_one_format_however_they_are_written():
    spellings = ("[-1 -0.25 0.3 1] g64", "[-1.00 -.25 0.30000000000000004 1.0] g64 f32", "[-1, -0.25, 3e-1, 1] g64")
    formats = {Format.parse(text) for text in spellings} | {Format("[-1 -.25 .3 1]", 64)}
    assert len(formats) == 1


def test_floats_are_spelled_in_the_fewest_digits_that_read_back():
    generator = random.Random(0)
    for _ in range(3000):
        value = struct.unpack("<f", generator.randbytes(4))[0]
        if value != value or value in (float("inf"), float("-inf")):
            continue
        text = spell_f32(value)
        assert to_f32(float(text)) == value
        digits = len(re.sub(r"e.*|[-.]", "", text).strip("0"))
        if digits > 1:
            assert to_f32(float(f"{value:.{digits - 2}e}")) != value, f"{text} has a digit too many"


SENTENCES = {
    "nf5 g64": "'nf5 g64' is no format; the nearest is 'nf4 g64 f32'",
    "NF4 G64 F16": "'NF4 G64 F16' is no format; the nearest is 'nf4 g64 f16'",
    "nf4": "'nf4' is no format; the nearest is 'nf4 g64 f32'",
    "nf4 g64 g64": "the nearest is 'nf4 g64 f32'",
    "nf4 g64 f16 f32": "is no format; the nearest is",
    "int4 g64 asym": "the nearest is 'int4 g64 f32 zero'",
    "int4 g64 zero zero": "the nearest is 'int4 g64 f32 zero'",
    "int4 group128": "the nearest is 'int4 g128 f32'",
    "int2 per-channel": "the nearest is 'int2 g64 f32'",
    "int2 channels": "the nearest is 'int2 channel f32'",
    "int3 g100": "group g100 is not offered; use one of g32, g64,",
    "nf4 g0": "'nf4 g0' is no format",
    "[-1 0 1]g64": "the nearest is '[-1 0 1] g64 f32'",
    "": "'' is no format; write for example 'nf4 g64 f32'",
    "nf4 g64 zero": "'zero' needs integer codes, not nf4; use int8, int4, int3 or int2, or drop 'zero'",
    "[-1 1] g64 zero": "'zero' needs integer codes, not [-1 1];",
    "int8 g64 dq": "dq saves nothing worth its error next to 8-bit codes; write f32, f16 or bf16 after int8",
    "int8 g64 dq zero": "write f32, f16 or bf16 after int8",
    "[1] g64": "levels [1] number 1; a codebook has 2 to 16 levels",
    f"[{' '.join(map(str, range(17)))}] g64": "number 17; a codebook has 2 to 16 levels",
    "[1 0] g64": "levels [1 0] do not ascend; write [0 1]",
    "[0 0.5 0.5 1] g64": "do not ascend; write [0 0.5 1]",
    "[0 1e-46] g64": "do not ascend; write [0]",
    "[0 one] g64": "hold something that is not an fp32 number; write for example [-1 -0.25 0.3 1]",
    "[0 nan] g64": "are not all finite; write finite fp32 numbers",
    "[0 1e39] g64": "are not all finite; write finite fp32 numbers",
    "[1 0]g64": "levels [1 0] do not ascend; write [0 1]",
    "[a 1]g64": "hold something that is not an fp32 number",
}


@pytest.mark.parametrize(("text", "sentence"), SENTENCES.items())
def test_what_is_refused_is_refused_in_a_sentence(text, sentence):
    with pytest.raises(FormatError) as refusal:
        Format.parse(text)
    message = str(refusal.value)
    assert sentence in message
    assert "\n" not in message


def test_a_format_error_is_a_value_error_and_wants_text():
    assert issubclass(FormatError, ValueError)
    for thing in (4, None, b"nf4 g64", ["nf4", "g64"]):
        with pytest.raises(FormatError, match="a format is a line of text such as 'nf4 g64 f32', not"):
            Format.parse(thing)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("nf9", 64),
            "'nf9' is no code; use nf4, nf3, nf2, fp4, lm4, lm3, lm2, int8, int4, int3, int2, or levels such as",
        ),
        (("nf4", 48), "group g48 is not offered"),
        (("nf4", 64, "f8"), "scale dtype 'f8' is unknown; use one of f32, f16, bf16, dq"),
    ],
)
def test_the_constructor_keeps_the_same_rules(arguments, sentence):
    with pytest.raises(FormatError, match=re.escape(sentence)):
        Format(*arguments)


def test_the_nearest_spelling_is_a_valid_one():
    generator = random.Random(0)
    words = (
        "nf4",
        "nf44",
        "int4",
        "int",
        "int8",
        "INT3",
        "[-1 0 1]",
        "g64",
        "g65",
        "64",
        "g",
        "channel",
        "chan",
        "f32",
        "F16",
    )
    words += (
        "bf-16",
        "half",
        "dq",
        "DQ",
        "zero",
        "asym",
        "zeros",
        "?",
        "-",
        ",",
        "4bit",
        "[-1",
        "1]",
        "fp16",
        "float32",
        "",
    )
    named = 0
    for _ in range(3000):
        text = " ".join(generator.choices(words, k=generator.randint(0, 5)))
        try:
            Format.parse(text)
        except FormatError as refusal:
            nearest = re.search(r"the nearest is '(.*)'$", str(refusal))
            if nearest:
                named += 1
                assert str(Format.parse(nearest[1])) == nearest[1], text
    assert named > 1000


# bits of a long row's weight: the code, its share of a scale, of a zero point, and of dq's absmax
BITS = {
    "nf4 g64 f32": 4.5,
    "nf4 g64 dq": 4 + 8 / 64 + 32 / 256 / 64,
    "nf3 g64 f32": 3.5,
    "nf2 g64 f32": 2.5,
    "nf2 g64 f16": 2.25,
    "int2 g64 f16": 2.25,
    "int4 g128 f16": 4.125,
    "int3 g128 f16": 3.125,
    "int3 g128 f16 zero": 3.25,
    "int4 g64 f32 zero": 5,
    "int4 g64 dq zero": 4 + (8 + 32 / 256 + 16) / 64,
    "int8 g64 bf16": 8.25,
    "int4 channel f32": 4,
    "nf4 g4096 f32": 4 + 32 / 4096,
    "[-1 1] g32 f16": 1.5,
    "[-1 0 1] g32 f16": 2.5,
    f"{ELEVEN} g64 f32": 4.5,
    "[1 2 3 4 5] g64 f32": 3.5,
}


@pytest.mark.parametrize(("text", "bits"), BITS.items())
def test_bits_per_weight_is_the_arithmetic_of_a_long_row(text, bits):
    assert Format.parse(text).bits_per_weight == bits


@pytest.mark.parametrize(
    ("text", "in_features", "row_bytes"),
    [
        ("nf4 g64", 1, 16),
        ("nf4 g64", 32, 16),
        ("nf4 g64", 33, 32),
        ("int8 g64", 33, 48),
        ("nf2 g64", 64, 16),
        ("nf2 g64", 65, 32),
        ("nf3 g64", 32, 16),  # 12 bytes per 32 codes
        ("nf3 g64", 33, 32),
        ("nf3 g64", 128, 48),
        ("[0 1] g64", 128, 16),
        ("[0 1] g64", 129, 32),
    ],
)
def test_rows_start_on_sixteen_bytes(text, in_features, row_bytes):
    assert Format.parse(text).row_bytes(in_features) == row_bytes


def test_the_last_group_may_be_short():
    grouped, whole = Format.parse("nf4 g64"), Format.parse("nf4 channel")
    assert [grouped.groups(n) for n in (1, 64, 65, 128)] == [1, 1, 2, 2]
    assert [whole.groups(n) for n in (1, 64, 4097)] == [1, 1, 1]
    assert (grouped.group_size(100), whole.group_size(100)) == (64, 100)


def test_integer_levels():
    assert Format.parse("int3 g64").levels == (-4, -3, -2, -1, 0, 1, 2, 3)
    assert Format.parse("int3 g64 zero").levels == (0, 1, 2, 3, 4, 5, 6, 7)
    assert Format.parse("int8 g64").levels[::255] == (-128, 127)


def normal_float(bits: int) -> list[float]:
    """NormalFloat (QLoRA, section 3), in fp32 as bitsandbytes has it: 2^(bits-1) quantiles above 0, one fewer below."""
    offset, above = 0.9677083, 2 ** (bits - 1)
    positive = norm.ppf(torch.linspace(offset, 0.5, above + 1)[:-1])
    negative = -norm.ppf(torch.linspace(offset, 0.5, above)[:-1])
    levels = torch.tensor([*negative, 0.0, *positive[::-1]], dtype=torch.float32)
    return (levels / levels.max()).sort().values.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_levels_are_the_quantiles(bits):
    assert list(CODEBOOKS[f"nf{bits}"]) == normal_float(bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_levels_are_the_means_of_their_cells(bits):
    """Under N(0, 1) every level is the mean of what is nearer to it than to the others (Max 1960), in fp32."""
    levels = torch.tensor(CODEBOOKS[f"lm{bits}"], dtype=torch.float64).numpy()
    assert (levels == -levels[::-1]).all()

    def means(largest):
        edges = largest * (levels[1:] + levels[:-1]) / 2
        below, above = [-math.inf, *edges], [*edges, math.inf]
        return (norm.pdf(below) - norm.pdf(above)) / (norm.cdf(above) - norm.cdf(below))

    largest = brentq(lambda size: means(size)[-1] - size, 1, 4, xtol=1e-14)
    assert means(largest) / largest == pytest.approx(levels, abs=1e-7)


@pytest.mark.parametrize("code", [*CODEBOOKS, *INTEGERS])
def test_levels_are_fp32_and_fill_the_width(code):
    fmt = Format(code, 64)
    assert len(fmt.levels) == 2**fmt.bits
    assert all(to_f32(level) == level for level in fmt.levels)


def test_needs_the_standard_library_only(python):
    program = "import sys, qft.format, qft.compiler.emit, qft.compiler.jit; print({'torch', 'numpy'} & {*sys.modules})"
    assert python(program) == "set()\n"
