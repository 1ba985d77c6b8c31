"""The doorway: it passes only what a kernel can read, works without torch's libraries, and lets other threads run."""

import re
import threading
import time
from pathlib import Path

import pytest
import torch
from formats import ELEVEN, FORMATS, FOUR, TWO, has_own_kernels, need

import qft
from qft import kernels, native
from qft.compiler.emit import CPU_FLAGS, generic_code, table_code


def test_every_instruction_set_of_this_machine_has_every_named_code():
    assert native.instruction_sets()[0] == "scalar"
    assert set(native.instruction_sets()) <= set(CPU_FLAGS)
    for fmt in FORMATS:
        for isa in native.instruction_sets() if has_own_kernels(fmt) else ():
            table = table_code(fmt, isa), isa
            assert (native.tables()[table].code, native.tables()[table].isa) == table
        assert has_own_kernels(fmt) or (generic_code(fmt), "scalar") in native.tables()


def test_the_module_links_no_torch_and_is_small():
    library = Path(native._native.__file__)
    content = library.read_bytes()
    assert not any(name in content for name in (b"libtorch", b"libc10", b"libpython"))
    assert len(content) <= 10e6


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux what a process's memory is made of")
def test_large_memory_asks_for_huge_pages():
    tensor = native.empty(16 << 20, dtype=torch.uint8, device=torch.device("cpu"))
    inside = tensor.data_ptr() + (8 << 20)
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", mapping)
        if bounds and int(bounds[1], 16) <= inside < int(bounds[2], 16):
            assert " hg" in re.search(r"^VmFlags:(.*)$", mapping, re.MULTILINE)[1]  # advised to
            return
    pytest.fail("the tensor lies in no mapping")


REFUSALS = {
    "device": (
        torch.empty(2, 3, device="meta"),
        ValueError,
        "x is on meta, but this kernel runs on cpu; move it with .to(cpu)",
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
        native.check(tensor, (2, 3), torch.float32, "x", torch.device("cpu"))


def test_an_address_is_passed_for_the_rest():
    tensor = torch.ones(2, 3)
    assert native.check(tensor, (2, 3), torch.float32, "x", torch.device("cpu")) == tensor.data_ptr()


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
    x = torch.randn(128, 2048)

    def longest_wait() -> float:
        """Of this thread, as a share of a call in another one."""
        span = []

        def call():
            span.append(time.perf_counter())
            kernels.matmul(x, q, "scalar")
            span.append(time.perf_counter())

        worker = threading.Thread(target=call)
        longest, last = 0.0, time.perf_counter()
        worker.start()
        while worker.is_alive():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return longest / (span[1] - span[0])

    assert min(longest_wait() for _ in range(5)) < 0.5  # a busy machine may hold one of them up, a held lock all


# Every buffer a kernel gets ends where a page begins that may not be touched: one byte too far ends the process.
# Nothing is aligned to more than its own numbers, as in a file mapped into memory.
GUARDED = """
import ctypes, math, mmap
import torch, qft
from qft import kernels, native
from qft.tensor import QuantTensor

libc = ctypes.CDLL(None, use_errno=True)


def guarded(*shape, dtype=torch.float32, device=None):
    shape = tuple(shape[0]) if not isinstance(shape[0], int) else shape
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    span = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, span + 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (start, start + mmap.PAGESIZE + span):
        if libc.mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(area, dtype=dtype, offset=mmap.PAGESIZE + span - size, count=math.prod(shape)).view(shape)


def guard(tensor):
    return guarded(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


torch.empty = guarded
for text, rows_of_table in CASES:
    for kernel in rows_of_table:
        for shape in ((1, 1), (3, 31), (2, 64), (5, 100), (2, 127), (3, 129), (4, 400), (2, 512)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                q = qft.quantize(guard(torch.randn(shape).to(dtype)), text, kernel=kernel)
                q = QuantTensor(q.format, shape, **{name: guard(tensor) for name, tensor in q.tensors().items()})
                plain = kernels.dequantize(q, dtype, "reference")
                table = kernels._table_of(q.format, kernel)
                out = guarded(shape, dtype=dtype)
                native.dequantize(q, out, (0, shape[0]), (0, shape[1]), *table)
                if not torch.equal(out, plain):
                    raise SystemExit(f"dequantize of {text} differs")
                for rows in (1, 2, 3, 5):
                    x, dy = guard(torch.randn(rows, shape[1]).to(dtype)), guard(torch.randn(rows, shape[0]).to(dtype))
                    kernels.matmul(x, q, kernel)
                    kernels.matmul_t(dy, q, kernel)
                dw, ds = guard(torch.randn(shape).to(dtype)), guarded(shape[0], q.format.groups(shape[1]))
                native.scale_grad(dw, q, (0, shape[0]), ds, *table)
                native.dot_columns(guard(torch.randn(shape).to(dtype)), dw, q, *table)
                if q.format.group == 0:
                    empty = QuantTensor(q.format, shape, **{**q.tensors(), "weight_scales": 0 * q.weight_scales})
                    native.zero_scale_grad(dy, x, empty, guarded(shape[0]), *table)
print("done")
"""


@pytest.mark.parametrize("kernel", [*CPU_FLAGS, "generic"])
def test_no_kernel_touches_a_byte_beyond_its_buffers(python, kernel):
    need(kernel)
    named = (
        "nf4 g64 f16",
        "nf3 g32 bf16",
        "int3 g64 f32 zero",
        "nf2 g128 dq",
        "int2 channel f16 zero",
        "int8 g32 f32 zero",
    )
    texts = (
        (f"{ELEVEN} g64", "[-1 -0.3 0.2 0.6 1] g32 f16", f"{FOUR} g64 dq", f"{TWO} g32")
        if kernel == "generic"
        else named
    )
    assert python(f"CASES = {[(text, [kernel]) for text in texts]}\n{GUARDED}") == "done\n"
