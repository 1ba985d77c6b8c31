"""What is timed on a CPU, as data: experiments, the targets they are held to, and the microbenchmarks. Standard library
only."""

from __future__ import annotations

from itertools import chain, product

from cases import (
    DOWN,
    FORMATS,
    LAYERS,
    NEVER_GRAD,
    NF4,
    OWN,
    PEERS,
    SQUARE,
    UP,
    Case,
    Experiment,
    Step,
    Target,
    against,
    peer,
    qft,
)

HELD = FORMATS[:4]  # that targets are set for: nf4, nf3, nf2, int4
BATCHES = (128, 512, 2048)  # rows of x

# A row of the table of targets -> what it holds; the bound is in the target.
ROWS = {
    "one token": "M=1, nf4, nf3, nf2 and int4, layers of 4096x14336 and 14336x4096: packed bytes against the machine's "
    "read bandwidth, and time against dense bf16, bitsandbytes' training and eval paths and torch's packed int4",
    "few tokens": "M=2 to 16: growth from M=1 to M=8, and torch's packed int4 at every M",
    "batch": "M=128, 512, 2048: forward, and forward with dx, against dense bf16",
    "scale_grad": "gradient of grouped scales at M=512 against one dense dW product; dW is never in memory whole",
    "quantize": "quantize nf4 4096x4096, and with a scale search of 33 candidates or more",
    "dequantize": "dequantize to bf16 against the machine's write bandwidth",
    "loftq": "LoftQ 4096x4096, r=64, T=5: seconds, and its error over the exact SVD's",
    "avx2": "the AVX2 kernels against the AVX-512 ones at M=1",
    "step": "a 4-bit LoRA step of the demo against the dense LoRA step",
    "earlier": "what an earlier version was held to, where no row above is stricter",
}


def _layer(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _one_token_every_format() -> Experiment:
    nf4, own = qft("matmul", rows=1), qft("matmul", OWN, rows=1)
    named = tuple(qft("matmul", fmt, rows=1) for fmt in FORMATS)
    smaller = tuple(case for case in named if case.fmt and case.fmt.startswith(("nf3", "nf2", "int3", "int2")))
    targets = (
        *against(nf4, "earlier", bitsandbytes=("speedup", 10), dense_torch=("speedup", 1.0)),
        *(Target(case, "speedup", 1.0, nf4, "earlier") for case in smaller),
        Target(own, "time ratio", 1.2, nf4, "earlier"),
    )
    return Experiment("One token, every format", (*named, own, *(peer(who, nf4) for who in PEERS)), targets)


def _one_token(shape: tuple[int, int]) -> Experiment:
    ours = {fmt: qft("matmul", fmt, rows=1, shape=shape) for fmt in HELD}
    by_isa = {
        (fmt, isa): qft("matmul", fmt, rows=1, shape=shape, kernel=isa) for fmt in HELD for isa in ("avx512", "avx2")
    }
    targets: list[Target] = []
    for fmt, case in ours.items():
        targets += (
            Target(case, "read bandwidth", 85, row="one token"),
            *against(
                case,
                "one token",
                dense_torch=("speedup", 3.0),
                bitsandbytes=("speedup", 25.0),
                bitsandbytes_eval=("speedup", 1.5),
                torch_int4=("speedup", 1.0),
            ),
            Target(by_isa[fmt, "avx2"], "speedup", 0.6, by_isa[fmt, "avx512"], "avx2"),
        )
    cases = chain.from_iterable((ours[fmt], by_isa[fmt, "avx512"], by_isa[fmt, "avx2"]) for fmt in HELD)
    peers = (peer(who, ours[NF4]) for who in PEERS)
    return Experiment(f"One token, {_layer(shape)}", (*cases, *peers), tuple(targets), headline=shape == DOWN)


def _few_tokens() -> Experiment:
    counts = (1, 2, 4, 8, 16)
    ours = [qft("matmul", fmt, rows=rows, shape=DOWN) for fmt in HELD for rows in counts]
    targets: list[Target] = []
    for fmt in HELD:
        one, *others = (case for case in ours if case.fmt == fmt)
        targets += (Target(case, "time ratio", 1.6, one, "few tokens") for case in others if case.rows == 8)
        targets += chain.from_iterable(against(case, "few tokens", torch_int4=("speedup", 1.0)) for case in others)
    peers = (peer(who, case) for who in PEERS[1:] for case in ours[: len(counts)])
    return Experiment(f"A few tokens, {_layer(DOWN)}", (*ours, *peers), tuple(targets))


def _over_rows(rows: int) -> Experiment:
    """Where the row kernels, the panels, dense torch and the peers cross."""
    case = qft("matmul", rows=rows)
    named = [qft("matmul", rows=rows, kernel=name) for name in ("avx512", "panel") if name == "panel" or rows <= 256]
    peers = ("bitsandbytes", "dense torch", *(NEVER_GRAD if rows <= 16 else ()))
    targets = against(case, "batch", dense_torch=("time ratio", 1.05)) if rows in BATCHES else ()
    series = f"matmul over rows of x, {_layer(SQUARE)}"
    return Experiment(f"M={rows}", (case, *named, *(peer(who, case) for who in peers)), targets, series=series)


def _many_tokens(verb: str, limit: float, shape: tuple[int, int]) -> Experiment:
    ours = [qft(verb, rows=rows, shape=shape) for rows in BATCHES]
    cases = (*ours, *(peer(who, case) for case in ours for who in ("bitsandbytes", "dense torch")))
    targets = chain.from_iterable(against(case, "batch", dense_torch=("time ratio", limit)) for case in ours)
    what = {"matmul": "forward", "train": "forward and dx"}[verb]
    headline = (verb, shape) == ("train", SQUARE)
    return Experiment(f"A batch, {what}, {_layer(shape)}", cases, tuple(targets), headline)


def _scale_grad(shape: tuple[int, int]) -> Experiment:
    grouped, channel = (qft("scale_grad", f"nf4 {group} f32", rows=512, shape=shape) for group in ("g64", "channel"))
    targets = against(grouped, "scale_grad", dense_torch=("time ratio", 1.15))
    cases = (grouped, channel, peer("dense torch", grouped))
    title = f"Gradient of the scales, {_layer(shape)}; dense torch: of the whole weight"
    return Experiment(title, cases, targets, headline=shape == SQUARE)


def _quantize() -> Experiment:
    plain = qft("quantize")
    searches = tuple(qft("quantize", fmt, search=True) for fmt in (NF4, "lm4 g64 f32"))
    targets = (
        Target(plain, "time", 5.0, row="quantize"),
        Target(searches[-1], "time", 60.0, row="quantize"),  # 33 candidates; nf4, whose levels have no mirror, tries 66
        *against(plain, "earlier", bitsandbytes=("speedup", 10)),
    )
    return Experiment("Quantize", (plain, *searches, peer("bitsandbytes", plain)), targets, headline=True)


def _dequantize() -> Experiment:
    ours = (*(qft("dequantize", fmt, into=True) for fmt in HELD), qft("dequantize"))
    targets = tuple(Target(case, "write bandwidth", 70, row="dequantize") for case in ours if case.into)
    return Experiment("Dequantize", (*ours, peer("bitsandbytes", ours[-1])), targets, headline=True)


def _loftq() -> Experiment:
    cases = tuple(qft("loftq", fmt, dtype="f32") for fmt in (NF4, "nf2 g64 f32"))
    bounds = (("time", 1000.0), ("error", 0.5))
    targets = tuple(Target(case, *bound, row="loftq") for case in cases for bound in bounds)
    return Experiment("LoftQ; its error is that over the exact SVD's", cases, targets)


def _step() -> Experiment:
    ours, dense = Step("qft", NF4), Step("dense torch")
    return Experiment("The demo's step", (ours, dense), (Target(ours, "time ratio", 1.15, dense, "step"),))


EXPERIMENTS = (
    *(_one_token(shape) for shape in (DOWN, UP)),
    _one_token_every_format(),
    _few_tokens(),
    *(_over_rows(2**power) for power in range(12)),
    _many_tokens("matmul", 1.05, DOWN),
    *(_many_tokens("train", 1.10, shape) for shape in (SQUARE, DOWN)),
    *(_scale_grad(shape) for shape in (SQUARE, DOWN)),
    _quantize(),
    _dequantize(),
    _loftq(),
    _step(),
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
