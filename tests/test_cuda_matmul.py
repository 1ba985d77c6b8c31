"""The CUDA kernels of matmul in the SIMT emulator: every format and odd shape under three schedules, against the
product in float64; and kernels broken on purpose."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from types import SimpleNamespace

import emulated
import pytest
import torch
from emulated import CSRC, PRODUCTS, SCHEDULES, KernelError, Library
from formats import BOUND, FORMATS, SHAPES, error, sample

import qft
from qft import reference
from qft.format import Format

pytestmark = pytest.mark.emulator

EIGHTHS = "[" + " ".join(str(i / 8) for i in range(-8, 8)) + "]"  # exact in bf16, as all integers of the formats are
EXACT = tuple(
    map(
        Format.parse,
        (
            f"{EIGHTHS} g64 f32",
            f"{EIGHTHS} channel dq",
            "[-1 -0.75 -0.5 -0.25 0 0.125 0.5 1] g32 f16",
            "[-1 -0.25 0.5 1] g512 f32",
            "[-0.375 1] g32 dq",
            *(str(fmt) for fmt in FORMATS if fmt.is_integer),
        ),
    )
)
DTYPES = (torch.bfloat16, torch.float16)
TAIL = (130, 520)  # two blocks, the second with two outputs; two chunks of K and a bit
ROWS = (1, 7, 9, 20, 33, 50, 64, 129)
HEADER = "gemm_small.cuh"


def weights(q, dtype=None):
    """The weight in float64, its levels rounded to `dtype` as the kernels hold them; and the magnitude of what they
    sum: integers count from the middle of their range, and so do zero points."""
    fmt, middle = q.format, 1 << (q.format.bits - 1)
    spread = [reference.per_weight(part.double(), fmt, q.shape[1]) for part in (q.scales, q.zeros) if part is not None]
    levels = torch.tensor(fmt.levels)
    level = (levels.to(dtype) if dtype and not fmt.is_integer else levels).double()[q.unpack().long()]
    if q.zeros is None:
        return level * spread[0], (level * spread[0]).abs()
    size = (level - middle).abs() + (spread[1] - middle).abs()
    return (level - spread[1]) * spread[0], size * spread[0].abs()


def assert_product(y, x, q):
    """`y` is the product over rounded levels, rounded once; what fp32 sums lose is added: one rounding of a sum for
    each 16 terms in a tensor core, and one for each 32 where the group's scale comes in."""
    weight, size = weights(q, x.dtype)
    exact, terms = x.double() @ weight.T, x.double().abs() @ size.T
    rounding = torch.finfo(x.dtype).eps / 2 * exact.abs() + torch.finfo(x.dtype).smallest_normal * 2**-10
    slack = torch.finfo(torch.float32).eps * (8 + q.shape[1] / 16) * terms
    assert ((y.double() - exact).abs() <= rounding + slack).all()


def run(x, q, schedules=SCHEDULES, **options):
    """The product under the first schedule, the same bits under the others."""
    y, *others = (emulated.matmul(x, q, schedule, **options) for schedule in schedules)
    assert all(torch.equal(other, y) for other in others)
    return y


def activations(rows, columns, dtype):
    return (torch.randn(rows, columns) / 4).to(dtype)  # so that no product overflows fp16


def off_by_one(tensor):
    """The same values where no row starts at a multiple of 16 bytes."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    assert moved.data_ptr() % 16
    return moved.copy_(tensor)


@pytest.fixture(scope="module", autouse=True)
def libraries(request):
    """The kernels of the tests that were selected, compiled side by side."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    emulated.build((emulated.code_of(given["fmt"]) for given in parameters if "fmt" in given), [PRODUCTS])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_matmul_is_the_product_in_float64(fmt):
    """Two counts of rows and both dtypes for every shape; which ones changes from format to format."""
    rows, dtypes = cycle(ROWS), cycle(DTYPES)
    for _ in range(FORMATS.index(fmt) % len(ROWS)):
        next(rows)
    for shape in (*SHAPES, TAIL):
        q = qft.quantize(sample(shape), fmt, kernel="reference")
        for _ in DTYPES:
            x = activations(next(rows), shape[1], next(dtypes))
            assert_product(run(x, q), x, q)
        next(dtypes)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_matmul_stays_within_the_bound_of_every_kernel(fmt):
    """Against the weight itself. A level rounded to bf16 is off by 2^-9 of itself at most; such errors of many weights
    add up like their root, and with the rounding of y they stay at about 2.5e-3 of its norm, half of the bound."""
    q = qft.quantize(sample((40, 256)), fmt, kernel="reference")
    for dtype in DTYPES:
        x = activations(24, 256, dtype)
        assert error(emulated.matmul(x, q), x.double() @ weights(q)[0].T) < BOUND[dtype]


@pytest.mark.parametrize("fmt", EXACT, ids=str)
def test_the_identity_yields_the_weight_bit_for_bit(fmt):
    """Every code at its place, every scale with its group: the dequantized weight, rounded once."""
    q = qft.quantize(sample((33, 100)), fmt, kernel="reference")
    dense = reference.dequantize(q.unpack(), q.scales, q.zeros, fmt)
    for dtype in DTYPES:
        assert torch.equal(run(torch.eye(100, dtype=dtype), q).T, dense.to(dtype))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_random_distinct_levels(bits):
    for count in ({2}, {3, 4}, {5, 8}, {9, 16})[bits - 1]:
        levels = torch.randperm(200)[:count].sort().values / 100 - 0.99
        fmt = Format.parse(f"[{' '.join(f'{level:.2f}' for level in levels.tolist())}] g32 f32")
        q, x = qft.quantize(sample((20, 290)), fmt, kernel="reference"), activations(9, 290, torch.bfloat16)
        assert_product(run(x, q), x, q)


@pytest.mark.parametrize("fmt", ["nf4 g64 f32", "int3 g32 f16 zero"])
def test_blocks_that_share_outputs_split_k(fmt):
    """However many: other sums, but always the same for one device."""
    q, x = qft.quantize(sample((140, 1300)), fmt, kernel="reference"), activations(20, 1300, torch.float16)
    workspace = []
    for multiprocessors in (1, 2, 3, 6, 32):
        devices = [{**schedule, "multiprocessors": multiprocessors} for schedule in SCHEDULES]
        y = run(x, q, [*devices, devices[0]])
        assert_product(y, x, q)
        workspace.append(emulated.library(emulated.code_of(fmt), PRODUCTS).workspace("matmul", 140, 1300, 20).numel())
    assert workspace == [splits * 20 * 140 for splits in (0, 2, 3, 6, 6)]


@pytest.mark.parametrize("fmt", ["nf4 g64 f32", "int3 g32 f16 zero", "int8 g64 bf16"])
def test_activations_at_any_address(fmt):
    for columns in (264, 300, 301):
        q = qft.quantize(sample((20, columns)), fmt, kernel="reference")
        for rows in (1, 9, 30, 60):
            x = activations(rows, columns, torch.bfloat16)
            assert torch.equal(run(off_by_one(x), q, SCHEDULES[:1]), run(x, q, SCHEDULES[:1]))


def test_one_token_does_not_touch_another():
    """Infinities and NaN stay in their row of y."""
    q = qft.quantize(sample((20, 300)), Format.parse("nf4 g64 f32"), kernel="reference")
    x = activations(20, 300, torch.bfloat16)
    clean = emulated.matmul(x, q)
    x[3, 7], x[18, 299] = torch.inf, torch.nan
    spoiled = emulated.matmul(x, q)
    others = [row for row in range(20) if row not in (3, 18)]
    assert torch.equal(spoiled[others], clean[others])
    assert not spoiled[[3, 18]].isfinite().any()


def test_empty_products():
    fmt = Format.parse("int4 g64 f32")
    q = qft.quantize(torch.randn(3, 300), fmt, kernel="reference")
    assert emulated.matmul(torch.empty(0, 300).half(), q).shape == (0, 3)
    fields = {"weight": torch.empty(3, 0, dtype=torch.uint8), "weight_scales": torch.empty(3, 0)}
    fields |= dict.fromkeys(("weight_zeros", "weight_scales_absmax", "weight_scales_offset"))
    nothing = SimpleNamespace(format=fmt, shape=(3, 0), **fields)
    assert torch.equal(emulated.matmul(torch.empty(5, 0).half(), nothing), torch.zeros(5, 3).half())


def test_fp32_activations_are_refused():
    q = qft.quantize(torch.randn(3, 300), Format.parse("int4 g64 f32"), kernel="reference")
    with pytest.raises(KernelError, match="bf16 or fp16 activations, not fp32: convert x"):
        emulated.matmul(torch.randn(2, 300), q)


# ------------------------------------------------------------------------------------------- other sources, compiled


def keeping(*tiles):
    """Replacements that leave the kernels of these numbers of tiles, of bf16 alone: a fraction of the time."""
    calls = {
        1: "  if (p.rows <= 8) return launch_gemm_small<F, T, 1, zeros, false>(p, splits, place);\n",
        2: "  if (p.rows <= 16) return launch_gemm_small<F, T, 2, zeros, false>(p, splits, place);\n",
        4: "  if (p.rows <= 32) return launch_gemm_small<F, T, 4, zeros, false>(p, splits, place);\n",
        8: "  launch_gemm_small<F, T, 8, zeros, false>(p, splits, place);\n",
    }
    dropped = [(HEADER, call, "") for count, call in calls.items() if count not in tiles]
    return [*dropped, (HEADER, "    matmul_in<F, __half>(a);\n", "    return;\n")]


def changed(code, csrc, replacements):
    """The kernels of a code, compiled from sources with these (file, old, new); `csrc`, a copy, is as before then."""
    before = {}
    for file, old, new in replacements:
        path = csrc / "qft" / "cuda" / file
        text = path.read_text()
        before.setdefault(path, text)
        assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
        path.write_text(text.replace(old, new))
    try:
        return Library(code, PRODUCTS, csrc, jobs=1)
    finally:
        for path, text in before.items():
            path.write_text(text)


@pytest.mark.parametrize("fmt", ["nf4 g64 dq", f"{EIGHTHS} g32 f32"])
def test_both_lookups_of_16_levels_give_the_same_bits(fmt):
    q = qft.quantize(sample(TAIL), Format.parse(fmt), kernel="reference")
    for rows in (5, 13):
        x = activations(rows, TAIL[1], torch.bfloat16)
        permuted = run(x, q, pair_table_rows=0)
        assert torch.equal(run(x, q, pair_table_rows=16), permuted)
        assert torch.equal(run(x, q, pair_table_rows=8), permuted)


OUTSIDE = "out of bounds|illegal address|uninitialised|race"  # by what lies there
UNORDERED = "race|uninitialised|in flight"
LOOP_BARRIER = "    __syncthreads();                    // everyone's, and the scales"
TILES = "a tile too few"  # the one that takes more than 8 rows to see
# name, file, what to break and how, what is then said: a fault of the emulator's, or None for a wrong result
MUTANTS = [
    ("copies not awaited", HEADER, "cp_wait<Stage::stages - 2>();", "cp_wait<Stage::stages - 1>();", "in flight"),
    ("no barrier in the loop", HEADER, LOOP_BARRIER, "    //", UNORDERED),
    ("no barrier after the tables", HEADER,
     "  __syncthreads();\n  const D decoder", "  const D decoder", UNORDERED),
    ("the slot that is being read", HEADER,
     "slot == 0 ? Stage::stages - 1 : slot - 1", "slot", UNORDERED),
    ("one buffer of scales", HEADER, "next = Stage::scales - now", "next = now", UNORDERED),
    ("rows past the last copied", HEADER,
     "row < rows_left && chunk < chunks_inside ? 16 : 0", "chunk < chunks_inside ? 16 : 0", OUTSIDE),
    ("columns past the last copied", HEADER,
     "row < rows_left && chunk < chunks_inside ? 16 : 0", "row < rows_left ? 16 : 0", OUTSIDE),
    ("elements past the last copied", HEADER, "row < rows_left && 2 * i < left", "row < rows_left", OUTSIDE),
    ("elements of tokens past the last", HEADER, "row < rows_left && 2 * i < left", "2 * i < left", OUTSIDE),
    ("outputs past the last written", HEADER, "token >= p.rows || output >= out", "token >= p.rows", OUTSIDE),
    ("tokens past the last written", HEADER, "token >= p.rows || output >= out", "output >= out", OUTSIDE),
    ("scales of rows past the last", HEADER, "if (i * step < rows_left) loaded", "loaded", OUTSIDE),
    ("groups past the last", HEADER, "first + (group < last ? group : last)", "first + group", OUTSIDE),
    ("the scale of another group", HEADER, "      group++;\n", "", None),
    ("the absmax of another block", HEADER, "/ kDqBlock];", "/ kDqBlock / 2];", None),
    ("the wrong octet", "decoder.cuh", "start(octet * 4)", "start((3 - octet) * 4)", None),
    ("no zero points", HEADER, "sum[i] = fmaf(-zero[i / 2], total[i], sum[i]);", "(void)total;", None),
    ("a split left out", HEADER, "split < splits; split++", "split < splits - 1; split++", None),
    ("splits in one place", HEADER,
     "(static_cast<int64_t>(blockIdx.y) * p.rows + token) * out", "(int64_t{0} + token) * out", "race"),
    (TILES, HEADER, "tile * 8 >= rows) break", "tile * 8 + 8 >= rows) break", None),
]  # fmt: skip


def works(kernels, schedule, rows):
    """What a kernel that was broken must fail at: zero points, dq, groups in part, tails, a ring gone round, splits."""
    for text, shape in (("int4 g32 dq", (130, 840)), ("int4 g512 f16 zero", (130, 1300)), ("int4 g32 f32", (5, 77))):
        q = qft.quantize(sample(shape), Format.parse(text), kernel="reference")
        x = activations(rows, shape[1], torch.bfloat16)
        for multiprocessors in (1, 4):
            for given in (x, off_by_one(x)):
                y = emulated.matmul(given, q, {**schedule, "multiprocessors": multiprocessors}, kernels=kernels)
                assert_product(y, x, q)


def test_what_catches_mutants_passes_the_kernels_themselves():
    for schedule in SCHEDULES:
        for rows in (3, 20):
            works(emulated.library("int4", PRODUCTS), schedule, rows)


@pytest.fixture(scope="module")
def mutants(request, tmp_path_factory):
    """The kernels of the mutants that were selected, by name."""
    items = [item for item in request.session.items if item.path == request.path]
    chosen = [item.callspec.params["mutant"] for item in items if "mutants" in item.fixturenames]

    def build(some):
        csrc = shutil.copytree(CSRC, tmp_path_factory.mktemp("mutants") / "csrc")
        for name, *replacement, _ in some:
            only = keeping(4 if name == TILES else 1)
            yield name, changed("int4", csrc, [tuple(replacement), *only])

    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(lambda some: dict(build(some)), (chosen[::2], chosen[1::2]))
        return {name: kernels for half in halves for name, kernels in half.items()}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0])
def test_a_kernel_broken_on_purpose_is_caught(mutant, mutants):
    name, *_, said = mutant
    for schedule in SCHEDULES:
        with pytest.raises(KernelError if said else AssertionError, match=said):
            works(mutants[name], schedule, 20 if name == TILES else 3)
