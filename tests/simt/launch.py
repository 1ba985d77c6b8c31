"""Launch what a test library exports: functions that take arrays and numbers, and return null or what was wrong."""

import ctypes

import numpy as np
from simt.build import Library

# Bytes on either side of an array that no kernel is told of: a stray access lands here, never in another array.
GUARD = 1 << 16


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 256 bytes, as device allocations do, with `GUARD` bytes before and after."""
    memory = np.empty(GUARD + 256 + array.nbytes + GUARD, np.uint8)
    start = GUARD + -(memory.ctypes.data + GUARD) % 256
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def launch(library: Library, name: str, *arguments: object) -> str | None:
    """Call `name` with pointers to the arrays and ctypes or int values as they are: None, or the error."""
    function = getattr(library.functions, name)
    function.restype = ctypes.c_char_p
    passed = [
        argument.ctypes.data_as(ctypes.c_void_p) if isinstance(argument, np.ndarray) else argument
        for argument in arguments
    ]
    error = function(*passed)
    return None if error is None else error.decode()
