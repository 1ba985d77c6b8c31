"""What a model's linear layers read while it runs: which of them the same tensors, and the sums of x xᵀ over a text.

And what the loss makes of their outputs: the mean square of its gradient there.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..model.targets import weight_of
from ..notices import say_once
from ..training.data import IGNORE

Collate = Callable[[Sequence[Any]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Source:
    """Layers that read the same tensors, as one forward pass showed it.

    Attributes:
        layers: their paths.
        calls: forward calls of all of them together.
        tensors: different tensors these calls read.
        features: in_features.
    """

    layers: tuple[str, ...]
    calls: int
    tensors: int
    features: int

    def nbytes(self, full: bool) -> int:
        """Bytes of its float64 sum: of x xᵀ, or of its diagonal alone."""
        return 8 * self.features ** (2 if full else 1)


class Batches(Sequence[dict[str, Any]]):
    """The rows by batches on the model's device, as its forward takes them; labels are kept from it."""

    def __init__(self, model: nn.Module, rows: Sequence[Any], collate: Collate, size: int) -> None:
        self.rows, self.collate, self.size = rows, collate, size
        self.device = next(model.parameters()).device
        # a cache of keys and values would only take memory
        takes_it = "use_cache" in inspect.signature(model.forward).parameters
        self.extra = {"use_cache": False} if takes_it else {}

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = self.labelled(index)
        batch.pop("labels", None)
        return batch

    def labelled(self, index: int) -> dict[str, Any]:
        """A batch with its labels."""
        return {**{name: tensor.to(self.device) for name, tensor in self._collated(index).items()}, **self.extra}

    def span(self, index: int) -> str:
        """The rows of a batch, for a message."""
        return f"rows {index * self.size} to {min((index + 1) * self.size, len(self.rows)) - 1}"

    def tokens(self) -> int:
        """Positions of all rows, padding not counted; the number of rows where they are no text."""
        return sum(_tokens(self._collated(index)) for index in range(len(self)))

    def _collated(self, index: int) -> Mapping[str, Tensor]:
        places = range(index * self.size, min((index + 1) * self.size, len(self.rows)))
        return self.collate([self.rows[at] for at in places])


def _tokens(batch: Mapping[str, Tensor]) -> int:
    mask = _mask(batch)
    if mask is not None:
        return int(mask.sum())
    return batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values())))


def survey(model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches) -> list[Source]:
    """Which layers read the same tensors, in the order in which they first do; one forward pass.

    Layers with the same weight count as one, for one start quantizes it. Layers that the first batch does not reach
    are left out, and named once.

    Raises:
        ValueError: it reaches none.
    """
    users: dict[int, list[str]] = {}  # by weight: its layers
    read: dict[int, list[int]] = {}  # by weight: a number for each tensor they were given
    seen = _Seen()

    def watch(weight: int) -> Callable[[Tensor], None]:
        return lambda x: read.setdefault(weight, []).append(seen.number(x))

    for path, module in layers.items():
        users.setdefault(id(module.weight), []).append(path)
    with _watching(layers, {path: watch(id(module.weight)) for path, module in layers.items()}):
        model(**batches[0])
    idle = [path for weight, paths in users.items() if weight not in read for path in paths]
    if len(idle) == len(layers):
        raise ValueError(f"the first batch reached none of {len(layers)} linear layers; give a model that runs them")
    if idle:
        names = ", ".join(idle[:4]) + (", ..." if len(idle) > 4 else "")
        say_once(f"{len(idle)} layers read nothing in the first batch and are not calibrated: {names}")
    together: dict[tuple[int, ...], list[int]] = {}
    for weight, numbers in read.items():
        together.setdefault(tuple(sorted(numbers)), []).append(weight)
    return [
        Source(
            layers=tuple(path for weight in weights for path in users[weight]),
            calls=len(numbers) * len(weights),
            tensors=len(set(numbers)),
            features=weight_of(layers[users[weights[0]][0]]).shape[1],
        )
        for numbers, weights in together.items()
    ]


class SecondMoment:
    """Σ x xᵀ of one source over the batches so far, float64, on the device of its first activations."""

    def __init__(self, source: Source, full: bool) -> None:
        self.source = source
        self.full = full
        self.total: Tensor | None = None
        self.rows = 0
        self.start_batch()

    def start_batch(self) -> None:
        """Forget which tensors have been read."""
        self.calls, self.seen = 0, _Seen()

    @property
    def complete(self) -> bool:
        """Whether this batch has made as many calls as the surveyed one."""
        return self.calls == self.source.calls

    def add(self, x: Tensor, mask: Tensor | None) -> bool:
        """Take the input `[..., in]` of one call of one of the layers; False where it is not finite."""
        self.calls += 1
        known = self.seen.count
        if self.seen.number(x) < known:
            return True  # another layer has read it
        x = _positions(x, mask).float()
        with torch.autocast(x.device.type, enabled=False):
            part = x.T @ x if self.full else x.square().sum(0, dtype=torch.float64)
        if self.total is None:
            self.total = torch.zeros_like(part, dtype=torch.float64)
        self.total += part.to(self.total.device)
        self.rows += len(x)
        diagonal = part.diagonal() if self.full else part  # a NaN or an infinity among x reaches it
        return bool(diagonal.isfinite().all())

    def mean(self) -> Tensor:
        """E[x xᵀ], exactly symmetric, or its diagonal; fp32 on the CPU. The sum is used up."""
        mean = cast(Tensor, self.total).div_(self.rows).float().cpu()
        self.total = None
        return mean.tril_().add_(mean.tril(-1).T) if self.full else mean


def accumulate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    moments: Sequence[SecondMoment],
    on_batch: Callable[[], None],
) -> None:
    """One pass over the rows into `moments`; each forward pass ends where the last of them is complete.

    Raises:
        ValueError: an input is NaN or infinite, a layer is called otherwise than in the survey, or all is padding.
    """
    mask: Tensor | None = None
    index, missing = 0, 0

    def watch(path: str, moment: SecondMoment) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            nonlocal missing
            if not moment.add(x, mask):
                raise ValueError(
                    f"the input of {path} is NaN or infinite in {batches.span(index)}; the model overflows there: try "
                    "another dtype, or leave these rows out"
                )
            missing -= moment.complete
            if not missing:
                raise _EnoughError

        return take

    watched = {path: watch(path, moment) for moment in moments for path in moment.source.layers}
    with _watching(layers, watched):
        for index in range(len(batches)):
            batch = batches[index]
            mask, missing = _mask(batch), len(moments)
            for moment in moments:
                moment.start_batch()
            with suppress(_EnoughError):
                model(**batch)
            for moment in moments:
                _refuse_other_calls(moment, batches.span(index))
            on_batch()
    for moment in moments:
        if not moment.rows:
            raise ValueError(f"every position that {moment.source.layers[0]} reads is padding; give rows with text")


def sensitivities(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, on_batch: Callable[[], None]
) -> dict[str, float]:
    """How much the loss minds noise in each layer's outputs; one pass forward and backward.

    A layer's sensitivity is Σ over positions of the mean over outputs of (∂L/∂y)², per label; L is the model's own
    loss, summed over labels. To second order, with the Fisher matrix of the text for the Hessian and a multiple of the
    identity for its factor on the side of the outputs (K-FAC, Martens and Grosse 2015), a change R of the layer's
    weight raises the loss by sensitivity / 2 · tr(R S Rᵀ), nats per label.

    Raises:
        ValueError: the model's output has no loss, or a gradient is NaN or infinite.
    """
    squares: dict[str, Any] = dict.fromkeys(layers, 0.0)
    labels = 0

    def watch(path: str) -> Any:
        def note(gradient: Tensor) -> None:
            squares[path] = squares[path] + gradient.float().square().sum(dtype=torch.float64) / gradient.shape[-1]

        def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing before it trains: the graph begins here
                output = output.requires_grad_().clone()
            output.register_hook(note)
            return output

        return hook

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [module.register_forward_hook(watch(path)) for path, module in layers.items()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)  # their gradients would only take memory
        for index in range(len(batches)):
            batch = batches.labelled(index)
            count = int((batch["labels"] != IGNORE).sum()) if "labels" in batch else 0
            if count:
                with torch.enable_grad():
                    loss = getattr(model(**batch), "loss", None)
                    if loss is None:
                        raise ValueError(
                            f"{type(model).__name__} computes no loss of labels; gradients need one that does"
                        )
                    (loss * count).backward()
            labels += count
            on_batch()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_()
    if not labels:
        raise ValueError("the rows hold no labels; gradients need some to compute a loss of")
    found = {path: float(square) / labels for path, square in squares.items()}
    for path, value in found.items():
        if not math.isfinite(value):
            raise ValueError(f"the gradient at the output of {path} is NaN or infinite; try another dtype")
    return found


def _refuse_other_calls(moment: SecondMoment, span: str) -> None:
    source = moment.source
    if (moment.calls, moment.seen.count) != (source.calls, source.tensors):
        raise ValueError(
            f"{', '.join(source.layers)}: {moment.calls} calls read {moment.seen.count} tensors in {span}, and "
            f"{source.calls} read {source.tensors} in the first batch; skip layers that not every batch calls alike"
        )


class _EnoughError(Exception):
    """All that a pass wants of a batch has been seen: the rest of the model need not run."""


class _Seen:
    """Numbers for tensors in the order they come, the same for the same one; keeps none of them alive."""

    def __init__(self) -> None:
        self.count = 0
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}

    def number(self, x: Tensor) -> int:
        version = 0 if x.is_inference() else x._version
        known = self._known.get(id(x))  # an address that was freed comes back: the reference tells
        if known is None or known[0]() is not x or known[1] != version:
            known = self._known[id(x)] = weakref.ref(x), version, self.count
            self.count += 1
        return known[2]


def _mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Which positions hold tokens, bool `[rows, length]`; None where the batch does not say."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def _positions(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows `[n, in]` of `x` that hold tokens."""
    flat = x.detach().reshape(-1, x.shape[-1])
    if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return flat
    return flat[mask.flatten().to(flat.device)]


@contextmanager
def _watching(layers: Mapping[str, nn.Module], watched: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call `watched[path]` with what the layer at `path` is about to read."""

    def hook(watch: Callable[[Tensor], None]) -> Any:
        return lambda module, given, named: watch(next(iter((*given, *named.values()))))

    handles = [layers[path].register_forward_pre_hook(hook(watch), with_kwargs=True) for path, watch in watched.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
