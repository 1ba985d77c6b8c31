"""The honest table: qft and its peers timed in turn in one process, beside what the machine can do.

    python bench/speed.py               writes bench/results/cpu-speed.json; ten minutes, on a quiet machine
    python bench/speed.py --quick       5 rounds and nothing written, unless --output says where; so does --only TEXT

Every round calls each case of an experiment once, starting one case further on each time, so that drift of the machine
meets all alike. Before each call a buffer of four times the last-level cache is read, and then the same call runs on a
layer of 64 outputs: weights come from memory and code does not, as in a model; `--cache warm` leaves the first out.
Figures are medians with their extremes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import contenders
import jobs
import machine
from cases import Experiment, Item, Step, evaluate
from contenders import Ready, UnavailableError
from experiments import EXPERIMENTS

from qft import native
from qft.disk.files import replace_file
from qft.speed import limits
from qft.speed.clock import QUICK, SMALL, Call, Effort, before_each, cache_flush, interleave, spread
from qft.speed.roofline import bound

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "cpu-speed.json"
Limits = dict[str, float]  # what `limits.limits` measured
BUILD_LIMITS = {"seconds": 180, "bytes": 10 << 20}  # of the extension on 2 cores


def measure(experiment: Experiment, effort: Effort, flush: Call, limits: Limits) -> dict[str, Any]:
    """One experiment's entry in the report: a row for every case, the reasons of those that cannot run, the targets."""
    ready: dict[Item, Ready] = {}
    absent = []
    for case in experiment.cases:
        try:
            ready[case] = prepare(case)
        except UnavailableError as reason:
            absent.append({**_entry(case), "reason": str(reason)})
    flushes = [_before(case, flush) for case in ready]
    times = interleave([one.call for one in ready.values()], effort, flushes)
    rows = {case: row(case, one, seconds, limits) for (case, one), seconds in zip(ready.items(), times, strict=True)}
    targets = [evaluate(target, rows, limits) for target in experiment.targets]
    about = {"title": experiment.title, "headline": experiment.headline, "series": experiment.series}
    return {**about, "rows": [*rows.values()], "absent": absent, "targets": targets}


def _before(case: Item, flush: Call) -> Call:
    """What runs before a case, untimed; a whole job brings its own code into the caches."""
    if _is_job(case):
        return flush
    return before_each(flush, prepare(replace(case, shape=(SMALL, case.shape[1]))).call)


def prepare(case: Item) -> Ready:
    """A case, or a whole job, as a checked call; see `contenders.prepare`."""
    return jobs.prepare(case) if _is_job(case) else contenders.prepare(case)


def _is_job(case: Item) -> bool:
    return isinstance(case, Step) or case.verb == "loftq"


def _entry(case: Item) -> dict[str, Any]:
    fields = {("kernel_named" if key == "kernel" else key): value for key, value in asdict(case).items()}
    return {**fields, "name": case.name, "work": case.work}


def row(case: Item, ready: Ready, seconds: Sequence[float], limits: Limits) -> dict[str, Any]:
    """A case's median and spread, and how near it is to what the machine allows."""
    least, by = bound(ready.work, limits)
    figures = spread(seconds)
    return {
        **_entry(case),
        "kernel_used": ready.kernel or None,
        **figures,
        "relative_error": ready.error,
        "weight_bytes": ready.nbytes,
        "read_bytes": ready.work.read,
        "written_bytes": ready.work.written,
        "operations": ready.work.operations,
        "percent_of_roofline": 100 * least / figures["median_s"],
        "bound_by": by,
    }


def build_facts(seconds: float | None) -> dict[str, Any]:
    """Size of the compiled module, and the time its build took where it was given."""
    size = Path(native._native.__file__).stat().st_size
    in_time = None if seconds is None else seconds <= BUILD_LIMITS["seconds"]
    met = {"bytes": size <= BUILD_LIMITS["bytes"], "seconds": in_time}
    return {"bytes": size, "seconds": seconds, "limits": BUILD_LIMITS, "met": met}


def run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measure everything; the report as it is written."""
    report: dict[str, Any] = {
        "command": shlex.join(["python", "bench/speed.py", *_nameless(arguments, options.output)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options.commit or machine.commit(),
        "versions": machine.versions(),
        "machine": limits.processor(),
        "quick": options.quick,
        "cache": options.cache,
        "load_before": os.getloadavg()[0],
    }
    report["limits"] = found = limits.limits(5 if options.quick else 15)
    flush, report["flush_bytes"] = cache_flush() if options.cache == "cold" else (lambda: None, 0)
    report["build"] = build_facts(options.build_seconds)
    report["experiments"] = []
    chosen = [one for one in EXPERIMENTS if options.only.lower() in f"{one.title} {one.series}".lower()]
    for experiment in chosen:
        entry = measure(experiment, QUICK if options.quick else Effort(), flush, found)
        report["experiments"].append(entry)
        print(render(entry), flush=True)
    report["load_after"] = os.getloadavg()[0]
    return report


def _nameless(arguments: Sequence[str], output: Path | None) -> list[str]:
    """The arguments with the folders of this machine left out."""
    return [word if output is None or word != str(output) else output.name for word in arguments]


def render(entry: dict[str, Any]) -> str:
    """An experiment as lines of text."""
    lines = [f"\n{', '.join(part for part in (entry['series'], entry['title']) if part)}"]
    for one in entry["rows"]:
        spread = f"{1e3 * one['min_s']:.3g} .. {1e3 * one['max_s']:.3g}"
        lines.append(
            f"  {one['work']:34} {one['name']:42} {1e3 * one['median_s']:9.3f} ms  ({spread}, {one['rounds']} rounds)"
            f"  {one['percent_of_roofline']:.0f} % of roofline  {one['kernel_used'] or ''}"
        )
    lines += [f"  {one['work']:34} {one['name']:42} not run: {one['reason']}" for one in entry["absent"]]
    words = {True: "met", False: "MISSED", None: "not measured"}
    for one in entry["targets"]:
        other = f" against {one['against']}" if one["against"] else ""
        measured = "" if one["measured"] is None else f"{one['measured']:.3g}{one['unit']}, "
        lines.append(
            f"  [{one['row']}] {one['work']}, {one['subject']}: {one['measure']}{other} {measured}"
            f"{one['how']} {one['limit']:g}{one['unit']}: {words[one['met']]}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """0: measured, met or not; 2: it could not be, and one sentence says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds; nothing is written without --output")
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold", help="where weights are before a call")
    parser.add_argument("--only", default="", metavar="TEXT", help="experiments whose title holds this")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: bench/results/{RESULT.name}")
    parser.add_argument("--commit", help="recorded in the report; default: what git says")
    parser.add_argument("--build-seconds", type=float, metavar="S", help="what building the extension took on 2 cores")
    options = parser.parse_args(arguments)
    try:
        report = run(options, arguments)
        output = options.output or (None if options.quick or options.only else RESULT)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(output) as temporary:
                temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
            print(f"\n{output}")
    except (OSError, ValueError) as error:
        print(f"speed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
