"""What is timed, as data: layers, cases, experiments and the targets they are held to. Standard library only.

Shapes are (out_features, in_features) as they stand in Llama-3-8B. A case is one call; an experiment is the cases timed
in turn in one process; a target compares two of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

SQUARE, UP, DOWN, KEY = (4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)
LAYERS = (SQUARE, UP, DOWN, KEY)
NF4 = "nf4 g64 f32"
FORMATS = tuple(f"{code} g64 f32" for code in ("nf4", "nf3", "nf2", "int4", "int3", "int2", "int8"))
NEVER_GRAD = ("bitsandbytes eval", "torch int4")  # paths that serve inference alone
PEERS = ("bitsandbytes", "bitsandbytes eval", "dense torch", "torch int4")


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
        verb: matmul, matmul_t, scale_grad, quantize, dequantize; or train, a matmul and the matmul_t of its gradient.
        shape: (out_features, in_features).
        fmt: spelling of the format; None for a dense weight.
        rows: of x; 0 for verbs without x.
        dtype: of x, or of the dense weight: bf16 or f32.
        kernel: a row of qft's kernel table, named in the call; None lets the table choose.
    """

    who: str
    verb: str
    shape: tuple[int, int] = SQUARE
    fmt: str | None = None
    rows: int = 0
    dtype: str = "bf16"
    kernel: str | None = None

    @property
    def work(self) -> str:
        """What is done, whoever does it: cases of equal work stand in one line of a table."""
        rows = f"M={self.rows} " if self.rows else ""
        return f"{self.verb} {rows}{self.shape[0]}x{self.shape[1]} {self.dtype}"

    @property
    def name(self) -> str:
        """Who does it, in which format, with which kernel."""
        fmt = "11 random levels g64 f32" if self.fmt == OWN else self.fmt
        return ", ".join(part for part in (self.who, fmt, self.kernel and f"kernel {self.kernel}") if part)


@dataclass(frozen=True)
class Target:
    """A bound on a figure of `subject`, by its time alone or against another case of the same experiment.

    Attributes:
        measure: a key of `MEASURES`.
        limit: at least or at most, as the measure says.
        stage: "now" for what this version must meet, "next" for what the memory wall allows.
    """

    subject: Case
    measure: str
    limit: float
    against: Case | None = None
    stage: str = "now"


# measure -> (how it is compared, unit)
MEASURES = {
    "speedup": ("at least", "x"),  # time of `against` / time of `subject`
    "time ratio": ("at most", "x"),  # time of `subject` / time of `against`
    "read bandwidth": ("at least", "%"),  # bytes read / time, of the machine's measured read bandwidth
    "write bandwidth": ("at least", "%"),
    "copy bandwidth": ("at least", "%"),  # bytes read and written / time, of the measured copy bandwidth
    "time": ("at most", " ms"),
}


def evaluate(target: Target, rows: dict[Case, dict[str, Any]], limits: dict[str, float]) -> dict[str, Any]:
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
        "stage": target.stage,
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
    }[target.measure]()
    met = measured >= target.limit if how == "at least" else measured <= target.limit
    return {**entry, "measured": measured, "met": met}


@dataclass(frozen=True)
class Experiment:
    """Cases timed in turn, and the targets among them; `headline` ones stand in the README."""

    title: str
    cases: tuple[Case, ...]
    targets: tuple[Target, ...] = ()
    headline: bool = False


def qft(verb: str, fmt: str = NF4, **more: object) -> Case:
    return Case("qft", verb, fmt=fmt, **more)  # type: ignore[arg-type]


def peer(who: str, case: Case) -> Case:
    """The same work by a peer, in the format it has."""
    fmt = {"dense torch": None, "torch int4": "int4 g64 bf16 zero"}.get(who, NF4)
    return Case(who, case.verb, case.shape, fmt, case.rows, case.dtype)


def against(case: Case, limits: dict[str, tuple[str, float]], stage: str = "now") -> tuple[Target, ...]:
    """Targets of `case` by peer: `{"dense torch": ("speedup", 1.0)}`."""
    return tuple(Target(case, measure, limit, peer(who, case), stage) for who, (measure, limit) in limits.items())


def _one_token_square() -> Experiment:
    nf4, own, avx2 = qft("matmul", rows=1), qft("matmul", OWN, rows=1), qft("matmul", rows=1, kernel="avx2")
    named = tuple(qft("matmul", fmt, rows=1) for fmt in FORMATS)
    smaller = tuple(case for case in named if case.fmt and case.fmt.startswith(("nf3", "nf2", "int3", "int2")))
    targets = (
        *against(nf4, {"bitsandbytes": ("speedup", 10), "dense torch": ("speedup", 1.0)}),
        *(Target(case, "speedup", 1.0, nf4) for case in smaller),
        Target(own, "time ratio", 1.2, nf4),
        Target(avx2, "speedup", 0.6, nf4, "next"),
    )
    return Experiment("One token", (*named, own, avx2, *(peer(who, nf4) for who in PEERS)), targets, headline=True)


def _one_token_wide() -> Experiment:
    cases = tuple(qft("matmul", f"{code} g64 f32", rows=1, shape=DOWN) for code in ("nf4", "nf3", "nf2", "int4"))
    limits = {
        "dense torch": ("speedup", 3.0),
        "bitsandbytes": ("speedup", 25.0),
        "bitsandbytes eval": ("speedup", 1.5),
        "torch int4": ("speedup", 1.0),
    }
    bandwidth = (Target(case, "read bandwidth", 85, stage="next") for case in cases)
    targets = (*bandwidth, *(target for case in cases for target in against(case, limits, "next")))
    return Experiment("One token, a wider layer", (*cases, *(peer(who, cases[0]) for who in PEERS)), targets)


def _few_tokens() -> Experiment:
    ours = {rows: qft("matmul", rows=rows) for rows in (1, 2, 4, 8, 16)}
    cases = (*ours.values(), *(peer(who, case) for case in ours.values() for who in PEERS[1:]))
    growth = Target(ours[8], "time ratio", 1.6, ours[1], "next")
    int4 = (target for case in ours.values() for target in against(case, {"torch int4": ("speedup", 1.0)}, "next"))
    return Experiment("A few tokens", cases, (growth, *int4))


def _many_tokens(title: str, verb: str, now: dict[int, float], limit: float) -> Experiment:
    """Times against dense torch's: at most `now` at some numbers of rows, `limit` at all of them in the end."""
    ours = [qft(verb, rows=rows) for rows in (128, 512, 2048)]
    cases = (*ours, *(peer(who, case) for case in ours for who in ("bitsandbytes", "dense torch")))
    first = (against(case, {"dense torch": ("time ratio", now[case.rows])}) for case in ours if case.rows in now)
    then = (against(case, {"dense torch": ("time ratio", limit)}, "next") for case in ours)
    return Experiment(title, cases, tuple(chain(*first, *then)), headline=verb == "train")


def _scale_grad() -> Experiment:
    grouped, channel = (qft("scale_grad", f"nf4 {group} f32", rows=512) for group in ("g64", "channel"))
    targets = against(grouped, {"dense torch": ("time ratio", 1.15)}, "next")
    cases = (grouped, channel, peer("dense torch", grouped))
    return Experiment("Gradient of the scales; dense torch: of the whole weight", cases, targets, headline=True)


def _elementwise(verb: str, *targets: Target) -> Experiment:
    case = qft(verb)
    return Experiment(verb.capitalize(), (case, peer("bitsandbytes", case)), targets, headline=True)


EXPERIMENTS = (
    _one_token_square(),
    _one_token_wide(),
    _few_tokens(),
    _many_tokens("A batch, forward", "matmul", {}, 1.05),
    _many_tokens("A batch, forward and dx", "train", {512: 1.3}, 1.10),
    _scale_grad(),
    _elementwise(
        "quantize",
        *against(qft("quantize"), {"bitsandbytes": ("speedup", 10)}),
        Target(qft("quantize"), "time", 5.0, stage="next"),
    ),
    _elementwise("dequantize", Target(qft("dequantize"), "write bandwidth", 70, stage="next")),
)

# The microbenchmarks: every verb over formats, layers, rows and dtypes, and every peer where it has the verb.
_ROW_VERBS = ("matmul", "matmul_t", "train", "scale_grad")
_OURS = (
    *(qft(verb, fmt, rows=rows) for verb, fmt, rows in product(("matmul", "matmul_t"), FORMATS, (1, 128))),
    *(qft(verb, shape=shape, rows=rows) for verb, shape, rows in product(("matmul", "train"), LAYERS[1:], (1, 512))),
    *(qft(verb, rows=512, dtype=dtype) for verb, dtype in product(_ROW_VERBS, ("bf16", "f32"))),
    *(qft(verb, fmt) for verb, fmt in product(("quantize", "dequantize"), FORMATS)),
    *(qft(verb, dtype="f32") for verb in ("quantize", "dequantize")),
)


def _can(who: str, case: Case) -> bool:
    """Whether a peer has the verb; who serves inference alone takes bf16 and few rows."""
    if who in NEVER_GRAD:
        return case.verb == "matmul" and case.rows == 1 and case.dtype == "bf16"
    return case.verb in (_ROW_VERBS if who == "dense torch" else (*_ROW_VERBS[:3], "quantize", "dequantize"))


_NF4 = tuple(case for case in _OURS if case.fmt == NF4)
MICROBENCHMARKS = (*_OURS, *dict.fromkeys(peer(who, case) for case in _NF4 for who in PEERS if _can(who, case)))
