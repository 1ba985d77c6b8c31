"""pytest in a process of its own, whose every outcome is on disk before the next test begins.

    python tests/gpu/session.py LOG FILE

LOG gets lines of JSON: first the names of the tests collected, then for each test that it began and how it ended.
Tests that LOG already knows are left out. A failure that has cost the process its CUDA context ends it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def context_is_lost() -> str | None:
    """Why no test after this one can run here; None where they can."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


class Recorder:
    """The plugin that writes the log."""

    def __init__(self, log: Path) -> None:
        self.log, self.known = log, {line["name"] for line in read(log) if "name" in line}
        self.session: Any = None

    def write(self, **line: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.write(collected=[item.nodeid for item in items])
        items[:] = [item for item in items if item.nodeid not in self.known]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(name=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcome = "not run" if report.outcome == "skipped" else report.outcome
            said = report.longrepr[2] if report.outcome == "skipped" else str(report.longrepr or "")
            why = said.removeprefix("Skipped: ")[-4000:]
            self.write(name=report.nodeid, outcome=outcome, seconds=round(report.duration, 3), why=why)
        if report.outcome == "failed" and (reason := context_is_lost()):
            self.session.shouldstop = f"the CUDA context is lost: {reason}"


def main(log: str, file: str) -> int:
    # Warnings of versions that nobody here chose are no failures; the options of pyproject.toml name plugins that may
    # be absent.
    options = ["-q", "--strict-markers", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "default", "--tb=short"]
    return int(pytest.main([*options, file], plugins=[Recorder(Path(log))]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
