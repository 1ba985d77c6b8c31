"""A sample kernel beside copies of it with one bug planted in each, in one translation unit: compiling is what costs.

The header written here has a namespace per variant and a list macro of them, NAME_VARIANTS(X) = X(0, flag) X(1, flag)
and so on, where the flag is the template argument that a variant is compiled with.
"""

import dataclasses
from pathlib import Path

import numpy as np

from .build import SCHEDULES

WRONG = "a wrong result and no report"


@dataclasses.dataclass(frozen=True)
class Bug:
    """What to replace, and by what; every text to be replaced occurs exactly once in the sample. `verdict` is a pattern
    of what the emulator reports in any schedule, or WRONG."""

    name: str
    verdict: str
    old: str
    new: str
    more: tuple[tuple[str, str], ...] = ()
    flag: bool = False

    def plant(self, source: str) -> str:
        for old, new in ((self.old, self.new), *self.more):
            assert source.count(old) == 1, f"{self.name}: {source.count(old)} places hold {old!r}"
            source = source.replace(old, new)
        return source


def write_variants(sample: Path, header: str, bugs: list[Bug], folder: Path) -> None:
    """Write <sample>_variants.h to `folder`: variants 0 and 1 are the sample itself with flag false and true, and
    variant 2 + i is bug i. `header` is what the sample includes; it comes before the namespaces."""
    source = sample.read_text()
    variants = [("as it is", source, False), ("as it is", source, True)]
    variants += [(bug.name, bug.plant(source), bug.flag) for bug in bugs]
    lines = [f'#include "{header}"']
    for number, (name, text, _) in enumerate(variants):
        lines += [f"namespace variant_{number} {{", f'#line 1 "{sample.name}, {name}"', text, "}"]
    entries = " ".join(f"X({number}, {str(flag).lower()})" for number, (_, _, flag) in enumerate(variants))
    lines.append(f"#define {sample.stem.upper()}_VARIANTS(X) {entries}")
    (folder / f"{sample.stem}_variants.h").write_text("\n".join(lines) + "\n")


def assert_right_in_every_schedule(library, problem, variant: int) -> None:
    """`problem.run(library, variant)` gives a result and the emulator's complaint: none, and always the same bits."""
    results = []
    for schedule in SCHEDULES.values():
        library.configure(**schedule)
        result, error = problem.run(library, variant)
        assert error is None
        assert problem.is_right(result)
        results.append(result)
    assert all(np.array_equal(results[0], result) for result in results)


def verdict_on(library, problem, variant: int, schedule: str) -> str:
    """What the emulator reports under a schedule; without a report, whether the result is right."""
    library.configure(**SCHEDULES[schedule])
    result, error = problem.run(library, variant)
    return error or ("right" if problem.is_right(result) else WRONG)
