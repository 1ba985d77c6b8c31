"""The CUDA kernels of quantize, dequantize, scale_grad and dot_columns in the SIMT emulator: every format and odd shape
under three schedules, against the reference; and kernels broken on purpose."""

from concurrent.futures import ThreadPoolExecutor

import emulated
import pytest
import torch
from emulated import ELEMENTWISE, SCHEDULES, KernelError, Mutant
from formats import DTYPES, ELEVEN, FORMATS, ODD, SHAPES, TWO, error, sample

import qft
from qft import reference
from qft.format import Format

pytestmark = pytest.mark.emulator

FEW = tuple(Format.parse(t) for t in ("nf4 g64 dq", "nf3 channel f16", "int3 g32 f16 zero", "int8 g64", f"{TWO} g64"))
EACH_CODE = tuple(
    Format.parse(f"{code} g32 f32") for code in ("int8", "int4", "int3", "int2", ELEVEN, "nf3", "nf2", TWO)
)
NOTHING_BAD = 2**63 - 1


@pytest.fixture(scope="module", autouse=True)
def libraries(request):
    """The kernels of the tests that were selected, compiled side by side."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    emulated.build((emulated.code_of(given["fmt"]) for given in parameters if "fmt" in given), [ELEMENTWISE])


def weight_of(q):
    """The exact weight, fp32: level x scale, by the reference."""
    return reference.dequantize(q.unpack(), q.scales, q.zeros, q.format)


def levels_of(q):
    """float64 level of each weight, its zero point subtracted."""
    return reference.dequantize(q.unpack(), torch.ones_like(q.scales), q.zeros, q.format).double()


def sum_groups(values, fmt):
    """Sum of `[out, in]` over each group: `[out, groups]`."""
    return torch.stack([part.sum(1) for part in values.split(fmt.group or values.shape[1], dim=1)], 1)


def each_dtype_where_it_matters():
    """Every shape in fp32, one in the other dtypes."""
    return [(shape, torch.float32) for shape in SHAPES] + [(ODD, dtype) for dtype in DTYPES[1:]]


def off_by_one(tensor):
    """The same values where no row starts at a multiple of 16 bytes."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    assert moved.data_ptr() % 16
    return moved.copy_(tensor)


# ---------------------------------------------------------------------------------------- quantize and dequantize


def assert_quantizes_as_the_reference(weight, fmt, schedules=SCHEDULES, **options):
    codes, scales, zeros = reference.quantize(weight, fmt)
    for schedule in schedules:
        packed, stored, zero_points, bad = emulated.quantize(weight, fmt, schedule, **options)
        assert torch.equal(packed, reference.pack(codes, fmt))
        assert torch.equal(stored.float(), scales)
        assert zeros is None or torch.equal(zero_points.float(), zeros)
        assert bad == NOTHING_BAD


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_quantize_is_the_reference_bit_for_bit(fmt):
    for shape, dtype in each_dtype_where_it_matters():
        assert_quantizes_as_the_reference(sample(shape, dtype), fmt)


@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_quantize_at_the_edges_of_fp32(fmt):
    """Subnormal weights, ties between levels, values one step from a tie, a row of one value."""
    levels = torch.tensor(sorted(set(fmt.levels)))[:16]
    ties = (levels[1:] + levels[:-1]) / 2
    near = torch.cat([ties, ties.nextafter(levels[1:]), ties.nextafter(levels[:-1]), levels])
    rows = [near, -near, near * 3.7, near * 1e-6, near * 1e-36, near * 1e-38, near * 1e-42, torch.full_like(near, 0.3)]
    assert_quantizes_as_the_reference(torch.stack(rows), fmt, SCHEDULES[:1])


@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_quantize_from_any_address(fmt):
    for dtype in DTYPES:
        for shape in ((3, 256), (2, 1000)):
            assert_quantizes_as_the_reference(off_by_one(sample(shape, dtype)), fmt, SCHEDULES[:1])


@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_the_first_weight_that_is_not_finite_is_named(fmt):
    weight = torch.randn(9, 300)
    for first in ((0, 0), (2, 299), (8, 256)):
        spoiled = weight.clone()
        spoiled[first] = torch.inf
        spoiled.view(-1)[first[0] * 300 + first[1] + 1 :: 7] = torch.nan
        for schedule in SCHEDULES:
            assert emulated.quantize(spoiled, fmt, schedule)[3] == first[0] * 300 + first[1]


def squared_errors(weight, codes, scales, zeros, fmt, importance):
    """In float64, summed over each group: `[out, groups]`."""
    off = weight.double() - reference.dequantize(codes, scales, zeros, fmt).double()
    return sum_groups(off.square() * (1 if importance is None else importance.double()), fmt)


def assert_searches_as_the_reference(weight, fmt, importance=None, schedules=SCHEDULES, **options):
    """Scales as good as the reference's, to what sums in another order may lose, and the codes that follow."""
    best = reference.quantize(weight, fmt, True, importance)
    found = []
    for schedule in schedules:
        packed, scales, zeros, bad = emulated.quantize(
            weight, fmt, schedule, search=True, importance=importance, **options
        )
        assert bad == NOTHING_BAD
        assert zeros is None or torch.equal(zeros.float(), best[2])
        codes = reference.encode(weight, scales, zeros, fmt)
        assert torch.equal(packed, reference.pack(codes, fmt))
        error = squared_errors(weight, codes, scales, zeros, fmt, importance)
        assert (error <= (1 + 1e-5) * squared_errors(weight, *best, fmt, importance)).all()
        assert (scales.float() == best[1]).float().mean() >= 0.98
        found.append(scales)
    assert all(torch.equal(scales, found[0]) for scales in found)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_search_is_as_good_as_the_reference(fmt):
    for shape, dtype in (((7, 129), torch.float32), ((2, 2100), torch.bfloat16), (ODD, torch.float16)):
        for importance in (None, torch.rand(shape[1]).pow(6)):
            assert_searches_as_the_reference(sample(shape, dtype), fmt, importance)


@pytest.mark.parametrize("text", ["nf4 g64 f16", "lm2 g64 f16", "int3 g32 f16 zero"])
def test_a_search_near_the_ends_of_fp16(text):
    """Subnormal scales, some of whose candidates come to 0, and scales whose larger candidates overflow."""
    fmt, row = Format.parse(text), torch.randn(64)
    largest = (len(fmt.levels) - 1) / 2 if fmt.zero else max(abs(level) for level in fmt.levels)
    sizes = (6e4, 3e4, 3e-7, 1e-7, 4e-8, 0)
    assert_searches_as_the_reference(torch.stack([row / row.abs().max() * size * largest for size in sizes]), fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_dequantize_is_exact(fmt):
    for shape, dtype in each_dtype_where_it_matters():
        q = qft.quantize(sample(shape), fmt, kernel="reference")
        exact = weight_of(q).to(dtype)
        for schedule in SCHEDULES:
            assert torch.equal(emulated.dequantize(q, dtype, schedule=schedule), exact)


@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_dequantize_any_rectangle(fmt):
    q = qft.quantize(sample((9, 700)), fmt, kernel="reference")
    dense = weight_of(q)
    for rows in ((0, 9), (3, 4), (8, 9), (5, 5)):
        for columns in ((0, 700), (128, 256), (128, 700), (640, 700), (256, 257)):
            part = dense[slice(*rows), slice(*columns)]
            assert torch.equal(emulated.dequantize(q, torch.float32, (rows, columns)), part)
            assert torch.equal(emulated.dequantize(q, torch.bfloat16, (rows, columns)), part.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", EACH_CODE, ids=str)
def test_dequantize_to_any_address(fmt, dtype):
    """Into rows of a wider matrix, aligned and not: what lies between them stays as it was."""
    q = qft.quantize(sample((5, 300)), fmt, kernel="reference")
    for start, pitch in ((0, 304), (0, 301), (1, 304)):
        buffer = torch.full((start + 5 * pitch,), 7, dtype=dtype)
        wide = buffer[start:].view(5, pitch)
        emulated.dequantize(q, out=wide[:, :300])
        assert torch.equal(wide[:, :300], weight_of(q).to(dtype))
        assert (wide[:, 300:] == 7).all()
        assert (buffer[:start] == 7).all()


@pytest.mark.parametrize("shape", [(700, 40), (130, 2100)], ids=str)
def test_warps_take_more_than_one_piece(shape):
    """More pieces of rows than a small device's grid has warps, one to a row or an odd number."""
    fmt, small = Format.parse("int4 g32 f32"), {"multiprocessors": 1}
    weight, dw = torch.randn(shape), torch.randn(shape)
    assert_quantizes_as_the_reference(weight, fmt, [small])
    q = qft.quantize(weight, fmt, kernel="reference")
    assert torch.equal(emulated.dequantize(q, schedule=small), weight_of(q))
    assert error(emulated.scale_grad(dw, q, small), sum_groups(levels_of(q) * dw, fmt)) < 1e-6


@pytest.mark.parametrize("fmt", ["nf4 g32 dq", "int3 g32 f16 zero", "int8 channel f32"])
def test_offsets_take_64_bits(fmt):
    """The last rows of a weight that pretends to have 2^33 more before them."""
    q, far = qft.quantize(sample((3, 300)), fmt, kernel="reference"), 2**33
    assert torch.equal(emulated.dequantize(q, rows_before=far), weight_of(q))
    dw = torch.randn(3, 300)
    assert torch.equal(emulated.scale_grad(dw, q, rows_before=far), emulated.scale_grad(dw, q))


def test_nothing_is_launched_for_nothing():
    fmt = Format.parse("int4 g64 f32")
    q = qft.quantize(torch.randn(3, 300), fmt, kernel="reference")
    assert emulated.dequantize(q, torch.float32, ((1, 1), (0, 300))).shape == (0, 300)
    assert emulated.dequantize(q, torch.float32, ((0, 3), (256, 256))).shape == (3, 0)
    assert emulated.scale_grad(torch.empty(0, 300), q, rows=(2, 2)).shape == (0, 5)
    for shape in ((0, 64), (3, 0)):
        codes, scales, _, bad = emulated.quantize(torch.empty(shape), fmt)
        assert codes.numel() == scales.numel() == 0
        assert bad == NOTHING_BAD
    assert emulated.dot_columns(torch.empty(4, 0), torch.empty(4, 0)).shape == (0,)
    assert torch.equal(emulated.dot_columns(torch.empty(0, 5), torch.empty(0, 5)), torch.zeros(5))


# ------------------------------------------------------------------------------------------------------- gradients


def assert_sums(sums, products, fmt):
    """`sums` are the float64 `products` summed over each group, to what fp32 sums of so many terms may lose."""
    exact, size = sum_groups(products, fmt), sum_groups(products.abs(), fmt)
    terms = min(fmt.group or products.shape[1], products.shape[1])
    slack = torch.finfo(torch.float32).eps * (terms**0.5 + 4) * size
    assert ((sums.double() - exact).abs() <= slack).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_scale_grad_is_the_sum_over_each_group(fmt):
    for shape, dtype in each_dtype_where_it_matters():
        q, dw = qft.quantize(sample(shape), fmt, kernel="reference"), torch.randn(shape).to(dtype)
        sums = [emulated.scale_grad(dw, q, schedule) for schedule in SCHEDULES]
        assert_sums(sums[0], levels_of(q) * dw.double(), fmt)
        assert all(torch.equal(again, sums[0]) for again in sums)


@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_scale_grad_of_some_rows_from_any_address(fmt):
    q, dw = qft.quantize(sample((9, 300)), fmt, kernel="reference"), torch.randn(9, 300)
    whole = emulated.scale_grad(dw, q)
    for dtype in DTYPES:
        part = off_by_one(dw[3:8].to(dtype))
        assert_sums(emulated.scale_grad(part, q, rows=(3, 8)), levels_of(q)[3:8] * part.double(), fmt)
    assert torch.equal(emulated.scale_grad(dw[3:8].clone(), q, rows=(3, 8)), whole[3:8])


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if not fmt.group], ids=str)
def test_zero_scale_grad_is_the_whole_sum_where_a_scale_is_0(fmt):
    for rows, shape, dtype in ((5, (7, 129), torch.float32), (3, (3, 4128), torch.float32), (4, ODD, torch.bfloat16)):
        q = qft.quantize(sample(shape), fmt, kernel="reference")
        q.weight_scales[[0, -1]] = 0  # as training may leave them: the codes say other than 0
        dy, x = torch.randn(rows, shape[0]).to(dtype), torch.randn(rows, shape[1]).to(dtype)
        products = (dy.double().T @ x.double()) * levels_of(q)
        slack = torch.finfo(torch.float32).eps * 64 * ((dy.double().abs().T @ x.double().abs()) * levels_of(q).abs())
        for given in (x, off_by_one(x)):
            for schedule in SCHEDULES:
                before = torch.randn(shape[0])
                ds, zero = emulated.zero_scale_grad(dy, given, q, before, schedule), q.scales[:, 0] == 0
                assert ((ds.double() - products.sum(1)).abs() <= slack.sum(1))[zero].all()
                assert torch.equal(ds[~zero], before[~zero])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dot_columns_sums_down_each_column(dtype):
    for rows, columns in ((1, 1), (7, 40), (129, 300), (400, 64), (33, 520)):
        a, b = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
        products = a.double() * b.double()
        for given in ((a, b), (off_by_one(a), b), (a, off_by_one(b))):
            totals = [emulated.dot_columns(*given, schedule) for schedule in SCHEDULES]
            slack = torch.finfo(torch.float32).eps * (rows**0.5 + 4) * products.abs().sum(0)
            assert ((totals[0].double() - products.sum(0)).abs() <= slack).all()
            assert all(torch.equal(again, totals[0]) for again in totals)


# --------------------------------------------------------------------------------------------- broken on purpose


def quantizes(kernels, formats):
    for fmt in map(Format.parse, formats):
        for schedule in SCHEDULES:
            weight = sample((7, 129))
            assert_quantizes_as_the_reference(weight, fmt, [schedule], kernels=kernels)
            assert_searches_as_the_reference(weight, fmt, torch.rand(129), [schedule], kernels=kernels)
            weight[5:] = torch.inf
            assert emulated.quantize(weight, fmt, schedule, kernels=kernels)[3] == 5 * 129


def dequantizes(kernels, formats):
    for fmt in formats:
        for schedule in (*SCHEDULES, {"multiprocessors": 1}):
            q = qft.quantize(sample((300, 43)), fmt, kernel="reference")
            for columns in ((0, 43), (0, 40)):
                part = weight_of(q)[:, slice(*columns)]
                out = torch.full((300 * 44 + 1,), torch.nan)[1:].view(300, 44)[:, slice(*columns)]
                options = {"rectangle": ((0, 300), columns), "schedule": schedule, "kernels": kernels}
                assert torch.equal(emulated.dequantize(q, out=out, **options), part)
                assert torch.equal(emulated.dequantize(q, **options), part)


def reduces_scales(kernels, formats):
    for fmt in formats:
        for schedule in SCHEDULES:
            q, dw = qft.quantize(sample((7, 320)), fmt, kernel="reference"), torch.randn(7, 320)
            sums = emulated.scale_grad(dw, q, schedule, kernels=kernels)
            assert_sums(sums, levels_of(q) * dw.double(), q.format)


def dots_columns(kernels, formats):
    for schedule in SCHEDULES:
        a, b = torch.randn(129, 300), torch.randn(129, 300)
        total = emulated.dot_columns(a, b, schedule, kernels=kernels)
        assert (total - (a * b).sum(0)).abs().max() < 1e-4


WORKS = {
    "quantize": quantizes,
    "dequantize": dequantizes,
    "scale_grad": reduces_scales,
    "dot_columns": dots_columns,
}
OF_CODE = {
    "int3": ("int3 g32 f32", "int3 g64 f16 zero", "int3 channel f32"),
    "int4": ("int4 g32 f32",),
    "int8": ("int8 g32 f32", "int8 channel bf16"),
    "levels4": ("nf4 g32 f32", "nf4 g64 dq", "fp4 channel f32"),
}

BARRIER = "  __syncthreads();\n"
UNORDERED = "race|uninitialised"
OUTSIDE = "out of bounds|illegal address|uninitialised|race"  # by what lies there
# What to break, and what is then said: a fault of the emulator's, or None for a wrong result.
MUTANTS = [
    (Mutant(name, verb, code, file, old, new), said)
    for name, verb, code, file, old, new, said in (
        ("no barrier after the tables of ranks", "quantize", "levels4", "nearest.cuh", BARRIER, "", UNORDERED),
        ("no tail mask on codes", "quantize", "int3", "pack.cuh", "if (kept < per_word)", "if (false)", None),
        ("row padding from a word too far", "quantize", "int3", "pack.cuh",
         "int64_t i = end;", "int64_t i = end + 4;", "codes is not fully written"),
        ("the wrong bit planes", "quantize", "int3", "pack.cuh", "words[3] >> i", "words[3] >> (i ^ 1)", None),
        ("a record past the row's end", "quantize", "int8", "pack.cuh", "if (end <= row_bytes) ", "", OUTSIDE),
        ("lanes past the last group write", "quantize", "int3", "groups.cuh",
         "leads = real && lane == 0;", "leads = lane == 0;", OUTSIDE),
        ("bounds of half a group", "quantize", "int3", "groups.cuh",
         "if (g.shift > 0) exchange(1);", "", None),
        ("an importance past the row's end", "quantize", "int3", "group_scale.cuh", "if (k < left) ", "", OUTSIDE),
        ("errors of half a group", "quantize", "int3", "group_scale.cuh",
         "across_group(lanes, [&](int distance) { error", "if (c > 1) across_group(lanes, [&](int distance) { error",
         None),
        ("the importance of the group's first columns", "quantize", "int3", "group_scale.cuh",
         "a.importance + column", "a.importance + group.first", None),
        ("the importance of another column", "quantize", "levels4", "group_scale.cuh",
         "importance[k]", "importance[0]", None),
        ("the last bad index instead of the least", "quantize", "int3", "quantize.cuh",
         "atomicMin(reinterpret_cast<unsigned long long*>(bad), static_cast<unsigned long long>(index + first));",
         "*bad = index + first;", "race"),
        ("no barrier after the tables of levels", "dequantize", "levels4", "levels.cuh", BARRIER, "", UNORDERED),
        ("no column mask on loads", "dequantize", "int8", "dequantize.cuh",
         "if (i * kStep<T> >= left) continue;\n      codes", "codes", OUTSIDE),
        ("a column too many", "dequantize", "int8", "dequantize.cuh",
         "left - i * kStep<T>, to", "left + 1 - i * kStep<T>, to", OUTSIDE),
        ("alignment taken for granted", "dequantize", "int8", "vectors.cuh",
         "reinterpret_cast<uintptr_t>(p) % 16 == 0", "p", "misaligned"),
        ("a row skipped", "dequantize", "int8", "warps.cuh",
         "row_step_ = warps / parts;", "row_step_ = warps / parts + 1;", "out is not fully written"),
        ("no tail mask on the gradient", "scale_grad", "levels4", "scale_grad.cuh",
         "column < group.last;", "column <= group.last;", OUTSIDE),
        ("half the lanes summed", "scale_grad", "levels4", "groups.cuh",
         "if (g.shift > 4) exchange(16);", "", None),
        ("no barrier between the warps' sums", "dot_columns", "int4", "dot_columns.cuh", BARRIER, "", UNORDERED),
        ("rows of the next chunk", "dot_columns", "int4", "dot_columns.cuh",
         "first + chunk_rows < rows ? first + chunk_rows : rows", "first + chunk_rows", OUTSIDE),
        ("a workspace of one chunk too few", "dot_columns", "int4", "dot_columns.cuh",
         "? chunks * columns", "? (chunks - 1) * columns", OUTSIDE),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def mutants(request, tmp_path_factory):
    """The libraries of the mutants that were selected, by name."""
    items = [item for item in request.session.items if item.path == request.path]
    wanted = [item.callspec.params["mutant"] for item in items if "mutant" in item.fixturenames]
    folder = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip([mutant.name for mutant in wanted], pool.map(lambda m: m.build(folder), wanted), strict=True))


@pytest.mark.parametrize(("mutant", "said"), MUTANTS, ids=[mutant.name for mutant, _ in MUTANTS])
def test_a_kernel_broken_on_purpose_is_caught(mutant, said, mutants):
    with pytest.raises(KernelError if said else AssertionError, match=said):
        WORKS[mutant.verb](mutants[mutant.name], OF_CODE[mutant.code])


def test_what_catches_mutants_passes_the_kernels_themselves():
    for verb, code in sorted({(mutant.verb, mutant.code) for mutant, _ in MUTANTS}):
        WORKS[verb](emulated.library(code, ELEMENTWISE), OF_CODE[code])
