"""Markdown of what `ggml.py` wrote. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_tables import table

NAME = "cpu-ggml.json"
TITLE = "## Against llama.cpp's ggml"
HOW_TO_READ = """\
The same layers in formats of about the same bits, timed in turn in one process. Both read the weight from memory: a
buffer of four times the last-level cache is read before each call, then the same call runs on 64 rows of the layer, so
that weights are cold and code is warm, as from one layer of a model to the next; neither is timed. ggml keeps its
threads between calls, and each type is timed in every kind of memory that has it ("CPU_REPACK": repacked for this CPU,
as llama.cpp does when it loads a model). It takes fp32 and rounds x to 8 bits inside; qft multiplies x as it is, in
bf16 or fp32. Before it was timed, every product was compared in float64 with its own dequantized weight.
"Weight error" is what the format loses of a normal weight: |dequantized - dense| / |dense|, ggml without an importance
matrix."""


def section(results: Path) -> str:
    """What docs/numbers.md says of ggml: the run, or that there is none."""
    path = results / NAME
    if not path.is_file():
        return f"{TITLE}\n\nNo run of `python bench/ggml.py` is in bench/results: not measured yet."
    run = json.loads(path.read_text())
    parts = (TITLE, HOW_TO_READ, where(run), threads(run), targets(run), ratios(run), one_token(run["rows"]))
    return "\n\n".join(parts)


def where(run: dict[str, Any]) -> str:
    at, peer = run["machine"], run["ggml"]
    pool = f"{peer['threads']} thread{'s' * (peer['threads'] > 1)}"
    quick = " **A quick run of 5 rounds, not for comparison.**" * run["quick"]
    return (
        f"{at['cpu']}, {at['cores']} cores, {pool} on either side, "
        f"{run['limits']['read'] / 1e9:.1f} GB/s measured read bandwidth, torch {run['versions']['torch']}. "
        f"ggml {peer['version']}, commit {peer['commit']}, built with {', '.join(peer['features'])}. Load average "
        f"{run['load_before']:.1f} before, {run['load_after']:.1f} after. `{run['command']}`, {run['date'][:10]}, "
        f"commit {run['commit']}.{quick}"
    )


def threads(run: dict[str, Any]) -> str:
    """Whose threads ran, and what the others would have cost."""
    if run["shared_threads"]:
        how = "Both sides run on the same OpenMP threads."
    else:
        how = "The sides have threads of their own; before a turn the other side's are asleep."
    costs = "; ".join(
        f"{who} takes {1e3 * one['usual_s']:.3g} ms as timed here and {1e3 * one['disturbed_s']:.3g} ms then"
        for who, one in run["disturbance"].items()
    )
    return f"{how} With the other side's threads awake, a token through the last layer (nf4 in fp32, q4_0): {costs}."


def targets(run: dict[str, Any]) -> str:
    """Each comparison that is held to a bound."""
    held = [one for one in run["comparisons"] if one["least"] is not None]
    if not held:
        return "This run has none of the layers that targets are set for."
    lines = [
        (
            f"{_layer(one)} M={one['rows']} {one['dtype']}: {one['qft']}",
            f"{one['ggml']} ({one['place']})",
            f"at least {one['least']:g}x",
            f"{one['ratio']:.2f}x",
            "met" if one["met"] else "**missed**",
        )
        for one in held
    ]
    tally = f"{sum(one['met'] for one in held)} of {len(held)} targets are met."
    return f"{tally}\n\n{table(('work', 'against', 'target', 'measured', ''), lines)}"


def ratios(run: dict[str, Any]) -> str:
    """qft's tokens per second over ggml's by rows of x."""
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for one in run["comparisons"]:
        key = (_layer(one), f"{one['qft']}, {one['dtype']}", one["ggml"])
        found.setdefault(key, {})[one["rows"]] = one["ratio"]
    rows = sorted({one["rows"] for one in run["comparisons"]})
    lines = [(*key, *(f"{by_rows[m]:.2f}x" for m in rows)) for key, by_rows in found.items()]
    head = ("layer", "qft, x", "ggml", *(f"M={m}" for m in rows))
    return f"### Tokens per second, times ggml's in its faster memory\n\n{table(head, lines)}"


def one_token(rows: Sequence[dict[str, Any]]) -> str:
    """Every row at the fewest rows of x."""
    fewest = min(row["rows"] for row in rows)
    lines = [
        (
            _layer(row),
            f"{row['who']}, {row['format']}, {row['place'] or row['dtype']}",
            f"{row['bits_per_weight']:.2f}",
            f"{100 * row['weight_error']:.1f} %",
            f"{1e3 * row['median_s']:.3g} ms",
            f"{1e3 * row['min_s']:.3g} .. {1e3 * row['max_s']:.3g}, {row['rounds']}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['bytes_per_s'] / 1e9:.1f}",
            f"{row['percent_of_read']:.0f} %",
        )
        for row in rows
        if row["rows"] == fewest
    ]
    head = (
        "layer",
        "who",
        "bits/weight",
        "weight error",
        "median",
        "min .. max, rounds",
        "tokens/s",
        "GB/s",
        "of read",
    )
    return f"### One token\n\n{table(head, lines)}"


def _layer(one: dict[str, Any]) -> str:
    return f"{one['shape'][0]}x{one['shape'][1]}"
