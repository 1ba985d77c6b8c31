"""What the numbers were measured on beside the machine itself, which `qft.speed.limits` describes: versions, commit."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def versions() -> dict[str, str]:
    """Of Python and the packages timed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "bitsandbytes", "qft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The checkout's commit, with "+" after it where files differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return "unknown"
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") not in ("", "unknown") else "")
