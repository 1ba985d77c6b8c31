"""What each format costs each layer of a model, measured, and the plan that follows.

What adds up over layers is the loss. A calibration with gradients says how much it minds a layer's error R = W − Q: to
second order it rises by sensitivity / 2 · tr(R S Rᵀ) nats per label, S = E[x xᵀ] (`activations.sensitivities`). A
calibration without them leaves the share of each output's mean square that is lost, tr(R S Rᵀ) / tr(W S Wᵀ), and none
at all the weights' own, ‖R‖² / ‖W‖²: shares, for what follows a layer is mostly normalized. bench/plan.py measures the
perplexity that each of them, and their absolute counterparts, lead to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..format import Format
from ..init.second_moment import ROWS, diagonal_of, weighted_square
from ..model.progress import bar
from ..model.targets import quantizable, weight_of
from ..tensor import quantize
from .calibration import Calibration
from .plan import Candidate, Plan, Weight, choose, first_layers

LADDER = tuple(f"lm{bits} g{group} f16" for bits in (2, 3, 4) for group in (128, 64, 32))


def plan_bits(
    model: nn.Module,
    bits: float,
    formats: Sequence[Format | str] = LADDER,
    *,
    calibration: Mapping[str, Tensor] | None = None,
    search: bool = True,
    skip: Iterable[str] = (),
    include: Iterable[str] = (),
    progress: bool = False,
) -> Plan:
    """Choose a format for every layer that `quantize_model` would replace: least error within a budget of bytes.

    Args:
        model: dense; only looked at.
        bits: budget, stored bits per weight over these layers, padding and scales included.
        formats: to choose from.
        calibration: second moments by layer path, whole or diagonal, as `qft.calibrate` gives them, best with
            gradients=True: what the error is, see above; and the search weighs columns by E[x_j²].
        search: measure with searched scales (`qft.quantize`), which is how the model should then be quantized: init
            "search", or another start that searches. False measures absmax scales, as init "plain" stores them.
        skip, include: as in `qft.calibrate`.
        progress: draw a progress bar with the time left on stderr.

    Returns:
        the plan; its `formats` go to `quantize_model`.

    Raises:
        FormatError: a spelling is no format.
        ValueError: no layer is left, the calibration lacks one, a weight is not finite, or the budget is below what the
            smallest formats take.
    """
    how = _measure(calibration, search)
    return choose(measure_formats(model, formats, calibration, search, skip, include, progress), bits, how)


def plan_first_layers(
    model: nn.Module,
    count: int,
    high: Format | str,
    low: Format | str,
    *,
    calibration: Mapping[str, Tensor] | None = None,
    search: bool = True,
    skip: Iterable[str] = (),
    include: Iterable[str] = (),
    progress: bool = False,
) -> Plan:
    """LoftQ's mixed precision: the model's first `count` blocks in the format `high`, the rest in `low`.

    The other arguments and what is raised are those of `plan_bits`; and ValueError where there are fewer blocks.
    """
    weights = measure_formats(model, (high, low), calibration, search, skip, include, progress)
    return first_layers(weights, count, str(high), str(low), _measure(calibration, search))


@torch.no_grad()
def measure_formats(
    model: nn.Module,
    formats: Sequence[Format | str],
    calibration: Mapping[str, Tensor] | None = None,
    search: bool = True,
    skip: Iterable[str] = (),
    include: Iterable[str] = (),
    progress: bool = False,
) -> list[Weight]:
    """Bytes and error of each weight in each format; arguments and what is raised as in `plan_bits`."""
    offered = list(dict.fromkeys(Format.parse(fmt) for fmt in formats))
    if not offered:
        raise ValueError("a plan needs at least one format to choose from, such as 'lm2 g64 f16'")
    layers = quantizable(model, skip, include)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no linear layer to plan; see qft.report for the reasons")
    users: dict[int, list[str]] = {}
    for path, module in layers.items():
        users.setdefault(id(module.weight), []).append(path)
    missing = [paths[0] for paths in users.values() if calibration is not None and paths[0] not in calibration]
    if missing:
        raise ValueError(
            f"the calibration lacks {len(missing)} of {len(users)} weights, such as that of {missing[0]}; calibrate "
            "this model again, or skip them"
        )
    sensitivity = _sensitivity(calibration)
    weights = []
    with bar(progress, len(users) * len(offered), "measuring") as advance:
        for paths in users.values():
            weight = weight_of(layers[paths[0]]).detach()
            moment = None if calibration is None else calibration[paths[0]].to(weight.device)
            importance = diagonal_of(moment, weight.shape[1], "the plan") if search and moment is not None else None
            if sensitivity:
                worth = sum(sensitivity[path] for path in paths) / 2
            else:
                whole = _square(weight, None, moment)
                worth = 1 / whole if whole else 0.0
            candidates = []
            for fmt in offered:
                q = quantize(weight, fmt, search=search, importance=importance, name=f"{paths[0]}.weight")
                error = worth * _square(weight, q.dequantize(), moment)
                candidates.append(Candidate(str(fmt), q.nbytes, error))
                advance(f"measuring {paths[0]}")
            weights.append(Weight(tuple(paths), (weight.shape[0], weight.shape[1]), tuple(candidates)))
    return weights


def _square(weight: Tensor, quantized: Tensor | None, moment: Tensor | None) -> float:
    """tr(R S Rᵀ) of R = W − Q, or of W itself; fp32, summed over its rows in float64."""
    total = 0.0
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        dense = weight[rows].float()
        total += weighted_square(dense if quantized is None else dense - quantized[rows], moment)
    return max(total, 0.0)


def _sensitivity(calibration: Mapping[str, Tensor] | None) -> Mapping[str, float]:
    return calibration.sensitivity if isinstance(calibration, Calibration) else {}


def _measure(calibration: Mapping[str, Tensor] | None, search: bool) -> str:
    """What the errors of a plan are, in words."""
    scales = "searched" if search else "absmax"
    if _sensitivity(calibration):
        return f"expected rise of the loss in nats per token, {scales} scales"
    return f"relative squared error of the {'weights' if calibration is None else 'outputs'}, {scales} scales"
