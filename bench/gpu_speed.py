"""qft on one GPU against cuBLAS and, where they are installed, bitsandbytes and gemlite; and whole training steps.

    python bench/gpu_speed.py                  writes bench/results/<gpu>-<date>.json and .md, in under nine minutes
    python bench/gpu_speed.py --resume FILE    goes on with what FILE has not got: same GPU, same commit

A second call goes on with the file of the day. Each case is compared with the reference, then timed: every call in a
CUDA graph, over copies of its weights and inputs that exceed L2 four times over, 128 at most. Figures are medians of
replays with their quartiles. Copy bandwidth and cuBLAS's peak are measured in every run. A training step is timed
whole, as it is called. The process that measures is replaced when it dies: the case it died of is an error in the
report, and the others go on.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import gpu_probe
import gpu_tables
import machine
import torch
from cases import Case, evaluate
from contenders import UnavailableError, work
from gpu_cases import BNB, BNB_DEQUANTIZE, DENSE, GEMLITE, ITEMS, TARGETS, Item, Step, key
from gpu_contenders import Ready, packed, prepare
from gpu_step import training_step

HERE = Path(__file__).resolve().parent
SAMPLES = 11  # replays timed of each case
CASE_S, STEP_S = 5, 45  # seconds that must be left for another case, another training step
GRACE_S = 10  # seconds after its time that a process is stopped
Row = dict[str, Any]


# ---- rows of the report


def entry(item: Item) -> Row:
    fields = {("kernel_named" if name == "kernel" else name): value for name, value in asdict(item).items()}
    return {"key": key(item), "work": item.work, "name": item.name, **fields}


def spread(samples: Sequence[float]) -> Row:
    first, median, third = statistics.quantiles(samples, n=4)
    return {"median_s": median, "q1_s": first, "q3_s": third, "samples": len(samples)}


def row(case: Case, ready: Ready, seconds: Sequence[float], limits: dict[str, float]) -> Row:
    """A case's times, and how near they are to what this GPU allows: bytes at the copy's speed, or operations at
    cuBLAS's, whichever takes longer."""
    least = work(case, ready.nbytes)
    memory, arithmetic = least.nbytes / limits["copy"], least.operations / limits["bf16"]
    figures = spread(seconds)
    return {
        **entry(case),
        **figures,
        "kernel_used": ready.kernel or None,
        "copies": len(ready.calls),
        "relative_error": ready.error,
        "weight_bytes": ready.nbytes,
        "read_bytes": least.read,
        "written_bytes": least.written,
        "operations": least.operations,
        "gb_per_s": least.nbytes / figures["median_s"] / 1e9,
        "percent_of_roofline": 100 * max(memory, arithmetic) / figures["median_s"],
        "bound_by": "arithmetic" if arithmetic > memory else "memory",
    }


def measure(item: Item, gpu: Any, limits: dict[str, float], device: str = "cuda") -> Row:
    """A row with times; or with the reason why there are none. `gpu` times and says how many copies exceed L2."""
    try:
        if isinstance(item, Step):
            packed.cache_clear()
            step = training_step(item, device)
            return {**entry(item), **spread(step.pop("seconds")), **step}
        with torch.no_grad():
            ready = prepare(item, gpu.rotation, device)
            return row(item, ready, gpu.graph(ready.calls), limits)
    except UnavailableError as reason:
        return {**entry(item), "reason": str(reason)}
    except ValueError as error:
        return {**entry(item), "error": str(error)}


# ---- one run


def limits_of(gpu: Any) -> dict[str, float]:
    """Bytes per second copied, both directions counted; operations per second of cuBLAS's bf16 product."""
    source = gpu.random_bytes(1 << 30)
    copy = statistics.median(gpu.graph([partial(torch.empty_like(source).copy_, source)]))
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = statistics.median(gpu.graph([partial(torch.mm, a, b)]))
    return {"copy": 2 * source.nbytes / copy, "bf16": 2 * 8192**3 / product}


def session(items: Sequence[Item], known: dict[str, float], until: float) -> Iterator[Any]:
    """In a process of its own: what the machine can do, then for each item its key and, once measured, its row."""
    gpu = gpu_probe.Gpu("no compiled probes are needed", quick=False)
    gpu.samples = SAMPLES
    if not known:
        known = limits_of(gpu)
        yield {"limits": known, "clocks": list(gpu.clocks())}
    for item in items:
        if time.monotonic() + (STEP_S if isinstance(item, Step) else CASE_S) > until:
            return
        yield key(item)
        yield measure(item, gpu, known)


Session = Callable[[Sequence[Item], dict[str, float], float], Iterator[Any]]


def gather(report: Row, items: Sequence[Item], run: Session, until: float, save: Callable[[], None]) -> None:
    """Measure what the report lacks until the time is up. What kills a session is left to an error row."""
    this = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "limits": {}, "clocks": []}
    todo = [item for item in items if key(item) not in {row["key"] for row in report["rows"]}]
    if todo:
        report["runs"].append(this)
    while todo and time.monotonic() < until - CASE_S:
        left, begun, saved = until - time.monotonic(), "", time.monotonic()
        share = max(left / 2, min(left, 60.0))  # one that hangs leaves half of the time to the others
        known, words, before = this["limits"], {key(item): item for item in todo}, len(todo)
        for got in gpu_probe.isolated(partial(run, todo, known, time.monotonic() + share), share + GRACE_S):
            if isinstance(got, dict) and "limits" in got:
                this |= got
            elif isinstance(got, dict):
                report["rows"].append(got | {"run": len(report["runs"]) - 1})
                todo, begun = [item for item in todo if key(item) != got["key"]], ""
                if time.monotonic() > saved + 1:
                    save()
                    saved = time.monotonic()
            elif got in words:
                begun = got
            elif begun:
                report["rows"].append({**entry(words[begun]), "error": got, "run": len(report["runs"]) - 1})
                todo = [item for item in todo if key(item) != begun]
            else:
                raise OSError(f"nothing could be measured: {got}")
        save()
        if len(todo) == before:  # what is next takes longer than the time that is left
            return


def finish(report: Row) -> Row:
    """The report with what compares its rows: time of cuBLAS's dense product over each, and the targets."""
    timed = {row["key"]: row for row in report["rows"] if "median_s" in row}
    dense_s = {row["work"]: row["median_s"] for row in timed.values() if row["who"] in (DENSE, "dense LoRA")}
    for one in timed.values():
        one["speedup"] = dense_s[one["work"]] / one["median_s"] if one["work"] in dense_s else None
    rows = {item: timed[key(item)] for item in ITEMS if key(item) in timed}
    report["targets"] = []
    for target in TARGETS:
        at = rows.get(target.subject, {}).get("run", -1)
        report["targets"].append(evaluate(target, rows, report["runs"][at]["limits"]))
    return report


def absent_peers() -> dict[str, str]:
    """Peers that are not installed, and that they are not."""
    packages = {BNB: "bitsandbytes", BNB_DEQUANTIZE: "bitsandbytes", GEMLITE: "gemlite"}
    return {who: "not installed" for who, package in packages.items() if importlib.util.find_spec(package) is None}


def begin(options: argparse.Namespace, at: Row, output: Path) -> Row:
    """A new report, or the one in `output` to go on with.

    Raises:
        OSError: that one is of another GPU or commit.
    """
    commit = options.commit or machine.commit()
    if options.resume is None and not output.exists():
        return {
            "kind": "gpu speed",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit,
            "machine": at,
            "versions": machine.versions(),
            "absent": absent_peers(),
            "runs": [],
            "rows": [],
        }
    report = gpu_tables.read(output, "gpu speed")
    was = (report["machine"]["gpu"], report["commit"])
    if (was[0], was[1].removesuffix("+")) != (at["gpu"], commit.removesuffix("+")):  # the report itself is a change
        raise OSError(f"{output} is of {was[0]} at commit {was[1]}; start another file with --output")
    return report


def run(options: argparse.Namespace) -> int:
    until = time.monotonic() + options.budget
    at = gpu_probe.found_gpu()
    name = f"{gpu_probe.file_name(at['gpu'])}-{datetime.now(UTC):%Y-%m-%d}.json"
    output = options.resume or options.output or HERE / "results" / name
    report = begin(options, at, output)
    items = [item for item in ITEMS if item.who not in report["absent"] and options.only in key(item)]

    def save() -> None:
        gpu_probe.save(finish(report), output)

    gather(report, items, session, until, save)
    save()
    text = gpu_tables.speed(report)
    output.with_suffix(".md").write_text(text + "\n")
    print(text)
    done = {row["key"]: row for row in report["rows"]}
    errors = [row["error"] for row in done.values() if "error" in row]
    missing = sum(key(item) not in done for item in items)
    more = f"; {missing} are left: go on with --resume {output}" if missing else ""
    print(f"\n{output}: {len(done)} cases, {len(errors)} errors{more}")
    return 1 if errors else 0


def main(argv: Sequence[str]) -> int:
    """0: measured, as far as time allowed; 1: the report holds errors; 2: it could not be, and a sentence says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: bench/results/<gpu>-<date>.json")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with this report")
    parser.add_argument("--budget", type=float, default=420, metavar="S", help="seconds; 420 unless told")
    parser.add_argument("--commit", help="recorded in the report; default: what git says")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this, such as 'M=16 8192'")
    options = parser.parse_args(argv)
    try:
        return run(options)
    except OSError as error:
        print(f"gpu_speed: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
