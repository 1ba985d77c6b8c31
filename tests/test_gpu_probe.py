"""bench/gpu_probe.py without a GPU: statistics, reference decoders, isolation, the command, and the compiled half."""

import ctypes
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_probe.py"
spec = importlib.util.spec_from_file_location("gpu_probe", SCRIPT)
assert spec is not None
assert spec.loader is not None
probe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(probe)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")
has_gpu = Path("/dev/nvidiactl").exists()


def pack(name, codes):
    """The inverse of gpu_probe.unpack, written from the format's description."""
    if name.startswith("nf3"):
        words = []
        for at in range(0, len(codes), 32):
            rows = [codes[at + 8 * row : at + 8 * row + 8] for row in range(4)]
            words += [sum((rows[j][i] | (rows[3][i] >> j & 1) << 3) << 4 * i for i in range(8)) for j in range(3)]
        return words
    bits = 2 if name.startswith("nf2") else 4
    per_word = 32 // bits
    return [
        sum(code << bits * i for i, code in enumerate(codes[at : at + per_word]))
        for at in range(0, len(codes), per_word)
    ]


@pytest.mark.parametrize(("name", "levels"), [("nf4_prmt", 16), ("nf3_prmt", 8), ("nf2_prmt", 4)])
def test_unpack_reverses_pack(name, levels):
    codes = [random.Random(0).randrange(levels) for _ in range(320)]
    codes[:levels] = range(levels)
    assert probe.unpack(name, pack(name, codes)) == codes


def test_reference_delivers_in_the_decoders_order():
    levels = list(range(100, 116))
    assert probe.reference_decode("nf4_pair_64k", struct.pack("<I", 0x76543210), levels) == list(range(100, 108))
    assert probe.reference_decode("nf2_prmt", struct.pack("<I", 0x44444444), levels) == [100] * 8 + [101] * 8
    minus_8, minus_4 = 0xC100, 0xC080  # codes 0 and 4 share a register
    assert probe.reference_decode("int4_lop3", struct.pack("<I", 0x76543210), levels)[:2] == [minus_8, minus_4]
    unit = bytes(range(16))
    assert struct.pack("<32H", *probe.reference_decode("raw", unit, levels)) == unit * 4


def test_levels_are_16_distinct_finite_bf16():
    levels = probe.random_levels(seed=5)
    values = [struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in levels]
    assert len(set(levels)) == 16
    assert all(math.isfinite(value) and abs(value) <= 1 for value in values)
    assert [probe.bf16_bits(value) for value in values] == levels


def test_figure_and_line():
    figure = probe.figure("read", "GB/s", (x for x in (3.0, 1.0, 2.0, 10.0)), segment=32, mb=4)
    assert figure == {
        "name": "read", "parameters": {"segment": 32, "mb": 4}, "unit": "GB/s",
        "median": 2.5, "min": 1.0, "max": 10.0, "n": 4,
    }  # fmt: skip
    assert probe.fit_line([1, 2, 4], [7, 9, 13]) == pytest.approx((5, 2))


def test_table_sweeps_the_last_parameter():
    figures = [probe.figure("read", "GB/s", [1234.5 * mb], pattern="linear", mb=mb) for mb in (1, 64)]
    lines = probe.table("rows", [*figures, probe.figure("power", "W", [0.5])]).splitlines()
    assert [line.split() for line in lines] == [
        ["==", "rows"],
        ["mb", "1", "64"],
        ["read", "pattern=linear", "GB/s", "1234", "79008"],
        ["power", "W", "0.5"],
    ]


def raising():
    yield {"kept": 1}
    raise ValueError("why")


def dying():
    yield {"kept": 1}
    os.kill(os.getpid(), signal.SIGKILL)


def hanging():
    yield {"kept": 1}
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the child uses none of the threads it loses
@pytest.mark.parametrize(
    ("task", "error"),
    [(raising, "ValueError: why"), (dying, "the process ended with code -9"), (hanging, "stopped after 1 s")],
)
def test_a_failing_section_is_a_line_of_text_and_keeps_its_figures(task, error):
    start = time.monotonic()
    entry = probe.measure(task, limit_s=1)
    assert entry["figures"] == [{"kept": 1}]
    assert entry["errors"] == [error]
    assert time.monotonic() - start < 10


def test_a_report_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    output = tmp_path / "new" / "report.json"
    probe.save({"figures": [1.5]}, output)
    with pytest.raises(ValueError, match="JSON compliant"):
        probe.save({"figures": [math.nan]}, output)
    monkeypatch.setattr(probe.os, "replace", lambda part, whole: None)  # as if the process ended just before
    probe.save({"figures": [2.5]}, output)
    assert json.loads(output.read_text()) == {"figures": [1.5]}


def command(*arguments, **environment):
    line = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.skipif(has_gpu, reason="says what happens on a machine without a GPU; this one has one")
def test_without_a_gpu_one_sentence_and_exit_code_2():
    done = command("--quick")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"gpu_probe: PyTorch .*\n", done.stderr)


def test_bad_use_is_one_sentence_and_exit_code_2(tmp_path):
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF")
    assert "was built from other sources" in command("--library", str(other)).stderr
    done = command("--build-only", str(other), PATH=str(tmp_path))
    assert done.returncode == 2
    assert re.fullmatch(r"gpu_probe: nvcc is not on the PATH.*\n", done.stderr)


def test_ctypes_structs_have_the_layout_of_the_header(tmp_path):
    structs = probe.structs((probe.SOURCES / "probe.h").read_text())
    assert sorted(structs) == ["Decode", "Dequantize", "Linear", "Rate", "Rows", "Work"]
    places = [(name, field) for name, cls in structs.items() for field, _ in cls._fields_]
    lines = "".join(f'std::printf("%zu %zu\\n", offsetof({n}, {f}), sizeof({n}));' for n, f in places)
    source = f'#include "probe.h"\n#include <cstddef>\n#include <cstdio>\nint main() {{{lines}}}'
    (tmp_path / "layout.cpp").write_text(source)
    build = ["c++", "-std=c++17", f"-I{probe.SOURCES}", str(tmp_path / "layout.cpp"), "-o", str(tmp_path / "layout")]
    subprocess.run(build, check=True)
    layout = subprocess.check_output([tmp_path / "layout"], text=True).split()
    ours = [(getattr(structs[n], f).offset, ctypes.sizeof(structs[n])) for n, f in places]
    assert [int(number) for number in layout] == [number for pair in ours for number in pair]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Built for sm_80 and sm_90a; a register spill or a stack frame fails the build."""
    output = tmp_path_factory.mktemp("probe") / "probe.so"
    return probe.build(output, "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror", "-Werror=all-warnings")


@needs_nvcc
@pytest.mark.parametrize("name", probe.DECODERS)
def test_decoders_match_the_reference_on_the_host(library, name):
    kernels, levels, units = probe.Library(probe.verified(library)), probe.random_levels(seed=7), 64
    work = kernels.work(f"check/{name}")
    packed = random.Random(1).randbytes(units * work.unit_bytes)
    decoded = (ctypes.c_uint16 * (units * work.unit_codes))(*[0xDEAD] * units * work.unit_codes)
    fields = {"packed": ctypes.cast(packed, ctypes.c_void_p), "decoded": ctypes.cast(decoded, ctypes.c_void_p)}
    args = kernels.arguments(f"check/{name}", levels=levels, mask=units - 1, **fields)
    kernels.call("decode_on_host", f"check/{name}", args)
    assert list(decoded) == probe.reference_decode(name, packed, levels)


@needs_nvcc
@pytest.mark.parametrize("name", probe.INSTRUCTIONS)
def test_every_rate_is_known_to_the_library(library, name):
    assert probe.Library(library).work(f"rate/{name}").per_turn >= 64


@needs_nvcc
def test_a_launch_that_cannot_be_says_why(library):
    kernels = probe.Library(library)
    with pytest.raises(OSError, match="linear/erase: there is no kernel of that name"):
        kernels.work("linear/erase")
    if has_gpu:
        pytest.skip("the rest needs a machine without a GPU")
    args = kernels.arguments("linear/read", bytes=16)
    with pytest.raises(OSError, match=r"linear/read: .*(CUDA|driver)"):
        kernels.call("launch", "linear/read", args, ctypes.c_int32(1), None)


# In the machine code of one loop turn: the opcode that the figure is named after, and how many of it.
MACHINE_CODE = {
    "rate_loopI9RegistersI4Prmt": ("PRMT", 128),
    "rate_loopI9RegistersI4Lop3": ("LOP3", 128),
    "rate_loopI9RegistersI4Shfl": ("SHFL", 128),
    "rate_loopI9RegistersI5Hfma2": ("HFMA2", 128),
    "rate_loopI9RegistersI5Bfma2": ("HFMA2", 128),
    "rate_loopI9PairTableILi128E": ("LDS", 128),
    "rate_loopI9PairTableILi256E": ("LDS", 128),
    "rate_loopI10TensorCore": ("HMMA", 64),
    "decode_loopI7Nf4Prmt15FeedTensorCores": ("PRMT", 256),  # 128 codes: two each
    "decode_loopI7Nf3Prmt15FeedTensorCores": ("PRMT", 128),  # 128 codes: one each
    "decode_loopI7Nf2Prmt15FeedTensorCores": ("PRMT", 256),  # 256 codes: one each
    "decode_loopI7Nf4PairILi128EE15FeedTensorCores": ("LDS", 64),  # 128 codes: one for two
    "decode_loopI7Nf4PairILi256EE15FeedTensorCores": ("LDS", 64),
    "decode_loopI10Nf4Shuffle15FeedTensorCores": ("SHFL", 128),
    "decode_loopI8Int4Lop315FeedTensorCores": ("LOP3", 64),  # one for two codes, and a few for addresses
}


@needs_nvcc
@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="needs cuobjdump and nvdisasm on the PATH")
def test_the_machine_code_holds_what_is_counted(library):
    text = subprocess.run(["cuobjdump", "-sass", str(library)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"code for (sm_\w+)\n", text)[1:]
    for architecture in ("sm_80", "sm_90a"):
        code = "".join(body for target, body in zip(parts[::2], parts[1::2], strict=True) if target == architecture)
        functions = dict(re.findall(r"Function : (\S+)\n(.*?)\.\.\.\.\.", code, re.DOTALL))
        for name, (opcode, count) in MACHINE_CODE.items():
            (body,) = (body for function, body in functions.items() if name in function)
            found = len(re.findall(rf"\b{opcode}\b", body))
            assert count <= found <= count * 1.25 + 8, f"{architecture} {name}: {found} {opcode}, not {count}"
