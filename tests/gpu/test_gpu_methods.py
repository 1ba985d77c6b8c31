"""Every method of docs/methods.md, its lines run on a GPU."""

import pytest
from method_sections import SECTIONS, run
from place import DEVICE


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for names it has since renamed
@pytest.mark.parametrize(("title", "text"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_a_methods_lines_run(title, text, tmp_path):
    for word, package in (("peft", "peft"), ("lorahub(", "nevergrad"), ("Recipe(", "accelerate")):
        if word in text:
            pytest.importorskip(package)
    run(title, text, tmp_path, DEVICE)
