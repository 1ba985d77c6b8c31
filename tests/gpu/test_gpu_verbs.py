"""The CPU's contracts on CUDA: bits against the reference, products against float64. The reference runs on the CPU."""

import re

import pytest
import torch
from formats import DTYPES, ELEVEN, FORMATS, ODD, REAL, ROWS, SHAPES, cases, error, sample
from place import BOTH, DEVICE, OWN, here, misaligned, there
from test_kernels import (
    BOUND,
    CODES,
    FEW,
    LAYERS,
    assert_product,
    each_dtype_where_it_matters,
    levels_of,
    sum_groups,
    weight_of,
)

import qft
from qft import kernels, native, ops, reference
from qft.format import Format

TENSOR_CORE_ROWS = (*ROWS, 8, 9, 16, 17, 33, 64, 65)  # around the widths of tiles
WIDE = ((129, 520), (64, 4104), (515, 64))  # several tiles in each direction, and ends inside one


def by_row(verb, formats=FORMATS, rows=BOTH):
    return pytest.mark.parametrize(("fmt", "kernel"), cases(verb, formats, rows))


# ---------------------------------------------------------------------------------------- quantize and dequantize


def assert_quantizes_as_the_reference(weight, fmt, on_device=there):
    wanted, got = kernels.quantize(weight, fmt, "reference"), kernels.quantize(on_device(weight), fmt, OWN)
    for name, theirs, ours in zip(("codes", "scales", "zeros"), wanted, got, strict=False):
        assert (theirs is None) == (ours is None)
        assert theirs is None or torch.equal(here(ours), theirs), f"{name} of {tuple(weight.shape)} {weight.dtype}"
    assert got[3] == wanted[3]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_quantize_is_the_reference_bit_for_bit(fmt, poisoned):
    for shape, dtype in each_dtype_where_it_matters((*SHAPES, *WIDE)):
        assert_quantizes_as_the_reference(sample(shape, dtype), fmt)
    for dtype in DTYPES:
        assert_quantizes_as_the_reference(sample(ODD, dtype), fmt, misaligned)


@pytest.mark.parametrize("fmt", LAYERS, ids=str)
def test_quantize_a_real_layer(fmt, poisoned):
    assert_quantizes_as_the_reference(torch.randn(REAL, dtype=torch.bfloat16), fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_search_is_as_good_as_the_reference(fmt, poisoned):
    """To what fp32 sums in another order may lose; the same bits every time."""
    for shape, dtype in each_dtype_where_it_matters(((7, 129), (2, 2100), (515, 64))):
        weight = sample(shape, dtype)
        for importance in (None, torch.rand(shape[1]).pow(6)):
            best = reference.quantize(weight, fmt, True, importance)
            again, (packed, scales, zeros, bad) = (
                kernels.quantize(
                    there(weight), fmt, OWN, search=True, importance=None if importance is None else there(importance)
                )
                for _ in range(2)
            )
            assert bad == -1
            assert torch.equal(again[0], packed)
            assert torch.equal(again[1], scales)
            scales, zeros = here(scales), None if zeros is None else here(zeros)
            codes = reference.encode(weight, scales, zeros, fmt)
            assert torch.equal(here(packed), reference.pack(codes, fmt))
            ours, theirs = (
                sum_groups((weight.double() - reference.dequantize(*found, fmt).double()).square()
                           * (1 if importance is None else importance.double()), fmt)
                for found in ((codes, scales, zeros), best)
            )  # fmt: skip
            assert (ours <= (1 + 1e-5) * theirs).all()
            assert (scales.float() == best[1]).float().mean() >= 0.98


@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_quantize_at_the_edges_of_fp32(fmt):
    """Ties between levels and values one step from a tie, from large to subnormal, and a row of one value."""
    levels = torch.tensor(sorted(set(fmt.levels)))[:16]
    ties = (levels[1:] + levels[:-1]) / 2
    near = torch.cat([ties, ties.nextafter(levels[1:]), ties.nextafter(levels[:-1]), levels])
    sizes = (1, -1, 3.7, 1e-6, 1e-36, 1e-38, 1e-42)
    weight = torch.stack([*(near * size for size in sizes), torch.full_like(near, 0.3)])
    assert_quantizes_as_the_reference(weight, fmt)


@pytest.mark.parametrize("fmt", ["nf4 g64 f32", "int4 g32 f16 zero", "nf3 channel f32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_weight_that_is_not_finite_is_named(fmt, value, dtype):
    for row, column in ((0, 0), (32, 99), (17, 63)):
        weight = torch.randn(ODD).to(dtype)
        weight[row, column] = weight[32, 99] = value
        with pytest.raises(ValueError, match=re.escape(f"w[{row}, {column}] is {value}; only finite weights quantize")):
            qft.quantize(there(weight), fmt, name="w")


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.scale == "dq"], ids=str)
def test_double_quantized_scales_are_as_near_as_on_the_cpu(fmt):
    weight = torch.randn(REAL) * 0.02
    scales = kernels.quantize(weight, fmt, "reference")[1]
    ours, theirs = qft.quantize(there(weight), fmt), qft.quantize(weight, fmt)
    assert torch.equal(here(ours.weight), theirs.weight)
    assert error(here(ours.scales), scales) <= 1.001 * error(theirs.scales, scales)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_dequantize_is_exact(fmt, poisoned):
    for shape, dtype in each_dtype_where_it_matters((*SHAPES, *WIDE)):
        q = qft.quantize(sample(shape), fmt)
        assert torch.equal(here(kernels.dequantize(there(q), dtype, OWN)), weight_of(q).float().to(dtype))


@pytest.mark.parametrize("fmt", FEW, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_any_rectangle_anywhere(fmt, dtype, poisoned):
    q = qft.quantize(sample((9, 700)), fmt)
    dense, on_device = weight_of(q).float().to(dtype), there(q)
    for rows in ((0, 9), (3, 4), (8, 9)):
        for columns in ((0, 700), (128, 256), (128, 700), (640, 700), (256, 257)):
            wanted = dense[slice(*rows), slice(*columns)]
            for out in (torch.empty(wanted.shape, dtype=dtype, device=DEVICE), misaligned(torch.zeros_like(wanted))):
                native.dequantize(on_device, out, rows, columns, *kernels._table_of(fmt, OWN))
                assert torch.equal(here(out), wanted)


# ------------------------------------------------------------------------------------------------------ products


def check_matmul(q, rows, dtype, kernel, on_device=there):
    x = torch.randn(rows, q.shape[1]).to(dtype)
    assert_product(here(kernels.matmul(on_device(x), there(q), kernel)), x.double(), weight_of(q).T, dtype)


def check_matmul_t(q, rows, dtype, kernel, on_device=there):
    dy = torch.randn(rows, q.shape[0]).to(dtype)
    assert_product(here(kernels.matmul_t(on_device(dy), there(q), kernel)), dy.double(), weight_of(q), dtype)


def check_scale_grad(q, rows, dtype, kernel, on_device=there):
    dy, x = torch.randn(rows, q.shape[0]).to(dtype), torch.randn(rows, q.shape[1]).to(dtype)
    exact = sum_groups((dy.double().T @ x.double()) * levels_of(q), q.format)
    ds = here(kernels.scale_grad(on_device(dy), on_device(x), there(q), kernel))
    assert (ds.dtype, ds.shape) == (torch.float32, exact.shape)
    assert error(ds, exact) <= BOUND[dtype]


CHECKS = {"matmul": check_matmul, "matmul_t": check_matmul_t, "scale_grad": check_scale_grad}


def products(formats):
    listed = [(verb, case) for verb in CHECKS for case in cases(verb, formats, BOTH)]
    values = [pytest.param(verb, *case.values, id=f"{verb}-{case.id}") for verb, case in listed]
    return pytest.mark.parametrize(("verb", "fmt", "kernel"), values)


def taken(kernel):
    """The dtypes that a row multiplies: tensor cores take no fp32."""
    return DTYPES if kernel == "panel" else DTYPES[1:]


@products(FORMATS)
def test_products_match_float64(verb, fmt, kernel, poisoned):
    q = qft.quantize(torch.randn(ODD), fmt)
    for dtype in taken(kernel):
        for rows in TENSOR_CORE_ROWS:
            CHECKS[verb](q, rows, dtype, kernel)
        CHECKS[verb](q, 5, dtype, kernel, misaligned)
    for shape in (*SHAPES, *WIDE):
        CHECKS[verb](qft.quantize(torch.randn(shape), fmt), 3, torch.bfloat16, kernel)


@products(LAYERS)
def test_products_of_a_real_layer_match_float64(verb, fmt, kernel, poisoned):
    q = qft.quantize(torch.randn(REAL) * 0.02, fmt)
    for rows, dtype in ((1, torch.bfloat16), (16, torch.float16), (48, torch.bfloat16), (300, torch.float16)):
        CHECKS[verb](q, rows, dtype, kernel)


@pytest.mark.parametrize("verb", CHECKS)
@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_many_small_panels_make_the_same_product(verb, fmt, poisoned, monkeypatch):
    monkeypatch.setitem(kernels.PANEL_BYTES, DEVICE, 1 << 12)
    monkeypatch.setattr(kernels, "PANEL_OUTPUTS", 16)
    q = qft.quantize(sample((67, 1030)), fmt)
    for dtype in DTYPES:
        CHECKS[verb](q, 33, dtype, "panel")


@by_row("matmul", CODES)
def test_the_identity_gives_back_the_weight(fmt, kernel, poisoned):
    """Exactly: tensor cores multiply by the level rounded to x's dtype, the fp32 scale comes after, then one rounding.
    A panel holds the weight itself, rounded once."""
    for shape in (ODD, (7, 260), (80, 512)):
        q = qft.quantize(sample(shape), fmt)
        for dtype in taken(kernel):
            wanted = weight_of(q).float()
            if kernel == OWN:
                wanted = levels_of(q).to(dtype).float() * reference.per_weight(q.scales, q.format, shape[1])
            y = kernels.matmul(there(torch.eye(shape[1], dtype=dtype)), there(q), kernel)
            assert torch.equal(here(y).T, wanted.to(dtype))


@by_row("matmul_t", CODES)
def test_a_one_hot_gradient_gives_back_a_row(fmt, kernel, poisoned):
    for shape in (ODD, (7, 1300)):
        q = qft.quantize(sample(shape), fmt)
        for dtype in taken(kernel):
            dx = kernels.matmul_t(there(torch.eye(shape[0], dtype=dtype)), there(q), kernel)
            assert torch.equal(here(dx), weight_of(q).to(dtype))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_random_levels_tell_every_code_apart(bits, poisoned):
    """Levels no formula predicts: a decoder that exchanged two codes would be off by far more than a rounding."""
    levels = torch.rand(2**bits).sub(0.5).sort().values
    fmt = f"[{' '.join(f'{level:.4f}' for level in levels)}] g32"
    q = qft.quantize(torch.randn(40, 160), fmt)
    assert torch.equal(q.unpack().unique(), torch.arange(2**bits, dtype=torch.uint8))
    assert_quantizes_as_the_reference(torch.randn(40, 160), Format.parse(fmt))
    for rows in (3, 40):
        CHECKS["matmul"](q, rows, torch.bfloat16, OWN)


@pytest.mark.parametrize("verb", ["matmul", "matmul_t"])
def test_no_rows_and_layouts(verb):
    q = qft.quantize(there(torch.randn(33, 100)), "nf4 g64")
    width, other = (100, 33) if verb == "matmul" else (33, 100)
    run = getattr(kernels, verb)
    for dtype in DTYPES:
        assert run(torch.empty(0, width, dtype=dtype, device=DEVICE), q).shape == (0, other)
        for rows in (3, 300):
            wide = there(torch.randn(width, rows).to(dtype))
            assert torch.equal(run(wide.T, q), run(wide.T.contiguous(), q))


@by_row("matmul", FEW)
def test_the_same_call_gives_the_same_bits(fmt, kernel, poisoned):
    """Shapes that split the sum over blocks included."""
    for shape in ((67, 1030), (64, 8192)):
        q = there(qft.quantize(torch.randn(shape), fmt))
        for rows, dtype in ((1, torch.bfloat16), (40, torch.float16)):
            x, dy = there(torch.randn(rows, shape[1]).to(dtype)), there(torch.randn(rows, shape[0]).to(dtype))
            first = kernels.matmul(x, q, kernel), kernels.matmul_t(dy, q), kernels.scale_grad(dy, x, q)
            for _ in range(5):
                again = kernels.matmul(x, q, kernel), kernels.matmul_t(dy, q), kernels.scale_grad(dy, x, q)
                assert all(map(torch.equal, first, again))


# ------------------------------------------------------------------------------------------------ scale gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["nf4 channel f32", "int4 channel f32", "int3 channel f32 zero", f"{ELEVEN} channel"])
def test_per_channel_gradients_need_only_the_output(fmt, dtype, poisoned, monkeypatch):
    """ds = sum over rows of dy y / s, and the direct sum in the rows where s is 0 and y says nothing."""
    monkeypatch.setattr(kernels, "scale_grad", None)  # the whole weight gradient
    for rows, shape in ((3, ODD), (700, ODD), (2048, (300, 64))):
        q = qft.quantize(sample(shape), fmt)
        q.weight_scales[::3] = 0
        dy, x = torch.randn(rows, shape[0]).to(dtype), torch.randn(rows, shape[1]).to(dtype)
        on_device = there(q)
        scales = on_device.weight_scales.requires_grad_()
        ops.matmul(there(x), on_device).backward(there(dy))
        exact = sum_groups((dy.double().T @ x.double()) * levels_of(q), q.format)
        terms = sum_groups((dy.double().T ** 2 @ x.double() ** 2) * levels_of(q) ** 2, q.format)
        # a sum whose terms cancel still carries their roundings
        assert (here(scales.grad).double() - exact).norm() <= BOUND[dtype] * max(exact.norm(), terms.sum().sqrt())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_a_product_are_summed_in_fp32(dtype, poisoned):
    q = there(qft.quantize(torch.randn(33, 100), "nf4 channel"))
    table = kernels._table_of(q.format, OWN)
    for rows, columns in ((1, 1), (7, 129), (5000, 33), (3, 70000)):
        a, b = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
        total = here(native.dot_columns(there(a), there(b), q, *table)).double()
        bound = torch.finfo(torch.float32).eps * rows**0.5 * 4
        assert error(total, (a.double() * b.double()).sum(0)) <= bound
        assert torch.equal(total, here(native.dot_columns(misaligned(a), misaligned(b), q, *table)).double())


# ------------------------------------------------------------------------------------------------ the table, errors


def test_the_tables_choice_on_a_gpu_and_why():
    def chosen(**problem):
        return {verb: choice.kernel.name for verb, choice in qft.explain("nf4 g64", 4096, 4096, **problem).items()}

    few = chosen(rows=1, dtype=torch.bfloat16, device=DEVICE)
    assert few == dict.fromkeys(("quantize", "dequantize", "matmul"), OWN) | dict.fromkeys(
        ("matmul_t", "scale_grad"), "panel"
    )
    assert chosen(rows=2048, dtype=torch.bfloat16, device=DEVICE)["matmul"] == "panel"
    single = qft.explain("nf4 g64", 4096, 4096, rows=1, dtype=torch.float32, device=DEVICE)["matmul"]
    assert single.kernel.name == "panel"
    assert dict(single.passed_over)[OWN] == "tensor cores multiply bfloat16 and float16, not float32"


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_format_takes_the_reference(fmt):
    for rows in (1, 512):
        for dtype in DTYPES:
            names = {
                c.kernel.name for c in qft.explain(fmt, 4096, 4096, rows=rows, dtype=dtype, device=DEVICE).values()
            }
            assert names <= set(BOTH)


def test_operands_on_another_device_are_refused():
    on_cpu = qft.quantize(torch.randn(33, 100), "nf4 g64")
    on_gpu, x, dy = there(on_cpu), torch.ones(3, 100), torch.ones(3, 33)
    calls = [
        (lambda: kernels.matmul(x, on_gpu), "x is on cpu, but the weight is on cuda:0"),
        (lambda: kernels.matmul(there(x), on_cpu), "x is on cuda:0, but the weight is on cpu"),
        (lambda: kernels.matmul_t(dy, on_gpu), "dy is on cpu, but the weight is on cuda:0"),
        (lambda: kernels.scale_grad(there(dy), x, on_gpu), "x is on cpu, but the weight is on cuda:0"),
        (lambda: kernels.matmul(x, on_cpu, OWN), "kernel 'cuda' cannot run matmul"),
    ]
    for call, sentence in calls:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call()


def test_what_cuda_refuses_names_verb_format_and_shape(monkeypatch):
    q, place = there(qft.quantize(torch.randn(33, 100), "nf4 g64")), native._place
    nowhere = native._native.Place(threads=0, device=torch.cuda.device_count(), stream=0)
    monkeypatch.setattr(native, "_place", lambda device: nowhere)
    with pytest.raises(OSError, match=r"dequantize of nf4 g64 f32 \(33, 100\) on cuda failed: .*invalid device"):
        q.dequantize()
    monkeypatch.setattr(native, "_place", place)
    assert torch.equal(here(q.dequantize()), here(q).dequantize())  # nothing is left of the error
    assert torch.ones(3, device=DEVICE).sum().item() == 3
