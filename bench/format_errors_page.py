"""Markdown of what `format_errors.py` wrote. Standard library only."""

from __future__ import annotations

from typing import Any

from gpu_tables import table


def section(report: dict[str, Any], figure: str) -> str:
    """What docs/numbers.md says of formats' errors."""
    lines = [
        (f"`{row['format']}`", f"{row['bits']:.3f}", f"{row['error']:.4f}", f"{row['searched']:.4f}")
        for row in report["rows"]
    ]
    about = (
        f"|dequantized - weight| / |weight| of a normal weight {report['shape'][0]}x{report['shape'][1]}, with absmax "
        f"scales and with `search=True`. `{report['command']}`, {report['date'][:10]}, commit {report['commit']}."
    )
    head = ("format", "stored bits", "error", "error with search")
    return f"## Errors of formats\n\n{about}\n\n![Error against stored bits]({figure})\n\n{table(head, lines)}"
