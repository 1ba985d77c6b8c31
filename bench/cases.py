"""What a case, a target and an experiment are, and the layers and formats they are of. Standard library only.

Shapes are (out_features, in_features) as they stand in Llama-3-8B. A case is one call; an experiment is the cases timed
in turn in one process; a target compares two of them, or one with what the machine can do.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

SQUARE, UP, DOWN, KEY = (4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)
LAYERS = (SQUARE, UP, DOWN, KEY)
NF4 = "nf4 g64 f32"
FORMATS = tuple(f"{code} g64 f32" for code in ("nf4", "nf3", "nf2", "int4", "int3", "int2", "int8"))
NEVER_GRAD = ("bitsandbytes eval", "torch int4")  # paths that serve inference alone
PEERS = ("bitsandbytes", "bitsandbytes eval", "dense torch", "torch int4")
LOFTQ_RANK, LOFTQ_ITERS = 64, 5


def random_levels(count: int, seed: int) -> str:
    """A codebook nobody wrote kernels for: -1, 1 and `count` - 2 random levels between them."""
    inner = random.Random(seed).sample(range(-99, 100), count - 2)
    return "[" + " ".join(f"{level / 100:g}" for level in sorted({-100, 100, *inner})) + "] g64 f32"


OWN = random_levels(11, seed=11)


@dataclass(frozen=True)
class Case:
    """One call that is timed.

    Attributes:
        who: qft, or a peer: bitsandbytes (its training path), bitsandbytes eval (weights repacked for inference), dense
            torch, torch int4 (`_weight_int4pack_mm_for_cpu`, asymmetric, groups of 64).
        verb: matmul, matmul_t, scale_grad, quantize, dequantize; train, a matmul and the matmul_t of its gradient; or
            loftq, at LOFTQ_RANK in LOFTQ_ITERS steps.
        shape: (out_features, in_features).
        fmt: spelling of the format; None for a dense weight.
        rows: of x; 0 for verbs without x.
        dtype: of x, or of the dense weight: bf16 or f32.
        kernel: a row of qft's kernel table, named in the call; None lets the table choose.
        search: whether quantize searches the scale of least error for each group.
        into: whether dequantize writes into a tensor that is there.
    """

    who: str
    verb: str
    shape: tuple[int, int] = SQUARE
    fmt: str | None = None
    rows: int = 0
    dtype: str = "bf16"
    kernel: str | None = None
    search: bool = False
    into: bool = False

    @property
    def work(self) -> str:
        """What is done, whoever does it: cases of equal work stand in one line of a table."""
        how = " with scale search" * self.search + " into a tensor" * self.into
        rows = f" M={self.rows}" if self.rows else ""
        rank = f" r={LOFTQ_RANK} T={LOFTQ_ITERS}" if self.verb == "loftq" else ""
        return f"{self.verb}{how}{rows}{rank} {self.shape[0]}x{self.shape[1]} {self.dtype}"

    @property
    def name(self) -> str:
        """Who does it, in which format, with which kernel."""
        fmt = "11 random levels g64 f32" if self.fmt == OWN else self.fmt
        return ", ".join(part for part in (self.who, fmt, self.kernel and f"kernel {self.kernel}") if part)


@dataclass(frozen=True)
class Step:
    """One step of the demo's fine-tuning: forward, backward, AdamW on LoRA factors, on real rows of text.

    Attributes:
        who: qft, or dense torch with PEFT's LoRA.
        fmt: of the packed weights; None for dense.
        rows: tokens.
    """

    who: str
    fmt: str | None = None
    rows: int = 1024
    verb: str = "step"
    dtype: str = "f32"

    @property
    def work(self) -> str:
        return f"fine-tuning step of the demo's model, {self.rows} tokens {self.dtype}"

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.who, self.fmt, "LoRA") if part)


Item = Case | Step


@dataclass(frozen=True)
class Target:
    """A bound on a figure of `subject`, by itself or against another case of the same experiment.

    Attributes:
        measure: a key of `MEASURES`.
        limit: at least or at most, as the measure says.
        row: of the table of targets; empty where another table has it.
    """

    subject: Item
    measure: str
    limit: float
    against: Item | None = None
    row: str = ""


# measure -> (how it is compared, unit)
MEASURES = {
    "speedup": ("at least", "x"),  # time of `against` / time of `subject`
    "time ratio": ("at most", "x"),  # time of `subject` / time of `against`
    "read bandwidth": ("at least", "%"),  # bytes read / time, of the machine's measured read bandwidth
    "write bandwidth": ("at least", "%"),
    "copy bandwidth": ("at least", "%"),  # bytes read and written / time, of the measured copy bandwidth
    "time": ("at most", " ms"),
    "error": ("at most", "%"),  # relative_error of `subject`, as its check defines it
}


def evaluate(target: Target, rows: dict[Any, dict[str, Any]], limits: dict[str, float]) -> dict[str, Any]:
    """A target with its measured figure; both that and `met` are None where a case could not run.

    `rows` holds the report's rows, `limits` what the machine can do, in bytes and operations per second.
    """
    how, unit = MEASURES[target.measure]
    entry = {
        "work": target.subject.work,
        "subject": target.subject.name,
        "against": target.against.name if target.against else None,
        "measure": target.measure,
        "how": how,
        "limit": target.limit,
        "unit": unit,
        "row": target.row,
    }
    if target.against and target.against.rows != target.subject.rows:
        entry["against"] += f" at M={target.against.rows}"
    if target.subject not in rows or (target.against and target.against not in rows):
        return {**entry, "measured": None, "met": None}
    subject = rows[target.subject]
    seconds = subject["median_s"]
    other = rows[target.against]["median_s"] if target.against else 0.0
    measured = {
        "speedup": lambda: other / seconds,
        "time ratio": lambda: seconds / other,
        "read bandwidth": lambda: 100 * subject["read_bytes"] / seconds / limits["read"],
        "write bandwidth": lambda: 100 * subject["written_bytes"] / seconds / limits["write"],
        "copy bandwidth": lambda: 100 * (subject["read_bytes"] + subject["written_bytes"]) / seconds / limits["copy"],
        "time": lambda: 1e3 * seconds,
        "error": lambda: 100 * subject["relative_error"],
    }[target.measure]()
    met = measured >= target.limit if how == "at least" else measured <= target.limit
    return {**entry, "measured": measured, "met": met}


@dataclass(frozen=True)
class Experiment:
    """Cases timed in turn, and the targets among them.

    Attributes:
        headline: whether its lines stand in the README.
        series: experiments of one series differ in the rows of x alone and share a table.
    """

    title: str
    cases: tuple[Item, ...]
    targets: tuple[Target, ...] = ()
    headline: bool = False
    series: str = ""


def qft(verb: str, fmt: str = NF4, **more: object) -> Case:
    return Case("qft", verb, fmt=fmt, **more)  # type: ignore[arg-type]


def peer(who: str, case: Case) -> Case:
    """The same work by a peer, in the format it has."""
    fmt = {"dense torch": None, "torch int4": "int4 g64 bf16 zero"}.get(who, NF4)
    return Case(who, case.verb, case.shape, fmt, case.rows, case.dtype)


def against(case: Case, row: str, **limits: tuple[str, float]) -> tuple[Target, ...]:
    """Targets of `case` by peer, spelled with _ for a space: `dense_torch=("speedup", 1.0)`."""
    return tuple(
        Target(case, measure, limit, peer(who.replace("_", " "), case), row) for who, (measure, limit) in limits.items()
    )
