"""Memory of the process and of the accelerator."""

import ctypes
import sys

import numpy as np


def memory_bytes() -> int:
    """Most memory used so far: of the first accelerator, or of this process on a CPU."""
    import jax

    found = jax.local_devices()[0].memory_stats()
    if found and "peak_bytes_in_use" in found:
        return int(found["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Tell glibc to keep the large buffers that XLA frees after every step instead of returning them to the system.

    Getting them back page by page costs a CPU training step up to half its time. Does nothing elsewhere than on Linux
    with glibc; must run before threads start.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # from malloc.h
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)  # a step's buffer may be larger than any threshold
    mallopt(trim_threshold, -1)


def give_back_freed_memory() -> None:
    """Return what is free now to the system, where the C library can (glibc), whatever it was told to keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """An array of `size` bytes, uninitialised, that begins where a cache line does, so that jax takes it without a copy."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype)
