"""docs/ladder.md, its figure and README's summary, written from bench/results/methods-*.json and nothing else.

python bench/methods_page.py
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import methods
from publish import replace_block, table
from written import renew

Rows = Sequence[dict[str, Any]]


def publish(root: Path, check: bool = False) -> list[str]:
    """Bring the page and the figure up to date with the results; what differed, written unless `check`."""
    rows = methods.read()
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    blocks = {f"docs/{methods.PAGE.name}": body(rows), "README.md": verdicts(rows)}
    pages = {name: replace_block((root / name).read_text(), "ladder", block) for name, block in blocks.items()}
    figures = {f"docs/{methods.FIGURE}": (digest, partial(draw, rows, digest))}
    return renew(root, pages, figures, check)


def body(rows: Rows) -> str:
    """The measured part of the page."""
    parts = [verdicts(rows)]
    bar = _of(rows, None, "dense", methods.RANK)
    parts.append(
        f"Medians over the seeds, least and greatest in brackets. Dense model, LoRA of rank "
        f"{methods.RANK}: {_spread(bar, 'before')} → {_spread(bar, 'after')} on the new domain, "
        f"{_spread(bar, 'own_before')} → {_spread(bar, 'own_after')} on its own."
    )
    for rank, title in (
        (methods.RANK, f"LoRA of rank {methods.RANK}"),
        (methods.LOW_RANK, f"LoRA of rank {methods.LOW_RANK}"),
        (0, "Scales alone (PEQA)"),
    ):
        parts.append(f"### {title}\n\n{ladder(rows, rank)}")
    return "\n\n".join(parts)


def ladder(rows: Rows, rank: int) -> str:
    """Every format and start at one rank."""
    lines = []
    for fmt in (*methods.FORMATS, methods.PLAN):
        for start in dict.fromkeys(row["start"] for row in rows if row["format"] == fmt and row["rank"] == rank):
            found = _of(rows, fmt, start, rank)
            over = _over_dense(rows, found)
            lines.append((
                f"`{fmt}`", start, _spread(found, "before"), _spread(found, "after"), f"{over:+.1f} %",
                f"{_median(found, 'own_before'):.2f} → {_median(found, 'own_after'):.2f}",
                f"{_median(found, 'bytes') / 1e6:.2f}", f"{_median(found, 'start_seconds'):.1f}", str(len(found)),
            ))  # fmt: skip
    head = ("format", "start", "before", "after", "over dense", "own domain", "stored MB", "start, s", "seeds")
    return table(head, lines)


def verdicts(rows: Rows) -> str:
    """What the ladder was asked, and what it says."""
    said = []
    asked = ("cloq", "qera_exact", "qera_diag", "loftq", "plain")
    for fmt in [fmt for fmt in methods.FORMATS if fmt.split()[0].endswith("2")]:
        found = {start: _median(_of(rows, fmt, start, methods.RANK), "before") for start in asked}
        chain = " < ".join(f"{start} {found[start]:.2f}" for start in sorted(asked, key=lambda s: found[s]))
        as_asked = sorted(asked, key=lambda s: found[s]) == list(asked)
        said.append(f"- `{fmt}`, perplexity before tuning: {chain}{'' if as_asked else ' (not the order expected)'}.")
    for rank in (methods.RANK, methods.LOW_RANK):
        bar = _median(_of(rows, None, "dense", rank), "after")
        small = [row for row in rows if row["rank"] == rank and row["bits"] and row["bits"] <= 2.25]
        names = {(row["format"], row["start"]) for row in small}
        best = min(names, key=lambda name: _over_dense(rows, _of(rows, *name, rank)))
        over, after = _over_dense(rows, _of(rows, *best, rank)), _median(_of(rows, *best, rank), "after")
        said.append(
            f"- After tuning at rank {rank}, at most 2.25 stored bits: best is `{best[0]}` from {best[1]}, "
            f"{after:.2f}, {over:+.2f} % over dense LoRA's {bar:.2f}."
        )
    return "\n".join(said)


def _of(rows: Rows, fmt: str | None, start: str, rank: int) -> list[dict[str, Any]]:
    found = [row for row in rows if (row["format"], row["start"], row["rank"]) == (fmt, start, rank)]
    if not found:
        raise ValueError(f"bench/results holds no run of {fmt}, {start}, rank {rank}; run python bench/methods.py")
    return found


def _median(rows: Rows, name: str) -> float:
    return statistics.median(row[name] for row in rows)


def _over_dense(rows: Rows, found: Rows) -> float:
    """Per cent that tuned runs lie above the dense model's of their rank and seed: the median over seeds."""
    bars = {row["seed"]: row["after"] for row in _of(rows, None, "dense", found[0]["rank"] or methods.RANK)}
    return statistics.median(100 * (row["after"] / bars[row["seed"]] - 1) for row in found)


def _spread(rows: Rows, name: str) -> str:
    values = [row[name] for row in rows]
    if max(values) - min(values) < 0.005:
        return f"{values[0]:.2f}"
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


def draw(rows: Rows, digest: str, path: Path) -> None:
    """Perplexity before tuning, and above the dense model's after it, over stored bits; the PNG names its results."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(10.5, 4.6), dpi=130, layout="constrained")
    before, after = figure.subplots(1, 2)
    for axis, height in ((before, lambda found: _median(found, "before")), (after, partial(_over_dense, rows))):
        for start, color in methods.COLORS.items():
            points = {fmt: _of(rows, fmt, start, methods.RANK) for fmt in methods.FORMATS}
            at = {fmt.split()[0]: (_median(found, "bits"), height(found)) for fmt, found in points.items()}
            line = [at[code] for code in ("lm2", "nf3", "nf4")]
            axis.plot(*zip(*line, strict=True), "o-", color=color, label=start, markersize=4, linewidth=1.4)
            for code, marker, aside in (("nf2", "v", 0.06), ("int2", "s", 0.12)):
                axis.plot(at[code][0] + aside, at[code][1], marker, color=color, markersize=5, markerfacecolor="none")
        planned = _of(rows, methods.PLAN, "cloq", methods.RANK)
        axis.plot(_median(planned, "bits"), height(planned), "*", color=methods.COLORS["cloq"], markersize=11)
        axis.set_xlabel(
            "stored bits per weight (lines: nf4, nf3, lm2; beside lm2: ▽ nf2, □ int2; ★ bit plan, cloq)", fontsize=8
        )
        axis.grid(color="#EEEEEE")
    before.set_yscale("log")
    before.yaxis.set_major_locator(FixedLocator([40, 45, 50, 60, 80, 100, 140]))
    before.yaxis.set_minor_locator(NullLocator())
    before.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    before.axhline(
        _median(_of(rows, None, "dense", methods.RANK), "before"), color="#555555", linewidth=0.8, linestyle="--"
    )
    before.set_title("Before tuning: perplexity on the new domain (dashed: dense)", loc="left", fontsize=9)
    after.axhline(0, color="#555555", linewidth=0.8, linestyle="--")
    after.set_title(
        f"After {methods.STEPS} steps, rank 16: per cent above the dense model, tuned alike", loc="left", fontsize=9
    )
    after.legend(fontsize=8, title="start", title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Source": digest})


if __name__ == "__main__":
    for name in publish(methods.ROOT):
        print(f"wrote {name}")
