"""docs/scaling.md and its figures, written from bench/results/scaling.json and nothing else.

python bench/scaling_page.py            writes them
python bench/scaling_page.py --check    writes nothing; exits with 1 where they differ from the results
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_tables import table
from scaling_figures import AXES, Point, Section, draw_layers, draw_models
from written import Draw, renew

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs") / "scaling.md"
FIGURES = {"layers": "figures/scaling-layers.png", "models": "figures/scaling-models.png"}

INTRODUCTION = """\
How time and memory grow with layers, rows of x, the rank of a LoRA, threads and models. Layers are timed as on
[the page of numbers](numbers.md): medians over interleaved rounds, results compared in float64 first, weights read from
memory; code is warm, as from one layer of a model to the next. "Extra" is the most by which resident memory rises
during a call, its results included. `dense bf16` is torch's own product with the same weight in bf16, with PEFT's LoRA
where there is one."""
ABOUT = {
    "size": "Square layers: one token, and forward and dx of a batch of {rows} rows.",
    "rows": "A 4096x4096 layer: time per row falls until arithmetic, not the reading of weights, sets the pace.",
    "rank": (
        "A 4096x4096 layer in training on {rows} rows, forward and backward, with the gradients of x and of both "
        "factors. The optimizer's state comes on top: AdamW keeps two fp32 numbers for each trained one."
    ),
    "threads": (
        "One token through a 4096x14336 layer, and forward and dx of {rows} rows through a 4096x4096 one. Beside them "
        "the bandwidth that the threads reach in reading alone."
    ),
}
TITLES = {
    "size": "Layer size",
    "rows": "Rows of x",
    "rank": "Rank of a LoRA",
    "threads": "Threads",
    "model": "Models",
}
MODELS = """\
Llamas of random weights with a vocabulary of 4096, so that layers make the model, and a LoRA of rank 16 on every linear
layer but the head. A step is forward, backward and AdamW on {tokens} tokens, without gradient checkpointing; a token is
a forward of one, nothing cached. Every row is a process of its own. "Peak" is the most resident memory of a step, less
what Python and its libraries hold before there is a model ({library} MB here); "stored" is the model's state, LoRA in
fp32 included."""
EXTRAPOLATION = """\
**Nothing below was measured.** A straight line, a + b * parameters, was fitted to the rows above by least squares, and
its value is given at larger sizes. The largest error of the line at a measured row stands behind it. The line takes for
granted that a larger model is more of the same layers and that it fits into memory; embedding and head of a larger
vocabulary come on top, 4 bytes for each of vocabulary x hidden in bf16. Activations and a LoRA of one rank grow more
slowly than parameters, so the line is likely to overstate stored bytes and peak."""


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    parts = [
        "# Scaling",
        "Written by `python bench/scaling_page.py` from bench/results; a test fails when they differ.",
    ]
    parts.append(INTRODUCTION)
    if any(name in report["sections"] for name in AXES):
        parts.append(f"![Time along each axis]({FIGURES['layers']})")
    for name, title in TITLES.items():
        section = report["sections"].get(name)
        if section is None:
            body = f"No run of `python bench/scaling.py --only {name}` is in bench/results: not measured yet."
        else:
            body = models(section) if name == "model" else layers(name, section)
        parts.append(f"## {title}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def where(section: Section) -> str:
    at = section["machine"]
    threads = f"{at['threads']} thread{'s' * (at['threads'] > 1)}"
    quick = " **A quick run, few points and rounds: not for comparison.**" * section["quick"]
    return (
        f"{at['cpu']}, {at['cores']} cores, {threads}, torch {section['versions']['torch']}. "
        f"Load average {section['load_before']:.1f} before, {section['load_after']:.1f} after. `{section['command']}`, "
        f"{section['date'][:10]}, commit {section['commit']}.{quick}"
    )


# ---- layers: a line for each place on the axis and each thing done, a column or two for each kind


WORDS: dict[str, Callable[[Point], str]] = {
    "size": lambda point: f"{point['size']}x{point['size']}",
    "rows": lambda point: f"{point['rows']}",
    "rank": lambda point: f"{point['rank']}",
    "threads": lambda point: f"{point['threads']}",
}


def layers(name: str, section: Section) -> str:
    """One section's table."""
    points = section["points"]
    kinds = list(dict.fromkeys(point["kind"] for point in points))
    found: dict[tuple[Any, ...], dict[str, Point]] = {}
    for point in points:
        found.setdefault((point[AXES[name]], point["what"]), {})[point["kind"]] = point
    lines = []
    for of in found.values():
        first = next(iter(of.values()))
        cells = [text for kind in kinds for text in _cells(name, of[kind], found)]
        extra = [f"{first['read'] / 1e9:.1f}"] if name == "threads" else []
        lines.append((WORDS[name](first), first["what"], *extra, *cells))
    head = [title for kind in kinds for title in _heads(name, kind)]
    extra = ["read GB/s"] if name == "threads" else []
    many = max(point["rows"] for point in points)
    about = ABOUT[name].format(rows=many)
    return f"{about}\n\n{table((name, 'work', *extra, *head), lines)}\n\n{where(section)}"


def _heads(name: str, kind: str) -> list[str]:
    if name == "size":
        return [kind, "stored MB", "extra MB"]
    if name == "rank":
        return [kind, "trained", "extra MB"]
    return [kind, "speedup" if name == "threads" else "extra MB"]


def _cells(name: str, point: Point, found: dict[tuple[Any, ...], dict[str, Point]]) -> list[str]:
    time, extra = milliseconds(point["median_s"]), megabytes(point["extra_bytes"])
    if name == "size":
        return [time, megabytes(point["stored_bytes"]), extra]
    if name == "rank":
        return [time, f"{point['trainable']:,}", extra]
    if name == "rows":
        return [time, extra]
    least = min(key[0] for key in found)
    return [time, f"{found[least, point['what']][point['kind']]['median_s'] / point['median_s']:.2f}x"]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{1e3 * seconds:.0f} ms"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}"


# ---- models


def models(section: Section) -> str:
    """Measured models, the lines through them, and what the lines say of larger ones."""
    points = section["points"]
    head = ("parameters", "kind", "stored MB", "step", "token", "peak MB", "tokens/s in training")
    measured = [
        (
            f"{point['parameters'] / 1e6:.0f} M",
            point["kind"],
            megabytes(point["stored_bytes"]),
            milliseconds(point["step_s"]),
            milliseconds(point["token_s"]),
            megabytes(point["peak_bytes"]),
            f"{section['tokens'] / point['step_s']:.0f}",
        )
        for point in points
    ]
    library = max(point["library_bytes"] for point in points)
    about = MODELS.format(tokens=section["tokens"], library=f"{library / 1e6:.0f}")
    parts = [about, table(head, measured), where(section), "### Larger models, extrapolated", EXTRAPOLATION]
    parts.append(table(("kind", "step", "token", "stored", "peak"), _lines(section["fits"])))
    head = ("model", "kind", "step", "token", "stored GB", "peak GB")
    larger = [
        (
            f"{one['name']} ({one['parameters'] / 1e9:.1f} G)",
            one["kind"],
            f"{one['step_s']:.1f} s",
            f"{one['token_s']:.2f} s",
            f"{one['stored_bytes'] / 1e9:.1f}",
            f"{one['peak_bytes'] / 1e9:.1f}",
        )
        for one in section["larger"]
    ]
    parts += [table(head, larger), f"![Models measured and extrapolated]({FIGURES['models']})"]
    return "\n\n".join(parts)


def _lines(fits: dict[str, dict[str, dict[str, float]]]) -> Iterable[Sequence[str]]:
    """Each line as a + b per billion parameters, and its largest error."""
    for kind, of in fits.items():
        yield (
            kind,
            *(_line(of[what], 1.0, "s") for what in ("step_s", "token_s")),
            *(_line(of[what], 1e9, "GB") for what in ("stored_bytes", "peak_bytes")),
        )


def _line(line: dict[str, float], scale: float, unit: str) -> str:
    return f"{line['a'] / scale:.3g} + {line['b'] * 1e9 / scale:.3g} {unit} per G, {100 * line['residual']:.0f} %"


# ---- files


def publish(root: Path, check: bool) -> list[str]:
    """Bring the page and its figures up to date with the results; what differed, written unless `check`."""
    results = root / "bench" / "results" / "scaling.json"
    if not results.is_file():
        raise FileNotFoundError(f"{results.name} is not in {results.parent.name}; run python bench/scaling.py")
    raw = results.read_bytes()
    report, digest = json.loads(raw), hashlib.sha256(raw).hexdigest()
    figures: dict[str, tuple[str, Draw]] = {}
    if any(name in report["sections"] for name in AXES):
        figures[f"docs/{FIGURES['layers']}"] = digest, lambda path: draw_layers(report, digest, path)
    if "model" in report["sections"]:
        figures[f"docs/{FIGURES['models']}"] = (
            digest,
            lambda path: draw_models(report["sections"]["model"], digest, path),
        )
    return renew(root, {str(PAGE): page(report)}, figures, check)


def main(arguments: Sequence[str]) -> int:
    """0: up to date, or made so; 1: --check found a difference; 2: nothing to publish, and one sentence says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something differs")
    options = parser.parse_args(arguments)
    try:
        differing = publish(ROOT, options.check)
    except (OSError, ValueError) as error:
        print(f"scaling_page: {error}", file=sys.stderr)
        return 2
    for name in differing:
        print(
            f"{name} differs from bench/results; run python bench/scaling_page.py" if options.check else f"wrote {name}"
        )
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
