"""`python -m build` makes an sdist that is enough to build from, and a wheel that works alone.

torch is the one thing not installed anew: the new environment is shown the folder that has it, after the wheel is in.
"""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import tiny_lm
import torch

ROOT = Path(__file__).parent.parent
MODULES = {
    str(path.relative_to(ROOT)) for path in (ROOT / "qft").rglob("*.py")
}  # before the build, which takes minutes

pytestmark = pytest.mark.slow


def shell(*words, **more):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel made from it in an environment that has the build's requirements alone."""
    out = tmp_path_factory.mktemp("dist")
    shell(sys.executable, "-m", "build", "--outdir", out, ROOT)
    return out


def test_the_sdist_holds_what_is_built_from_and_no_more(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [
        name for name in names if name.endswith(".so") or name.startswith(("tests", "bench", "examples", "build"))
    ]


def test_the_wheel_holds_templates_and_one_compiled_module(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    assert {"qft/csrc/qft/cpu/verbs.h", "qft/analysis/report_page.html.j2", "qft/crossovers.json"} <= names
    assert names >= MODULES
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert {name.partition("/")[0] for name in names} == {"qft", "qft-0.1.0.dist-info"}
    for needed in ("torch", "transformers", "peft", "safetensors", "jinja2"):
        assert f"Requires-Dist: {needed}>=" in metadata


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment with the wheel, and the folder to work in."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    shell(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    place = shell(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    (Path(place) / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")  # no .pth file in there is read
    return python, folder


SMOKE = """
import pathlib, sys, torch, qft
assert pathlib.Path(qft.__file__).is_relative_to(sys.prefix), qft.__file__
weight = torch.randn(96, 256)
for fmt in ("nf4 g64 dq", "int3 g64 f16 zero"):
    q = qft.quantize(weight, fmt)
    assert (q.dequantize() - weight).norm() < 0.3 * weight.norm()
layer = qft.QuantLinear.from_linear(torch.nn.Linear(256, 96), "nf2 g64 f16")
layer.add_lora(rank=4)
x = torch.randn(8, 256, requires_grad=True)
layer(x).square().sum().backward()
assert x.grad.isfinite().all() and layer.lora_B.grad.any()
made = qft.compile("[-1 -0.37 0.21 1] g64 f32")
assert made[0] == "scalar", made
from qft.compiler.jit import template_folder
assert template_folder().is_relative_to(pathlib.Path(qft.__file__).parent)
best = qft.explain("[-1 -0.37 0.21 1] g64 f32", 96, 256)["matmul"].kernel.name
assert best in made or best == "panel", best
print("well")
"""


def test_the_installed_wheel_works(installed):
    python, folder = installed
    environment = {**os.environ, "QFT_CACHE": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)
    assert shell(python, "-W", "error", "-c", SMOKE, cwd=folder, env=environment) == "well\n"
    assert len(list((folder / "cache").glob("*.so"))) >= 1


def test_the_installed_command_works(installed):
    python, folder = installed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    qft = python.with_name("qft")
    assert "fine-tune" in shell(qft, "--help", cwd=folder, env=environment)
    tiny_lm.save(folder / "MODEL")
    shell(qft, "quantize", "MODEL", "small", "--format", "nf2 g64 f16", cwd=folder, env=environment)
    shell(qft, "report", "small", "report.html", "--dense", "MODEL", cwd=folder, env=environment)
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
