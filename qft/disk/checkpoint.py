"""Directories of files that are complete, or recognisably not.

A checkpoint counts once `complete.json` stands in it, and that file appears by the last rename, after every other file
has reached the disk. It names each file with its SHA-256, so that a kill at any moment, while writing or deleting, and
a flipped bit later, all leave a directory that is skipped and named. Standard library only.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..format import FormatError
from .files import digest, replace_file, sync

SEAL = "complete.json"


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def refuse_to_overwrite(directory: Path) -> None:
    """Raise FileExistsError if there is anything at `directory` but an empty folder."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory} is not empty; name a new directory, or delete it first")


def claim(path: Path, settings: Mapping[str, Any]) -> None:
    """Write a run's settings to `path`, or see that the run begun there has the same.

    Raises:
        ValueError: a run with other settings was begun there; they are named. FormatError: `path` is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            begun = json.loads(path.read_bytes())
            changed = [
                f"{name} {begun.get(name)}, now {now}" for name, now in settings.items() if begun.get(name) != now
            ]
        except (ValueError, AttributeError):
            raise FormatError(f"{path} is damaged; delete {path.parent} to start again") from None
        if changed:
            raise ValueError(
                f"{path.parent} holds a run with {'; '.join(changed)}; use its settings to go on, or another directory"
            )
    write_json(path, settings)


def seal(directory: Path) -> None:
    """Declare a directory complete as it is now."""
    files = [path for path in sorted(directory.iterdir()) if path.name != SEAL]
    for path in files:
        sync(path)
    sync(directory)
    write_json(directory / SEAL, {path.name: digest(path) for path in files})
    sync(directory.parent)


def damage(directory: Path) -> str:
    """Why a directory is not complete, in a few words; empty if it is."""
    try:
        listing = json.loads((directory / SEAL).read_bytes())
        for name, wanted in listing.items():
            if digest(directory / name) != wanted:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError):
        return f"{SEAL} is damaged"
    return ""


def newest(parent: Path) -> tuple[Path | None, list[str]]:
    """The complete checkpoint of the highest step below `parent`, and a sentence for each later one, all skipped."""
    skipped: list[str] = []
    for path in reversed(_checkpoints(parent)):
        reason = damage(path)
        if not reason:
            return path, skipped
        skipped.append(f"{path} is incomplete and was skipped: {reason}")
    return None, skipped


def prune(newest: Path, keep: int) -> None:
    """Delete what is older than the `keep` checkpoints up to `newest`; a seal goes first, so no half of one stays."""
    upto = _checkpoints(newest.parent)
    for path in upto[: max(0, upto.index(newest) + 1 - keep)]:
        (path / SEAL).unlink(missing_ok=True)
        shutil.rmtree(path)


def _checkpoints(parent: Path) -> list[Path]:
    """Directories `checkpoint-<step>`, by step."""
    found = [(int(match[1]), path) for path in parent.glob("checkpoint-*")
             if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]  # fmt: skip
    return [path for _, path in sorted(found)]
