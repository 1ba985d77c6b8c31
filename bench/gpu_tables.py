"""Markdown of what `gpu_speed.py` and tests/gpu/run.py wrote, and of the targets that no run has met or missed yet.

Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cases import evaluate
from gpu_cases import CROSSING, FEW, PERMUTES, ROWS, STEPS, TARGETS

NOT_MEASURED = "not measured"
HOW_TO_READ = """\
- A cell: median time per call in microseconds, then cuBLAS's bf16 time for the same work over it, then per cent of what
  the GPU allows (bytes at its copy bandwidth or operations at cuBLAS's speed, both measured in the same run).
- Calls are replayed in a CUDA graph over copies of weights and inputs that exceed L2 four times over; each result was
  compared with the reference before it was timed. `scale_grad` of dense torch is the gradient of the whole weight.
- `kernel cuda` is the small product, `kernel panel` dequantizes panels for cuBLAS; without a word the table chose."""


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def read(path: Path, kind: str) -> dict[str, Any]:
    """A report. OSError: there is none of that kind in the file."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise OSError(f"{path} is damaged: {error}") from None
    if report.get("kind") != kind:
        raise OSError(f"{path} holds no report of {kind}")
    return report


def targets(evaluated: Iterable[dict[str, Any]]) -> str:
    """Each target with its measured figure, met or missed by the medians as they are."""
    words = {True: "met", False: "**missed**", None: NOT_MEASURED + " yet"}
    lines = []
    for one in evaluated:
        measure = one["measure"] + (f" against {one['against']}" if one["against"] else "")
        measured = "" if one["measured"] is None else f"{one['measured']:.3g}{one['unit']}"
        limit = f"{one['how']} {one['limit']:g}{one['unit']}"
        lines.append((f"{one['work']}: {one['subject']}", measure, limit, measured, words[one["met"]]))
    return table(("work", "measure", "target", "measured", ""), lines)


def where(report: dict[str, Any]) -> str:
    """The GPU, the versions, the commit and the day."""
    at, versions = report["machine"], report["versions"]
    peers = "".join(
        f", {name} {version}" for name, version in versions.items() if name not in ("python", "torch", "qft")
    )
    return (
        f"{at['gpu']}, compute capability {at['capability']}, {at['multiprocessors']} multiprocessors, "
        f"{at['l2_bytes'] / 2**20:.0f} MiB L2, {at['bytes'] / 2**30:.0f} GiB, driver {at['driver']}, "
        f"CUDA {at['cuda']}; torch {at['torch']}{peers}; {report['date'][:10]}, commit {report['commit']}."
    )


def speed(report: dict[str, Any]) -> str:
    """The whole of a speed report."""
    runs = [run["limits"] for run in report["runs"] if run["limits"]]
    measured = "; ".join(
        f"{run['copy'] / 1e9:.0f} GB/s copy, {run['bf16'] / 1e12:.0f} TFLOP/s cuBLAS bf16" for run in runs
    )
    parts = [
        f"## GPU speed: {report['machine']['gpu']}",
        f"{where(report)} Measured, run by run: {measured}.",
        _spread(report),
    ]
    parts += [f"### Targets\n\n{targets(report['targets'])}", f"### Training steps\n\n{_steps(report)}", HOW_TO_READ]
    cases = [row for row in report["rows"] if "shape" in row]
    for shape in dict.fromkeys(tuple(row["shape"]) for row in cases):
        here = [row for row in cases if tuple(row["shape"]) == shape]
        for verb in dict.fromkeys(row["verb"] for row in here if row["rows"]):
            columns = [("", *(f"M={rows}" for rows in ROWS))]
            parts.append(f"### {verb} {shape[0]}x{shape[1]} bf16\n\n{_grid(columns[0], here, verb, ROWS)}")
        if any(not row["rows"] for row in here):
            heads, verbs = ("", "quantize", "dequantize"), ("quantize", "dequantize")
            parts.append(f"### Elementwise {shape[0]}x{shape[1]} bf16\n\n{_elementwise(heads, here, verbs)}")
    wrong = [f"- {row['key']}: {row.get('error') or row['reason']}" for row in report["rows"] if "median_s" not in row]
    wrong += [f"- {who}: {why}" for who, why in report["absent"].items()]
    return "\n\n".join([*parts, *(["### Not measured\n\n" + "\n".join(wrong)] if wrong else [])])


def _spread(report: dict[str, Any]) -> str:
    wide = sorted((row["q3_s"] - row["q1_s"]) / row["median_s"] for row in report["rows"] if "median_s" in row)
    if not wide:
        return "Nothing was measured."
    return (
        f"{len(wide)} cases; the middle half of a case's samples spans {100 * wide[len(wide) // 2]:.1f} % of its "
        f"median in the middle case, {100 * wide[-1]:.1f} % in the widest."
    )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return NOT_MEASURED
    if "median_s" not in row:
        return "error" if "error" in row else "not run"
    ratio = f", {row['speedup']:.3g}x" if row["speedup"] is not None else ""
    return f"{1e6 * row['median_s']:.4g}{ratio}, {row['percent_of_roofline']:.0f} %"


def _grid(head: Sequence[str], rows: Sequence[dict[str, Any]], verb: str, columns: Sequence[int]) -> str:
    at = {(row["name"], row["rows"]): row for row in rows if row["verb"] == verb}
    names = dict.fromkeys(name for name, _ in at)

    def cell(name: str, column: int) -> str:
        asked = ", kernel " not in name or column in (FEW if name.endswith(PERMUTES) else CROSSING)
        return _cell(at.get((name, column))) if asked else ""

    return table(head, ((name, *(cell(name, column) for column in columns)) for name in names))


def _elementwise(head: Sequence[str], rows: Sequence[dict[str, Any]], verbs: Sequence[str]) -> str:
    at = {(row["name"], row["verb"]): row for row in rows if not row["rows"]}
    names = dict.fromkeys(name for name, _ in at)
    return table(head, ((name, *(_cell(at.get((name, verb))) for verb in verbs)) for name in names))


def _steps(report: dict[str, Any]) -> str:
    done = {row["name"]: row for row in report["rows"] if row["work"] == STEPS[0].work}
    lines = []
    for step in STEPS:
        row = done.get(step.name)
        if row is None or "median_s" not in row:
            lines.append((step.name, NOT_MEASURED if row is None else "error", "", "", "", ""))
            continue
        ratio = "" if row["speedup"] is None else f"{row['speedup']:.3g}x"
        sizes = (f"{row[name] / 2**30:.2f}" for name in ("peak_bytes", "model_bytes"))
        lines.append((step.name, f"{1e3 * row['median_s']:.1f}", ratio, *sizes, f"{row['trained']:,}"))
    head = (STEPS[0].work, "ms", "dense LoRA's time over it", "peak GiB", "model GiB", "trained")
    return table(head, lines)


def tests(report: dict[str, Any]) -> str:
    """The whole of a test report: counts by file, then what failed and what was not run."""
    outcomes = ("passed", "failed", "not run")
    files: dict[str, dict[str, int]] = {}
    for test in report["tests"]:
        count = files.setdefault(test["name"].partition("::")[0], dict.fromkeys(outcomes, 0))
        count[test["outcome"]] += 1
    grid = table(("file", *outcomes), ((name, *map(str, count.values())) for name, count in files.items()))
    build = f"Built in {report['build_s']:.0f} s, tested in {report['tests_s']:.0f} s."
    parts = [f"## GPU tests: {report['machine']['gpu']}", f"{where(report)} {build}", grid]
    for outcome in outcomes[1:]:
        lines = {f"- {t['name']}: {_in_a_line(t['why'])}" for t in report["tests"] if t["outcome"] == outcome}
        parts += [f"### {outcome.capitalize()}\n\n" + "\n".join(sorted(lines))] if lines else []
    return "\n\n".join(parts)


def _in_a_line(why: str) -> str:
    """Of a traceback its first error, else the first line; the report holds the rest."""
    lines = why.strip().splitlines() or ["no word"]
    return next((line.removeprefix("E ").strip() for line in lines if line.startswith("E ")), lines[0])[:300]


def section(results: Path) -> str:
    """What docs/numbers.md says of GPUs: every report of a real run, or that there is none."""
    reports = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    writers = {"gpu speed": speed, "gpu tests": tests}
    parts = [writers[one["kind"]](one) for one in reports if isinstance(one, dict) and one.get("kind") in writers]
    if not any(one.get("kind") == "gpu speed" for one in reports if isinstance(one, dict)):
        unmet = targets(evaluate(target, {}, {}) for target in TARGETS)
        absent = "No run of `make gpu-bench` is in bench/results: nothing here has been measured on a GPU yet."
        parts.insert(0, f"## GPU speed\n\n{absent}\n\n### Targets\n\n{unmet}")
    return "\n\n".join(parts)
