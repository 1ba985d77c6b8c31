"""qft report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .options import AsJson
from .output import print_result, quiet


@app.command()
def report(
    model: Annotated[Path, typer.Argument(help="A quantized model: anything qft.load reads.")],
    out: Annotated[Path, typer.Argument(help="The page to write, for example report.html.")],
    dense: Annotated[Path | None, typer.Option(help="The dense model it was made from, to measure errors.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a page about a model: bits, errors, size against dense, the last run's losses."""
    quiet()
    from .. import load
    from ..analysis.report_page import report_page
    from ..disk.directory import is_quantized
    from ..disk.files import replace_file
    from ..training import losses

    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"{out} cannot be a file; name one in a directory that there is, such as report.html")
    if dense is not None and is_quantized(dense):
        raise ValueError(f"{dense} is quantized; name the dense model that {model} was made from")
    opened = load(model)
    page = report_page(
        opened, model.resolve().name, None if dense is None else _dense(opened, dense), losses.last_run(model)
    )
    with replace_file(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print_result({"out": str(out), "bytes": len(page.encode())}, as_json, f"wrote {out}")


def _dense(model: Any, directory: Path) -> Any:
    """The dense model, of the quantized one's class."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no directory; give one written by save_pretrained")
    if not hasattr(type(model), "from_pretrained"):
        raise ValueError(f"{type(model).__name__} is not transformers' own, so its dense weights cannot be opened")
    return type(model).from_pretrained(directory, dtype="auto", local_files_only=True)
