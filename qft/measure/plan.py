"""Which format each layer gets: the least total error whose stored bytes fit a budget.

Pure numbers in, a choice out. One format per weight, the sum of errors least, the sum of stored bytes (padding and
scales included) within the budget: an integer linear program, as LQ-LoRA (Guo et al., ICLR 2024, section 3.2) sets it,
solved by scipy's HiGHS.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..disk.files import replace_file
from ..format import Format, FormatError

GAP = 1e-6  # how far the sum of errors may lie above the least, as a share of it: proving less can take hours


@dataclass(frozen=True)
class Candidate:
    """One way to store a weight.

    Attributes:
        format: its spelling.
        nbytes: stored, row padding and scales included.
        error: what it costs, 0 or more; of any unit that adds up over weights.
    """

    format: str
    nbytes: int
    error: float


@dataclass(frozen=True)
class Weight:
    """A weight matrix and the ways to store it.

    Attributes:
        paths: the layers that use it; more than one where layers are tied.
        shape: (out_features, in_features).
        candidates: at least one, of different formats.
    """

    paths: tuple[str, ...]
    shape: tuple[int, int]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Planned:
    """A weight matrix and how it is to be stored; see `Weight` and `Candidate`."""

    paths: tuple[str, ...]
    shape: tuple[int, int]
    format: str
    nbytes: int
    error: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """A format for each layer of a model: `quantize_model(model, fmt, formats=plan.formats)`.

    Attributes:
        weights: in the model's order.
        budget: bits per weight that it had to fit, or None where no budget chose it.
        measure: what the errors are, in words.
    """

    weights: tuple[Planned, ...]
    budget: float | None = None
    measure: str = ""

    @property
    def formats(self) -> dict[str, str]:
        """Format by layer path."""
        return {path: weight.format for weight in self.weights for path in weight.paths}

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all of them."""
        return 8 * self.nbytes / sum(math.prod(weight.shape) for weight in self.weights)

    @property
    def error(self) -> float:
        """Sum of the weights' errors."""
        return math.fsum(weight.error for weight in self.weights)

    def __str__(self) -> str:
        lines = [
            f"{', '.join(weight.paths)}: {weight.format}, {weight.shape[0]}x{weight.shape[1]}, {weight.nbytes} bytes, "
            f"error {weight.error:.4g}"
            for weight in self.weights
        ]
        asked = "" if self.budget is None else f" of {self.budget:g} asked for"
        return "\n".join([*lines, f"{self.bits_per_weight:.3f} bits per weight{asked}, total error {self.error:.4g}"])

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            OSError: the place cannot be written.
        """
        said = {"budget": self.budget, "measure": self.measure, "weights": [asdict(weight) for weight in self.weights]}
        with replace_file(Path(path)) as temporary:
            temporary.write_text(json.dumps(said, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan in a file.

        Raises:
            FormatError: the file holds no plan, or one with a format that is none. OSError: it cannot be read.
        """
        content = Path(path).read_bytes()
        try:
            said = json.loads(content)
            weights = tuple(
                Planned(
                    paths=tuple(map(str, entry["paths"])),
                    shape=(int(entry["shape"][0]), int(entry["shape"][1])),
                    format=str(Format.parse(entry["format"])),
                    nbytes=int(entry["nbytes"]),
                    error=float(entry["error"]),
                )
                for entry in said["weights"]
            )
            budget = None if said["budget"] is None else float(said["budget"])
            return cls(weights, budget, str(said["measure"]))
        except FormatError as error:
            raise FormatError(f"{path} is no plan: {error}") from None
        except (ValueError, TypeError, KeyError, IndexError):
            raise FormatError(f"{path} is no plan; write one with qft plan") from None


def choose(weights: Sequence[Weight], bits: float, measure: str = "") -> Plan:
    """The formats of least total error that fit a budget.

    Args:
        weights: with their candidates.
        bits: budget, stored bits per weight over all of them.
        measure: what the errors are, in words, for the plan.

    Returns:
        the plan, its error within a share of 1e-6 of the least possible.

    Raises:
        ValueError: there is no weight, an error is negative or not finite, or the budget is below the smallest choice.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not weights:
        raise ValueError("a plan needs at least one weight; see qft.report for why none is quantized")
    every = [(row, candidate) for row, weight in enumerate(weights) for candidate in weight.candidates]
    for row, candidate in every:
        if not (candidate.error >= 0 and math.isfinite(candidate.error)):
            raise ValueError(
                f"the error of {weights[row].paths[0]} as {candidate.format} is {candidate.error}; give 0 or more"
            )
    total = sum(math.prod(weight.shape) for weight in weights)
    budget = math.floor(bits * total / 8 * (1 + 1e-12)) if math.isfinite(bits) else -1  # 8 n / total is to allow n
    smallest = sum(min(candidate.nbytes for candidate in weight.candidates) for weight in weights)
    if budget < smallest:
        least = math.ceil(8 * smallest / total * 1000) / 1000
        raise ValueError(
            f"a budget of {bits:g} bits per weight is below {least:g}, which the smallest formats offered take; "
            f"use {least:g} or more, or offer smaller formats"
        )
    largest = max(candidate.error for _, candidate in every) or 1.0
    unit = math.gcd(*(candidate.nbytes for _, candidate in every))  # small whole numbers, which the solver keeps exact
    errors = np.array([candidate.error / largest for _, candidate in every])
    sizes = np.array([[candidate.nbytes // unit for _, candidate in every]])
    one_each = csr_array((np.ones(len(every)), ([row for row, _ in every], range(len(every)))))
    solved = milp(
        errors,
        integrality=np.ones(len(every)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes, ub=budget // unit)],
        options={"mip_rel_gap": GAP},
    )
    if solved.x is None:
        raise ValueError(f"the solver found no plan of {bits:g} bits: {solved.message}; try another budget")
    taken = dict(every[at] for at in np.flatnonzero(solved.x > 0.5))
    return _plan(weights, [taken[row] for row in range(len(weights))], bits, measure)


def first_layers(weights: Sequence[Weight], count: int, high: str, low: str, measure: str = "") -> Plan:
    """LoftQ's mixed precision (section 4.3): the model's first `count` blocks in one format, the rest in another.

    A block is what a path names up to its first number (`model.layers.3`); layers outside of any block count as the
    rest.

    Raises:
        ValueError: there are fewer blocks, or a weight has no candidate of a format.
        FormatError: a spelling is no format.
    """
    high, low = str(Format.parse(high)), str(Format.parse(low))
    blocks = list(dict.fromkeys(block for weight in weights if (block := _block(weight.paths[0]))))
    if not 0 <= count <= len(blocks):
        raise ValueError(f"the first {count} of {len(blocks)} blocks cannot be; use 0 to {len(blocks)}")
    first = set(blocks[:count])
    chosen = []
    for weight in weights:
        wanted = high if _block(weight.paths[0]) in first else low
        offered = {candidate.format: candidate for candidate in weight.candidates}
        if wanted not in offered:
            raise ValueError(f"{weight.paths[0]} was not measured as {wanted}; it has {', '.join(offered)}")
        chosen.append(offered[wanted])
    return _plan(weights, chosen, None, measure)


def _block(path: str) -> str:
    match = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", path)
    return match[0] if match else ""


def _plan(weights: Sequence[Weight], chosen: Sequence[Candidate], budget: float | None, measure: str) -> Plan:
    planned = (
        Planned(weight.paths, weight.shape, candidate.format, candidate.nbytes, candidate.error)
        for weight, candidate in zip(weights, chosen, strict=True)
    )
    return Plan(tuple(planned), budget, measure)
