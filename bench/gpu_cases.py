"""What is timed on a GPU, as data, the most telling first, and the targets. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cases import DOWN, NF4, SQUARE, UP, Case, Target

LARGE = (8192, 8192)
LAYERS = (LARGE, SQUARE, UP, DOWN)
NF4_DQ = "nf4 g64 dq"
FORMATS = (
    NF4,
    NF4_DQ,
    "nf3 g64 f32",
    "nf2 g64 f32",
    "int4 g128 f16",
    "int3 g128 f32",
    "int2 g64 f32",
    "int4 g64 f16 zero",
)
CHANNEL = "int4 channel f32"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
CROSSING = (16, 32, 64, 128)  # where the small product and the panels meet: both sides are timed
PERMUTES = "cuda, byte permutes"  # for 16 levels at few rows, in the pair table's place
FEW = (1, 8, 16)  # rows at which both lookups are timed
DENSE, BNB, BNB_DEQUANTIZE, GEMLITE = "dense torch", "bitsandbytes", "bitsandbytes dequantize", "gemlite"
PRODUCTS = ("matmul", "matmul_t", "scale_grad")


@dataclass(frozen=True)
class Step:
    """One training step of a random Llama of 1.2 billion parameters in bf16, batch 1: forward, backward, AdamW.

    Attributes:
        who: what trains: a LoRA over dense weights (PEFT's), a LoRA over packed ones, or the scales alone.
        fmt: of the packed weights; None for dense.
        rows: tokens.
        rank: of the LoRA on every linear layer but the output head; 0 without one.
        rate: AdamW's, small enough that the loss falls on one batch.
    """

    who: str
    fmt: str | None
    rank: int
    rate: float
    rows: int = 2048

    @property
    def work(self) -> str:
        return f"training step of a 1.2 B Llama, {self.rows} tokens bf16"

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.who, self.fmt, self.rank and f"rank {self.rank}") if part)


STEPS = (Step("dense LoRA", None, 16, 1e-3), Step("QLoRA", NF4_DQ, 16, 1e-3), Step("PEQA", CHANNEL, 0, 3e-5))
Item = Case | Step


def key(item: Item) -> str:
    """What a row of the report is found by."""
    return f"{item.work}: {item.name}"


def peers(case: Case) -> Iterator[Case]:
    """The same work by others: dense cuBLAS; bitsandbytes for NF4; gemlite for the integers that it has."""
    verb, shape, rows = case.verb, case.shape, case.rows
    if verb in PRODUCTS:
        yield Case(DENSE, verb, shape, None, rows)
    if case.fmt in (NF4, NF4_DQ) and verb != "scale_grad":
        yield Case(BNB, verb, shape, case.fmt, rows)
        if verb == "matmul":
            yield Case(BNB_DEQUANTIZE, verb, shape, case.fmt, rows)
    if case.fmt in ("int4 g128 f16", "int2 g64 f32") and verb == "matmul":
        yield Case(GEMLITE, verb, shape, case.fmt, rows)


def together(case: Case) -> Iterator[Case]:
    """A case after its peers, and then by the rows of the kernel table where two of them compete."""
    yield from peers(case)
    yield case
    if case.verb == "matmul" and case.rows in CROSSING:
        yield from (Case("qft", case.verb, case.shape, case.fmt, case.rows, kernel=name) for name in ("cuda", "panel"))
    if case.verb == "matmul" and case.rows in FEW and case.fmt in (NF4, NF4_DQ):
        yield Case("qft", case.verb, case.shape, case.fmt, case.rows, kernel=PERMUTES)


def weight_cases(shape: tuple[int, int], fmt: str) -> Iterator[Case]:
    """Every verb on one weight."""
    for verb in ("dequantize", "quantize"):
        yield from together(Case("qft", verb, shape, fmt))
    for verb in PRODUCTS:
        for rows in ROWS:
            yield from together(Case("qft", verb, shape, fmt, rows))


def _in_order() -> Iterator[Item]:
    for rows in ROWS:
        yield from together(Case("qft", "matmul", LARGE, NF4, rows))
    for target in TARGETS:
        yield from together(target.subject)
    yield from STEPS
    for shape in LAYERS:
        for fmt in FORMATS:
            yield from weight_cases(shape, fmt)
        for rows in ROWS:
            yield from together(Case("qft", "scale_grad", shape, CHANNEL, rows))


def _targets() -> Iterator[Target]:
    def ours(verb: str, fmt: str = NF4, rows: int = 0) -> Case:
        return Case("qft", verb, LARGE, fmt, rows)

    def others(who: str, case: Case) -> Case:
        return Case(who, case.verb, case.shape, None if who == DENSE else case.fmt, case.rows)

    def faster(case: Case, who: str, limit: float) -> Target:
        return Target(case, "speedup", limit, others(who, case))

    for rows in (1, 2, 4, 8, 16):
        for fmt, limit in ((NF4, 2.8), ("nf3 g64 f32", 3.5), ("nf2 g64 f32", 4.5)):
            yield faster(ours("matmul", fmt, rows), DENSE, limit)
        yield faster(ours("matmul", rows=rows), BNB, 1.3)
    yield faster(ours("matmul", rows=64), DENSE, 1.8)
    for verb in ("matmul", "matmul_t"):
        for rows, limit in ((2048, 0.82), (8192, 0.91)):
            yield faster(ours(verb, rows=rows), DENSE, limit)
            yield faster(ours(verb, rows=rows), BNB, 1.0)
    for fmt in (NF4, CHANNEL):
        case = ours("scale_grad", fmt, 2048)
        yield Target(case, "time ratio", 1.25, others(DENSE, case))
    for verb in ("quantize", "dequantize"):
        for fmt in (NF4, NF4_DQ):
            yield Target(ours(verb, fmt), "copy bandwidth", 85)


TARGETS = tuple(_targets())
ITEMS: tuple[Item, ...] = tuple(dict.fromkeys(_in_order()))
