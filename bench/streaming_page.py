"""Markdown of what `streaming.py` wrote. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_tables import table

NAME = "streaming.json"
HOW_TO_READ = """\
A checkpoint of random bf16 weights in the shape of a 7B Llama is quantized from one directory into another, checksums
and the wait for the disk included, imports not. The disk's rate is that of reading the same files from front to back,
none of them cached, once before and once after. Peak memory is the kernel's VmHWM of the whole process, Python and
torch included."""


def section(results: Path) -> str:
    """What docs/numbers.md says of streaming: the run, or that there is none."""
    path = results / NAME
    if not path.is_file():
        return "## Streaming\n\nNo run of `python bench/streaming.py` is in bench/results: not measured yet."
    return f"## Streaming\n\n{HOW_TO_READ}\n\n{_lines(json.loads(path.read_text()))}"


def _lines(run: dict[str, Any]) -> str:
    targets, at = run["targets"], run["machine"]
    before, after = (f"{rate / 1e9:.2f}" for rate in run["disk_rates"])
    rows = [
        ("read", f"{run['bytes_read'] / 1e9:.2f} GB in {run['files_read']} files", "", ""),
        ("written", f"{run['bytes_written'] / 1e9:.2f} GB in {run['files_written']} files", "", ""),
        ("seconds", f"{run['seconds']:.1f}", "", ""),
        ("rate", f"{run['rate'] / 1e9:.2f} GB/s of what is read", "", ""),
        ("the disk's own", f"{run['disk_rate'] / 1e9:.2f} GB/s ({before} before, {after} after)", "", ""),
        ("share of it", f"{run['share']:.1f} %", f"at least {targets['share']['least']:.0f} %", _met(targets["share"])),
        (
            "peak memory",
            f"{run['peak'] / 1e9:.2f} GB",
            f"at most {targets['memory']['most'] / 1e9:.0f} GB",
            _met(targets["memory"]),
        ),
    ]
    where = (
        f"{at['cpu']}, {at['cores']} cores, {at['threads']} threads, torch {run['versions']['torch']}. Load average "
        f"{run['load_before']:.1f} before, {run['load_after']:.1f} after. `{run['command']}`, {run['date'][:10]}, "
        f"commit {run['commit']}."
    )
    return f"{table((run['format'], 'measured', 'target', ''), rows)}\n\n{where}"


def _met(target: dict[str, Any]) -> str:
    return "met" if target["met"] else "**missed**"
