"""docs/methods.md keeps its word: every method's lines run on a packed 2-bit model, and the tests it names exist."""

import re
from pathlib import Path

import pytest
import tiny_lm
import torch

import qft
from qft.data import Examples, PaddingCollator

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "methods.md").read_text()
SECTIONS = re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
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


def namespace(folder):
    """What a section's lines may use."""
    collate = PaddingCollator(tiny_lm.END)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 256, (24,), generator=generator) for _ in range(16)]
    rows = Examples([{"input_ids": row, "labels": row.clone()} for row in ids])
    batch = collate(rows[:4])

    def optimizer_steps(model, n=2):
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, 1e-3)
        for _ in range(n):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return {
        "qft": qft,
        "torch": torch,
        "dense": tiny_lm.model(),
        "model": qft.quantize_model(tiny_lm.model(), "nf2 g64 f16"),
        "batch": batch,
        "rows": rows,
        "collate": collate,
        "folder": folder,
        "optimizer_steps": optimizer_steps,
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for names it has since renamed
@pytest.mark.parametrize(("title", "text"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_a_methods_lines_run(title, text, tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(compile(code, title, "exec"), namespace(tmp_path))


@pytest.mark.parametrize("title", METHODS)
def test_every_method_has_a_section_with_a_test(title):
    (text,) = [text for name, text in SECTIONS if name == title]
    named = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert named
    assert all((ROOT / name).is_file() for name in named)
