"""What packing changed, weight by weight: the dequantized layers of a model beside the dense ones they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.targets import weight_of
from ..nn.experts import oriented
from ..nn.packed import PackedWeight, packed_weights

RANGE = 4.0  # of the histograms, in root mean squares of a layer's weight; what lies beyond counts in the last bin
BINS = 8193  # odd: the middle bin is centred on no error
SHOWN = 61
CHUNK = 1 << 22  # errors binned at a time: their bins are int64
KEPT = 0.999  # share of the weights that a shown histogram reaches


@dataclass(frozen=True)
class Histogram:
    """Errors of many weights: `counts[i]` of them lie within ± width / 2 of `first + i * width`."""

    first: float
    width: float
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """Number of weights."""
        return sum(self.counts)


@dataclass(frozen=True)
class WeightErrors:
    """What packing changed.

    Attributes:
        relative: ‖W − Q‖ / ‖W‖ (Frobenius) by the weight's path; Q is the packed weight alone, without an adapter.
        histograms: of the elements of W − Q over the root mean square of their layer's W, by format's spelling.
    """

    relative: dict[str, float]
    histograms: dict[str, Histogram]


@torch.no_grad()
def weight_errors(model: nn.Module, dense: nn.Module) -> WeightErrors:
    """Compare the packed layers of a model with the dense model it was made from, one layer at a time.

    Args:
        model: quantized, on any device.
        dense: of the same architecture, on any device.

    Raises:
        ValueError: the model holds no packed layer, or the dense one lacks a layer or has it in another shape.
    """
    relative: dict[str, float] = {}
    counts: dict[str, Tensor] = {}
    counted: set[int] = set()
    for path, weight in packed_weights(model).items():
        packed, was = weight.value.dequantize(), _dense_weight(dense, weight)
        if was.shape != packed.shape:
            raise ValueError(
                f"{path} is {list(packed.shape)} here and {list(was.shape)} in the dense model; give the dense model "
                "that this one was made from"
            )
        was = was.to(packed.device).float()
        error, norm = was - packed, was.norm().item()
        relative[path] = error.norm().item() / norm if norm else 0.0
        if norm and id(weight.value.codes) not in counted:  # else shared, as a tied head's is
            counted.add(id(weight.value.codes))
            spelling = str(weight.value.format)
            drawn = _drawn(error, norm / was.numel() ** 0.5)
            counts[spelling] = counts[spelling] + drawn if spelling in counts else drawn
    return WeightErrors(relative, {fmt: _shown(drawn) for fmt, drawn in counts.items()})


def _dense_weight(dense: nn.Module, weight: PackedWeight) -> Tensor:
    """As qft stores it: `[out, in]`, or `[experts, out, in]`."""
    path = weight.path if weight.name == "weight" else weight.path.rpartition(".")[0]
    try:
        module = dense.get_submodule(path)
        tensor = weight_of(module) if weight.name == "weight" else oriented(module, weight.name)
    except AttributeError:
        tensor = None
    if tensor is None or not tensor.is_floating_point():
        raise ValueError(
            f"{type(dense).__name__} has no dense weight at {weight.path}; give the dense model that this one was "
            "made from"
        )
    return tensor.detach()


def _drawn(error: Tensor, unit: float) -> Tensor:
    """How many errors lie in each of the fine bins, int64 `[BINS]` on the CPU."""
    counts = torch.zeros(BINS, dtype=torch.int64, device=error.device)
    for part in error.flatten().split(CHUNK):
        bins = (part * (BINS / (2 * RANGE * unit))).round_().clamp_(-(BINS // 2), BINS // 2).long()
        counts += torch.bincount(bins + BINS // 2, minlength=BINS)
    return counts.cpu()


def _shown(counts: Tensor) -> Histogram:
    """A fine histogram as one of `SHOWN` bins, over the least symmetric range that holds `KEPT` of the weights."""
    middle = BINS // 2
    outward = counts[middle:].clone()
    outward[1:] += counts[:middle].flip(0)
    inside = int((outward.cumsum(0) < KEPT * counts.sum()).sum())  # fine bins beside the middle one
    joined = max(1, -(-(2 * inside + 1) // SHOWN))
    joined += 1 - joined % 2  # odd, so that the shown middle bin is centred on the fine one
    half = joined * SHOWN // 2
    padded = torch.zeros(joined * SHOWN, dtype=counts.dtype)
    reach = min(half, middle)
    padded[half - reach : half + reach + 1] = counts[middle - reach : middle + reach + 1]
    width = 2 * RANGE / BINS * joined
    drawn = padded.view(SHOWN, joined).sum(1)
    drawn[0] += counts[: middle - reach].sum()
    drawn[-1] += counts[middle + reach + 1 :].sum()
    return Histogram(-width * (SHOWN // 2), width, tuple(int(count) for count in drawn))


def start_errors(errors: Sequence[float], bins: int = 24) -> Histogram:
    """How many layers have which relative error; `errors` of one or more."""
    top = max(errors) or 1.0
    width = top / bins
    counts = [0] * bins
    for error in errors:
        counts[min(bins - 1, int(error / width))] += 1
    return Histogram(width / 2, width, tuple(counts))
