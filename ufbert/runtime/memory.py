"""Memory of the process and of the accelerator: how much was used, and when glibc returns it."""

import ctypes
import sys

import numpy as np


def memory_bytes() -> int:
    """Return the most bytes used so far: on the first accelerator, or by this process on a CPU."""
    import jax

    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Tell glibc to keep the large buffers that XLA frees after every step instead of returning them to the system.

    Getting them back page by page costs a CPU training step up to half of its time. Must run before threads start. Without
    glibc this does nothing.
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
    """Return freed memory to the system, whatever glibc was told to keep. Without glibc this does nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """Allocate an uninitialised array of `size` bytes at the start of a cache line, so that jax takes it without a copy."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype)
