"""Every case as a call that is ready to be timed, once what it returns has been compared with the reference.

Where a path trains, x requires grad, so that all of them pay for autograd.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from cases import NEVER_GRAD, Case
from torch import Tensor

import qft
from qft import kernels, ops, reference
from qft.format import Format
from qft.speed import roofline, verbs
from qft.speed.check import SAMPLE, every, operand, product_error, relative_error, require, weight_like
from qft.speed.roofline import DTYPES, Work


class UnavailableError(OSError):
    """This machine or environment cannot run the case; the message says why."""


@dataclass(frozen=True)
class Contender:
    """A weight in someone's storage; rows and verb of the case play no part.

    Attributes:
        nbytes: stored.
        expected: fp32 `[out, in]`, what its products must show.
        forward: x `[rows, in]` -> y `[rows, out]`.
        quantize: makes the storage from the dense weight.
        dequantize: the storage `quantize` returns -> dense.
        scale_grad: x, dy -> a call for the gradient of the scales; of the weight, for a dense one.
    """

    nbytes: int
    expected: Tensor
    forward: Callable[[Tensor], Tensor]
    quantize: Callable[[], Any] | None = None
    dequantize: Callable[[Any], Tensor] | None = None
    scale_grad: Callable[[Tensor, Tensor], Callable[[], Tensor]] | None = None


@dataclass(frozen=True)
class Ready:
    """A checked call: its relative error, the weight's stored bytes, the least the work costs, qft's kernels."""

    call: Callable[[], Any]
    error: float
    nbytes: int
    work: Work
    kernel: str


@lru_cache(maxsize=2)
def dense(shape: tuple[int, int], dtype: str) -> Tensor:
    """The weight that every contender holds."""
    return weight_like(shape, DTYPES[dtype])


@lru_cache(maxsize=2)
def oracle(shape: tuple[int, int], dtype: str, fmt: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Codes, zero points and dequantized weight as the reference has them."""
    codes, scales, zeros = reference.quantize(dense(shape, dtype), Format.parse(fmt))
    return codes, zeros, reference.dequantize(codes, scales, zeros, Format.parse(fmt))


# ---- contenders


def _qft(case: Case) -> Contender:
    w, dtype = dense(case.shape, case.dtype), DTYPES[case.dtype]
    q = qft.quantize(w, case.fmt)
    trained = replace(q, weight_scales=q.weight_scales.clone().requires_grad_())

    def forward(x: Tensor) -> Tensor:
        return kernels.matmul(x, q, case.kernel) if case.kernel else ops.matmul(x, q)

    def scale_grad(x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
        y = ops.matmul(x, trained)
        return lambda: torch.autograd.grad(y, trained.weight_scales, dy, retain_graph=True)[0]

    return Contender(
        q.nbytes,
        oracle(case.shape, case.dtype, case.fmt)[2],
        forward,
        partial(qft.quantize, w, case.fmt),
        lambda stored, **into: stored.dequantize(dtype, **into),
        scale_grad,
    )


def _torch(case: Case) -> Contender:
    w = dense(case.shape, case.dtype)
    forward = partial(torch.nn.functional.linear, weight=w)
    return Contender(w.nbytes, w.float(), forward, scale_grad=lambda x, dy: lambda: dy.T @ x)


def _torch_int4(case: Case) -> Contender:
    """Asymmetric int4: w = (code - 8) * scale + zero per group of 64, scale and zero bf16 side by side."""
    grouped = dense(case.shape, case.dtype).float().unflatten(1, (-1, 64))
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    codes = ((grouped - zero) / scale + 8).round().clamp(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().flatten(1), 1)
    pairs = torch.cat([scale, zero], 2).transpose(0, 1).bfloat16().contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    expected = ((codes - 8) * scale + zero).flatten(1)
    return Contender(packed.nbytes + pairs.nbytes, expected, lambda x: multiply(x, packed, 64, pairs))


@lru_cache(maxsize=1)
def _bitsandbytes() -> ModuleType:
    # It says at import that an optional download is missing; its own kernel is what is timed here.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.addFilter(lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward"))
    try:
        import bitsandbytes
    except ImportError:
        raise UnavailableError("bitsandbytes is not installed; install it with: pip install bitsandbytes") from None
    return bitsandbytes


def _bnb(case: Case) -> Contender:
    bnb, w = _bitsandbytes(), dense(case.shape, case.dtype)

    def quantize() -> tuple[Tensor, Any]:
        return bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")

    packed, state = quantize()
    if case.who == "bitsandbytes eval":
        if not bnb.functional.has_avx512bf16():
            raise UnavailableError("bitsandbytes repacks weights for inference on CPUs with AVX-512 BF16 alone")
        packed, state = bnb.functional._convert_weight_packed_for_cpu(packed, state)
    return Contender(
        packed.nbytes + state.absmax.nbytes,
        oracle(case.shape, case.dtype, case.fmt)[2],
        lambda x: bnb.matmul_4bit(x, packed, quant_state=state),
        quantize,
        lambda stored: bnb.functional.dequantize_4bit(*stored),
    )


CONTENDERS = {
    "qft": _qft,
    "bitsandbytes": _bnb,
    "bitsandbytes eval": _bnb,
    "dense torch": _torch,
    "torch int4": _torch_int4,
}


@lru_cache(maxsize=4)
def _contender(weight: Case) -> Contender:
    return CONTENDERS[weight.who](weight)


# ---- verbs: the call, and the error of what it returns


def _operands(case: Case) -> tuple[Tensor, Tensor]:
    """x and dy."""
    (out, in_features), dtype = case.shape, DTYPES[case.dtype]
    return operand(case.rows, in_features, dtype, verbs.X), operand(case.rows, out, dtype, verbs.DY)


def _products(case: Case, contender: Contender) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    """matmul, matmul_t, or both as in training."""
    x, dy = _operands(case)
    x.requires_grad_(case.who not in NEVER_GRAD and not case.kernel)
    forward, weight = contender.forward, contender.expected

    def train() -> tuple[Tensor, Tensor]:
        y = forward(x)
        return y, torch.autograd.grad(y, x, dy)[0]

    if case.verb == "train":
        return train, lambda made: max(product_error(made[0], x, weight.T), product_error(made[1], dy, weight))
    if case.verb == "matmul":
        return lambda: forward(x), lambda y: product_error(y, x, weight.T)
    y = forward(x)
    return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)[0], lambda dx: product_error(dx, dy, weight)


def _scale_grad(case: Case, contender: Contender) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    x, dy = _operands(case)
    some = every(case.shape[0], SAMPLE[1])

    def error(made: Tensor) -> float:
        if case.who == "dense torch":
            return relative_error(made[some], dy[:, some].double().T @ x.double())
        codes, zeros, _ = oracle(case.shape, case.dtype, case.fmt)
        some_zeros = None if zeros is None else zeros[some]
        truth = reference.scale_grad(dy[:, some], x, codes[some], some_zeros, Format.parse(case.fmt))
        return relative_error(made[some], truth)

    return contender.scale_grad(x, dy), error


def _quantize(case: Case, contender: Contender) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    if case.search:
        return _searched(case)
    return contender.quantize, lambda stored: relative_error(contender.dequantize(stored), contender.expected)


def _searched(case: Case) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    """Compared on some rows: the reference tries one candidate after the other on all of the weight."""
    w, fmt = dense(case.shape, case.dtype), Format.parse(case.fmt)
    some = every(case.shape[0], SAMPLE[1])

    def error(made: qft.QuantTensor) -> float:
        truth = reference.dequantize(*reference.quantize(w[some], fmt, search=True), fmt)
        return relative_error(made.dequantize()[some], truth)

    return partial(qft.quantize, w, fmt, search=True), error


def _dequantize(case: Case, contender: Contender) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    stored, into = contender.quantize(), {}
    if case.into:
        into["out"] = torch.empty(case.shape, dtype=DTYPES[case.dtype])
    return lambda: contender.dequantize(stored, **into), lambda made: relative_error(made, contender.expected)


def work(case: Case, stored: int) -> Work:
    """The least that a case costs, of a weight of `stored` bytes."""
    verb = case.verb
    if case.search:
        candidates = len(reference.search_factors(Format.parse(case.fmt)))
        return roofline.search_work(case.shape, stored, candidates, case.dtype)
    if verb == "scale_grad" and case.who == "dense torch":
        verb = "weight_grad"
    elif by_rows(case):
        verb = "channel_scale_grad"
    return roofline.work(verb, case.shape, stored, case.rows, case.dtype)


def by_rows(case: Case) -> bool:
    """Whether the gradient of per-channel scales is the sum of dy y / s: autograd keeps y, and no kernel is needed."""
    return case.verb == "scale_grad" and case.fmt is not None and not Format.parse(case.fmt).group


def _kernel(case: Case) -> str:
    """The rows of qft's kernel table that serve; empty for peers."""
    if case.who != "qft":
        return ""
    task = verbs.Task(case.verb, case.rows)
    try:
        return verbs.kernels_of(task, Format.parse(case.fmt), DTYPES[case.dtype], case.kernel)
    except ValueError as reason:
        raise UnavailableError(str(reason)) from None


def prepare(case: Case) -> Ready:
    """Build a case, run it once and compare.

    Raises:
        UnavailableError: this machine cannot run it.
        ValueError: its result is wrong, so that its time would mean nothing.
    """
    kernel = _kernel(case)
    contender = _contender(replace(case, verb="", rows=0, search=False, into=False))
    make = {"scale_grad": _scale_grad, "quantize": _quantize, "dequantize": _dequantize}.get(case.verb, _products)
    call, error_of = make(case, contender)
    error = require(error_of(call()), case.dtype, f"{case.name}, {case.work}")
    return Ready(call, error, contender.nbytes, work(case, contender.nbytes), kernel)
