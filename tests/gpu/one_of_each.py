"""One small shape for each of qft's own kernels, for compute-sanitizer to watch; the last line printed is `ran`.

Tensors come from the CPU and nothing of torch's or cuBLAS's own is launched on the device but copies.
"""

import sys
from dataclasses import replace

import torch

from qft import kernels, native
from qft.format import Format
from qft.tensor import quantize

FORMATS = ("nf4 g64 dq", "nf3 g32 f16", "nf2 channel bf16", "[-0.4 1] g32 f32", "int8 g32 f16 zero", "int4 g64 f32",
           "int3 g32 f16 zero", "int2 g64 bf16")  # fmt: skip
SHAPE = (36, 328)  # two tiles of 16 rows and a part of one, five records of 64 codes and a part of one
ROWS = (1, 8, 13, 32, 64)  # of x: every width of tile, and one in part


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda:0")
    out, width = SHAPE
    for fmt in map(Format.parse, FORMATS):
        table = kernels._table_of(fmt, "cuda")
        weight = torch.randn(SHAPE)
        native.quantize(weight.to(device), fmt, *table)
        importance = torch.rand(width, device=device)
        native.quantize(weight.to(device), fmt, *table, search=True, importance=importance)
        on_cpu = quantize(weight, fmt)
        q = replace(on_cpu, **{name: tensor.to(device) for name, tensor in on_cpu.tensors().items()})
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            dense = torch.empty(SHAPE, dtype=dtype, device=device)
            native.dequantize(q, dense, (0, out), (0, width), *table)
            ds = torch.empty(out, fmt.groups(width), device=device)
            native.scale_grad(torch.randn(SHAPE).to(dtype).to(device), q, (0, out), ds, *table)
            a = torch.randn(70, width).to(dtype).to(device)
            results = [dense, ds, native.dot_columns(a, a, q, *table)]
            if fmt.group == 0:
                q.weight_scales[::3] = 0
                dy, total = torch.randn(70, out).to(dtype).to(device), torch.zeros(out).to(device)
                native.zero_scale_grad(dy, a, q, total, *table)
                results.append(total)
            for rows in ROWS if dtype != torch.float32 else ():
                results.append(native.matmul(torch.randn(rows, width).to(dtype).to(device), q, *table))
            assert all(result.cpu().isfinite().all() for result in results), f"{fmt} {dtype}"
    torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    sys.exit(main())
