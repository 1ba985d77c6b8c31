"""Which numbers of rows each kernel serves: measured, and kept as data in crossovers.json.

The file tells machines apart by their best instruction set ("cuda" for a GPU), because that also decides how fast
torch.mm multiplies panels. For each it holds where its figures come from and, by kernel, verb and dtype, from how many
rows to how many that kernel is the fastest, against panel products and the instruction sets plainer than its own.
`python bench/crossovers.py` measures them and writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from .format import FormatError

FILE = "crossovers.json"
BASES = ("measured", "reasoned")  # with a command that anyone can run again; with a sentence that says why
VERBS = ("matmul", "matmul_t")
DTYPES = ("float32", "bfloat16", "float16")

Rows = tuple[int, int | None]  # the least and the most; None: no end was found
NO_ROWS: Rows = (1, 0)
Served = dict[tuple[str, str, str], Rows]  # by kernel, verb and dtype


def rows_served(kernel: str, verb: str, dtype: str, machine: Sequence[str]) -> Rows:
    """For how many rows of x or dy a kernel is the fastest.

    Args:
        kernel: a row of the table in `qft.kernels`.
        verb: matmul or matmul_t.
        dtype: of x or dy, as torch spells it: "bfloat16".
        machine: the instruction sets it runs, plainest first; ("cuda",) for a GPU. The best of them that the file knows
            counts: a newer one that was never measured changes nothing.

    Returns:
        The least and the most rows; a most of None has no end, and `NO_ROWS` stands for what is not listed.

    Raises:
        FormatError: the file is malformed.
    """
    known = _known()
    best = next((name for name in reversed(machine) if name in known), "")
    return known.get(best, {}).get((kernel, verb, dtype), NO_ROWS)


def spell(rows: Rows) -> str:
    """As a sentence says it: "1 to 24", "2 and more", "no number of rows"."""
    least, most = rows
    if most is None:
        return f"{least} and more"
    return f"{least} to {most}" if least <= most else "no number of rows"


@cache
def _known() -> dict[str, Served]:
    return parse(files(__package__).joinpath(FILE).read_text(encoding="utf-8"))


def parse(text: str) -> dict[str, Served]:
    """What the text of crossovers.json says, by machine.

    Raises:
        FormatError: it is no such text; the sentence names the place.
    """
    try:
        machines = json.loads(text)["machines"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _malformed(f'no JSON object with "machines" ({error})') from None
    return {name: _served(name, about) for name, about in machines}


def _served(machine: str, about: object) -> Served:
    """One machine's entries."""
    if not isinstance(about, dict) or about.get("basis") not in BASES or not isinstance(about.get("served"), list):
        raise _malformed(f"{machine!r} needs a basis, {' or '.join(BASES)}, and a list of what is served")
    found: Served = {}
    for entry in about["served"]:
        if not isinstance(entry, dict) or not {"kernel", "verb", "dtype", "least", "most"} <= {*entry}:
            raise _malformed(f"{machine!r} holds {entry!r}; an entry is kernel, verb, dtype, least and most")
        key, least, most = (entry["kernel"], entry["verb"], entry["dtype"]), entry["least"], entry["most"]
        if type(key[0]) is not str or key[1] not in VERBS or key[2] not in DTYPES:
            raise _malformed(f"{machine!r} names {key!r}; use a kernel, {' or '.join(VERBS)}, and {', '.join(DTYPES)}")
        if key in found:
            raise _malformed(f"{machine!r} holds {' '.join(key)} twice; say it once")
        if type(least) is not int or least < 1 or not (most is None or (type(most) is int and most >= least - 1)):
            raise _malformed(f"{machine!r} gives {' '.join(key)} rows {least!r} to {most!r}; use 1 or more, in order")
        found[key] = least, most
    return found


def _malformed(what: str) -> FormatError:
    return FormatError(f"{FILE}: {what}; python bench/crossovers.py writes it anew")
