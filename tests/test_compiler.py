"""From a code to C++ text and on to kernels at run time: what is emitted, built, cached, and said when nothing is."""

import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from formats import BOUND, ELEVEN, FORMATS, TWO, error

import qft
from qft import kernels, native, notices, reference
from qft.compiler import __main__ as compiler_main
from qft.compiler import emit, jit
from qft.format import CODEBOOKS, INTEGERS, Format, to_f32

# -------------------------------------------------------------------------------------------------------- emit

NF2 = """\
// Emitted by qft.compiler for nf2; edit csrc/qft, not this.
#include "qft/cpu/verbs.h"
#include "qft/cpu/formats.h"

namespace qft::QFT_ISA {
struct nf2 : CompiledCodebook<nf2> {
  static constexpr int bits = 2, count = 4;
  static constexpr float values[count] = {-0x1.0000000000000p+0f, 0x0.0p+0f, 0x1.5a06740000000p-2f, 0x1.0000000000000p+0f};
  static constexpr const char* name = "nf2";
};
extern const Kernels nf2_kernels;
const Kernels nf2_kernels = kernels_of<nf2>(QFT_STRING(QFT_ISA));
}  // namespace qft::QFT_ISA
"""  # noqa: E501


CUDA_INT4 = """\
// Emitted by qft.compiler for int4; edit csrc/qft, not this.
#include "qft/cuda/verbs.cuh"

namespace qft::QFT_ISA {
struct int4 : Code<Levels::integer, 4> {
  static constexpr const char* name = "int4";
};
extern const Kernels int4_kernels;
const Kernels int4_kernels = kernels_of<int4>(QFT_STRING(QFT_ISA));
}  // namespace qft::QFT_ISA
"""


def test_the_emitted_text():
    assert emit.emit("nf2", "avx2") == NF2
    assert emit.emit("int4", "cuda") == CUDA_INT4


def test_every_format_has_its_kernels_among_those_built_for_cuda():
    assert {emit.table_code(fmt, "cuda") for fmt in FORMATS} == set(emit.built_codes("cuda"))


GPUS = {
    "a Hopper and an Ada": ("9.0\n8.9\n9.0", ["arch=compute_89,code=sm_89", "arch=compute_90a,code=sm_90a"]),
    "a driver that does not answer": ("No devices were found", list(emit.CUDA_TARGETS)),
    "a driver that fails": ("8.0; exit 9", list(emit.CUDA_TARGETS)),
}


@pytest.mark.parametrize(("answer", "targets"), GPUS.values(), ids=GPUS)
def test_cuda_is_built_for_the_gpus_present(answer, targets, monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    text, _, failure = answer.partition(";")
    smi.write_text(f"#!/bin/sh\nprintf '{text}\\n'\n{failure}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert list(compiler_main.cuda_targets()) == targets


@pytest.mark.parametrize("code", [*CODEBOOKS, ELEVEN, TWO])
def test_every_level_is_emitted_exactly(code):
    (line,) = (line for line in emit.emit(code, "avx2").splitlines() if "values[count]" in line)
    numbers = line[line.index("{") + 1 : line.index("}")].split(", ")
    levels = Format(code, 64).levels
    assert [float.fromhex(number.removesuffix("f")) for number in numbers] == list(levels)
    assert f"bits = {(len(levels) - 1).bit_length()}, count = {len(levels)};" in emit.emit(code, "avx2")


def test_a_symbol_per_code():
    codes = [*CODEBOOKS, *INTEGERS, ELEVEN, TWO, "[-1 1]", "[-1 0 1]", "levels1", "levels4"]
    symbols = [emit.symbol(code) for code in codes]
    assert len(set(symbols)) == len(codes)
    assert all(symbol.isidentifier() for symbol in symbols)


def test_no_level_is_spelled_outside_python():
    sources = [path for path in jit.template_folder().rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    text = "\n".join(path.read_text() for path in sources)
    assert len(sources) > 5
    for levels in CODEBOOKS.values():
        for level in levels:
            if level not in (0.0, 1.0, -1.0, 0.5, -0.5, 0.25, -0.25):
                assert f"{abs(level):.6g}"[1:] not in text
                assert float(to_f32(abs(level))).hex().rstrip("0") not in text


RELEASES = {"13.0": "--compress-mode=size", "12.8": "--compress-mode=size", "12.4": "-Xfatbin=-compress-all"}


@pytest.mark.parametrize(("release", "flag"), RELEASES.items())
def test_nvcc_is_asked_in_words_its_release_knows(release, flag, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    assert compiler_main.cuda_flags(str(nvcc)) == (*emit.CUDA_FLAGS, flag)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    with pytest.raises(SystemExit, match=r"is release 11\.8, qft needs 12\.0; install a newer CUDA"):
        compiler_main.cuda_flags(str(nvcc))


def test_the_ahead_of_time_set(tmp_path):
    command = [sys.executable, "-m", "qft.compiler", str(tmp_path), "--isa", "scalar", "avx2"]
    subprocess.run(command, check=True)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    sources = {f"{emit.symbol(code)}.cpp" for code in emit.built_codes("scalar")}
    assert set(written) == sources | {"registry.cpp", "kernels.cmake"}
    for code in emit.built_codes("scalar"):
        assert (tmp_path / f"{emit.symbol(code)}.cpp").read_text() == emit.emit(code, "avx2")
    registry = (tmp_path / "registry.cpp").read_text()
    assert "&qft::avx2::nf4_kernels" in registry
    assert "&qft::scalar::levels4_kernels" in registry
    assert "&qft::avx2::levels4_kernels" not in registry
    (tmp_path / "nf4.cpp").write_text("edited")
    subprocess.run(command, check=True)
    assert (tmp_path / "nf4.cpp").read_text() == emit.emit("nf4", "avx2")
    assert all((tmp_path / name).stat().st_mtime_ns == then for name, then in written.items() if name != "nf4.cpp")


# ------------------------------------------------------------------------------------------------------- cache

# Stands in for a compiler: a line in a log for each run, and text for a library.
COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
while [ "$1" != "-o" ]; do shift; done
sleep {seconds}
{fail}
echo "a library" > "$2"
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("QFT_CACHE", str(folder))
    return folder


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Install a stand-in as the only c++ on the path; returns how often it ran."""
    log = tmp_path / "runs"
    log.touch()

    def install(fail: str = "", seconds: float = 0):
        path = tmp_path / "bin" / "c++"
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMPILER.format(log=log, fail=fail, seconds=seconds))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        return lambda: len(log.read_text().splitlines())

    return install


NVCC = """#!/bin/sh
if [ "$1" = "--version" ]; then cat {folder}/version; exit; fi
echo "$@" >> {folder}/runs
while [ "$1" != "-o" ]; do shift; done
echo "a library" > "$2"
"""


def test_cuda_kernels_are_cached_by_code_architecture_and_compiler(cache, monkeypatch, tmp_path):
    nvcc, version, runs = tmp_path / "nvcc", tmp_path / "version", tmp_path / "runs"
    nvcc.write_text(NVCC.format(folder=tmp_path))
    nvcc.chmod(0o755)
    version.write_text("13.0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    libraries = [jit.build({"cuda": "levels4"}, "90a"), jit.build({"cuda": "levels4"}, "90a")]
    assert libraries[0] == libraries[1]
    assert len(runs.read_text().splitlines()) == 1
    assert "-arch=sm_90a" in runs.read_text()
    libraries.append(jit.build({"cuda": "levels3"}, "90a"))
    libraries.append(jit.build({"cuda": "levels4"}, "89"))
    version.write_text("13.1")
    libraries.append(jit.build({"cuda": "levels4"}, "90a"))
    assert len({str(library) for (library,) in libraries}) == 4
    no_compiler(monkeypatch, tmp_path)
    with pytest.raises(OSError, match=r"no CUDA compiler is on the path \(nvcc\)"):
        jit.build({"cuda": "levels4"}, "90a")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")
def test_nvcc_builds_kernels_that_load_and_say_what_they_are_for(monkeypatch):
    tables, targets = dict(native.tables()), dict(native.cuda_targets())
    monkeypatch.setattr(native, "tables", lambda: tables)
    monkeypatch.setattr(native, "cuda_targets", lambda: targets)
    (library,) = jit.build({"cuda": "levels1"}, "80")
    native.load(str(library), "sm_80")
    assert (tables["levels1", "cuda"].code, tables["levels1", "cuda"].isa) == ("levels1", "cuda")
    assert native.serves("levels1", (8, 6))
    assert not native.serves("levels1", (9, 0))


def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_a_library_per_instruction_set_is_built_once(cache, compiler, monkeypatch, tmp_path):
    runs = compiler()
    first = jit.build({"scalar": "[-1 0 1]", "avx2": "[-1 0 1]"})
    assert runs() == 2
    assert sorted(path.name for path in cache.iterdir()) == sorted(path.name for path in first)
    assert [path.name.split("-")[:2] for path in first] == [
        [emit.symbol("[-1 0 1]"), isa] for isa in ("scalar", "avx2")
    ]
    no_compiler(monkeypatch, tmp_path)
    assert jit.build({"scalar": "[-1 0 1]", "avx2": "[-1 0 1]"}) == first
    assert runs() == 2


def test_only_what_the_cache_lacks_is_built(cache, compiler):
    runs = compiler()
    jit.build({"scalar": "[-1 0 1]"})
    jit.build({"scalar": "[-1 0 1]", "avx2": "[-1 0 1]"})
    assert runs() == 2
    jit.build({"scalar": "[-1 0 0.5 1]"})
    assert runs() == 3


def test_the_name_is_a_hash_of_the_content(cache, compiler, monkeypatch, tmp_path):
    runs = compiler()
    (before,) = jit.build({"scalar": "[-1 0 1]"})
    monkeypatch.setattr(jit, "FLAGS", (*jit.FLAGS, "-DOTHER"))
    (other_flags,) = jit.build({"scalar": "[-1 0 1]"})
    monkeypatch.setattr(jit, "_templates_hash", lambda: "other templates")
    (other_templates,) = jit.build({"scalar": "[-1 0 1]"})
    assert len({before, other_flags, other_templates}) == 3
    assert runs() == 3


def test_the_templates_hash_reads_every_header(monkeypatch, tmp_path):
    header = tmp_path / "qft" / "cpu" / "verbs.h"
    header.parent.mkdir(parents=True)
    monkeypatch.setattr(jit, "template_folder", lambda: tmp_path)
    seen = set()
    for text in ("one", "other"):
        header.write_text(text)
        seen.add(jit._templates_hash.__wrapped__())
    header.rename(header.with_name("other.h"))
    seen.add(jit._templates_hash.__wrapped__())
    assert len(seen) == 3


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "a bit flipped": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "something else": lambda content: b"#!/bin/sh",
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_library_is_built_again(cache, compiler, harm):
    runs = compiler()
    (library,) = jit.build({"scalar": "[-1 0 1]"})
    whole = library.read_bytes()
    library.write_bytes(harm(whole))
    assert jit.build({"scalar": "[-1 0 1]"}) == [library]
    assert runs() == 2
    assert library.read_bytes() == whole


def test_two_processes_may_build_the_same_kernels(cache, compiler):
    runs = compiler(seconds=1.5)
    program = "from qft.compiler import jit; print(*jit.build({'scalar': '[-1 0 1]', 'avx2': '[-1 0 1]'}))"
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert runs() > 2  # they really ran side by side
    assert {str(path) for path in cache.iterdir()} == set(outputs[0].split())
    assert all(jit._is_whole(Path(path)) for path in outputs[0].split())


def test_a_failing_compiler_is_quoted_and_leaves_nothing(cache, compiler):
    compiler(fail="echo 'kernels.cpp:7: error: no such thing'; echo 'error: and more'; exit 1")
    with pytest.raises(jit.CompilerError, match=r"could not compile \[-1 0 1\]: kernels.cpp:7: error: no such thing$"):
        jit.build({"scalar": "[-1 0 1]", "avx2": "[-1 0 1]"})
    assert list(cache.iterdir()) == []


def test_without_a_compiler_the_way_out_is_named(cache, monkeypatch, tmp_path):
    no_compiler(monkeypatch, tmp_path)
    with pytest.raises(OSError, match=r"no C\+\+ compiler is on the path \(c\+\+, g\+\+, clang\+\+\); install one"):
        qft.compile("[-1 0.001 1] g64")


def test_a_cache_that_cannot_be_written_is_an_os_error(compiler, monkeypatch, tmp_path):
    compiler()
    (tmp_path / "file").touch()
    monkeypatch.setenv("QFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="file"):
        jit.build({"scalar": "[-1 0 1]"})


def test_the_cache_has_a_home(monkeypatch, tmp_path):
    monkeypatch.delenv("QFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert jit.cache_folder() == tmp_path / ".cache" / "qft"
    monkeypatch.setenv("QFT_CACHE", str(tmp_path / "mine"))
    assert jit.cache_folder() == tmp_path / "mine"


# ---------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("code", [ELEVEN, TWO])
def test_levels_of_ones_own_become_kernels(code, kernel_cache):
    assert qft.compile(f"{code} g64") == list(native.instruction_sets())
    assert {f"{emit.symbol(code)}-{isa}" for isa in native.instruction_sets() if isa not in emit.SHARED} <= {
        path.name.rpartition("-")[0] for path in kernel_cache.iterdir()
    }
    choices = qft.explain(f"{code} g64 f32", 64, 64, rows=1)
    assert choices["matmul"].kernel.name == native.instruction_sets()[-1]


@pytest.mark.skipif("avx512_bf16" not in native.instruction_sets(), reason="this machine has no avx512_bf16")
def test_where_all_codebooks_share_kernels_levels_of_ones_own_need_no_compiler(monkeypatch, tmp_path, caplog):
    no_compiler(monkeypatch, tmp_path)
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "qft"):
        q = qft.quantize(torch.randn(33, 100), "[-1 -0.61 -0.33 0.006 0.28 0.61 1] g64")
        taken = {verb: choice.kernel.name for verb, choice in qft.explain(q.format, 33, 100, rows=8).items()}
    assert caplog.messages == []
    assert {taken[verb] for verb in ("quantize", "dequantize", "matmul", "matmul_t")} == {"avx512_bf16"}
    exact = reference.dequantize(q.unpack(), q.scales, None, q.format)
    assert torch.equal(q.dequantize(), exact)
    x = torch.randn(8, 100, dtype=torch.bfloat16)
    assert error(kernels.matmul(x, q), x.double() @ exact.double().T) < BOUND[torch.bfloat16]


def test_another_process_takes_the_kernels_from_the_cache(python, kernel_cache):
    qft.compile(f"{ELEVEN} g64")
    before = {path: path.stat().st_mtime_ns for path in kernel_cache.iterdir()}
    program = f"import qft; print(qft.compile('{ELEVEN} g64'))"
    assert python(program, PATH="") == f"{list(native.instruction_sets())}\n"
    assert {path: path.stat().st_mtime_ns for path in kernel_cache.iterdir()} == before


def products(q, kernel):
    x, dy = torch.linspace(-1, 1, 700).view(7, 100), torch.linspace(-1, 1, 231).view(7, 33)
    return [kernels.matmul(x, q, kernel), kernels.matmul_t(dy, q, kernel), kernels.dequantize(q, torch.float32, kernel)]


@pytest.mark.usefixtures("needs_compiler")
def test_without_a_compiler_the_generic_kernel_runs_and_says_so_once(cache, monkeypatch, tmp_path, caplog):
    code = "[-1 -0.61 -0.33 0.007 0.28 0.61 1]"
    weight = torch.randn(33, 100)
    notices.say_once.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "qft"):
        no_compiler(patch, tmp_path)
        q = qft.quantize(weight, f"{code} g64")
        x, dy = torch.randn(300, 100), torch.randn(300, 33)
        outputs = [kernels.matmul(x, q), kernels.matmul_t(dy, q), kernels.scale_grad(dy, x, q), q.dequantize()]
        few = products(q, "generic")
        again = qft.quantize(weight, f"{code} g32 f16")
        assert qft.explain(again.format, 64, 64)["dequantize"].kernel.name == "generic"
    (message,) = caplog.messages
    assert message.startswith(f"{code} runs on the generic kernel, which is slower: no C++ compiler is on the path")

    exact = reference.dequantize(q.unpack(), q.scales, None, q.format)
    assert torch.equal(outputs[3], exact)
    assert error(outputs[0], x.double() @ exact.double().T) < 1e-5
    assert error(outputs[1], dy.double() @ exact.double()) < 1e-5
    assert error(outputs[2], reference.scale_grad(dy, x, q.unpack(), None, q.format).double()) < 1e-5

    (library,) = jit.build({"scalar": code})  # a compiler appears
    native.load(str(library))
    compiled = qft.quantize(weight, f"{code} g64", kernel="scalar")
    assert all(torch.equal(a, b) for a, b in zip(compiled.tensors().values(), q.tensors().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(products(q, "scalar"), few, strict=True))


@pytest.mark.usefixtures("needs_compiler")
def test_a_failing_compiler_runs_once_and_not_at_every_call(cache, compiler, caplog):
    runs = compiler(fail="echo 'error: broken'; exit 1")
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "qft"):
        q = qft.quantize(torch.randn(33, 100), "[-1 -0.61 -0.33 0.008 0.28 0.61 1] g64")
        for rows in (1, 1, 300):
            kernels.matmul(torch.randn(rows, 100), q)
    assert runs() == len(native.instruction_sets())
    (message,) = caplog.messages
    assert message.endswith("could not compile [-1 -0.61 -0.33 0.008 0.28 0.61 1]: error: broken")


@pytest.mark.usefixtures("needs_compiler")
def test_a_library_the_machine_refuses_falls_back_too(cache, compiler, caplog):
    compiler()  # its "libraries" are text
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "qft"):
        qft.quantize(torch.randn(3, 100), "[-1 -0.61 -0.33 0.009 0.28 0.61 1] g64")
    (message,) = caplog.messages
    assert "did not load" in message


def test_templates_travel_with_the_package():
    folder = jit.template_folder()
    assert (folder / "qft" / "cpu" / "verbs.h").is_file()
    assert os.fspath(folder).endswith("csrc")


# ------------------------------------------------------------------------------------------------------- build


def test_without_nvcc_the_cpu_part_is_built_and_it_is_said(tmp_path):
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    if cmake is None:
        pytest.skip("needs cmake on the PATH")
    root = Path(__file__).resolve().parents[1]
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DQFT_NVCC=OFF"]
    command = [cmake, "-S", str(root), "-B", str(tmp_path), "-G", "Ninja", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nvcc was not found: qft is built for the CPU alone" in " ".join(done.stderr.split())
    assert not list((tmp_path / "emitted").glob("*.cu"))
    assert (tmp_path / "emitted" / "nf4.cpp").exists()
