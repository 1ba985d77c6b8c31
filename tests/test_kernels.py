"""Every kernel against the reference bit for bit and against float64: the list of formats times the kernels' table."""

import logging
import re

import pytest
import torch
from formats import (
    BOUND,
    DTYPES,
    ELEVEN,
    FORMATS,
    FOUR,
    ODD,
    OWN,
    REAL,
    ROWS,
    SHAPES,
    TWO,
    cases,
    error,
    has_own_kernels,
    need,
    sample,
)

import qft
from qft import kernels, native, notices, reference
from qft.compiler.emit import CPU_FLAGS, built_codes, table_code
from qft.crossovers import rows_served
from qft.format import Format
from qft.kernels import TABLE, Problem, choose

FEW = tuple(
    Format.parse(t) for t in ("nf4 g64 dq", "nf3 channel f16", "int3 g32 f16 zero", "int8 g64", f"{ELEVEN} g64")
)
LAYERS = tuple(Format.parse(t) for t in ("nf4 g64 dq", "int3 g128 f16 zero", "nf2 g64 f16", f"{ELEVEN} g64"))
CODES = tuple(
    Format.parse(f"{code} g32")
    for code in ("nf4", "nf3", "nf2", "fp4", "int8", "int4", "int3", "int2", ELEVEN, FOUR, TWO)
)


def weight_of(q):
    """The exact weight, float64: fp32 level x scale, by the reference."""
    return reference.dequantize(q.unpack(), q.scales, q.zeros, q.format).double()


def levels_of(q):
    """float64 level of each weight, its zero point subtracted."""
    ones = torch.ones_like(q.scales)
    return reference.dequantize(q.unpack(), ones, q.zeros, q.format).double()


def sum_groups(values, fmt):
    """Sum of `[out, in]` over each group: `[out, groups]`."""
    return torch.stack([part.sum(1) for part in values.split(fmt.group or values.shape[1], dim=1)], 1)


def each_dtype_where_it_matters(shapes=SHAPES):
    """Every shape in fp32, one in the other dtypes."""
    return [(shape, torch.float32) for shape in shapes] + [(ODD, dtype) for dtype in DTYPES[1:]]


# ---------------------------------------------------------------------------------------- quantize and dequantize


def assert_quantizes_as_the_reference(weight, fmt, kernel):
    oracle, q = (
        qft.quantize(weight, fmt, kernel="reference").tensors(),
        qft.quantize(weight, fmt, kernel=kernel).tensors(),
    )
    assert q.keys() == oracle.keys()
    for name, tensor in oracle.items():
        assert torch.equal(q[name], tensor), f"{name} of {tuple(weight.shape)} {weight.dtype}"


@pytest.mark.parametrize(("fmt", "kernel"), cases("quantize"))
def test_quantize_is_the_reference_bit_for_bit(fmt, kernel):
    need(kernel)
    for shape, dtype in each_dtype_where_it_matters():
        assert_quantizes_as_the_reference(sample(shape, dtype), fmt, kernel)


@pytest.mark.parametrize(("fmt", "kernel"), cases("quantize", LAYERS, OWN))
def test_quantize_a_real_layer(fmt, kernel):
    need(kernel)
    assert_quantizes_as_the_reference(torch.randn(REAL, dtype=torch.bfloat16), fmt, kernel)


@pytest.mark.parametrize(("fmt", "kernel"), cases("quantize", FEW, OWN))
def test_quantize_at_the_edges_of_fp32(fmt, kernel):
    """Subnormal weights, ties between levels, values one step from a tie, a row of one value."""
    need(kernel)
    levels = torch.tensor(sorted(set(fmt.levels)))[:16]
    ties = (levels[1:] + levels[:-1]) / 2
    near = torch.cat([ties, ties.nextafter(levels[1:]), ties.nextafter(levels[:-1]), levels])
    rows = [near, -near, near * 3.7, near * 1e-6, near * 1e-36, near * 1e-38, near * 1e-42, torch.full_like(near, 0.3)]
    assert_quantizes_as_the_reference(torch.stack(rows), fmt, kernel)


@pytest.mark.parametrize(("fmt", "kernel"), cases("dequantize"))
def test_dequantize_is_exact(fmt, kernel, poisoned):
    need(kernel)
    for shape, dtype in each_dtype_where_it_matters():
        q = qft.quantize(sample(shape), fmt, kernel="reference")
        assert torch.equal(kernels.dequantize(q, dtype, kernel), weight_of(q).float().to(dtype))


@pytest.mark.parametrize(("fmt", "kernel"), cases("dequantize", FEW, OWN))
def test_dequantize_any_rectangle(fmt, kernel, poisoned):
    need(kernel)
    q = qft.quantize(sample((9, 700)), fmt)
    dense = kernels.dequantize(q, torch.float32, kernel)
    for rows in ((0, 9), (3, 4), (8, 9)):
        for columns in ((0, 700), (128, 256), (128, 700), (640, 700), (256, 257)):
            part = torch.empty(rows[1] - rows[0], columns[1] - columns[0])
            native.dequantize(q, part, rows, columns, *kernels._table_of(fmt, kernel))
            assert torch.equal(part, dense[slice(*rows), slice(*columns)])


# ------------------------------------------------------------------------------------------------------ products


def assert_product(out, left, right, dtype):
    """`out` is left x right, float64 `[rows, n]` and `[n, columns]`: within the design's bound, and entry by entry.

    An entry may be off by a rounding of each operand and of itself, and by a random walk of fp32 sums.
    """
    exact, spread = left @ right, left.abs() @ right.abs()
    roundings = 2 * torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps * left.shape[1] ** 0.5
    assert out.dtype == dtype
    assert error(out, exact) <= BOUND[dtype]
    assert ((out.double() - exact).abs() <= roundings * spread).all()


def check_matmul(q, rows, dtype, kernel):
    x = torch.randn(rows, q.shape[1]).to(dtype)
    assert_product(kernels.matmul(x, q, kernel), x.double(), weight_of(q).T, dtype)


def check_matmul_t(q, rows, dtype, kernel):
    dy = torch.randn(rows, q.shape[0]).to(dtype)
    assert_product(kernels.matmul_t(dy, q, kernel), dy.double(), weight_of(q), dtype)


def check_scale_grad(q, rows, dtype, kernel):
    dy, x = torch.randn(rows, q.shape[0]).to(dtype), torch.randn(rows, q.shape[1]).to(dtype)
    exact = sum_groups((dy.double().T @ x.double()) * levels_of(q), q.format)
    ds = kernels.scale_grad(dy, x, q, kernel)
    assert (ds.dtype, ds.shape) == (torch.float32, exact.shape)
    assert error(ds, exact) <= BOUND[dtype]


CHECKS = {"matmul": check_matmul, "matmul_t": check_matmul_t, "scale_grad": check_scale_grad}
PRODUCTS = [pytest.param(v, *c.values, id=f"{v}-{c.id}") for v in CHECKS for c in cases(v)]
LAYER_PRODUCTS = [
    pytest.param(v, *c.values, id=f"{v}-{c.id}") for v in CHECKS for c in cases(v, LAYERS, (*OWN, "panel"))
]


@pytest.mark.parametrize(("verb", "fmt", "kernel"), PRODUCTS)
def test_products_match_float64(verb, fmt, kernel, poisoned):
    need(kernel)
    q = qft.quantize(torch.randn(ODD), fmt)
    for rows in ROWS:
        for dtype in DTYPES:
            CHECKS[verb](q, rows, dtype, kernel)
    for shape in SHAPES:
        CHECKS[verb](qft.quantize(torch.randn(shape), fmt), 3, torch.float32, kernel)


@pytest.mark.parametrize(("verb", "fmt", "kernel"), LAYER_PRODUCTS)
def test_products_of_a_real_layer_match_float64(verb, fmt, kernel):
    need(kernel)
    q = qft.quantize(torch.randn(REAL) * 0.02, fmt)
    for rows, dtype in ((1, torch.float32), (7, torch.bfloat16), (129 if kernel == "panel" else 5, torch.float16)):
        CHECKS[verb](q, rows, dtype, kernel)


@pytest.mark.parametrize("kernel", CPU_FLAGS)
@pytest.mark.parametrize("text", ["nf4 g64 dq", "int3 g32 f16 zero", "nf2 g32", "int8 g64 zero"])
def test_products_at_the_edges_of_tiles_of_rows(text, kernel, poisoned):
    """Numbers of rows around those that kernels take at a time, odd numbers of outputs, columns that end in a block."""
    need(kernel)
    for shape in ((67, 300), (129, 31)):
        q = qft.quantize(sample(shape), text)
        for rows in (2, 3, 4, 5, 6, 8, 9, 15, 16, 17, 32, 33, 48, 49, 97):
            check_matmul(q, rows, torch.bfloat16, kernel)
            check_matmul_t(q, rows, torch.bfloat16, kernel)


@pytest.mark.parametrize("text", ["nf4 g64", "int4 g32 f16 zero"])
def test_rows_that_a_kernel_packs_in_several_times(text, poisoned):
    """More rows than a core's sums of them find room for, and rows too long for many of them."""
    need("avx512_bf16")
    for shape, rows in (((5, 100), 1100), ((3, 40000), 230), ((40000, 3), 230)):
        q = qft.quantize(sample(shape), text)
        check_matmul(q, rows, torch.bfloat16, "avx512_bf16")
        check_matmul_t(q, rows, torch.bfloat16, "avx512_bf16")


@pytest.mark.parametrize("verb", CHECKS)
@pytest.mark.parametrize("fmt", FEW, ids=str)
def test_many_small_panels_make_the_same_product(verb, fmt, poisoned, monkeypatch):
    monkeypatch.setitem(kernels.PANEL_BYTES, "cpu", 1 << 12)
    monkeypatch.setattr(kernels, "PANEL_OUTPUTS", 16)
    q = qft.quantize(sample((67, 1030)), fmt)
    assert len(kernels._panels(67, 4 * 1030, 16, "cpu")) > 4
    assert len(kernels._panels(1030, 4 * 67, native.BLOCK, "cpu")) > 4
    for dtype in DTYPES:
        CHECKS[verb](q, 33, dtype, "panel")


@pytest.mark.parametrize("verb", CHECKS)
def test_panels_multiply_in_the_dtype_that_torch_is_fast_in(verb, monkeypatch, poisoned):
    q = qft.quantize(sample((67, 300)), "nf4 g64")
    for best, dtypes in (
        ("avx2", (torch.bfloat16, torch.float16)),
        ("avx512", (torch.float16,)),
        ("scalar", (torch.float16,)),
    ):
        monkeypatch.setattr(kernels, "SLOW_PRODUCTS", kernels.slow_products(("scalar", best)))
        assert [dtype for dtype in DTYPES if kernels.product_dtype(dtype) != dtype] == list(dtypes)
        CHECKS[verb](q, 33, torch.bfloat16, "panel")


@pytest.mark.parametrize(("fmt", "kernel"), cases("matmul", CODES))
def test_the_identity_gives_back_the_weight(fmt, kernel, poisoned):
    need(kernel)
    for shape in (ODD, (7, 260)):
        q = qft.quantize(sample(shape), fmt)
        for dtype in DTYPES:
            y = kernels.matmul(torch.eye(shape[1], dtype=dtype), q, kernel)
            assert torch.equal(y.T, weight_of(q).to(dtype))


@pytest.mark.parametrize(("fmt", "kernel"), cases("matmul_t", CODES))
def test_a_one_hot_gradient_gives_back_a_row(fmt, kernel, poisoned):
    need(kernel)
    for shape in (ODD, (7, 1300)):
        q = qft.quantize(sample(shape), fmt)
        for dtype in DTYPES:
            dx = kernels.matmul_t(torch.eye(shape[0], dtype=dtype), q, kernel)
            assert torch.equal(dx, weight_of(q).to(dtype))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_random_levels_tell_every_code_apart(bits, poisoned):
    """Levels no formula predicts: a decoder that exchanged two codes would be off by far more than a rounding."""
    levels = torch.rand(2**bits).sub(0.5).sort().values
    q = qft.quantize(torch.randn(5, 160), f"[{' '.join(f'{level:.4f}' for level in levels)}] g32", kernel="generic")
    assert torch.equal(q.unpack().unique(), torch.arange(2**bits, dtype=torch.uint8))
    CHECKS["matmul"](q, 3, torch.float32, "generic")
    CHECKS["matmul_t"](q, 3, torch.float32, "generic")


@pytest.mark.parametrize("isa", CPU_FLAGS)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 16), (129, 63), (40, 64), (7, 100), (1000, 200)])
def test_dot_columns(isa, shape, poisoned):
    need(isa)
    q = qft.quantize(torch.randn(2, 32), "nf4 g32")
    for dtype in DTYPES:
        a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        total = native.dot_columns(a, b, q, table_code(q.format, isa), isa)
        assert total.dtype == torch.float32
        exact = (a.double() * b.double()).sum(0)
        # one rounding per row, of a partial sum no larger than the sum of magnitudes; they add up as a random walk
        bound = torch.finfo(torch.float32).eps * (1 + shape[0] ** 0.5) * (a.double() * b.double()).abs().sum(0)
        assert ((total - exact).abs() <= bound).all()


@pytest.mark.parametrize(("fmt", "kernel"), cases("dequantize", tuple(f for f in FORMATS if f.group == 0), OWN))
def test_zero_scale_grad_touches_zero_scales_alone(fmt, kernel, poisoned):
    need(kernel)
    for out, in_features in ((33, 100), (1, 1), (7, 129), (5, 256)):
        q = qft.quantize(sample((out, in_features)), fmt)
        q.weight_scales[::3] = 0
        for dtype in DTYPES:
            x, dy = torch.randn(9, in_features).to(dtype), torch.randn(9, out).to(dtype)
            ds = torch.full((out,), 7.0)
            native.zero_scale_grad(dy, x, q, ds, *kernels._table_of(q.format, kernel))
            exact = sum_groups((dy.double().T @ x.double()) * levels_of(q), q.format)[:, 0]
            zero = q.scales[:, 0] == 0
            assert error(ds[zero], exact[zero]) < BOUND[torch.float32]
            assert (ds[~zero] == 7).all()


@pytest.mark.parametrize("verb", ["matmul", "matmul_t"])
def test_no_rows_and_layouts(verb):
    q = qft.quantize(torch.randn(33, 100), "nf4 g64")
    width, other = (100, 33) if verb == "matmul" else (33, 100)
    run = getattr(kernels, verb)
    assert run(torch.empty(0, width), q).shape == (0, other)
    for rows in (3, 300):
        wide = torch.randn(width, rows)
        assert torch.equal(run(wide.T, q), run(wide.T.contiguous(), q))


def test_no_rows_leave_no_scale_gradient():
    for fmt in FEW:
        q = qft.quantize(torch.randn(33, 100), fmt)
        assert not kernels.scale_grad(torch.empty(0, 33), torch.empty(0, 100), q).any()


# ------------------------------------------------------------------------------------------------ scale gradients


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_scale_gradients_are_finite_differences(fmt):
    q = qft.quantize(torch.randn(5, 129), fmt)
    dy, x = torch.randn(4, 5), torch.randn(4, 129)
    ds = kernels.scale_grad(dy, x, q)
    levels, scales = levels_of(q), q.scales.double()

    def loss(scales):
        return float((dy.double() * (x.double() @ (levels * reference.per_weight(scales, fmt, 129)).T)).sum())

    for row, group in {(0, 0), (2, scales.shape[1] // 2), (4, scales.shape[1] - 1)}:
        step = torch.zeros_like(scales)
        step[row, group] = 1e-3
        assert float(ds[row, group]) == pytest.approx(
            (loss(scales + step) - loss(scales - step)) / 2e-3, rel=1e-4, abs=1e-4
        )


@pytest.mark.parametrize("text", ["nf4 channel", "nf3 channel", "int8 channel", "int4 channel zero", f"{FOUR} channel"])
def test_per_channel_gradients_need_only_the_output(text):
    """ds = sum over rows of dy * y / s: PEQA's gradient without a weight gradient."""
    q = qft.quantize(torch.randn(33, 100), text)
    dy, x = torch.randn(7, 33), torch.randn(7, 100)
    identity = (dy.double() * kernels.matmul(x, q).double()).sum(0)[:, None] / q.scales
    assert error(kernels.scale_grad(dy, x, q), identity) < 1e-5


# --------------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize(("fmt", "kernel"), cases("matmul", FEW))
def test_the_same_call_gives_the_same_bits(fmt, kernel, poisoned):
    need(kernel)
    q = qft.quantize(torch.randn(67, 1030), fmt)
    for rows, dtype in ((1, torch.float32), (5, torch.bfloat16)):
        x, dy = torch.randn(rows, 1030).to(dtype), torch.randn(rows, 67).to(dtype)
        assert torch.equal(kernels.matmul(x, q, kernel), kernels.matmul(x, q, kernel))
        assert torch.equal(kernels.matmul_t(dy, q, kernel), kernels.matmul_t(dy, q, kernel))


@pytest.mark.parametrize("kernel", OWN)
def test_a_row_of_x_does_not_depend_on_the_others(kernel):
    need(kernel)
    q = qft.quantize(torch.randn(33, 300), f"{ELEVEN} g64" if kernel == "generic" else "nf4 g64")
    x, dy = torch.randn(9, 300), torch.randn(9, 33)
    y, dx = kernels.matmul(x, q, kernel), kernels.matmul_t(dy, q, kernel)
    for row in (0, 3, 8):
        assert torch.equal(kernels.matmul(x[row : row + 1], q, kernel)[0], y[row])
        assert torch.equal(kernels.matmul_t(dy[row : row + 1], q, kernel)[0], dx[row])


# --------------------------------------------------------------------------------------------------- the table


def test_explain_says_why_each_row_before_was_passed_over():
    for fmt in FORMATS:
        for choice in qft.explain(fmt, 4096, 4096, rows=512).values():
            names = [row.name for row in TABLE]
            assert all(names.index(name) < names.index(choice.kernel.name) for name, _ in choice.passed_over)
            assert all(len(reason) > 10 for _, reason in choice.passed_over)


def test_a_device_without_kernels_takes_the_reference_and_says_so():
    choice = choose(Problem("matmul", Format.parse("nf4 g64"), "xpu", torch.float32, 1))
    assert choice.kernel.name == "reference"
    reasons = [reason for name, reason in choice.passed_over if name != "generic" and name in native.instruction_sets()]
    assert reasons == ["the weight is on xpu, this kernel runs on the CPU"] * len(reasons)


def test_a_slow_path_is_said_once(caplog):
    notices.say_once.cache_clear()
    q = qft.quantize(torch.randn(33, 100), "nf4 g64")
    with caplog.at_level(logging.WARNING, "qft"):
        for _ in range(3):
            kernels.matmul(torch.randn(2, 100, dtype=torch.float64), q)
    assert caplog.messages == [
        "matmul of nf4 g64 f32 on cpu in torch.float64 uses the reference: no compiled kernel takes it"
    ]


def test_a_fast_path_says_nothing(caplog):
    notices.say_once.cache_clear()
    with caplog.at_level(logging.DEBUG, "qft"):
        for fmt in FORMATS:
            q = qft.quantize(torch.randn(33, 100), fmt)
            for rows in (1, 300):
                for dtype in DTYPES:
                    kernels.matmul(torch.randn(rows, 100).to(dtype), q)
                    kernels.matmul_t(torch.randn(rows, 33).to(dtype), q)
                    kernels.scale_grad(torch.randn(rows, 33).to(dtype), torch.randn(rows, 100).to(dtype), q)
    assert caplog.messages == []


def test_float64_is_served():
    q = qft.quantize(torch.randn(33, 100), "int4 g64 zero")
    x, dy = torch.randn(7, 100, dtype=torch.float64), torch.randn(7, 33, dtype=torch.float64)
    assert error(kernels.matmul(x, q), x @ weight_of(q).T) < 1e-12
    assert error(kernels.matmul_t(dy, q), dy @ weight_of(q)) < 1e-12


@pytest.mark.parametrize(
    ("verb", "name", "sentence"),
    [
        ("matmul", "avx1024", "there is no kernel 'avx1024' for matmul; use one of "),
        ("quantize", "panel", "there is no kernel 'panel' for quantize; use one of "),
        ("matmul", "generic", "kernel 'generic' cannot run matmul for nf4 g64 f32: nf4 has kernels of its own"),
    ],
)
def test_a_kernel_that_cannot_is_refused_by_name(verb, name, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        choose(Problem(verb, Format.parse("nf4 g64"), "cpu", torch.float32, 1), name)


OPERANDS = {
    "width": (
        lambda rows: torch.ones(rows, 99),
        ValueError,
        "99), expected (rows, 100) for a weight of shape (100, 100)",
    ),
    "rank": (lambda rows: torch.ones(100), ValueError, "has shape (100,), expected (rows, 100)"),
    "integers": (
        lambda rows: torch.ones(rows, 100, dtype=torch.int32),
        TypeError,
        "is torch.int32; kernels take floating tensors",
    ),
    "device": (
        lambda rows: torch.ones(rows, 100, device="meta"),
        ValueError,
        "is on meta, but the weight is on cpu; move one",
    ),
}


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize(("make", "kind", "sentence"), OPERANDS.values(), ids=OPERANDS)
def test_an_operand_that_does_not_fit_is_refused_in_a_sentence(make, kind, sentence, rows):
    q, good, bad = qft.quantize(torch.randn(100, 100), "nf4 g64"), torch.ones(rows, 100), make(rows)
    calls = [
        ("x", lambda: kernels.matmul(bad, q)),
        ("dy", lambda: kernels.matmul_t(bad, q)),
        ("x", lambda: kernels.scale_grad(good, bad, q)),
        ("dy", lambda: kernels.scale_grad(bad, good, q)),
    ]
    for name, call in calls:
        with pytest.raises(kind, match=f"^{name} .*{re.escape(sentence)}"):
            call()


def test_a_gradient_that_does_not_match_its_input_is_refused():
    q = qft.quantize(torch.randn(33, 100), "nf4 g64")
    for dy in (torch.ones(4, 33), torch.ones(3, 33).bfloat16()):
        with pytest.raises(ValueError, match="they must be the same"):
            kernels.scale_grad(dy, torch.ones(3, 100), q)


def test_named_codes_need_no_compiling():
    for fmt in FORMATS:
        if has_own_kernels(fmt):
            assert qft.compile(fmt) == list(native.instruction_sets())


# -------------------------------------------------------------------------------------------------- the GPU's rows


@pytest.fixture
def pretend_gpu(monkeypatch):
    """As if torch saw one GPU of a compute capability, and qft had been built for some targets."""

    def install(capability=(9, 0), targets=("sm_80", "sm_90a", "compute_80")):
        codes = built_codes("cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(native, "cuda_targets", lambda: dict.fromkeys(codes, targets) if targets else {})
        kernels._compile_at_first_need.cache_clear()

    return install


def chosen(verb, dtype=torch.bfloat16, rows=1, fmt="nf4 g64"):
    return choose(Problem(verb, Format.parse(fmt), "cuda:0", dtype, rows)).kernel.name


@pytest.mark.parametrize("fmt", ["nf4 g64 dq", "int3 g128 f16 zero", f"{ELEVEN} g64"])
def test_a_gpu_takes_few_rows_by_its_own_kernel_and_many_by_panels(fmt, pretend_gpu):
    pretend_gpu()
    for dtype in (torch.bfloat16, torch.float16):
        limit = limit_on_gpu(dtype)
        assert chosen("matmul", dtype, 1, fmt) == chosen("matmul", dtype, limit, fmt) == "cuda"
        assert chosen("matmul", dtype, limit + 1, fmt) == "panel"
    assert chosen("matmul", torch.float32, 1, fmt) == "panel"
    for dtype in DTYPES:
        assert chosen("quantize", dtype, 0, fmt) == chosen("dequantize", dtype, 0, fmt) == "cuda"
        assert chosen("matmul_t", dtype, 1, fmt) == chosen("scale_grad", dtype, 1, fmt) == "panel"
    assert chosen("matmul", torch.float64, 1, fmt) == "reference"


def test_explain_says_what_the_gpu_takes_and_why(pretend_gpu):
    pretend_gpu()
    few, many = (qft.explain("nf4 g64", 4096, 4096, rows=rows, device="cuda")["matmul"] for rows in (1, 512))
    assert (few.kernel.name, few.passed_over) == ("cuda", ())
    assert "tensor cores" in few.kernel.about
    assert dict(many.passed_over)["cuda"] == f"512 rows: it is the fastest for 1 to {limit_on_gpu()}"
    single = qft.explain("nf4 g64", 4096, 4096, dtype=torch.float32, device="cuda")["matmul"]
    assert dict(single.passed_over)["cuda"] == "tensor cores multiply bfloat16 and float16, not float32"


def limit_on_gpu(dtype=torch.bfloat16):
    return rows_served("cuda", "matmul", str(dtype).removeprefix("torch."), ("cuda",))[1]


SERVED = {
    "its own machine code": ((9, 0), ("sm_90a",), True),
    "a later minor version": ((8, 9), ("sm_80",), True),
    "an earlier minor version": ((8, 0), ("sm_86",), False),
    "another major version": ((9, 0), ("sm_80",), False),
    "PTX of an older GPU": ((12, 0), ("sm_90a", "compute_80"), True),
    "PTX of a newer GPU": ((8, 6), ("compute_90",), False),
    "machine code with an a is for one GPU": ((9, 1), ("sm_90a",), False),
    "nothing": ((9, 0), (), False),
}


@pytest.mark.parametrize(("capability", "targets", "served"), SERVED.values(), ids=SERVED)
def test_kernels_are_chosen_for_exact_gpus(capability, targets, served, pretend_gpu, monkeypatch):
    pretend_gpu(capability, targets)
    monkeypatch.setenv("PATH", "")  # no nvcc that could build what is missing
    assert native.serves("levels4", capability) == served
    assert (chosen("matmul") == "cuda") == served


def test_a_gpu_without_kernels_is_named_and_the_way_out_too(pretend_gpu, monkeypatch, caplog):
    pretend_gpu((9, 0), ("sm_80",))
    monkeypatch.setenv("PATH", "")
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "qft"):
        reason = dict(choose(Problem("matmul", Format.parse("nf4 g64"), "cuda:1", torch.bfloat16, 1)).passed_over)
    assert reason["cuda"] == (
        "cuda:1 has compute capability 9.0, qft was built for sm_80; install it again where nvcc is on the PATH"
    )
    assert caplog.messages[0].startswith("nf4 runs on the reference, which is slower: no CUDA compiler is on the path")
    pretend_gpu((7, 5))
    reason = dict(choose(Problem("matmul", Format.parse("nf4 g64"), "cuda:0", torch.bfloat16, 1)).passed_over)
    assert reason["cuda"] == "cuda:0 has compute capability 7.5, the kernels need 8.0"


def test_for_a_gpu_it_was_not_built_for_nvcc_builds_the_kernels(pretend_gpu, monkeypatch):
    pretend_gpu((8, 9), ())
    made, loaded = [], []
    monkeypatch.setattr(kernels, "build", lambda codes, name: made.append((codes, name)) or ["library"])
    targets = {}
    monkeypatch.setattr(native, "cuda_targets", lambda: targets)
    monkeypatch.setattr(native, "load", lambda path, target: loaded.append(path) or targets.update(levels4=(target,)))
    assert chosen("matmul") == chosen("matmul", rows=2) == "cuda"
    assert (made, loaded) == ([({"cuda": "levels4"}, "89")], ["library"])


@pytest.mark.usefixtures("needs_compiler")
def test_a_cpus_first_need_builds_nothing_for_the_gpu_beside_it(pretend_gpu, monkeypatch, caplog):
    pretend_gpu((9, 0), ())
    asked = []
    monkeypatch.setattr(kernels, "build", lambda codes, *name: asked.append(codes) or [])
    fmt = Format.parse("[-1 -0.61 -0.33 0.009 0.28 0.61 1] g64")
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "qft"):
        choose(Problem("matmul", fmt, "cpu", torch.float32, 1))
    assert asked == [dict.fromkeys(native.instruction_sets(), fmt.code)]
    assert caplog.messages == []


def test_compiling_leaves_out_a_gpu_that_is_too_old(pretend_gpu, monkeypatch):
    pretend_gpu((7, 5), ())
    monkeypatch.setenv("PATH", "")
    assert qft.compile("nf4 g64") == list(native.instruction_sets())


def test_cuda_kernels_refuse_tensors_of_the_cpu():
    if ("levels4", "cuda") not in native.tables():
        pytest.skip("qft was built without nvcc")
    q, x = qft.quantize(torch.randn(4, 64), "nf4 g64"), torch.randn(1, 64)
    with pytest.raises(ValueError, match=re.escape("weight is on cpu, but this kernel runs on cuda; move it with")):
        native.dequantize(q, torch.empty(4, 64), (0, 4), (0, 64), "levels4", "cuda")
    with pytest.raises(ValueError, match=re.escape("x is on meta, but this kernel runs on cpu")):
        native.matmul(x.to("meta"), q, "nf4", "scalar")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_a_refusal_of_cuda_names_verb_format_and_shape():
    if ("levels4", "cuda") not in native.tables():
        pytest.skip("qft was built without nvcc")
    with pytest.raises(OSError, match=r"dequantize of nf4 g64 f32 \(4, 64\) on cuda failed: cuda\w+: "):
        native._run("dequantize", ("levels4", "cuda"), Format.parse("nf4 g64"), (4, 64), **a_rectangle())


def a_rectangle():
    q, out = qft.quantize(torch.randn(4, 64), "nf4 g64"), torch.empty(4, 64)
    return {
        "weight": native._weight(q, torch.device("cpu")),
        "row0": 0,
        "row1": 4,
        "col0": 0,
        "col1": 64,
        "out": out.data_ptr(),
        "stride": 64,
        "dtype": native.DTYPES[out.dtype],
        "place": native._native.Place(threads=0, device=0, stream=0),
    }
