"""What `qft info` says of a machine: one line, and a way out of every trouble."""

from dataclasses import replace
from pathlib import Path

import pytest

from qft import machine
from qft.machine import Gpu, Machine

GOOD = Machine(
    versions={"qft": "0.1.0", "torch": "2.13.0"},
    processor="x86_64",
    cores=8,
    threads=8,
    instruction_sets=("scalar", "avx2", "avx512"),
    compiled=("nf4",),
    compiler="/usr/bin/c++ 12.2.0",
    nvcc="/usr/local/bin/nvcc 13.0.88",
    torch_cuda="13.0",
    driver=True,
    cuda_targets=("sm_80",),
    gpus=(Gpu("A100", (8, 0), True),),
    cache=Path("cache"),
    cache_writable=True,
)

TROUBLES = {
    "scalar kernels": ({"instruction_sets": ("scalar",)}, "neither AVX2 nor AVX-512"),
    "one thread": ({"threads": 1}, "1 of 8 cores is used; unset OMP_NUM_THREADS, or call torch.set_num_threads(8)"),
    "no compiler": ({"compiler": ""}, "no C++ compiler is on the path (c++, g++, clang++)"),
    "a cache that is locked": ({"cache_writable": False}, "cache cannot be written"),
    "a CPU build beside a driver": (
        {"torch_cuda": "", "gpus": ()},
        "torch is built without CUDA; install torch for CUDA",
    ),
    "no GPU to be seen": ({"gpus": ()}, "torch is built for CUDA 13.0 and sees no GPU"),
    "an old GPU": ({"gpus": (Gpu("T4", (7, 5), False),)}, "T4 has compute capability 7.5; qft needs 8.0"),
    "a GPU it was not built for": (
        {"gpus": (Gpu("B200", (10, 0), False),), "nvcc": ""},
        "qft was built for sm_80, not for B200; install it again where nvcc is on the path",
    ),
    "no CUDA kernels": (
        {"gpus": (Gpu("A100", (8, 0), False),), "nvcc": "", "cuda_targets": ()},
        "built for no GPU, not",
    ),
}

FINE = {
    "a good machine": {},
    "no GPU and no driver": {"torch_cuda": "", "driver": False, "gpus": ()},
    "a processor without vectors of its own": {"instruction_sets": ("scalar",), "processor": "aarch64"},
    "one core": {"cores": 1, "threads": 1},
    "nvcc makes up for a GPU it was not built for": {"gpus": (Gpu("B200", (10, 0), False),)},
}


@pytest.mark.parametrize(("changed", "sentence"), TROUBLES.values(), ids=TROUBLES)
def test_each_trouble_is_a_sentence_with_a_way_out(changed, sentence):
    found = replace(GOOD, **changed)
    (trouble,) = found.troubles
    assert sentence in trouble
    assert found.line.endswith("| troubles: 1")


@pytest.mark.parametrize("changed", FINE.values(), ids=FINE)
def test_what_is_fine_is_no_trouble(changed):
    found = replace(GOOD, **changed)
    assert found.troubles == []
    assert found.line.endswith("| no trouble")


def test_the_line_is_one_and_says_all():
    assert GOOD.line == (
        "qft 0.1.0, torch 2.13.0 | x86_64 avx512, 8 of 8 cores | /usr/bin/c++ 12.2.0, /usr/local/bin/nvcc 13.0.88 | "
        "CUDA 13.0, A100 sm_80 | no trouble"
    )
    bare = replace(GOOD, compiler="", nvcc="", torch_cuda="", gpus=(), driver=False)
    assert "| no C++ compiler, no nvcc | torch without CUDA | troubles: 1" in bare.line


def test_this_machine_is_seen_as_it_is(kernel_cache, monkeypatch, tmp_path):
    found = machine.look()
    assert {"qft", "Python", "torch", "transformers"} <= set(found.versions)
    assert found.instruction_sets[0] == "scalar"
    assert found.cache == kernel_cache
    assert found.cache_writable
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'c++ (Debian 12.2.0-14) 12.2.0'\n")
    compiler.chmod(0o755)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc: NVIDIA (R)'\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert (machine.look().compiler, machine.look().nvcc) == (f"{compiler} 12.2.0", f"{nvcc} 13.0.88")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert (machine.look().compiler, machine.look().nvcc) == ("", "")


def test_a_cache_that_cannot_be_made_is_seen(monkeypatch, tmp_path):
    (tmp_path / "file").touch(0o777)
    monkeypatch.setenv("QFT_CACHE", str(tmp_path / "file" / "cache"))
    assert not machine.look().cache_writable
    monkeypatch.setenv("QFT_CACHE", str(tmp_path / "not" / "yet"))
    assert machine.look().cache_writable
    assert not (tmp_path / "not").exists()


def test_the_command_prints_the_line_in_one_piece(result, run, threads):
    threads(1)
    said = result("info")
    code, out, _ = run("info")
    assert code == 0
    assert out.splitlines()[0] == said["diagnosis"] == machine.look().line
    assert said["troubles"] == machine.look().troubles
    assert bool(said["troubles"]) == (said["cores"] > 1)
    assert set(said["troubles"]) <= set(out.splitlines())
