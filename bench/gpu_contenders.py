"""Every case of `gpu_cases.py` as calls that are ready to be timed on a GPU, compared with the reference first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from cases import Case
from contenders import UnavailableError, by_rows, work
from gpu_cases import BNB, BNB_DEQUANTIZE, DENSE, GEMLITE, PERMUTES
from torch import Tensor

import qft
from qft import kernels, native, reference
from qft.format import Format
from qft.speed.check import TOLERANCE, every, product_error, relative_error
from qft.tensor import QuantTensor

BF16 = torch.bfloat16


def dense(shape: tuple[int, int], device: str) -> Tensor:
    """A weight as training leaves it: normal, standard deviation 0.02."""
    torch.manual_seed(0)
    return torch.empty(shape, dtype=BF16, device=device).normal_(0, 0.02)


@lru_cache(maxsize=4)
def packed(shape: tuple[int, int], fmt: str, device: str) -> tuple[QuantTensor, Tensor]:
    """A weight in qft's storage, and in fp32 as the reference decodes it."""
    q = qft.quantize(dense(shape, device), fmt)
    return q, reference.dequantize(q.unpack(), q.scales, q.zeros, q.format)


def clone(q: QuantTensor) -> QuantTensor:
    return replace(q, **{name: tensor.clone() for name, tensor in q.tensors().items()})


@dataclass(frozen=True)
class Ready:
    """A checked case.

    Attributes:
        calls: one for each copy of weight and inputs.
        error: relative, of what the first returns.
        nbytes: stored, of one weight.
        kernel: the row of qft's kernel table that serves; empty for peers.
    """

    calls: list[Callable[[], Any]]
    error: float
    nbytes: int
    kernel: str = ""


Verb = Callable[[Any, Tensor, Tensor], Any]  # (a copy of the weight, x [rows, in], dy [rows, out]) -> the result


@dataclass(frozen=True)
class Contender:
    """A weight in someone's storage, and what they do with it."""

    nbytes: int
    copy: Callable[[], Any]
    verbs: dict[str, Verb]


def _dense(case: Case, device: str) -> Contender:
    weight = dense(case.shape, device)
    verbs: dict[str, Verb] = {
        "matmul": lambda w, x, dy: torch.mm(x, w.T),
        "matmul_t": lambda w, x, dy: torch.mm(dy, w),
        "scale_grad": lambda w, x, dy: torch.mm(dy.T, x),  # of the whole weight
    }
    return Contender(weight.nbytes, weight.clone, verbs)


def _qft(case: Case, device: str) -> Contender:
    q, _ = packed(case.shape, case.fmt, device)
    if case.kernel == PERMUTES:
        table = kernels._table_of(q.format, "cuda")
        return Contender(q.nbytes, partial(clone, q), {"matmul": lambda q, x, dy: native.matmul(x, q, *table, 0)})
    verbs: dict[str, Verb] = {
        "matmul": lambda q, x, dy: kernels.matmul(x, q, case.kernel),
        "matmul_t": lambda q, x, dy: kernels.matmul_t(dy, q, case.kernel),
        "scale_grad": lambda q, x, dy: kernels.scale_grad(dy, x, q, case.kernel),
        "dequantize": lambda q, x, dy: kernels.dequantize(q, BF16, case.kernel),
    }
    return Contender(q.nbytes, partial(clone, q), verbs)


def _bitsandbytes(case: Case, device: str) -> Contender:
    try:
        from bitsandbytes import functional, matmul_4bit
    except Exception as error:  # a build for another CUDA fails in its own ways
        raise UnavailableError(f"bitsandbytes did not load: {error}") from None
    nested = case.fmt.endswith("dq")
    quantize = partial(functional.quantize_4bit, blocksize=64, quant_type="nf4", compress_statistics=nested)
    stored, state = quantize(dense(case.shape, device))
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if nested else 0)
    fused: Verb = lambda w, x, dy: matmul_4bit(x, w, quant_state=state)  # noqa: E731
    split: Verb = lambda w, x, dy: torch.mm(x, functional.dequantize_4bit(w, state).T)  # noqa: E731
    verbs: dict[str, Verb] = {
        "matmul": split if case.who == BNB_DEQUANTIZE else fused,
        "matmul_t": lambda w, x, dy: torch.mm(dy, functional.dequantize_4bit(w, state)),  # as MatMul4Bit's backward
        "quantize": lambda w, x, dy: quantize(w),
        "dequantize": lambda w, x, dy: functional.dequantize_4bit(w, state),
    }
    return Contender(stored.nbytes + scales, stored.clone, verbs)


def _gemlite(case: Case, device: str) -> Contender:
    try:
        from gemlite.core import TORCH_TO_DTYPE, GemLiteLinearTriton
    except Exception as error:  # Triton's too
        raise UnavailableError(f"gemlite did not load: {error}") from None
    (q, _), fmt, bf16 = packed(case.shape, case.fmt, device), Format.parse(case.fmt), TORCH_TO_DTYPE[BF16]

    def layer() -> Any:
        linear = GemLiteLinearTriton(
            W_nbits=fmt.bits,
            group_size=fmt.group,
            in_features=case.shape[1],
            out_features=case.shape[0],
            input_dtype=bf16,
            output_dtype=bf16,
        )
        scales = q.scales.bfloat16().reshape(-1, 1)
        linear.pack(q.unpack(), scales, torch.full_like(scales, -fmt.levels[0]), None)
        return linear

    weights = case.shape[0] * case.shape[1]
    verbs: dict[str, Verb] = {"matmul": lambda linear, x, dy: linear(x)}
    return Contender(weights * fmt.bits // 8 + weights // fmt.group * 4, layer, verbs)


CONTENDERS = {"qft": _qft, DENSE: _dense, BNB: _bitsandbytes, BNB_DEQUANTIZE: _bitsandbytes, GEMLITE: _gemlite}


# ---- a case, ready and checked


def prepare(case: Case, rotation: Callable[[int], int], device: str = "cuda") -> Ready:
    """Build a case, run it once and compare.

    Args:
        rotation: how many copies of so many bytes read are used in turn.

    Raises:
        UnavailableError: it cannot run here.
        ValueError: its result is wrong, so that its time would mean nothing.
    """
    kernel = _kernel(case, device)
    if case.verb == "quantize":
        ready = _quantize(case, kernel, rotation, device)
    else:
        contender = CONTENDERS[case.who](case, device)
        ready = _rotating(case, contender, kernel, rotation(work(case, contender.nbytes).read), device)
    if not ready.error <= TOLERANCE["bf16"]:
        raise ValueError(f"the relative error {ready.error:.2g} exceeds {TOLERANCE['bf16']:g}; not timed")
    return ready


def _rotating(case: Case, contender: Contender, kernel: str, sets: int, device: str) -> Ready:
    out, in_features = case.shape
    verb = contender.verbs[case.verb]
    if by_rows(case):
        return _channel_gradient(case, sets, device)
    calls = []
    for _ in range(sets):
        x, dy = (torch.randn(case.rows, width, device=device).to(BF16) for width in (in_features, out))
        calls.append((partial(verb, contender.copy(), x, dy), x, dy))
    call, x, dy = calls[0]
    error = _error(case, call(), x, dy, device)
    return Ready([call for call, _, _ in calls], error, contender.nbytes, kernel)


def _channel_gradient(case: Case, sets: int, device: str) -> Ready:
    """PEQA per channel: from y, which autograd keeps."""
    q, weight = packed(case.shape, case.fmt, device)
    calls = []
    for _ in range(sets):
        x, dy = (torch.randn(case.rows, width, device=device).to(BF16) for width in reversed(case.shape))
        calls.append(partial(kernels.channel_scale_grad, dy, x, kernels.matmul(x, q), q))
    exact = (dy.double() * (x.double() @ weight.double().T)).sum(0) / q.scales[:, 0].double()
    return Ready(calls, relative_error(calls[-1]()[:, 0], exact), q.nbytes, "sum of dy y / s")


def _error(case: Case, made: Any, x: Tensor, dy: Tensor, device: str) -> float:
    """Relative, of a sample of the result, against float64."""
    if case.who == DENSE and case.verb == "scale_grad":
        some = every(case.shape[0], 585)
        return relative_error(made[some], dy[:, some].double().T @ x.double())
    if case.who == DENSE:
        weight = dense(case.shape, device).float()
    else:
        q, weight = packed(case.shape, case.fmt, device)
    if case.verb == "matmul":
        return product_error(made, x, weight.T)
    if case.verb == "matmul_t":
        return product_error(made, dy, weight)
    if case.verb == "dequantize":
        return relative_error(made, weight)
    some = every(case.shape[0], 585)
    zeros = None if q.zeros is None else q.zeros[some]
    return relative_error(made[some], reference.scale_grad(dy[:, some], x, q.unpack()[some], zeros, q.format))


def _kernel(case: Case, device: str) -> str:
    if case.who != "qft":
        return ""
    problem = kernels.Problem(case.verb, Format.parse(case.fmt), device, BF16, case.rows)
    try:
        return kernels.choose(problem, "cuda" if case.kernel == PERMUTES else case.kernel).kernel.name
    except ValueError as reason:
        raise UnavailableError(str(reason)) from None


def _quantize(case: Case, kernel: str, rotation: Callable[[int], int], device: str) -> Ready:
    """The launch alone, outputs at hand: `qft.quantize` then waits to hear whether all weights were finite, which no
    graph can hold; under dq, scales end in fp32."""
    weight = dense(case.shape, device)
    copies = [weight.clone() for _ in range(rotation(weight.nbytes))]
    if case.who != "qft":
        contender = CONTENDERS[case.who](case, device)
        made = contender.verbs["dequantize"](contender.verbs["quantize"](weight, weight, weight)[0], weight, weight)
        error = relative_error(made, packed(case.shape, case.fmt, device)[1])
        return Ready([partial(contender.verbs["quantize"], w, w, w) for w in copies], error, contender.nbytes)
    fmt = Format.parse(case.fmt)
    table = kernels._table_of(fmt, kernel)
    codes, scales, zeros, _ = native.quantize(weight, fmt, *table)
    bad = torch.empty(1, dtype=torch.int64, device=device)
    out, in_features = case.shape

    def launch(w: Tensor) -> None:
        native.tables()[table].quantize(
            weight=w.data_ptr(),
            out=out,
            in_=in_features,
            row_bytes=codes.shape[1],
            group=fmt.group_size(in_features),
            groups=scales.shape[1],
            dtype=native.DTYPES[BF16],
            zero=fmt.zero,
            scale_kind=native.SCALES[fmt.scale],
            zero_kind=native.ZEROS[fmt.scale],
            levels=native._levels(fmt).data_ptr(),
            count=min(len(fmt.levels), 16),
            factors=0,
            factor_count=0,
            importance=0,
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            zeros=0 if zeros is None else zeros.data_ptr(),
            bad=bad.data_ptr(),
            place=native._place(codes.device),
        )

    codes.fill_(0xA5)
    launch(weight)
    some = every(out, 585)
    wanted = reference.dequantize(*reference.quantize(weight[some].cpu(), fmt), fmt)
    some_zeros = None if zeros is None else zeros[some].cpu()
    unpacked = reference.unpack(codes[some].cpu(), fmt, in_features)
    error = relative_error(reference.dequantize(unpacked, scales[some].cpu(), some_zeros, fmt), wanted)
    stored = sum(tensor.nbytes for tensor in (codes, scales, zeros) if tensor is not None)
    return Ready([partial(launch, w) for w in copies], error, stored, kernel)
