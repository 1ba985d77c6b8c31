"""What a weight format is: data with one spelling.

    nf4 g64 f32        codes nf4, one fp32 scale per 64 weights of a row
    nf4 g64 dq         the same scales, double-quantized to 8 bits
    int3 g128 f16 zero asymmetric: an fp16 scale and an fp16 zero point per 128 weights
    int4 channel f32   one scale per output row
    [-1 -0.25 0.3 1] g64 f32   levels of one's own

Standard library only: the build runs this module before anything is installed.
"""

from __future__ import annotations

import difflib
import math
import re
import struct
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise


class FormatError(ValueError):
    """A format, or a file that holds one, that breaks a rule; the message names value, rule and way out."""


# bitsandbytes' fp32 constants. NF: quantiles of N(0, 1) (QLoRA, section 3); nf3 and nf2 follow the same recipe at their
# width. FP4 (E2M1) keeps bitsandbytes' code order, sign in the top bit, so that its codes import as they are.
# LM: the symmetric levels of least squared error for N(0, 1) (Max 1960; Lloyd 1982), divided by the largest; they need
# a searched scale, since absmax puts their largest level, 1.5 to 2.7 standard deviations, on a group's extreme.
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "nf3": (
        -1.0, -0.4786292016506195, -0.217141792178154, 0.0,
        0.16093020141124725, 0.33791524171829224, 0.5626170039176941, 1.0,
    ),
    "nf2": (-1.0, 0.0, 0.33791524171829224, 1.0),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
    "lm4": (
        -1.0, -0.7571635246276855, -0.5921292901039124, -0.4597218632698059,
        -0.3448525369167328, -0.2403431236743927, -0.14200752973556519, -0.04698657616972923,
        0.04698657616972923, 0.14200752973556519, 0.2403431236743927, 0.3448525369167328,
        0.4597218632698059, 0.5921292901039124, 0.7571635246276855, 1.0,
    ),
    "lm3": (
        -1.0, -0.6245089173316956, -0.35131242871284485, -0.11389422416687012,
        0.11389422416687012, 0.35131242871284485, 0.6245089173316956, 1.0,
    ),
    "lm2": (-1.0, -0.29977142810821533, 0.29977142810821533, 1.0),
}  # fmt: skip
INTEGERS: dict[str, int] = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
GROUPS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALE_BITS = {"f32": 32, "f16": 16, "bf16": 16, "dq": 8}
ZERO_DTYPE = {"f32": "f32", "f16": "f16", "bf16": "bf16", "dq": "f16"}  # a zero point is an integer below 256: exact
DQ_BLOCK = 256  # scales per fp32 absmax under double quantization
ROW_ALIGNMENT = 16  # bytes: every row of codes starts on a 16-byte boundary


def to_f32(value: float) -> float:
    """`value` rounded to the nearest float32; infinite past its range."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def spell_f32(value: float) -> str:
    """The shortest decimal text that reads back as the same float32."""
    for digits in range(1, 10):
        text = f"{value:.{digits}g}"
        if to_f32(float(text)) == value:
            break
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


@dataclass(frozen=True)
class Format:
    """How a weight matrix `[out, in]` is stored.

    Attributes:
        code: a name of `CODEBOOKS` or `INTEGERS`, or the user's levels as text, `[-1 -0.25 0.3 1]`.
        group: weights of one row that share a scale; 0 is the whole row (`channel`).
        scale: how a scale is stored: f32, f16, bf16, or dq (8-bit code of the scale, fp32 absmax per 256 scales).
        zero: integer codes with a zero point per group, w = scale * (code - zero); without, w = scale * level[code].
    """

    code: str
    group: int
    scale: str = "f32"
    zero: bool = False

    def __post_init__(self) -> None:
        if not self.is_integer and self.code not in CODEBOOKS:  # one spelling per codebook, however it was written
            object.__setattr__(self, "code", f"[{' '.join(map(spell_f32, _read_levels(self.code)))}]")
        if self.group and self.group not in GROUPS:
            raise FormatError(
                f"group g{self.group} is not offered; use one of {', '.join(f'g{g}' for g in GROUPS)}, or channel"
            )
        if self.scale not in SCALE_BITS:
            raise FormatError(f"scale dtype {self.scale!r} is unknown; use one of {', '.join(SCALE_BITS)}")
        if self.zero and not self.is_integer:
            raise FormatError(
                f"'zero' needs integer codes, not {self.code}; use int8, int4, int3 or int2, or drop 'zero'"
            )
        if self.scale == "dq" and self.code == "int8":
            raise FormatError("dq saves nothing worth its error next to 8-bit codes; write f32, f16 or bf16 after int8")

    @staticmethod
    def parse(text: str | Format) -> Format:
        """The format spelled by `text`; a Format passes through.

        Raises:
            FormatError: the text spells no format; the message gives the nearest that does.
        """
        if isinstance(text, Format):
            return text
        if not isinstance(text, str):
            raise FormatError(f"a format is a line of text such as 'nf4 g64 f32', not {type(text).__name__}")
        return _parse(text)

    def __str__(self) -> str:
        group = f"g{self.group}" if self.group else "channel"
        return f"{self.code} {group} {self.scale}" + (" zero" if self.zero else "")

    @property
    def is_integer(self) -> bool:
        """Whether the levels are consecutive integers, so that a zero point can shift them."""
        return self.code in INTEGERS

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """fp32 value of each code before scaling. Integers: -2^(bits-1).., or 0.. where a zero point is subtracted."""
        if self.is_integer:
            low = 0 if self.zero else -(1 << (self.bits - 1))
            return tuple(float(low + i) for i in range(1 << self.bits))
        return CODEBOOKS[self.code] if self.code in CODEBOOKS else _read_levels(self.code)

    @cached_property
    def bits(self) -> int:
        """Bits of one code."""
        return INTEGERS[self.code] if self.code in INTEGERS else (len(self.levels) - 1).bit_length()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of a long row: the code's share of its scale and zero point included, padding not."""
        if not self.group:
            return float(self.bits)
        companions = SCALE_BITS[self.scale] + (32 / DQ_BLOCK if self.scale == "dq" else 0)
        if self.zero:
            companions += SCALE_BITS[ZERO_DTYPE[self.scale]]
        return self.bits + companions / self.group

    def groups(self, in_features: int) -> int:
        """Scales per row; the last group may be short."""
        return math.ceil(in_features / self.group) if self.group else 1

    def group_size(self, in_features: int) -> int:
        """Weights of a row that share a scale: the group, or the whole row."""
        return self.group or in_features

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one packed row, padded to 16; 3-bit codes come as 12 bytes per 32."""
        used = 12 * math.ceil(in_features / 32) if self.bits == 3 else math.ceil(in_features * self.bits / 8)
        return math.ceil(used / ROW_ALIGNMENT) * ROW_ALIGNMENT


@cache
def _parse(text: str) -> Format:
    match = re.fullmatch(r"\s*(\[[^\]]*\]|\S+)((?:\s+\S+)*)\s*", text)
    if not match:
        raise FormatError(f"{text!r} is no format; write for example 'nf4 g64 f32' or '[-1 -0.25 0.3 1] g64 f32'")
    code, words = match[1], match[2].split()
    groups = [w for w in words if w == "channel" or re.fullmatch(r"g[1-9]\d*", w)]
    scales = [w for w in words if w in SCALE_BITS]
    zeros = [w for w in words if w == "zero"]
    if sorted(scales) == ["dq", "f32"]:  # fp32 is what dq starts from; saying so is not a second scale dtype
        scales = ["dq"]
    known = len(groups) + len(zeros) + sum(w in SCALE_BITS for w in words)
    if known < len(words) or len(groups) != 1 or len(scales) > 1 or len(zeros) > 1 or not _is_code(code):
        raise FormatError(f"{text!r} is no format; the nearest is {_nearest(text)!r}")
    group = 0 if groups[0] == "channel" else int(groups[0][1:])
    return Format(code, group, scales[0] if scales else "f32", bool(zeros))


def _is_code(code: str) -> bool:
    return code in CODEBOOKS or code in INTEGERS or code.startswith("[")


@cache
def _read_levels(code: str) -> tuple[float, ...]:
    if not (code.startswith("[") and code.endswith("]")):
        raise FormatError(
            f"{code!r} is no code; use {', '.join((*CODEBOOKS, *INTEGERS))}, or levels such as [-1 0 0.5 1]"
        )
    words = code[1:-1].replace(",", " ").split()
    try:
        levels = tuple(to_f32(float(word)) for word in words)
    except ValueError:
        raise FormatError(
            f"levels {code} hold something that is not an fp32 number; write for example [-1 -0.25 0.3 1]"
        ) from None
    if not 2 <= len(levels) <= 16:
        raise FormatError(f"levels {code} number {len(levels)}; a codebook has 2 to 16 levels")
    if not all(math.isfinite(level) for level in levels):
        raise FormatError(f"levels {code} are not all finite; write finite fp32 numbers")
    if any(a >= b for a, b in pairwise(levels)):
        ordered = " ".join(spell_f32(level) for level in sorted(set(levels)))
        raise FormatError(f"levels {code} do not ascend; write [{ordered}]")
    return tuple(level + 0.0 for level in levels)  # -0 is spelled 0


def _nearest(text: str) -> str:
    """The valid spelling closest to `text`, as difflib measures it."""
    words = text.lower().replace(",", " ").split()
    codes = (*CODEBOOKS, *INTEGERS)
    bracketed = re.match(r"\s*(\[[^\]]*\])", text)
    if bracketed:
        _read_levels(bracketed[1])  # says first what is wrong with the levels themselves
    code = (
        bracketed[1] if bracketed else (difflib.get_close_matches(words[0] if words else "", codes, 1, 0) or ["nf4"])[0]
    )
    rest = text[bracketed.end() :].lower().split() if bracketed else words[1:]
    group, scale, zero = "g64", "f32", ""
    for word in rest:
        size = re.search(r"\d+", word)
        if word.startswith("chan"):
            group = "channel"
        elif word in SCALE_BITS:
            scale = word
        elif difflib.get_close_matches(word, ("zero", "zeros", "asym", "asymmetric"), 1, 0.7) and code in INTEGERS:
            zero = " zero"
        elif size and word.startswith(("g", size[0])):
            group = f"g{min(GROUPS, key=lambda g: abs(g - int(size[0])))}"
        else:
            scale = (difflib.get_close_matches(word, tuple(SCALE_BITS), 1, 0.5) or [scale])[0]
    if code == "int8" and scale == "dq":
        scale = "f32"
    return f"{code} {group} {scale}{zero}"
