"""The doorway: it passes only what a kernel can read, works without torch's libraries, and lets other threads run."""

import re
import threading
import time
from pathlib import Path

import pytest
import torch
from formats import FORMATS, has_own_kernels

import qft
from qft import kernels, native
from qft.compiler.emit import ISA_FLAGS, generic_code


def test_every_instruction_set_of_this_machine_has_every_named_code():
    assert native.instruction_sets()[0] == "scalar"
    assert set(native.instruction_sets()) <= set(ISA_FLAGS)
    for fmt in FORMATS:
        for isa in native.instruction_sets() if has_own_kernels(fmt) else ():
            assert native.tables()[fmt.code, isa].isa == isa
            assert native.tables()[fmt.code, isa].code == fmt.code
        assert has_own_kernels(fmt) or (generic_code(fmt), "scalar") in native.tables()


def test_the_module_links_no_torch_and_is_small():
    library = Path(native._native.__file__)
    content = library.read_bytes()
    assert not any(name in content for name in (b"libtorch", b"libc10", b"libpython"))
    assert len(content) <= 10e6


REFUSALS = {
    "device": (
        torch.empty(2, 3, device="meta"),
        ValueError,
        "x is on meta, but this kernel runs on the CPU; move it with .cpu()",
    ),
    "dtype": (
        torch.ones(2, 3).half(),
        TypeError,
        "x is torch.float16, expected torch.float32; convert it with .to(torch.float32)",
    ),
    "shape": (torch.ones(3, 2), ValueError, "x has shape (3, 2), expected (2, 3)"),
    "rank": (torch.ones(6), ValueError, "x has shape (6,), expected (2, 3)"),
    "layout": (torch.ones(3, 2).T, ValueError, "x is not contiguous; pass x.contiguous()"),
}


@pytest.mark.parametrize(("tensor", "kind", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_a_tensor_no_kernel_can_read_is_refused(tensor, kind, sentence):
    with pytest.raises(kind, match=re.escape(sentence)):
        native.check(tensor, (2, 3), torch.float32, "x")


def test_an_address_is_passed_for_the_rest():
    tensor = torch.ones(2, 3)
    assert native.check(tensor, (2, 3), torch.float32, "x") == tensor.data_ptr()


@pytest.mark.parametrize("name", ["weight", "weight_scales", "weight_zeros"])
def test_a_stored_tensor_that_does_not_fit_is_refused(name):
    q = qft.quantize(torch.randn(4, 128), "int4 g64 zero")
    stored = q.tensors()
    stored[name] = stored[name][:, :-1].contiguous()
    broken = type(q)(q.format, q.shape, **stored)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        native.matmul(torch.randn(1, 128), broken, "int4", "scalar")


def test_missing_zero_points_are_refused():
    q = qft.quantize(torch.randn(4, 128), "int4 g64 zero")
    with pytest.raises(ValueError, match=re.escape("weight_zeros is missing; this format needs it with shape (4, 2)")):
        native.matmul(torch.randn(1, 128), type(q)(q.format, q.shape, q.weight, q.weight_scales), "int4", "scalar")


@pytest.mark.parametrize("name", ["weight_scales_absmax", "weight_scales_offset"])
def test_double_quantized_companions_that_do_not_fit_are_refused(name):
    q = qft.quantize(torch.randn(40, 1024), "nf4 g64 dq")
    for broken in (q.tensors()[name].double(), q.tensors()[name][:0], None):
        with pytest.raises((ValueError, TypeError), match=name):
            native.matmul(
                torch.randn(1, 1024), type(q)(q.format, q.shape, **{**q.tensors(), name: broken}), "nf4", "scalar"
            )


def test_columns_start_on_a_block():
    assert native.BLOCK % 32 == 0


def test_a_file_that_is_no_library_does_not_load(tmp_path):
    path = tmp_path / "kernels.so"
    path.write_bytes(b"no library")
    with pytest.raises(OSError, match="did not load"):
        native.load(str(path))


def test_other_python_threads_run_during_a_call(threads):
    threads(1)
    q = qft.quantize(torch.randn(2048, 2048), "nf4 g64")
    x = torch.randn(64, 2048)
    span = []

    def call():
        span.append(time.perf_counter())
        kernels.matmul(x, q, "scalar")
        span.append(time.perf_counter())

    worker = threading.Thread(target=call)
    worker.start()
    longest, last = 0.0, time.perf_counter()
    while worker.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    worker.join()
    assert span[1] - span[0] > 0.05  # long enough to tell
    assert longest < (span[1] - span[0]) / 2
