"""What every named format loses of a normal weight, with and without a search for scales, against its stored bits.

    python bench/format_errors.py      writes bench/results/format-errors.json; seconds

The error is |dequantized - weight| / |weight|, Frobenius, in float64. It is a property of the format: it depends on no
machine and on no timing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import torch

import qft
from qft.disk.files import replace_file
from qft.format import CODEBOOKS, INTEGERS
from qft.speed.check import relative_error, weight_like

RESULT = Path(__file__).resolve().parent / "results" / "format-errors.json"
SHAPE = (1024, 4096)


def formats() -> Iterator[str]:
    """Every named code at a group of 64 with fp16 scales, integers also with zero points; one with scales under dq."""
    for code in (*CODEBOOKS, *INTEGERS):
        yield f"{code} g64 f16"
        if code in INTEGERS:
            yield f"{code} g64 f16 zero"
    yield "nf4 g64 dq"


def errors(shape: tuple[int, int] = SHAPE) -> list[dict[str, Any]]:
    """A row for each format: stored bits per weight, and its error with and without the search."""
    w = weight_like(shape, torch.float32)
    rows = []
    for fmt in formats():
        plain, searched = qft.quantize(w, fmt), qft.quantize(w, fmt, search=True)
        lost, found = (relative_error(q.dequantize(), w) for q in (plain, searched))
        rows.append({"format": str(plain.format), "bits": plain.bits_per_weight, "error": lost, "searched": found})
    return sorted(rows, key=lambda row: (row["bits"], row["error"]))


def main(arguments: Sequence[str]) -> int:
    """0: measured and written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE", help=f"default: {RESULT.name}")
    options = parser.parse_args(arguments)
    report = {
        "command": "python bench/format_errors.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "shape": SHAPE,
        "rows": errors(),
    }
    with replace_file(options.output) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["rows"]:
        print(f"{row['format']:20} {row['bits']:.3f} bits  error {row['error']:.4f}  searched {row['searched']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
