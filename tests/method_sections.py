"""The sections of docs/methods.md, and what their lines may use."""

import re
from pathlib import Path

import tiny_lm
import torch

import qft
from qft.training.data import Examples, PaddingCollator

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "methods.md").read_text()
SECTIONS = re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)


def run(title, text, folder, device="cpu"):
    """Run a section's lines."""
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(compile(code, title, "exec"), namespace(folder, device))


def namespace(folder, device):
    """What a section's lines may use."""
    collate = PaddingCollator(tiny_lm.END)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 256, (24,), generator=generator) for _ in range(16)]
    rows = Examples([{"input_ids": row, "labels": row.clone()} for row in ids])
    batch = {name: tensor.to(device) for name, tensor in collate(rows[:4]).items()}

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
        "dense": tiny_lm.model().to(device),
        "model": qft.quantize_model(tiny_lm.model().to(device), "nf2 g64 f16"),
        "batch": batch,
        "rows": rows,
        "collate": collate,
        "folder": folder,
        "optimizer_steps": optimizer_steps,
    }
