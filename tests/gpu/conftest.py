"""Tests that need a CUDA device: collected everywhere, skipped in one sentence where there is none."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    here = [item for item in items if HERE in item.path.parents]
    absent = pytest.mark.skip(reason="needs a CUDA device; torch sees none")
    for item in here:
        item.add_marker("gpu")
        if not torch.cuda.is_available():
            item.add_marker(absent)


@pytest.fixture
def emptied(monkeypatch):
    """Every tensor that torch.empty makes in the test, outputs and workspaces, so that garbage can be put in again."""
    made, empty = [], torch.empty

    def remember(*args, **keywords):
        made.append(empty(*args, **keywords))
        return made[-1]

    monkeypatch.setattr(torch, "empty", remember)
    return made


@pytest.fixture
def python(python):
    """As everywhere, with more time: the first use of a device takes seconds."""
    return lambda program, **environment: python(program, timeout=300, **environment)
