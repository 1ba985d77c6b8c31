"""docs/methods.md keeps its word: every method's lines run on a packed 2-bit model, and the tests it names exist."""

import re

import pytest
from method_sections import ROOT, SECTIONS, run

# Every method of the mission, as the page calls it
METHODS = (
    "LoRA", "rsLoRA", "DoRA", "LoRA+", "VeRA", "AdaLoRA", "(IA)³", "LoHa", "LoKr", "Prefix-Tuning", "Prompt Tuning",
    "P-Tuning", "Multitask Prompt Tuning", "LoftQ", "Scale search", "QERA", "GPTQ", "CLoQ", "LQ-LoRA", "RILQ",
    "QA-LoRA", "PEQA", "QLoRA", "Calibration", "Bit plans", "LoraHub", "ZipLoRA", "GLoRA", "MultiLoRA", "LongLoRA",
    "Online-LoRA", "Focused Prefix Tuning", "Intruder dimensions", "Intrinsic dimension", "Rank sweep",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for names it has since renamed
@pytest.mark.parametrize(("title", "text"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_a_methods_lines_run(title, text, tmp_path):
    run(title, text, tmp_path)


@pytest.mark.parametrize("title", METHODS)
def test_every_method_has_a_section_with_a_test(title):
    (text,) = [text for name, text in SECTIONS if name == title]
    named = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert named
    assert all((ROOT / name).is_file() for name in named)
