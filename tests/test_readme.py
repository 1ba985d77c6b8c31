"""The README keeps its word: its first example runs, and its tables are those of bench/results."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import publish  # noqa: E402


def test_tables_are_those_of_the_results():
    assert publish.publish(ROOT, check=True) == [], "run python bench/publish.py"


def test_every_missed_target_is_explained():
    assert publish.unexplained(ROOT) == [], "write bench/results/explanations.json"


def test_the_first_example_runs_as_it_stands(tmp_path):
    example = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
