"""Streaming quantization of a 7B-shaped checkpoint: peak memory, and its rate against the disk's own.

python bench/streaming.py --folder DIR      needs 20 GB there; writes bench/results/streaming.json

A checkpoint of random bf16 weights is written in shards, and deleted at the end. The disk's rate is that of reading its
files once from front to back, on one thread, before and after the run, the page cache emptied of them each time. The
quantization runs in a process of its own, whose highest resident memory is the kernel's VmHWM, libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import torch

from qft.disk.files import replace_file
from qft.disk.shards import lay_out
from qft.disk.skeleton import empty_model
from qft.speed.limits import processor

RESULT = Path(__file__).resolve().parent / "results" / "streaming.json"
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
SHARD = 5_000_000_000  # bytes of a file of the dense checkpoint
BLOCK = 1 << 25  # bytes that are read and written at a time
MOST_MEMORY = 2 * 10**9  # bytes
LEAST_SHARE = 60.0  # per cent of the disk's read rate
PROGRAM = """
import json, sys, time
import accelerate
from transformers import LlamaForCausalLM
from qft.disk.streaming import quantize_checkpoint

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

source, out, fmt = sys.argv[1:]
begin, before = time.perf_counter(), resident("VmRSS:")
quantize_checkpoint(source, out, fmt)
print(json.dumps({"seconds": time.perf_counter() - begin, "resident_before": before, "peak": resident("VmHWM:")}))
"""


def make_checkpoint(folder: Path, config: dict[str, Any]) -> list[Path]:
    """A checkpoint of random weights, standard deviation 0.02: one block of them, turned around for each tensor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = empty_model(folder, config["architectures"][0], config)
    tensors = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    block = (torch.randn(BLOCK // 2, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    paths, homes = [], {}
    for layout in lay_out([{name: described} for name, described in tensors.items()], SHARD):
        paths.append(folder / layout.name)
        homes.update(dict.fromkeys(layout.spans, layout.name))
        with open(paths[-1], "wb") as file:
            file.write(layout.head)
            for number, (name, span) in enumerate(layout.spans.items()):
                content = (torch.ones_like(block) if "norm" in name else block.roll(number * 997)).view(torch.uint8)
                for start in range(*span, BLOCK):
                    file.write(content.numpy()[: span[1] - start].data)
            file.flush()
            os.fsync(file.fileno())
    if len(paths) > 1:
        index = {"metadata": {}, "weight_map": homes}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


def forget(paths: Sequence[Path]) -> None:
    """Empty the page cache of files that are on the disk."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(paths: Sequence[Path]) -> float:
    """Bytes per second of reading files that are in no cache, each from front to back."""
    forget(paths)
    buffer = bytearray(BLOCK)
    begin, total = time.perf_counter(), 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                total += got
    return total / (time.perf_counter() - begin)


def measured(folder: Path, config: dict[str, Any], fmt: str) -> dict[str, Any]:
    """Make, read, quantize, read again."""
    paths = make_checkpoint(folder / "dense", config)
    size = sum(path.stat().st_size for path in paths)
    rates = [read_rate(paths)]
    forget(paths)
    words = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder / "dense"), str(folder / "packed"), fmt]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the run failed: {done.stderr.strip().splitlines()[-1]}")
    result = json.loads(done.stdout)
    rates.append(read_rate(paths))
    written = sum(path.stat().st_size for path in (folder / "packed").glob("*.safetensors"))
    rate, reached = sum(rates) / len(rates), size / result["seconds"]
    return {
        "format": fmt,
        "bytes_read": size,
        "bytes_written": written,
        "files_read": len(paths),
        "files_written": len(list((folder / "packed").glob("*.safetensors"))),
        "disk_rates": rates,
        "disk_rate": rate,
        "rate": reached,
        "share": 100 * reached / rate,
        **result,
        "targets": {
            "memory": {"most": MOST_MEMORY, "met": result["peak"] <= MOST_MEMORY},
            "share": {"least": LEAST_SHARE, "met": 100 * reached / rate >= LEAST_SHARE},
        },
    }


def main(arguments: Sequence[str]) -> int:
    """0: measured, met or not; 2: it could not be, and one sentence says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--layers", type=int, default=LLAMA_7B["num_hidden_layers"], help="of the model; 32 make 7B")
    parser.add_argument("--format", default="nf4 g64 f32")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: bench/results/streaming.json for 7B")
    options = parser.parse_args(arguments)
    before = os.getloadavg()[0]
    place = Path(tempfile.mkdtemp(prefix="qft-streaming-", dir=options.folder))
    try:
        result = measured(place, {**LLAMA_7B, "num_hidden_layers": options.layers}, options.format)
    except (OSError, ValueError) as error:
        print(f"streaming: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(place)
    report = {
        "kind": "streaming",
        "layers": options.layers,
        **result,
        "machine": processor(),
        "versions": machine.versions(),
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "command": f"python bench/streaming.py {' '.join(arguments)}".strip(),
        "commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(json.dumps(report, indent=1))
    output = options.output or (RESULT if options.layers == LLAMA_7B["num_hidden_layers"] else None)
    if output:
        with replace_file(output) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
