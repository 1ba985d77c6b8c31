"""Seconds of a scale search in qft's kernels and in vectorised torch, on the CPU.

python bench/search_speed.py [--rounds 5]      writes bench/results/search-speed.json

Both do the same work, and the scales they find are compared: every factor on the absmax scale, rounded as it is stored,
nearest levels, squared error, the best of each group. The torch search keeps to what torch does well: chunks of rows
that stay in the cache, 32-bit indices, outputs written in place. It stops at scales; qft's time includes the packed
codes. They take turns; a time is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor

import qft
from qft import kernels, reference
from qft.format import Format
from qft.speed.limits import processor

RESULT = Path(__file__).resolve().parent / "results" / "search-speed.json"
FORMATS = ("lm2 g64 f16", "lm4 g64 f16", "nf4 g64 dq", "nf4 g64 f32", "int4 g64 f16", "int3 g64 f16 zero")
LARGE, SMALL = (4096, 4096), (512, 4096)  # qft alone; both
CHUNK = 1 << 16  # weights that torch searches at a time: a few buffers of them stay in a core's cache


def torch_search(weight: Tensor, fmt: Format) -> Tensor:
    """Scales fp32 `[out, groups]` of the best candidates, for fp32 weights whose rows are whole groups."""
    rows = max(1, CHUNK // weight.shape[1])
    return torch.cat([_search_rows(part, fmt) for part in weight.split(rows)])


def _search_rows(weight: Tensor, fmt: Format) -> Tensor:
    groups = weight.view(weight.shape[0], -1, fmt.group)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    levels = torch.tensor(sorted(set(fmt.levels)))
    midpoints, top = (levels[1:] + levels[:-1]) / 2, len(levels) - 1
    anchor = levels[levels.abs().argmax()]
    extreme = torch.where(high > -low, high, low)
    exact = (high - low) / top if fmt.zero else extreme / anchor
    if not fmt.zero and -anchor in levels:
        exact = exact.abs()
    dtype = reference.TORCH_DTYPE["f32" if fmt.scale == "dq" else fmt.scale]
    zeros = (-low / exact.to(dtype).float()).round_().clamp_(0, top) if fmt.zero else torch.zeros(())
    scaled, decoded = torch.empty_like(groups), torch.empty_like(groups)
    codes = torch.empty(groups.shape, dtype=torch.int32)
    best, least = torch.empty_like(exact), torch.full_like(exact, torch.inf)
    for factor in reference.search_factors(fmt):
        scales = (exact * factor).to(dtype).float()
        torch.mul(groups, 1 / scales, out=scaled)
        if fmt.is_integer:
            scaled.round_().add_(zeros).clamp_(levels[0].item(), levels[-1].item()).sub_(zeros)
            torch.mul(scaled, scales, out=decoded)
        else:
            torch.bucketize(scaled, midpoints, out_int32=True, out=codes)
            torch.index_select(levels, 0, codes.view(-1), out=decoded.view(-1))
            decoded.mul_(scales)
        error = decoded.sub_(groups).square_().sum(2, keepdim=True)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best[..., 0]


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(text: str, rounds: int) -> dict[str, Any]:
    """Median seconds of one format, and the share of groups in which both find the same scale."""
    fmt = Format.parse(text)
    large, small = torch.randn(LARGE) * 0.02, torch.randn(SMALL) * 0.02

    def ours(weight: Tensor, search: bool = True) -> Tensor:
        return kernels.quantize(weight, fmt, search=search)[1]

    same = float((ours(small).float() == torch_search(small, fmt)).float().mean())
    calls = {
        "qft": lambda: ours(small),
        "torch": lambda: torch_search(small, fmt),
        "qft large": lambda: ours(large),
        "qft large without a search": lambda: ours(large, search=False),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            times[name].append(seconds(call))
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    return {
        "format": text,
        "candidates": len(reference.search_factors(fmt)),
        "seconds": medians,
        "torch over qft": medians["torch"] / medians["qft"],
        "the same scale": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each (default 5)")
    parser.add_argument("--output", type=Path, default=RESULT, help="where the figures go")
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for text in FORMATS:
        rows.append(row := measure(text, given.rounds))
        took = {name: f"{1e3 * value:.1f} ms" for name, value in row["seconds"].items()}
        print(f"{text}, {row['candidates']} candidates: {took}, {row['torch over qft']:.1f}x", flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": machine.commit(),
        "machine": processor(),
        "versions": machine.versions(),
        "kernel": qft.explain("nf4 g64", *LARGE)["quantize"].kernel.name,
        "shapes": {"both": SMALL, "large": LARGE},
        "rows": rows,
    }
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
