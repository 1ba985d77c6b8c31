"""Every verb on one layer as a checked call, and dense torch's call for the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import kernels, ops, reference
from ..format import Format
from ..tensor import QuantTensor, quantize
from . import check, roofline
from .clock import Call
from .roofline import Work

FEW_ROWS = 16  # up to here a product is timed alone, as tokens are generated; above, as a batch trains
X, DY = 1, 2  # seeds


@dataclass(frozen=True)
class Task:
    """What is asked of a layer: a verb of `roofline.work`, and the rows of x; 0 for verbs without."""

    verb: str
    rows: int = 0

    @property
    def name(self) -> str:
        """As a table says it."""
        verb = "fwd + dx" if self.verb == "train" else self.verb
        return f"{verb} M={self.rows}" if self.rows else verb


@dataclass(frozen=True)
class Checked:
    """A call whose result was compared with the reference: its relative error, the least it costs, its kernels."""

    task: Task
    fmt: str
    call: Call
    error: float
    work: Work
    kernel: str


def tasks(rows: Sequence[int]) -> Iterator[Task]:
    """Products of few rows; forward and dx, and the gradient of the scales, of many; quantize and dequantize."""
    for count in rows:
        yield from [Task("matmul", count)] if count <= FEW_ROWS else [Task("train", count), Task("scale_grad", count)]
    yield from (Task("quantize"), Task("dequantize"))


def dense_call(task: Task, w: Tensor) -> Call | None:
    """Dense torch at the same task, the gradient of the whole weight for that of scales; None where it has none."""
    out, in_features = w.shape
    x, dy = (check.operand(task.rows, n, w.dtype, seed) for n, seed in ((in_features, X), (out, DY)))
    calls: dict[str, Call] = {
        "matmul": lambda: linear(x.requires_grad_(), w),
        "train": lambda: _train(lambda x: linear(x, w), x.requires_grad_(), dy),
        "scale_grad": lambda: dy.T @ x,
    }
    return calls.get(task.verb)


def checked(tasks: Sequence[Task], w: Tensor, fmt: Format, dtype: str) -> list[Checked]:
    """The tasks on one dense weight in one format, each run once and compared with the reference in float64.

    Args:
        w: `[out, in]` on the CPU.
        dtype: of w: bf16 or f32.

    Raises:
        ValueError: a result is wrong.
    """
    q = quantize(w, fmt)
    truth = _dense(q)
    shape = (w.shape[0], w.shape[1])
    made = []
    for task in tasks:
        call, error_of = _CALLS[task.verb](task, w, q, truth)
        error = check.require(error_of(call()), dtype, f"{task.name} of {fmt} at {shape[0]} x {shape[1]}")
        verb = "channel_scale_grad" if task.verb == "scale_grad" and not fmt.group else task.verb
        least = roofline.work(verb, shape, q.nbytes, task.rows, dtype)
        made.append(Checked(task, str(fmt), call, error, least, kernels_of(task, fmt, w.dtype)))
    return made


def kernels_of(task: Task, fmt: Format, dtype: torch.dtype, name: str | None = None) -> str:
    """The rows of the kernel table that serve a task on the CPU, or the one named.

    Raises:
        ValueError: `name` is no row of the table, or that row cannot run the task here.
    """
    if task.verb == "scale_grad" and not fmt.group:
        return "sum of dy y / s"
    verbs = ("matmul", "matmul_t") if task.verb == "train" else (task.verb,)
    chosen = (kernels.choose(kernels.Problem(verb, fmt, "cpu", dtype, task.rows), name) for verb in verbs)
    return "+".join(dict.fromkeys(choice.kernel.name for choice in chosen))


Made = tuple[Call, Callable[..., float]]  # the call, and the error of what it returns


def _matmul(task: Task, w: Tensor, q: QuantTensor, truth: Tensor) -> Made:
    x = check.operand(task.rows, q.shape[1], w.dtype, X).requires_grad_()
    return lambda: ops.matmul(x, q), lambda y: check.product_error(y, x, truth.T)


def _train(forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    y = forward(x)
    return y, torch.autograd.grad(y, x, dy)[0]


def _forward_and_dx(task: Task, w: Tensor, q: QuantTensor, truth: Tensor) -> Made:
    x = check.operand(task.rows, q.shape[1], w.dtype, X).requires_grad_()
    dy = check.operand(task.rows, q.shape[0], w.dtype, DY)

    def error(made: tuple[Tensor, Tensor]) -> float:
        return max(check.product_error(made[0], x, truth.T), check.product_error(made[1], dy, truth))

    return lambda: _train(lambda x: ops.matmul(x, q), x, dy), error


def _scale_grad(task: Task, w: Tensor, q: QuantTensor, truth: Tensor) -> Made:
    x, dy = (check.operand(task.rows, n, w.dtype, seed) for n, seed in ((q.shape[1], X), (q.shape[0], DY)))
    trained = q.with_scales(q.scales)  # fp32, as they are while they train
    trained.weight_scales.requires_grad_()
    y = ops.matmul(x, trained)
    some = check.every(q.shape[0], check.SAMPLE[1])

    def error(made: Tensor) -> float:
        zeros = None if q.zeros is None else q.zeros[some]
        return check.relative_error(made[some], reference.scale_grad(dy[:, some], x, q.unpack()[some], zeros, q.format))

    return lambda: torch.autograd.grad(y, trained.weight_scales, dy, retain_graph=True)[0], error


def _quantize(task: Task, w: Tensor, q: QuantTensor, truth: Tensor) -> Made:
    # Scales are double-quantized in blocks that run through all rows, so that some rows cannot stand for them
    some = slice(None) if q.format.scale == "dq" else check.every(q.shape[0], check.SAMPLE[1])

    def error(made: QuantTensor) -> float:
        expected = QuantTensor.from_codes(*reference.quantize(w[some], q.format), q.format)
        return check.relative_error(_dense(made)[some], _dense(expected))

    return lambda: quantize(w, q.format), error


def _dense(q: QuantTensor) -> Tensor:
    """As the reference unpacks it, fp32 `[out, in]`."""
    return reference.dequantize(q.unpack(), q.scales, q.zeros, q.format)


def _dequantize(task: Task, w: Tensor, q: QuantTensor, truth: Tensor) -> Made:
    out = torch.empty_like(w)  # fresh memory would cost more than what is timed
    return lambda: q.dequantize(out=out), lambda made: check.relative_error(made, truth)


_CALLS: dict[str, Callable[[Task, Tensor, QuantTensor, Tensor], Made]] = {
    "matmul": _matmul,
    "train": _forward_and_dx,
    "scale_grad": _scale_grad,
    "quantize": _quantize,
    "dequantize": _dequantize,
}
