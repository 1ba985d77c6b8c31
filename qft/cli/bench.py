"""qft bench."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .app import app
from .options import AsJson
from .output import new_table, print_result, progress

READ_ME = """\
ms: median of calls that took turns, weights out of the caches; spread: from the fastest to the slowest, of the median.
MB, GB/s: the least that must cross memory, and that over the time. dense: dense torch's time over this one's; under
scale_grad it computes the gradient of the whole weight. of roofline: the least time this machine allows by the limits
above, over the time taken, and what sets it."""


@app.command()
def bench(
    formats: Annotated[
        list[str] | None, typer.Option(help="A format; can be repeated. nf4, nf3, nf2 and int4 g64 f32 where left out.")
    ] = None,
    shape: Annotated[
        tuple[int, int] | None, typer.Option(help="OUT IN: features of the layer; 4096 14336 where left out.")
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(help="Rows of x; can be repeated. 1, 8 and 512 where left out.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of x and the dense weight: bfloat16 or float32.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(help="Of torch and kernels; torch's choice where left out.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds: 4096 x 4096, 3 rounds; not for comparison.")] = False,
    device: Annotated[str, typer.Option(help="cpu; a GPU has a benchmark of its own.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time every kernel on this machine, and say how far each is from its own roofline."""
    if device != "cpu":
        raise ValueError(f"qft bench times the CPU, not {device}; for a GPU say `make gpu-bench` in a checkout of qft")
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype {dtype!r} is not timed; use bfloat16 or float32")
    if threads is not None and threads < 1:
        raise ValueError(f"{threads} threads time nothing; use 1 or more")
    import torch

    from ..speed.short_table import SHORT_EFFORT, SHORT_LIMIT_ROUNDS, SMALL_SHAPE, Wanted, measure

    given: dict[str, Any] = {"formats": formats, "shape": shape, "rows": rows}
    if quick:
        given |= {"shape": shape or SMALL_SHAPE, "effort": SHORT_EFFORT, "limit_rounds": SHORT_LIMIT_ROUNDS}
    said = {name: value for name, value in given.items() if value}
    wanted = Wanted(dtype={"bfloat16": "bf16", "float32": "f32"}[dtype], **said)
    if threads:
        torch.set_num_threads(threads)
    with progress() as tell:
        found = measure(wanted, tell)
    if as_json:
        print_result(found, as_json, None)
        return
    print(_head(found, quick))
    print_result(found, as_json, _table(found))
    print(READ_ME)


def _head(found: dict[str, Any], quick: bool) -> str:
    at, limits = found["machine"], found["limits"]
    cache = max(at["caches"].values(), default=0) / 2**20
    lines = [
        f"{at['cpu']}, {at['threads']} threads on {at['cores']} cores, last-level cache {cache:.0f} MiB, "
        f"torch {found['versions']['torch']}, qft {found['versions']['qft']}",
        f"limits: read {limits['read'] / 1e9:.1f}, write {limits['write'] / 1e9:.1f}, copy {limits['copy'] / 1e9:.1f} "
        f"GB/s; dense product bf16 {limits['bf16'] / 1e12:.3g}, f32 {limits['f32'] / 1e12:.3g} TFLOP/s",
        f"layer {found['shape'][0]} x {found['shape'][1]}, x in {found['dtype']}; {found['seconds']:.0f} s in all",
    ]
    if found["load_before"] is not None and found["load_before"] > at["cores"] / 2:
        lines.append(f"load average {found['load_before']:.1f} before: other work was running, times are too long")
    if quick:
        lines.append("a quick run of 3 rounds: not for comparison")
    return "\n".join(lines)


def _table(found: dict[str, Any]) -> Any:
    table = new_table("", "kernel", "ms", "spread", "MB", "GB/s", "dense", "of roofline")
    table.collapse_padding, table.pad_edge = True, False  # 80 columns hold it
    shown = None
    for row in found["rows"]:
        if row["task"] != shown:
            table.add_section()
            table.add_row(f"[bold]{row['task']}")
        table.add_row(
            row["format"] or "dense",
            row["kernel"],
            f"{1e3 * row['median_s']:.3g}",
            f"{100 * (row['max_s'] - row['min_s']) / row['median_s']:.0f} %",
            f"{(row['read_bytes'] + row['written_bytes']) / 1e6:.1f}",
            f"{row['bytes_per_s'] / 1e9:.3g}",
            "" if row["dense_over_this"] is None else f"{row['dense_over_this']:.3g}x",
            f"{row['percent_of_roofline']:.0f} % {row['bound_by'][:6]}",
        )
        shown = row["task"]
    return table
