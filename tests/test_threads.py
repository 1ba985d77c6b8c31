"""The same bits for any number of threads, one budget with torch's, and calls from many Python threads at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from formats import ELEVEN, OWN, need

import qft
from qft import kernels, native
from qft.format import Format

TEXTS = ("nf4 g64 dq", "int3 g32 f16 zero", "int8 channel")
OWN_CASES = [(text, kernel) for text in TEXTS for kernel in OWN if kernel != "generic"] + [(f"{ELEVEN} g64", "generic")]


def every_verb(fmt: Format, kernel: str) -> list[torch.Tensor]:
    """Outputs of the five verbs, of qft's own kernels alone; inputs depend on nothing but the seed."""
    torch.manual_seed(0)
    weight = torch.randn(67, 1030)
    q = qft.quantize(weight, fmt, kernel=kernel)
    outputs = [*q.tensors().values()]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, dy, dw = torch.randn(5, 1030).to(dtype), torch.randn(5, 67).to(dtype), torch.randn(67, 1030).to(dtype)
        ds = torch.full((67, fmt.groups(1030)), float("nan"))
        native.scale_grad(dw, q, (0, 67), ds, *kernels._table_of(fmt, kernel))
        outputs += [
            kernels.dequantize(q, dtype, kernel),
            kernels.matmul(x, q, kernel),
            kernels.matmul_t(dy, q, kernel),
            ds,
        ]
    return outputs


@pytest.mark.parametrize(("text", "kernel"), OWN_CASES)
def test_the_number_of_threads_changes_no_bit(text, kernel, threads):
    need(kernel)
    threads(1)
    alone = every_verb(Format.parse(text), kernel)
    for count in (2, 3, 4):
        threads(count)
        for expected, output in zip(alone, every_verb(Format.parse(text), kernel), strict=True):
            assert torch.equal(output, expected)
            assert not output.isnan().any()


def test_panel_products_repeat_at_the_same_number_of_threads(threads):
    q = qft.quantize(torch.randn(200, 1030), "nf4 g64")
    x, dy = torch.randn(150, 1030), torch.randn(150, 200)
    for count in (1, 2, 4):
        threads(count)
        for call in (
            lambda: kernels.matmul(x, q, "panel"),
            lambda: kernels.matmul_t(dy, q, "panel"),
            lambda: kernels.scale_grad(dy, x, q, "panel"),
        ):
            assert torch.equal(call(), call())


def test_the_budget_is_torchs(threads):
    for count in (1, 3):
        threads(count)
        assert native.threads() == count


@pytest.mark.parametrize("text", [*TEXTS, f"{ELEVEN} g64"])
def test_calls_from_many_python_threads(text):
    q = qft.quantize(torch.randn(100, 1030), text)
    inputs = [(torch.randn(5, 1030), torch.randn(5, 100)) for _ in range(8)]

    def work(pair: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        x, dy = pair
        return [
            kernels.matmul(x, q),
            kernels.matmul_t(dy, q),
            q.dequantize(),
            *qft.quantize(x, text).tensors().values(),
        ]

    expected = [work(pair) for pair in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for one, other in zip(pool.map(work, inputs), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
