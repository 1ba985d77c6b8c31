"""qft demo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import AsJson
from .output import new_table, print_result, progress, quiet


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for table.json and figure.png.")] = Path("demo-out"),
    examples: Annotated[Path | None, typer.Option(help="Folder with the demo's model and texts.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each case.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a small model at 4, 3 and 2 bits and compare it with the dense one: about 5 minutes on 4 cores."""
    quiet()
    from ..demo import NAMES, STEPS, find_examples
    from ..demo import demo as run

    with progress() as tell:
        rows = run(find_examples(examples), out, tell, STEPS if steps is None else steps)
    table = new_table("perplexity on", "new domain", "own domain", "stored MB", "trainable", "seconds")
    for index, row in enumerate(rows):
        table.add_row(
            f"{row.bits} bits, {NAMES[row.method]}",
            f"{row.before:.2f} → {row.after:.2f}",
            f"{row.own_before:.2f} → {row.own_after:.2f}",
            f"{row.bytes / 1e6:.2f}",
            f"{row.trainable:,}",
            f"{row.seconds:.0f}",
            end_section=index + 1 < len(rows) and rows[index + 1].bits != row.bits,
        )
    table.caption = f"written to {out / 'table.json'} and {out / 'figure.png'}"
    print_result({"rows": [asdict(row) for row in rows], "out": str(out)}, as_json, table)
