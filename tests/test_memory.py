"""What a call allocates beyond its input, its result and the packed weight."""

import json
import os
from pathlib import Path

import pytest

OUT, IN, ROWS = 14336, 4096, 512
LIMIT = max(16 << 20, OUT * IN * 2 // 8)  # bytes: 16 MiB, or an eighth of the dense bf16 weight

# Large blocks go straight to the kernel and back (MALLOC_*), so that resident memory is what is allocated; writing 5 to
# clear_refs starts a new peak. The weight's codes are random bytes: a dense weight never exists here.
PROGRAM = f"""
import json, torch, qft
from qft import kernels
from qft.format import Format
from qft.tensor import QuantTensor

torch.set_num_threads(2)

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

def beyond_result(call):
    before = resident("VmRSS:")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    result = call()
    return resident("VmHWM:") - before - result.nbytes

def weight(out, in_features, text):
    fmt = Format.parse(text)
    codes = torch.randint(0, 256, (out, fmt.row_bytes(in_features)), dtype=torch.uint8)
    scales = torch.rand(out, fmt.groups(in_features)).to(torch.float16 if fmt.scale == "f16" else torch.float32)
    zeros = torch.full_like(scales, 3) if fmt.zero else None
    return QuantTensor(fmt, (out, in_features), codes, scales, zeros)

spent = {{}}
for text in ("nf4 g64 f32", "int3 g128 f16 zero"):
    small, large = weight(64, 64, text), weight({OUT}, {IN}, text)
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if text == "nf4 g64 f32" else (torch.bfloat16,):
        for rows in (1, {ROWS}):
            x, dy = torch.randn(rows, {IN}).to(dtype), torch.randn(rows, {OUT}).to(dtype)
            tiny = torch.randn(rows, 64).to(dtype)
            for name, call in {{
                "forward": lambda q, x, dy: kernels.matmul(x, q),
                "dx": lambda q, x, dy: kernels.matmul_t(dy, q),
                "ds": lambda q, x, dy: kernels.scale_grad(dy, x, q),
                "dequantize": lambda q, x, dy: q.dequantize(dtype),
            }}.items():
                if name != "dequantize" or rows == 1 and dtype == torch.bfloat16:
                    call(small, tiny, tiny)  # what libraries set up once is not counted
                    spent[f"{{name}} {{text}} {{rows}} {{dtype}}"] = beyond_result(lambda: call(large, x, dy))
print(json.dumps(spent))
"""


def test_no_call_allocates_a_dense_weight(python):
    if not os.access("/proc/self/clear_refs", os.W_OK) or not Path("/proc/self/status").is_file():
        pytest.skip("needs a Linux /proc whose clear_refs can be written")
    spent = json.loads(python(PROGRAM, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0"))
    assert len(spent) == 3 * 2 * 3 + 1 + 2 * 3 + 1
    assert {name: size / 2**20 for name, size in spent.items() if size > LIMIT} == {}
    assert max(spent.values()) > 1 << 20  # panels are seen
