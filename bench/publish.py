"""Tables of the README and docs/numbers.md, written from bench/results and nothing else.

python bench/publish.py            writes both, and the figures beside them; names missed targets nobody has explained
python bench/publish.py --check    writes nothing; exits with 1 where they differ from the results, or where a missed
                                   target has no explanation in bench/results/explanations.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import format_errors_page
import ggml_page
import gpu_tables
import instructions_page
import speed_page
import streaming_page
from gpu_tables import table
from written import Draw, renew

ROOT = Path(__file__).resolve().parent.parent
SPEED_FIGURE, ERRORS_FIGURE = "figures/cpu-speed.png", "figures/format-errors.png"
MADE_BY = {
    "cpu-speed": "run `python bench/speed.py`",
    "format-errors": "run `python bench/format_errors.py`",
    "demo": "run `qft demo` and copy demo-out/table.json there",
}
EXPLANATIONS = "explanations.json"  # of missed targets, by row or by target: {"profile": ..., "next": ...}


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


def page(results: Path, speed: dict[str, Any], demo: dict[str, Any], errors: dict[str, Any]) -> str:
    """docs/numbers.md."""
    parts = (
        "# Numbers",
        "Written by `python bench/publish.py` from the files in bench/results; a test fails when they differ.",
        f"## How to read them\n\n{speed_page.HOW_TO_READ}",
        speed_page.section(speed, ggml(results), explanations(results), SPEED_FIGURE),
        ggml_page.section(results),
        instructions_page.section(results),
        format_errors_page.section(errors, ERRORS_FIGURE),
        f"## The demo\n\n{demo_table(demo)}",
        streaming_page.section(results),
        gpu_tables.section(results),
    )
    return "\n\n".join(parts) + "\n"


def ggml(results: Path) -> dict[str, Any] | None:
    """The comparison with ggml, where one was made: it needs a build of ggml."""
    path = results / ggml_page.NAME
    return json.loads(path.read_text()) if path.is_file() else None


def explanations(results: Path) -> dict[str, dict[str, str]]:
    """Written by hand: why a target is missed, and what comes next."""
    path = results / EXPLANATIONS
    return json.loads(path.read_text()) if path.is_file() else {}


def unexplained(root: Path) -> list[str]:
    """A sentence for each missed target that nobody has explained."""
    results = root / "bench" / "results"
    speed = json.loads(read(results, "cpu-speed"))
    return speed_page.unexplained(speed, speed_page.held(speed, ggml(results)), explanations(results))


def replace_block(text: str, name: str, body: str) -> str:
    """`text` with `body` between its markers; ValueError unless both stand in it, once and in order."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md has no block from {begin} to {end}; put the two markers where the table belongs")
    return text[: text.index(begin) + len(begin)] + f"\n{body}\n" + text[text.index(end) :]


def read(folder: Path, name: str) -> bytes:
    """A results file; FileNotFoundError says how to make it."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {folder.name}; {MADE_BY[name]}")
    return path.read_bytes()


def publish(root: Path, check: bool) -> list[str]:
    """Bring README.md and docs up to date with bench/results; the files that differed, written unless `check`."""
    from speed_figures import draw_errors, draw_speed

    results = root / "bench" / "results"
    raw = {name: read(results, name) for name in MADE_BY}
    speed, errors, demo = (json.loads(raw[name]) for name in MADE_BY)
    targets = speed_page.held(speed, ggml(results))
    readme = (root / "README.md").read_text()
    body = f"{speed_page.tally(targets)} ([all of them](docs/numbers.md)).\n"
    body += "Time per call; in brackets a peer's time over qft's. In `scale_grad`, dense torch computes the gradient\n"
    body += "of the whole weight; `train` is forward and dx.\n\n"
    body += f"{speed_page.comparison(speed)}\n\n{speed_page.machine_line(speed)}"
    readme = replace_block(replace_block(readme, "numbers", body), "demo", demo_table(demo))
    pages = {"README.md": readme, "docs/numbers.md": page(results, speed, demo, errors)}
    figures: dict[str, tuple[str, Draw]] = {}
    for name, figure, draw, shown in (
        ("cpu-speed", SPEED_FIGURE, draw_speed, speed),
        ("format-errors", ERRORS_FIGURE, draw_errors, errors),
    ):
        digest = hashlib.sha256(raw[name]).hexdigest()
        figures[f"docs/{figure}"] = digest, partial(draw, shown, digest)
    return renew(root, pages, figures, check)


def main(arguments: Sequence[str]) -> int:
    """0: up to date, or made so; 1: --check found a difference; 2: nothing to publish, and one sentence says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something differs")
    options = parser.parse_args(arguments)
    try:
        differing = publish(ROOT, options.check)
        missing = unexplained(ROOT)
    except (OSError, ValueError) as error:
        print(f"publish: {error}", file=sys.stderr)
        return 2
    for name in differing:
        print(f"{name} differs from bench/results; run python bench/publish.py" if options.check else f"wrote {name}")
    print("\n".join(missing), end="\n" * bool(missing))
    return 1 if options.check and (differing or missing) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
