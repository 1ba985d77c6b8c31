"""Pages and figures that results make: found to differ from them, and written anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

Draw = Callable[[Path], None]


def renew(root: Path, pages: Mapping[str, str], figures: Mapping[str, tuple[str, Draw]], check: bool) -> list[str]:
    """Bring files up to date; those that differed, in order, written unless `check`.

    Args:
        root: of the checkout.
        pages: path below `root` -> the text it must hold.
        figures: path below `root` -> a digest that its PNG must hold, and what draws it.
        check: write nothing.
    """
    differing = []
    for name, text in pages.items():
        page = root / name
        if not page.is_file() or page.read_text() != text:
            differing.append(name)
            if not check:
                page.parent.mkdir(parents=True, exist_ok=True)
                page.write_text(text)
    for name, (digest, draw) in figures.items():
        image = root / name
        if not image.is_file() or digest.encode() not in image.read_bytes():
            differing.append(name)
            if not check:
                draw(image)
    return differing
