"""Tables of the README and docs/numbers.md, written from bench/results and nothing else.

python bench/publish.py            writes both, and the figure beside them
python bench/publish.py --check    writes nothing; exits with 1 where they differ from the results
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_tables
import streaming_page
from gpu_tables import table

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("bitsandbytes", "bitsandbytes eval", "dense torch", "torch int4")
NF4 = "nf4 g64 f32"
FIGURE = "figures/cpu-speed.png"
# Okabe and Ito's colours, told apart by every kind of colour vision
COLORS = dict(zip(("qft", *PEERS), ("#0072B2", "#D55E00", "#E69F00", "#555555", "#009E73"), strict=True))
MADE_BY = {"cpu-speed": "run `python bench/speed.py`", "demo": "run `qft demo` and copy demo-out/table.json there"}
HOW_TO_READ = """\
- Times are medians over interleaved rounds in one process: a round calls every case of a section once. Compare within a
  section; between sections, and between machines, compare ratios.
- "cold": a buffer of four times the last-level cache is read before each call, so that weights come from memory as they
  do in a model. Every result was compared with the reference's, in float64, before it was timed.
- qft is one path for training and inference, timed with an input that requires grad; so are bitsandbytes' training path
  (`matmul_4bit`) and dense torch. "bitsandbytes eval" is its inference path on repacked weights, "torch int4" is
  `_weight_int4pack_mm_for_cpu`; neither of the two can train.
- "of roofline": the least time the machine allows (stored bytes at the measured read and write bandwidth, or operations
  at the measured speed of a dense product, whichever takes longer) over the time taken.
- A target is met or missed by the medians as they are, without rounding and without allowance for noise.
"""


def machine_line(speed: dict[str, Any]) -> str:
    """Where, when and by which command the times were taken."""
    at, limits, versions = speed["machine"], speed["limits"], speed["versions"]
    quick = " **A quick run of 5 rounds, not for comparison.**" if speed["quick"] else ""
    cache = max(at["caches"].values(), default=0) / 2**20
    return (
        f"{at['cpu']}, {at['cores']} cores, {at['threads']} threads, {cache:.0f} MiB last-level cache; "
        f"measured: {limits['read'] / 1e9:.1f} GB/s read, {limits['write'] / 1e9:.1f} GB/s write, "
        f"{limits['copy'] / 1e9:.1f} GB/s copy, {limits['bf16'] / 1e12:.2f} TFLOP/s dense bf16. "
        f"torch {versions['torch']}, bitsandbytes {versions['bitsandbytes']}. Caches {speed['cache']}. "
        f"Load average {speed['load_before']:.1f} before, {speed['load_after']:.1f} after. "
        f"`{speed['command']}`, {speed['date'][:10]}, commit {speed['commit']}.{quick}"
    )


def comparison(speed: dict[str, Any]) -> str:
    """The headline experiments: a line for each thing qft did, and the peers at the same work."""
    lines = []
    for experiment in speed["experiments"]:
        for row in experiment["rows"]:
            if experiment["headline"] and row["who"] == "qft" and not row["kernel_named"]:
                others = {
                    o["who"]: o["median_s"]
                    for o in experiment["rows"]
                    if o["work"] == row["work"] and o["who"] != "qft"
                }
                cells = (_versus(others.get(who), row["median_s"]) for who in PEERS)
                lines.append((row["work"], row["name"].removeprefix("qft, "), f"**{_ms(row['median_s'])}**", *cells))
    return table(("work", "format", "qft", *PEERS), lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{1e3 * seconds:.0f} ms"


def _versus(other: float | None, ours: float) -> str:
    return "" if other is None else f"{_ms(other)} ({other / ours:.2g}x)"


def targets(speed: dict[str, Any], stage: str) -> str:
    """Every target of a stage with its measured figure."""
    lines = []
    for one in (target for experiment in speed["experiments"] for target in experiment["targets"]):
        if one["stage"] == stage:
            what = f"{one['work']}: {one['subject']}"
            measure = one["measure"] + (f" against {one['against']}" if one["against"] else "")
            limit = f"{one['how']} {one['limit']:g}{one['unit']}"
            measured = "" if one["measured"] is None else f"{one['measured']:.3g}{one['unit']}"
            lines.append((what, measure, limit, measured, _met(one["met"])))
    if stage == "now":
        build = speed["build"]
        for name, unit, scale in (("seconds", "s on 2 cores", 1), ("bytes", "MiB", 2**20)):
            measured = "" if build[name] is None else f"{build[name] / scale:.3g} {unit}"
            limit = f"at most {build['limits'][name] / scale:g} {unit}"
            lines.append(("the compiled extension", name, limit, measured, _met(build["met"][name])))
    return table(("work", "measure", "target", "measured", ""), lines)


def _met(met: bool | None) -> str:
    return {True: "met", False: "**missed**", None: "not measured"}[met]


def tally(speed: dict[str, Any]) -> str:
    """How many targets of this version are met."""
    found = [one["met"] for e in speed["experiments"] for one in e["targets"] if one["stage"] == "now"]
    found += speed["build"]["met"].values()
    absent = f", {found.count(None)} not measured" if None in found else ""
    return f"{found.count(True)} of this version's {len(found)} targets are met{absent}"


def demo_table(demo: dict[str, Any]) -> str:
    """The demo's rows, as `qft demo` prints them."""
    from qft.figure import LABELS

    def perplexities(row: dict[str, Any], prefix: str) -> str:
        return f"{row[prefix + 'before']:.2f} → {row[prefix + 'after']:.2f}"

    lines = [
        (
            f"{'dense' if row['format'] is None else row['format']}, {LABELS[row['method']]}",
            perplexities(row, ""),
            perplexities(row, "own_"),
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['trainable']:,}",
            f"{row['seconds']:.0f}",
        )
        for row in demo["rows"]
    ]
    head = ("", "perplexity, new domain", "perplexity, own domain", "stored MB", "trainable", "seconds")
    about = f"Before → after {demo['steps']} steps at rank {demo['rank']}; {demo['seconds']:.0f} s in all"
    return f"{table(head, lines)}\n\n{about} on {demo['machine']}."


def section(experiment: dict[str, Any]) -> str:
    """One experiment with every case and its spread."""
    lines = [
        (
            row["work"],
            row["name"],
            row["kernel_used"] or "",
            _ms(row["median_s"]),
            f"{_ms(row['min_s'])} .. {_ms(row['max_s'])}, {row['rounds']}",
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['percent_of_roofline']:.0f} % ({row['bound_by']})",
        )
        for row in experiment["rows"]
    ]
    lines += [(one["work"], one["name"], "", "not run", one["reason"], "", "") for one in experiment["absent"]]
    head = ("work", "who", "kernel", "median", "min .. max, rounds", "weight MB", "of roofline")
    return f"### {experiment['title']}\n\n{table(head, lines)}"


def page(speed: dict[str, Any], demo: dict[str, Any], streaming: str, gpus: str) -> str:
    """docs/numbers.md; `streaming` and `gpus` are its parts on those."""
    parts = (
        "# Numbers",
        "Written by `python bench/publish.py` from the files in bench/results; a test fails when they differ.",
        f"## How to read them\n\n{HOW_TO_READ.strip()}",
        f"## CPU speed\n\n{machine_line(speed)}",
        f"Instruction sets: {', '.join(speed['machine']['flags'])}.",
        f"![Bandwidth by format, and time over rows]({FIGURE})",
        f"### Targets of this version\n\n{tally(speed)}.\n\n{targets(speed, 'now')}",
        f"### Targets of the next, at the memory wall\n\n{targets(speed, 'next')}",
        *(section(experiment) for experiment in speed["experiments"]),
        f"## The demo\n\n{demo_table(demo)}",
        streaming,
        gpus,
    )
    return "\n\n".join(parts) + "\n"


def replace_block(text: str, name: str, body: str) -> str:
    """`text` with `body` between its markers; ValueError unless both stand in it, once and in order."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md has no block from {begin} to {end}; put the two markers where the table belongs")
    return text[: text.index(begin) + len(begin)] + f"\n{body}\n" + text[text.index(end) :]


def draw(speed: dict[str, Any], digest: str, path: Path) -> None:
    """Bandwidth by format at one token, and time over rows; the PNG names the results that it shows."""
    from matplotlib.figure import Figure

    rows = [row for experiment in speed["experiments"] for row in experiment["rows"] if not row["kernel_named"]]
    products = [row for row in rows if row["verb"] == "matmul"]
    largest = max((row["shape"] for row in products), key=lambda shape: shape[0] * shape[1])
    usual = max((row["shape"] for row in products), key=[row["shape"] for row in products].count)
    figure = Figure(figsize=(10, 3.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)

    fewest = [row for row in products if row["shape"] == largest and row["rows"] == min(r["rows"] for r in products)]
    speeds = [row["weight_bytes"] / row["median_s"] / 1e9 for row in fewest]
    left.barh([row["name"] for row in fewest], speeds, color=[COLORS[row["who"]] for row in fewest])
    left.axvline(speed["limits"]["read"] / 1e9, color="#888888", linestyle="--")
    left.invert_yaxis()
    left.set_title(f"{fewest[0]['work']}: GB/s of stored weight\n(dashed: measured read bandwidth)", fontsize=9)
    left.tick_params(labelsize=8)

    for who, color in COLORS.items():
        of = [row for row in products if row["who"] == who and row["shape"] == usual]
        points = sorted({row["rows"]: 1e3 * row["median_s"] for row in of if who != "qft" or row["fmt"] == NF4}.items())
        if points:
            right.loglog(*zip(*points, strict=True), "o-", markersize=4, color=color, label=who, base=2)
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set_title(f"matmul {usual[0]}x{usual[1]} bf16, 4-bit weights: ms over rows of x", fontsize=9)
    right.legend(fontsize=8)
    right.grid(color="#EEEEEE")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Source": digest})


def read(folder: Path, name: str) -> bytes:
    """A results file; FileNotFoundError says how to make it."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {folder.name}; {MADE_BY[name]}")
    return path.read_bytes()


def publish(root: Path, check: bool) -> list[str]:
    """Bring README.md and docs up to date with bench/results; the files that differed, written unless `check`."""
    results = root / "bench" / "results"
    raw = read(results, "cpu-speed")
    speed, demo = json.loads(raw), json.loads(read(results, "demo"))
    readme = (root / "README.md").read_text()
    body = f"{tally(speed)} ([all of them](docs/numbers.md)). Time per call; in brackets a peer's time over qft's. In\n"
    body += "`scale_grad`, dense torch computes the gradient of the whole weight; `train` is forward and dx.\n\n"
    body += f"{comparison(speed)}\n\n{machine_line(speed)}"
    readme = replace_block(replace_block(readme, "numbers", body), "demo", demo_table(demo))
    differing, numbers = [], page(speed, demo, streaming_page.section(results), gpu_tables.section(results))
    for path, text in (
        (root / "README.md", readme),
        (root / "docs" / "numbers.md", numbers),
    ):
        if not path.is_file() or path.read_text() != text:
            differing.append(str(path.relative_to(root)))
            if not check:
                path.write_text(text)
    digest, image = hashlib.sha256(raw).hexdigest(), root / "docs" / FIGURE
    if not image.is_file() or digest.encode() not in image.read_bytes():
        differing.append(str(image.relative_to(root)))
        if not check:
            draw(speed, digest, image)
    return differing


def main(arguments: Sequence[str]) -> int:
    """0: up to date, or made so; 1: --check found a difference; 2: nothing to publish, and one sentence says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something differs")
    options = parser.parse_args(arguments)
    try:
        differing = publish(ROOT, options.check)
    except (OSError, ValueError) as error:
        print(f"publish: {error}", file=sys.stderr)
        return 2
    for name in differing:
        print(f"{name} differs from bench/results; run python bench/publish.py" if options.check else f"wrote {name}")
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
