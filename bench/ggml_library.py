"""llama.cpp's ggml through ctypes: weights quantized by it, held where it is fastest, and their products with x.

No header is read: types have the numbers they have in GGUF files, thread parameters are filled in by the library, and a
symbol that a build lacks is named. Written against ggml 0.21; what is called has been in ggml since early 2025.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEMORY = 1 << 20  # bytes of descriptors and graph in one context; data lies in buffers of their own
WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
PARAMETERS = 4096  # bytes, more than struct ggml_threadpool_params takes
TYPES = {"f32": 0, "q4_0": 2, "q2_K": 10, "q3_K": 11, "iq4_nl": 20}
LOUD = (3, 4)  # GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR
NAMES = ("libggml-base.so", "libggml-cpu*.so", "libggml.so")


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )


class Feature(ctypes.Structure):
    """struct ggml_backend_feature."""

    _fields_ = (("name", c_char_p), ("value", c_char_p))


@ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def _log(level: int, text: bytes, _: int | None) -> None:
    """Warnings and errors, not a line for each tensor."""
    if level in LOUD:
        sys.stderr.write(text.decode(errors="replace"))


FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_log_set": (None, (c_void_p, c_void_p)),
    "ggml_version": (c_char_p, ()),
    "ggml_commit": (c_char_p, ()),
    "ggml_get_type_traits": (POINTER(TypeTraits), (c_int,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_quantize_requires_imatrix": (c_bool, (c_int,)),
    "ggml_quantize_init": (None, (c_int,)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "ggml_init": (c_void_p, (InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_set_usage": (None, (c_void_p, c_int)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_dev_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_set_threadpool": (None, (c_void_p, c_void_p)),
    "ggml_threadpool_params_init": (None, (c_void_p, c_int)),
    "ggml_threadpool_new": (c_void_p, (c_void_p,)),
    "ggml_threadpool_pause": (None, (c_void_p,)),
    "ggml_threadpool_resume": (None, (c_void_p,)),
}


def find(folder: Path) -> list[Path]:
    """A build's libraries in the order in which they load.

    Raises:
        OSError: they are not there, or there are several for the CPU.
    """
    found = [sorted(folder.glob(name)) for name in NAMES]
    if not (found[0] or found[2]):
        raise OSError(
            f"{folder} holds neither {NAMES[0]} nor {NAMES[2]}; build ggml or llama.cpp with -DBUILD_SHARED_LIBS=ON "
            "and name the folder that its libraries are in"
        )
    if len(found[1]) > 1:
        raise OSError(
            f"{folder} holds {len(found[1])} libraries for the CPU; build with -DGGML_NATIVE=ON and without "
            "-DGGML_CPU_ALL_VARIANTS, so that there is one"
        )
    return [path for paths in found for path in paths]


def bind(libraries: Sequence[Any]) -> dict[str, Callable[..., Any]]:
    """Every function of `FUNCTIONS` from the first library that has it.

    Raises:
        OSError: none has it.
    """
    bound = {}
    for name, (result, arguments) in FUNCTIONS.items():
        function = next((getattr(library, name) for library in libraries if hasattr(library, name)), None)
        if function is None:
            raise OSError(f"this build of ggml has no {name}; take one from 2025 or later with the CPU backend in it")
        function.restype, function.argtypes = result, arguments
        bound[name] = function
    return bound


class Ggml:
    """A loaded build with a CPU backend and a pool of threads that stays.

    Without OpenMP the pool's threads wait for the next graph in a loop for a while before they sleep (poll 50, the
    default of ggml and llama.cpp); with OpenMP they are OpenMP's, and wait as it has them wait.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        try:
            self.calls = bind([ctypes.CDLL(str(path.resolve()), ctypes.RTLD_GLOBAL) for path in find(folder)])
        except OSError as error:
            raise OSError(f"cannot use ggml in {folder}: {error}") from None
        call = self.calls
        call["ggml_log_set"](_log, None)
        self.version, self.commit = (call[f"ggml_{what}"]().decode() for what in ("version", "commit"))
        registry = call["ggml_backend_cpu_reg"]()
        self.device = call["ggml_backend_reg_dev_get"](registry, 0)
        self.features = self._features(registry)
        self.buffer_types = {"plain": call["ggml_backend_dev_buffer_type"](self.device), **self._extra(registry)}
        self.backend = call["ggml_backend_cpu_init"]()
        parameters = ctypes.create_string_buffer(PARAMETERS)
        call["ggml_threadpool_params_init"](parameters, threads)
        self.pool = call["ggml_threadpool_new"](parameters)
        call["ggml_backend_cpu_set_n_threads"](self.backend, threads)
        call["ggml_backend_cpu_set_threadpool"](self.backend, self.pool)
        self.threads = threads

    def _found(self, registry: int, name: bytes, prototype: Any) -> Callable[..., Any] | None:
        address = self.calls["ggml_backend_reg_get_proc_address"](registry, name)
        return prototype(address) if address else None

    def _features(self, registry: int) -> list[str]:
        """Instruction sets and options it was built with, such as AVX512_VNNI, OPENMP and REPACK."""
        get = self._found(registry, b"ggml_backend_get_features", ctypes.CFUNCTYPE(POINTER(Feature), c_void_p))
        found: list[str] = []
        features = get(registry) if get else None
        while features and features[len(found)].name:
            found.append(features[len(found)].name.decode())
        return found

    def _extra(self, registry: int) -> dict[str, int]:
        """Buffer types that hold weights in another order, as llama.cpp asks for them; by name."""
        get = self._found(registry, b"ggml_backend_dev_get_extra_bufts", ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p))
        found: dict[str, int] = {}
        types = get(self.device) if get else None
        while types and types[len(found)]:
            found[self.calls["ggml_backend_buft_name"](types[len(found)]).decode()] = types[len(found)]
        return found

    def pause(self) -> None:
        """Send the pool's threads to sleep; nothing under OpenMP."""
        self.calls["ggml_threadpool_pause"](self.pool)

    def resume(self) -> None:
        self.calls["ggml_threadpool_resume"](self.pool)

    def quantize(self, weight: Tensor, name: str) -> Tensor:
        """fp32 `[out, in]` -> its bytes in ggml's type `name`, uint8 `[out, bytes of a row]`, no importance given.

        Raises:
            OSError: it needs an importance matrix for that.
        """
        kind, (out, width) = TYPES[name], weight.shape
        if self.calls["ggml_quantize_requires_imatrix"](kind):
            raise OSError(f"ggml quantizes to {name} with an importance matrix only")
        self.calls["ggml_quantize_init"](kind)
        stored = torch.empty(out, self.calls["ggml_row_size"](kind, width), dtype=torch.uint8)
        step = -(-out // self.threads)

        def some(first: int) -> None:
            count = min(step, out - first)
            chunk = self.calls["ggml_quantize_chunk"]
            chunk(kind, weight.data_ptr(), stored.data_ptr(), first * width, count, width, None)

        with ThreadPoolExecutor(self.threads) as workers:
            list(workers.map(some, range(0, out, step)))
        return stored

    def dequantize(self, stored: Tensor, name: str, width: int) -> Tensor:
        """What `quantize` made -> fp32 `[out, width]`, by ggml's own reference."""
        traits = self.calls["ggml_get_type_traits"](TYPES[name]).contents
        dense = torch.empty(stored.shape[0], width)
        traits.to_float(stored.data_ptr(), dense.data_ptr(), dense.numel())
        return dense

    def context(self) -> int:
        """Room for descriptors of tensors and a graph."""
        return self.calls["ggml_init"](InitParams(MEMORY, None, True))

    def allocate(self, context: int, place: str) -> int:
        """Memory of the kind `place` for all tensors described in a context. MemoryError: there is none."""
        buffer = self.calls["ggml_backend_alloc_ctx_tensors_from_buft"](context, self.buffer_types[place])
        if not buffer:
            raise MemoryError(f"ggml found no memory for tensors in its {place} buffer")
        return buffer

    def release(self, context: int, buffer: int) -> None:
        self.calls["ggml_backend_buffer_free"](buffer)
        self.calls["ggml_free"](context)


class Weight:
    """A matrix in one of ggml's types and kinds of memory.

    Attributes:
        out, width: its shape.
        tensor: ggml's descriptor.

    Raises:
        OSError: that kind of memory does not serve that type here.
    """

    def __init__(self, ggml: Ggml, stored: Tensor, name: str, width: int, place: str = "plain") -> None:
        self.ggml, self.out, self.width = ggml, stored.shape[0], width
        call, context = ggml.calls, ggml.context()
        self.tensor = call["ggml_new_tensor_2d"](context, TYPES[name], width, self.out)
        buffer = ggml.allocate(context, place)
        weakref.finalize(self, ggml.release, context, buffer)
        call["ggml_backend_buffer_set_usage"](buffer, WEIGHTS)
        # Asked before data goes in: a buffer that cannot repack a type would be written with a null function.
        if not Product(self, 1).supported():
            raise OSError(f"ggml does not keep {name} in its {place} buffer on this CPU")
        call["ggml_backend_tensor_set"](self.tensor, stored.data_ptr(), 0, stored.nbytes)


class Product:
    """The graph y = x Wt for fp32 x of some rows; calling it computes y, into its own memory."""

    def __init__(self, weight: Weight, rows: int) -> None:
        self.weight, self.rows = weight, rows
        ggml, call, context = weight.ggml, weight.ggml.calls, weight.ggml.context()
        self.x = call["ggml_new_tensor_2d"](context, TYPES["f32"], weight.width, rows)
        self.y = call["ggml_mul_mat"](context, weight.tensor, self.x)
        buffer = ggml.allocate(context, "plain")
        weakref.finalize(self, ggml.release, context, buffer)
        self.graph = call["ggml_new_graph"](context)
        call["ggml_build_forward_expand"](self.graph, self.y)
        self._compute, self._backend = call["ggml_backend_graph_compute"], ggml.backend

    def supported(self) -> bool:
        return bool(self.weight.ggml.calls["ggml_backend_dev_supports_op"](self.weight.ggml.device, self.y))

    def load(self, x: Tensor) -> None:
        """fp32 `[rows, width]`."""
        self.weight.ggml.calls["ggml_backend_tensor_set"](self.x, x.data_ptr(), 0, x.nbytes)

    def result(self) -> Tensor:
        """y, fp32 `[rows, out]`."""
        y = torch.empty(self.rows, self.weight.out)
        self.weight.ggml.calls["ggml_backend_tensor_get"](self.y, y.data_ptr(), 0, y.nbytes)
        return y

    def __call__(self) -> None:
        self._compute(self._backend, self.graph)
