"""Measure the GPU facts that the kernel design rests on, and write them as one JSON file.

    python bench/gpu_probe.py [--quick] [--output FILE]    build the kernels with nvcc, measure, print a table
    python bench/gpu_probe.py --build-only probe.so        where there is nvcc and no GPU
    python bench/gpu_probe.py --library probe.so           where there is a GPU and no nvcc

Each section runs in a process of its own with a time limit: a crash, a hang or an error in one is a line of text in
the JSON, and the others go on. Times come from CUDA events around replays of a CUDA graph whose buffers, used in turn,
exceed L2, unless a figure's name says otherwise; rates per clock come from the multiprocessor's own counter.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "gpu_probe"
ARCHITECTURES = ("80", "90a")
MB = 1 << 20
LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (1024, 4096))  # (out_features, in_features)
INSTRUCTIONS = ("prmt", "lop3", "shfl", "hfma2", "bfma2", "pair_32k", "pair_64k", "hmma")
DECODERS = ("raw", "nf4_prmt", "nf3_prmt", "nf2_prmt", "nf4_pair_32k", "nf4_pair_64k", "int4_lop3", "nf4_shuffle")
# The order in which a decoder hands out a chunk's codes; decoders not named here keep the order of storage.
DELIVERY = {"nf2_prmt": [*range(0, 16, 2), *range(1, 16, 2)], "int4_lop3": [0, 4, 1, 5, 2, 6, 3, 7]}
Call = Callable[[], Any]


# ---- the compiled half


def digest() -> str:
    """Of the kernels' sources: a library built from others is refused."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.*")))).hexdigest()[:16]


def build(output: Path, *flags: str) -> Path:
    """Compile the kernels into a shared library with a plain C interface. OSError: no nvcc, or it fails."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise OSError("nvcc is not on the PATH; use --build-only where it is, and pass the file as --library here")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    options = ["-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", f'-DPROBE_SOURCES="{digest()}"', *flags]
    command = [nvcc, *options, *targets, "-o", str(output), str(SOURCES / "probe.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"nvcc ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return output


def structs(header: str) -> dict[str, type[ctypes.Structure]]:
    """The structs of probe.h as ctypes classes, so that a field is spelled once."""
    types: dict[str, Any] = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}
    types |= {"uint16_t": ctypes.c_uint16, "void*": ctypes.c_void_p}
    found = {}
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", header, re.DOTALL | re.MULTILINE):
        fields = []
        for kind, field, length in re.findall(r"^ +(?:const )?(\w+\*?) (\w+)(?:\[(\d+)\])?;", body, re.MULTILINE):
            fields.append((field, types[kind] * int(length) if length else types[kind]))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


def verified(library: Path) -> Path:
    """The same path. OSError: no such file, or it was built from other sources. Looks without loading."""
    if digest().encode() not in library.read_bytes():
        raise OSError(f"{library} was built from other sources than {SOURCES}; build it again")
    return library


class Library:
    """The compiled kernels by name. A call that fails raises an OSError that says why."""

    def __init__(self, path: Path) -> None:
        self.handle = ctypes.CDLL(str(path))
        self.structs = structs((SOURCES / "probe.h").read_text())
        for entry in ("work", "launch", "decode_on_host"):
            getattr(self.handle, f"probe_{entry}").restype = ctypes.c_char_p

    def call(self, entry: str, kernel: str, *args: Any) -> None:
        if error := getattr(self.handle, f"probe_{entry}")(kernel.encode(), *args):
            raise OSError(f"{kernel}: {error.decode()}")

    def work(self, kernel: str) -> Any:
        work = self.structs["Work"]()
        self.call("work", kernel, ctypes.byref(work))
        return work

    def arguments(self, kernel: str, **fields: Any) -> Any:
        """The struct of `kernel` with its fields set; a list becomes an array."""
        family = kernel.split("/")[0].replace("check", "decode").capitalize()
        args = self.structs[family]()
        for name, value in fields.items():
            setattr(args, name, type(getattr(args, name))(*value) if isinstance(value, list) else value)
        return ctypes.byref(args)


# ---- what the decoders must give


def bf16_bits(value: float) -> int:
    """The upper half of the fp32 pattern: bf16, rounded toward zero."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0]) >> 16


def random_levels(seed: int) -> list[int]:
    """16 distinct bf16 patterns in [-1, 1]: a swapped code cannot go unseen."""
    draw, levels = random.Random(seed), dict[int, None]()
    while len(levels) < 16:
        levels[bf16_bits(draw.uniform(-1, 1))] = None
    return list(levels)


def unpack(name: str, words: Sequence[int]) -> list[int]:
    """The codes of 32-bit words in storage order, the first in the lowest bits. In nf3 three words hold 32 codes: 24
    nibbles of three bits, then eight codes whose bits 0, 1, 2 are the spare bits of the three words' nibbles."""
    if not name.startswith("nf3"):
        bits = 2 if name.startswith("nf2") else 4
        return [word >> at & (1 << bits) - 1 for word in words for at in range(0, 32, bits)]
    codes = []
    for first in range(0, len(words), 3):
        nibbles = [[word >> at & 15 for at in range(0, 32, 4)] for word in words[first : first + 3]]
        codes += [nibble & 7 for word in nibbles for nibble in word]
        codes += [sum((word[i] >> 3) << bit for bit, word in enumerate(nibbles)) for i in range(8)]
    return codes


def reference_decode(name: str, packed: bytes, levels: Sequence[int]) -> list[int]:
    """The bf16 patterns that decoder `name` must deliver for `packed`, in its order of delivery."""
    if name == "raw":  # each group of eight is the 16-byte unit itself, four times over
        units = [struct.unpack("<8H", packed[at : at + 16]) for at in range(0, len(packed), 16)]
        return [half for unit in units for half in unit * 4]
    codes = unpack(name, struct.unpack(f"<{len(packed) // 4}I", packed))
    values = [bf16_bits(code - 8) if name == "int4_lop3" else levels[code] for code in codes]
    order = DELIVERY.get(name, [0])
    return [values[at + i] for at in range(0, len(values), len(order)) for i in order]


# ---- figures


def figure(name: str, unit: str, samples: Iterable[float], **parameters: int | str) -> dict[str, Any]:
    """One measured figure. The last parameter is the swept one: the table makes its values the columns."""
    values = list(samples)
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}
    return {"name": name, "parameters": parameters, "unit": unit, **spread}


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares y = constant + slope * x, as (constant, slope)."""
    slope, constant = statistics.linear_regression(x, y)
    return constant, slope


def table(section: str, figures: Iterable[dict[str, Any]]) -> str:
    """Medians as plain text: a line per name, unit and fixed parameters, a column per value of the swept one."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry in figures:
        *fixed, (swept, value) = list(entry["parameters"].items()) or [("", "")]
        label = " ".join([entry["name"], *(f"{key}={fixed_value}" for key, fixed_value in fixed)])
        median = f"{entry['median']:.0f}" if abs(entry["median"]) >= 1000 else f"{entry['median']:.3g}"
        lines.setdefault((label, entry["unit"], swept), {})[str(value)] = median
    out, header = [f"== {section}"], [""]
    for (label, unit, swept), cells in lines.items():
        width = max(8, *(len(column) + 1 for column in cells))
        if swept and [swept, *cells] != header:
            header = [swept, *cells]
            out.append(f"{swept:>57}" + "".join(f"{column:>{width}}" for column in cells))
        out.append(f"{label:<42} {unit:>14}" + "".join(f"{cell:>{width}}" for cell in cells.values()))
    return "\n".join(out)


# ---- the GPU, as one section's process sees it


class Gpu:
    """Buffers, launches and timing. Timing methods return seconds per call, one sample a measurement."""

    def __init__(self, library: Path | str, quick: bool) -> None:
        """`library`: the compiled kernels, or why there are none."""
        import torch

        self.torch, self.library, self.quick, self.samples = torch, library, quick, 7 if quick else 15
        properties = torch.cuda.get_device_properties(0)
        self.processors, self.l2_bytes = properties.multi_processor_count, properties.L2_cache_size
        self.flush_buffer = self.random_bytes(256 * MB)  # the size that triton.testing.do_bench clears between calls
        self.sink = self.random_bytes(self.processors * 4096)
        self.last: Call = torch.cuda.synchronize
        square, until = torch.randn(4096, 4096, device="cuda").bfloat16(), time.monotonic() + 0.5
        while time.monotonic() < until:  # an idle GPU has a fraction of its clock
            square @ square
            torch.cuda.synchronize()

    @cached_property
    def kernels(self) -> Library:
        if isinstance(self.library, str):
            raise OSError(self.library)
        return Library(self.library)

    def launch(self, kernel: str, blocks: int, **fields: Any) -> None:
        """On the current stream; tensors are passed as their addresses."""
        plain = {name: value.data_ptr() if hasattr(value, "data_ptr") else value for name, value in fields.items()}
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        self.kernels.call("launch", kernel, self.kernels.arguments(kernel, **plain), ctypes.c_int32(blocks), stream)

    def read(self, source: Any) -> None:
        self.launch("linear/read", 4 * self.processors, source=source, target=self.sink, bytes=source.nbytes)

    def write(self, target: Any) -> None:
        self.launch("linear/write", 4 * self.processors, target=target, bytes=target.nbytes)

    def random_bytes(self, count: int) -> Any:
        return self.torch.randint(0, 256, (count,), dtype=self.torch.uint8, device="cuda")

    def pick(self, full: Sequence[Any], quick: Sequence[Any]) -> Sequence[Any]:
        return quick if self.quick else full

    def rotation(self, set_bytes: int) -> int:
        """How many sets of buffers, used in turn, leave nothing of a set in L2 until it is used again."""
        return max(2, min(128, math.ceil(4 * self.l2_bytes / set_bytes)))

    def events(self, calls: Sequence[Call], before: Call = lambda: None) -> list[float]:
        """Events around one call after another, queued without waiting, as do_bench does; `before` is its flush."""
        pairs = [[self.torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.samples + 3)]
        for (start, end), call in zip(pairs, itertools.cycle(calls), strict=False):
            before()
            start.record()
            call()
            end.record()
        self.torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs[3:]]

    def graph(self, calls: Sequence[Call]) -> list[float]:
        """All calls captured in one graph, over and over up to 10 ms, so that starting a replay does not count."""

        def run_all() -> None:
            for call in calls:
                call()

        self.torch.cuda.synchronize()
        with self.torch.cuda.stream(self.torch.cuda.Stream()):  # lazy set-up must be over before a capture begins
            run_all()
        self.torch.cuda.synchronize()
        repeats = max(1, min(2000 // len(calls), int(10e-3 / statistics.median(self.events([run_all])))))
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            for _ in range(repeats):
                run_all()
        self.last = graph.replay
        return [seconds / repeats / len(calls) for seconds in self.events([graph.replay])]

    def counted(self, launch: Callable[..., None]) -> tuple[list[float], list[float]]:
        """(clocks, seconds) per launch; `launch` is given `cycles`, where each block leaves its clock ticks."""
        cycles = self.torch.zeros(self.processors, dtype=self.torch.int64, device="cuda")
        self.last = partial(launch, cycles=cycles)
        runs = []
        for _ in range(self.samples):
            seconds = self.events([self.last])[-1]
            runs.append((float(cycles.median()), seconds))
        clocks, times = zip(*runs, strict=True)
        return list(clocks), list(times)

    def clocks(self) -> Iterator[dict[str, Any]]:
        """What the driver says of clocks and power while the section's last workload runs."""
        units = {"clocks.sm": "MHz", "clocks.mem": "MHz", "power.draw": "W", "temperature.gpu": "C"}
        command = ["nvidia-smi", f"--query-gpu={','.join(units)}", "--format=csv,noheader,nounits"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while process.poll() is None:
            self.last()
            self.torch.cuda.synchronize()
        for (name, unit), value in zip(units.items(), process.communicate()[0].split(","), strict=True):
            yield figure(name, unit, [float(value)])


# ---- sections: each yields figures, and a text for a part that failed


def bandwidth(gpu: Gpu) -> Iterator[Any]:
    """Device memory and, as a small buffer is used again and again, L2. A copy counts bytes read plus bytes written."""
    sizes = gpu.pick((1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 128, 512, 2048), (4, 16, 32, 512))
    source = gpu.random_bytes(sizes[-1] * MB)
    target = gpu.torch.empty_like(source)
    for name in ("copy", "read", "write"):
        for mb in sizes:
            part, other = source[: mb * MB], target[: mb * MB]
            call = partial(other.copy_, part) if name == "copy" else partial(getattr(gpu, name), part)
            moved = part.nbytes * (2 if name == "copy" else 1)
            yield figure(name, "GB/s", (moved / t / 1e9 for t in gpu.graph([call])), mb=mb)


def rates(gpu: Gpu) -> Iterator[Any]:
    """Per clock and multiprocessor: instructions per lane, pair_* lookups per lane, and mma.sync m16n8k16 per warp."""
    turns = 300 if gpu.quick else 1000
    for name in INSTRUCTIONS:
        kernel, per_warp = f"rate/{name}", name == "hmma"
        clocks, seconds = gpu.counted(partial(gpu.launch, kernel, gpu.processors, turns=turns, sink=gpu.sink))
        work = gpu.kernels.work(kernel)
        done = work.per_turn * turns * work.threads // (32 if per_warp else 1)
        yield figure("rate", f"{'mma' if per_warp else 'lanes'}/clk/SM", (done / c for c in clocks), instruction=name)
        yield figure("clock", "MHz", (c / s / 1e6 for c, s in zip(clocks, seconds, strict=True)), instruction=name)


def decode(gpu: Gpu) -> Iterator[Any]:
    """Each decoder feeding mma.sync: codes per clock from L1, and packed bytes per second from device memory."""
    levels, blocks = random_levels(seed=2), gpu.processors
    for name in DECODERS:
        work = gpu.kernels.work(f"decode/{name}")
        near = {"levels": levels, "step": work.threads, "mask": 4 * work.threads - 1, "cycles": gpu.flush_buffer}
        packed = gpu.random_bytes(4 * work.threads * work.unit_bytes)
        decoded = gpu.torch.full((4 * work.threads * work.unit_codes,), -1, dtype=gpu.torch.int16, device="cuda")
        gpu.launch(f"check/{name}", 1, packed=packed, decoded=decoded, turns=4 // work.per_turn, **near)
        want = reference_decode(name, bytes(packed.tolist()), levels)
        wrong = sum(got & 0xFFFF != bits for got, bits in zip(decoded.tolist(), want, strict=True))
        if wrong:
            yield f"{name}: {wrong} of {len(want)} codes differ from the host reference; not timed"
            continue

        near |= {"packed": packed, "sink": gpu.sink, "turns": 200 if gpu.quick else 600, "mask": 2 * work.threads - 1}
        del near["cycles"]
        clocks, _ = gpu.counted(partial(gpu.launch, f"decode/{name}", blocks, **near))
        codes = near["turns"] * work.per_turn * work.unit_codes * work.threads
        yield figure("from L1", "codes/clk/SM", (codes / c for c in clocks), decoder=name)

        units = 1 << ((1 << (28 if gpu.quick else 30)) // work.unit_bytes).bit_length() - 1
        at_once = blocks * work.threads * work.per_turn
        far = {"packed": gpu.random_bytes(units * work.unit_bytes), "mask": units - 1, "turns": units // at_once}
        far |= {"step": blocks * work.threads, "block_stride": work.threads, "cycles": gpu.flush_buffer}
        seconds = gpu.graph([partial(gpu.launch, f"decode/{name}", blocks, **near | far)])
        moved = far["turns"] * at_once * work.unit_bytes
        yield figure("from device memory", "GB/s packed", (moved / t / 1e9 for t in seconds), decoder=name)


def rows(gpu: Gpu) -> Iterator[Any]:
    """Packed rows read in the pattern of mma.sync's A fragment, against the same loads in memory order."""
    packed = gpu.random_bytes(512 * MB)
    for pattern, segment in itertools.product(("linear", "sliced", "interleaved"), (32, 64)):
        for row_bytes in (2048, 4096, 7168):
            blocks = packed.nbytes // row_bytes // 16
            fields = {"packed": packed, "sink": gpu.sink, "row_bytes": row_bytes}
            seconds = gpu.graph([partial(gpu.launch, f"rows/{pattern}_{segment}", blocks, **fields)])
            speed = (blocks * 16 * row_bytes / t / 1e9 for t in seconds)
            yield figure(pattern, "GB/s", speed, segment_bytes=segment, row_bytes=row_bytes)


def harness(gpu: Gpu) -> Iterator[Any]:
    """Where the constant in a do_bench timing comes from: reads of known size timed five ways, a line through each."""
    sizes, big = gpu.pick((2, 4, 8, 16, 32, 64, 128), (4, 16, 64)), gpu.random_bytes(1024 * MB)

    def read_flush() -> None:
        gpu.read(gpu.flush_buffer)

    def write_and_read_flush() -> None:
        gpu.flush_buffer.zero_()
        read_flush()

    flushes = {"do_bench (zero_)": gpu.flush_buffer.zero_, "read flush": read_flush}
    flushes |= {"zero_, then read flush": write_and_read_flush, "no flush": lambda: None}
    for name, flush in flushes.items():
        yield figure(f"nothing, {name}", "us", (1e6 * t for t in gpu.events([lambda: None], flush)))
    yield figure("read of 16 bytes, graph", "us", (1e6 * t for t in gpu.graph([partial(gpu.read, big[:16])])))
    for name in ("graph", *flushes):
        times = []
        for mb in sizes:
            parts = gpu.torch.split(big, mb * MB)[: gpu.rotation(mb * MB)]
            calls = [partial(gpu.read, part) for part in parts]
            times.append(gpu.graph(calls) if name == "graph" else gpu.events(calls, flushes[name]))
            yield figure(name, "us", (1e6 * t for t in times[-1]), mb=mb)
        lines = [fit_line([mb * MB for mb in sizes], sample) for sample in zip(*times, strict=True)]
        yield figure(f"{name}: constant", "us", (1e6 * constant for constant, _ in lines))
        yield figure(f"{name}: slope", "GB/s", (1e-9 / slope for _, slope in lines))


def matmul(gpu: Gpu) -> Iterator[Any]:
    """y = x W^T through torch.mm, as graph replay over rotating buffers and as do_bench times it."""
    torch = gpu.torch
    for out, width in gpu.pick(LAYERS, LAYERS[:2]):
        for dtype in gpu.pick(("bfloat16", "float16"), ("bfloat16",)):
            for m in gpu.pick([1 << i for i in range(14)], (1, 16, 512, 8192)):
                sets = gpu.rotation(2 * (out * width + m * (out + width)))
                new = partial(torch.randn, dtype=getattr(torch, dtype), device="cuda")
                buffers = [(new(m, width), new(out, width), new(m, out)) for _ in range(sets)]
                calls = [partial(torch.mm, x, w.T, out=y) for x, w, y in buffers]
                labels = {"layer": f"{out}x{width}", "dtype": dtype, "m": m}
                seconds = gpu.graph(calls)
                yield figure("graph", "us", (1e6 * t for t in seconds), **labels)
                yield figure("graph", "TFLOP/s", (2e-12 * m * out * width / t for t in seconds), **labels)
                seconds = gpu.events(calls[:1], gpu.flush_buffer.zero_)
                yield figure("do_bench", "us", (1e6 * t for t in seconds), **labels)


def panels(gpu: Gpu) -> Iterator[Any]:
    """Does what was just written come back out of L2? A panel is written, then read; GB/s counts both."""
    area = gpu.random_bytes(2048 * MB)

    def write_then_read(part: Any) -> None:
        gpu.write(part)
        gpu.read(part)

    for scratch in ("reused", "fresh"):
        for mb in gpu.pick((2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 128), (4, 16, 24, 32, 64)):
            parts = gpu.torch.split(area, mb * MB)[: 1 if scratch == "reused" else gpu.rotation(mb * MB)]
            seconds = gpu.graph([partial(write_then_read, part) for part in parts])
            yield figure(scratch, "GB/s", (2 * mb * MB / t / 1e9 for t in seconds), panel_mb=mb)


class TwoPassLayer:
    """NF4 g64 weights [out, width] in copies that rotate, some of them dense too, and one scratch of the dense size."""

    def __init__(self, gpu: Gpu, out: int, width: int) -> None:
        torch, self.gpu, self.out, self.width = gpu.torch, gpu, out, width
        self.levels, copies = random_levels(seed=3), range(gpu.rotation(out * width // 2))
        values = torch.tensor([struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in self.levels]).cuda()
        self.packed = [gpu.random_bytes(out * width // 2).view(out, -1) for _ in copies]
        self.scales = [torch.rand(out, width // 64, device="cuda") * 0.02 + 0.01 for _ in copies]
        self.dense = []
        for copy in copies[: gpu.rotation(2 * out * width)]:
            codes = torch.stack((self.packed[copy] & 15, self.packed[copy] >> 4), -1).view(out, width).int()
            self.dense.append((values[codes] * self.scales[copy].repeat_interleave(64, 1)).bfloat16())
        self.scratch = torch.empty(out, width, dtype=torch.bfloat16, device="cuda")
        self.codes_per_block = gpu.kernels.work("dequantize").unit_codes

    def dequantize(self, copy: int, first: int, last: int) -> None:
        """Rows first..last of a copy into the start of the scratch."""
        fields = {"packed": self.packed[copy][first], "scales": self.scales[copy][first], "levels": self.levels}
        codes = (last - first) * self.width
        self.gpu.launch("dequantize", -(-codes // self.codes_per_block), dense=self.scratch, codes=codes, **fields)

    def multiply(self, copy: int, x: Any, y: Any, panel: int) -> None:
        """y [m, out] = x [m, width] W^T, `panel` rows of W at a time."""
        for first in range(0, self.out, panel):
            last = min(first + panel, self.out)
            self.dequantize(copy, first, last)
            self.gpu.torch.mm(x, self.scratch[: last - first].T, out=y[:, first:last])


def two_pass(gpu: Gpu) -> Iterator[Any]:
    """NF4 weights dequantized panel by panel into one bf16 scratch, each multiplied by torch.mm, against dense ones."""
    torch = gpu.torch
    for out, width in gpu.pick(((4096, 4096), (14336, 4096), (8192, 8192)), ((4096, 4096), (8192, 8192))):
        layer, name = TwoPassLayer(gpu, out, width), f"{out}x{width}"
        layer.dequantize(0, 0, out)
        if not torch.equal(layer.scratch, layer.dense[0]):
            yield f"{name}: dequantized values differ from the reference; not timed"
            continue
        copies = range(len(layer.packed))
        seconds = gpu.graph([partial(layer.dequantize, copy, 0, out) for copy in copies])
        moved = out * width * (1 / 2 + 4 / 64 + 2)
        yield figure("dequantize", "GB/s", (moved / t / 1e9 for t in seconds), layer=name)
        for m in gpu.pick((512, 2048, 8192), (512, 8192)):
            x = torch.randn(m, width, device="cuda").bfloat16()
            y, dense_y = torch.empty(2, m, out, dtype=torch.bfloat16, device="cuda")
            dense = gpu.graph([partial(torch.mm, x, weight.T, out=dense_y) for weight in layer.dense])
            yield figure("dense", "us", (1e6 * t for t in dense), layer=name, m=m)
            for mb in gpu.pick((4, 8, 16, 20, 24, 32, 48, 64, 128, 256), (8, 16, 24, 128)):
                panel = min(mb * MB // 2 // width, out)
                layer.multiply(0, x, y, panel)
                torch.mm(x, layer.dense[0].T, out=dense_y)
                error = float((y.float() - dense_y.float()).norm() / dense_y.float().norm())
                if not error <= 5e-3:  # one bf16 rounding each, and the order of the sums
                    yield f"{name}, m={m}: panels of {mb} MB are off the dense product by {error:.1e}; not timed"
                    break
                seconds = gpu.graph([partial(layer.multiply, copy, x, y, panel) for copy in copies])
                labels = {"layer": name, "m": m, "panel_mb": panel * width * 2 // MB}
                yield figure("two-pass", "us", (1e6 * t for t in seconds), **labels)
                yield figure("two-pass", "of dense", (statistics.median(dense) / t for t in seconds), **labels)
                if panel == out:
                    break


SECTIONS = (bandwidth, rates, decode, rows, harness, matmul, panels, two_pass)


# ---- one run


def isolated(task: Callable[[], Iterable[Any]], limit_s: float) -> Iterator[Any]:
    """What `task` yields, as it comes, from a forked process; if it raises, dies or overruns, the last item says so."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def child() -> None:
        try:
            for item in task():
                sender.send(item)
        except Exception as error:  # whatever it is, it belongs in the report
            sender.send(f"{type(error).__name__}: {error}")

    process = fork.Process(target=child)
    process.start()
    sender.close()
    until = time.monotonic() + limit_s
    try:
        while receiver.poll(max(0.0, until - time.monotonic())):
            try:
                yield receiver.recv()
            except EOFError:
                process.join()
                if process.exitcode:
                    yield f"the process ended with code {process.exitcode}"
                return
        yield f"stopped after {limit_s:.0f} s"
    finally:
        process.kill()
        process.join()


def machine() -> Iterator[Any]:
    """One dictionary; nothing where PyTorch sees no GPU."""
    import torch

    if torch.cuda.is_available():
        gpu, fields = torch.cuda.get_device_properties(0), "driver_version,clocks.max.sm,clocks.max.mem"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        driver, sm_mhz, memory_mhz = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
        size = {"multiprocessors": gpu.multi_processor_count, "l2_bytes": gpu.L2_cache_size, "bytes": gpu.total_memory}
        limits = {"max_sm_mhz": int(sm_mhz), "max_memory_mhz": int(memory_mhz)}
        versions = {"driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__}
        yield {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", **size, **limits, **versions}


def found_gpu() -> dict[str, Any]:
    """What `machine` says, from a process of its own. OSError: PyTorch sees no GPU here."""
    found = [*isolated(machine, limit_s=60), "PyTorch sees no CUDA GPU"]
    if isinstance(found[0], str):
        raise OSError(f"{found[0]}; run this on a machine with a GPU")
    return found[0]


def file_name(gpu: str) -> str:
    """A GPU's name as part of a file's."""
    return re.sub(r"[^\w.]+", "-", gpu)


def commit() -> str:
    done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def measure(task: Callable[[], Iterator[Any]], limit_s: float) -> dict[str, Any]:
    """One section's entry in the report."""
    start, items = time.monotonic(), list(isolated(task, limit_s))
    figures, errors = ([item for item in items if isinstance(item, kind)] for kind in (dict, str))
    return {"seconds": round(time.monotonic() - start, 2), "figures": figures, "errors": errors}


def section_task(name: str, library: Path | str, quick: bool) -> Iterator[Any]:
    gpu = Gpu(library, quick)
    yield from next(section for section in SECTIONS if section.__name__ == name)(gpu)
    yield from gpu.clocks()


def save(report: dict[str, Any], output: Path) -> None:
    """Complete or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    part.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(part, output)


def run(options: argparse.Namespace) -> int:
    try:
        import torch  # noqa: F401  before the first fork, so that the sections need not load it each
    except ImportError:
        raise OSError("PyTorch is not installed; install a build with CUDA, or use --build-only") from None
    given = verified(options.library) if options.library else None
    report: dict[str, Any] = {"machine": found_gpu(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    report |= {"commit": options.commit or commit(), "sources": digest(), "quick": options.quick, "sections": {}}
    with tempfile.TemporaryDirectory() as folder:
        library: Path | str
        try:
            library = given or build(Path(folder) / "probe.so")
        except OSError as error:
            library = str(error)
            print(f"gpu_probe: only what PyTorch alone can measure: {error}", file=sys.stderr)
        until = time.monotonic() + (50 if options.quick else 330)
        for left, name in zip(range(len(options.sections), 0, -1), options.sections, strict=True):
            limit_s = (until - time.monotonic()) / min(2, left)  # one that hangs leaves half of the time to the others
            entry = measure(partial(section_task, name, library, options.quick), limit_s)
            report["sections"][name] = entry
            print(f"{name}: {len(entry['figures'])} figures in {entry['seconds']} s", file=sys.stderr)
    output = options.output or HERE / "results" / f"gpu_probe-{file_name(report['machine']['gpu'])}.json"
    save(report, output)
    for name, entry in report["sections"].items():
        print("\n".join([table(name, entry["figures"]), *(f"!! {error}" for error in entry["errors"])]))
    errors = sum(len(entry["errors"]) for entry in report["sections"].values())
    print(f"{output}: {errors} errors")
    return 1 if errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    """0: all measured; 1: the report holds errors; 2: nothing could be done, and one sentence says why."""
    names = [section.__name__ for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and samples: one minute instead of six")
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: bench/results/gpu_probe-<gpu>.json")
    parser.add_argument("--commit", help="recorded in the report; default: what git says")
    parser.add_argument("--library", type=Path, metavar="FILE", help="use the kernels that --build-only built")
    parser.add_argument("--build-only", type=Path, metavar="FILE", help="build the kernels (sm_80, sm_90a) and stop")
    options = parser.parse_args(argv)
    try:
        if options.build_only:
            print(build(options.build_only))
            return 0
        return run(options)
    except OSError as error:
        print(f"gpu_probe: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
