"""Markdown of what `speed.py` wrote: targets row by row, what is missed and why, every case. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ggml_page
from cases import PEERS
from experiments import ROWS
from gpu_tables import table

HOW_TO_READ = """\
- Times are medians over interleaved rounds in one process: a round calls every case of a section once. Compare within a
  section; between sections, and between machines, compare ratios.
- "cold": before each call a buffer of four times the last-level cache is read, and then the same call runs, untimed, on
  a layer of 64 outputs: weights come from memory and code does not, as in a model, where the layer before ran the same
  code. Peers are treated alike. Every result was compared with the reference's, in float64, before it was timed.
- qft is one path for training and inference, timed with an input that requires grad; so are bitsandbytes' training path
  (`matmul_4bit`) and dense torch. "bitsandbytes eval" is its inference path on repacked weights, "torch int4" is
  `_weight_int4pack_mm_for_cpu`; neither of the two can train.
- "of roofline": the least time the machine allows (stored bytes at the measured read and write bandwidth, or operations
  at the measured speed of a dense product, whichever takes longer) over the time taken, and which of the two it is.
- A target is met or missed by the medians as they are, without rounding and without allowance for noise; a row of the
  table is met where all its targets are."""
GGML = "ggml", "M=1, qft's nf4, int4, nf3 and nf2 in tokens per second against ggml's Q4_0, IQ4_NL, Q3_K and Q2_K"
Found = dict[str, Any]


def machine_line(speed: Found) -> str:
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


# ---- targets


def held(speed: Found, ggml: Found | None) -> list[Found]:
    """Every target with its figure, in the order of the rows: of the table, of the build, and of ggml where it ran."""
    found = [target for experiment in speed["experiments"] for target in experiment["targets"]]
    found += _of_build(speed["build"])
    found += _of_ggml(ggml) if ggml else []
    order = [*ROWS, GGML[0]]
    return sorted(found, key=lambda one: order.index(one["row"]))


def _target(row: str, what: str, measure: str, against: str | None, figures: Found) -> Found:
    return {"row": row, "work": what, "subject": "qft", "measure": measure, "against": against, **figures}


def _of_build(build: Found) -> Iterator[Found]:
    for name, unit, scale in (("seconds", " s on 2 cores", 1), ("bytes", " MiB", 2**20)):
        measured = None if build[name] is None else build[name] / scale
        figures = {"how": "at most", "limit": build["limits"][name] / scale, "unit": unit, "measured": measured}
        yield _target("earlier", "the compiled extension", name, None, {**figures, "met": build["met"][name]})


def _of_ggml(ggml: Found) -> Iterator[Found]:
    for one in ggml["comparisons"]:
        if one["least"] is not None:
            figures = {"how": "at least", "limit": one["least"], "unit": "x", "measured": one["ratio"]}
            what = f"matmul M={one['rows']} {one['shape'][0]}x{one['shape'][1]} {one['dtype']}, {one['qft']}"
            yield _target("ggml", what, "speedup", f"ggml {one['ggml']}", {**figures, "met": one["met"]})


def key(target: Found) -> str:
    """What an explanation of a missed target is found by, where its row's is not enough."""
    other = f" against {target['against']}" if target["against"] else ""
    return f"{target['work']}: {target['subject']}: {target['measure']}{other}"


def verdict(targets: list[Found]) -> str:
    """Of a row: met where all its targets are, missed where one is."""
    met = [target["met"] for target in targets]
    if not met or (None in met and False not in met):
        return "not measured"
    return "met" if all(met) else "**missed**"


def by_row(targets: list[Found]) -> str:
    """The rows of the table, each with how many of its targets are met and the one that is farthest off, or nearest."""
    lines = []
    for name, what in [*ROWS.items(), GGML]:
        of = [target for target in targets if target["row"] == name]
        measured = [target for target in of if target["measured"] is not None]
        worst = min(measured, key=_reached, default=None)
        figure = "" if worst is None else f"{_figure(worst)} ({key(worst)}; {_bound(worst)})"
        lines.append((f"**{name}**: {what}", f"{sum(t['met'] is True for t in of)} of {len(of)}", figure, verdict(of)))
    return table(("row", "targets met", "the hardest", ""), lines)


def _reached(target: Found) -> float:
    """How much of its bound a figure reaches: 1 where it just does."""
    share: float = target["measured"] / target["limit"]
    return share if target["how"] == "at least" else 1 / max(share, 1e-9)


def _figure(target: Found) -> str:
    if target["measured"] is None:
        return ""
    value = target["measured"]
    return f"{value:.3g}{target['unit']}" if value < 1000 else f"{value:,.0f}{target['unit']}"


def _bound(target: Found) -> str:
    return f"{target['how']} {target['limit']:g}{target['unit']}"


def every_target(targets: list[Found]) -> str:
    """Every target with its measured figure."""
    words = {True: "met", False: "**missed**", None: "not measured"}
    lines = [(one["row"], key(one), _bound(one), _figure(one), words[one["met"]]) for one in targets]
    return table(("row", "work: subject: measure", "target", "measured", ""), lines)


def tally(targets: list[Found]) -> str:
    """How many targets, and how many rows of the table, are met."""
    found = [target["met"] for target in targets]
    rows = [verdict([target for target in targets if target["row"] == name]) for name in (*ROWS, GGML[0])]
    absent = f", {found.count(None)} not measured" if None in found else ""
    return (
        f"{found.count(True)} of {len(found)} targets are met{absent}; "
        f"of the {len(rows)} rows of the table, {rows.count('met')} are met in full"
    )


# ---- what is missed, and why


def explanation(target: Found, explanations: dict[str, dict[str, str]]) -> dict[str, str] | None:
    """Of a target by its key, or else by its row."""
    return explanations.get(key(target)) or explanations.get(target["row"])


def unexplained(speed: Found, targets: list[Found], explanations: dict[str, dict[str, str]]) -> list[str]:
    """A sentence for each missed target without a profile and a next idea, and for each explanation of nothing missed.

    A quick run claims nothing, and is asked for nothing.
    """
    if speed["quick"]:
        return []
    missed = [target for target in targets if target["met"] is False]
    said = []
    for target in missed:
        found = explanation(target, explanations) or {}
        said += [
            f"missed without its {part} in explanations.json: [{target['row']}] {key(target)}"
            for part in ("profile", "next")
            if not found.get(part)
        ]
    used = {key(target) for target in missed} | {target["row"] for target in missed}
    return said + [
        f"explained in explanations.json but not missed: {name}" for name in explanations if name not in used
    ]


def missed(targets: list[Found], explanations: dict[str, dict[str, str]]) -> str:
    """What a profile says of each missed target, and the next idea: of a whole row, then of targets by themselves."""
    found = [target for target in targets if target["met"] is False]
    parts = []
    for row in dict.fromkeys(target["row"] for target in found):
        of = [target for target in found if target["row"] == row]
        alone = [target for target in of if key(target) in explanations]
        if together := len(of) - len(alone):
            parts.append(f"**{row}**, {together} of its targets\n\n{_why(explanations.get(row, {}))}")
        for target in alone:
            figures = f"{_figure(target)}, {_bound(target)}"
            parts.append(f"**{row}**, {key(target)}: {figures}\n\n{_why(explanations[key(target)])}")
    return "\n\n".join(parts) or "No target is missed."


def _why(said: dict[str, str]) -> str:
    return f"- Profile: {said.get('profile') or 'none yet'}\n- Next: {said.get('next') or 'nothing named yet'}"


# ---- rows


def comparison(speed: Found) -> str:
    """The headline experiments: a line for each thing qft did that a peer did too."""
    lines = []
    for experiment in speed["experiments"]:
        for row in experiment["rows"]:
            if experiment["headline"] and row["who"] == "qft" and not row.get("kernel_named"):
                others = {
                    o["who"]: o["median_s"]
                    for o in experiment["rows"]
                    if o["work"] == row["work"] and o["who"] != "qft"
                }
                cells = [_versus(others.get(who), row["median_s"]) for who in PEERS]
                if any(cells):
                    name, share = row["name"].removeprefix("qft, "), f"{row['percent_of_roofline']:.0f} %"
                    lines.append((row["work"], name, f"**{_ms(row['median_s'])}**", share, *cells))
    return table(("work", "format", "qft", "of roofline", *PEERS), lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{1e3 * seconds:.0f} ms"


def _versus(other: float | None, ours: float) -> str:
    return "" if other is None else f"{_ms(other)} ({other / ours:.2g}x)"


def sections(speed: Found) -> Iterator[str]:
    """Every case with its spread: a table for an experiment, or for a series of them."""
    together: dict[str, list[Found]] = {}
    for experiment in speed["experiments"]:
        together.setdefault(experiment["series"] or experiment["title"], []).append(experiment)
    for title, of in together.items():
        rows = [row for experiment in of for row in experiment["rows"]]
        absent = [row for experiment in of for row in experiment["absent"]]
        yield f"### {title}\n\n{_rows(rows, absent)}"


def _rows(rows: list[Found], absent: list[Found]) -> str:
    lines = [
        (
            row["work"],
            row["name"],
            row["kernel_used"] or "",
            _ms(row["median_s"]),
            f"{_ms(row['min_s'])} .. {_ms(row['max_s'])}, {row['rounds']}",
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{(row['read_bytes'] + row['written_bytes']) / row['median_s'] / 1e9:.1f}",
            f"{row['relative_error']:.1g}",
            f"{row['percent_of_roofline']:.0f} % ({row['bound_by']})",
        )
        for row in rows
    ]
    lines += [(one["work"], one["name"], "", "not run", one["reason"], "", "", "", "") for one in absent]
    head = ("work", "who", "kernel", "median", "min .. max, rounds", "weight MB", "GB/s", "error", "of roofline")
    return table(head, lines)


def section(speed: Found, ggml: Found | None, explanations: dict[str, dict[str, str]], figure: str) -> str:
    """What docs/numbers.md says of speed on a CPU."""
    targets = held(speed, ggml)
    missing = "" if ggml else f" {ggml_page.NAME} is not in bench/results: the row on ggml is not measured."
    parts = (
        f"## CPU speed\n\n{machine_line(speed)}",
        f"Instruction sets: {', '.join(speed['machine']['flags'])}.",
        f"![Bandwidth by format, and time over rows]({figure})",
        f"### Targets\n\n{tally(targets)}.{missing}\n\n{by_row(targets)}",
        f"### Missed targets, by their profile\n\n{missed(targets, explanations)}",
        f"### Every target\n\n{every_target(targets)}",
        *sections(speed),
    )
    return "\n\n".join(parts)
