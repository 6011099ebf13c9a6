"""Start jax on a device."""

import os
import shutil
import subprocess
from pathlib import Path

import jax

from ufbert.config import Device
from ufbert.errors import UserError
from ufbert.runtime.files import user_cache
from ufbert.runtime.memory import keep_freed_memory


def visible_accelerator() -> str | None:
    """The extra (`cuda` or `tpu`) for an accelerator that the system shows, or None."""
    if any(Path("/dev").glob("nvidia[0-9]*")) or _nvidia_smi_lists_one():
        return "cuda"
    if any(Path("/dev").glob("accel[0-9]*")):
        return "tpu"
    return None


def _nvidia_smi_lists_one() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        found = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU " in found.stdout


def usable_threads(threads: int) -> int:
    """How many of `threads` threads have a processor of their own here; as many as there are for 0."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(threads or processors, processors)


def use_device(device: Device, distributed: str = "", threads: int = 0) -> str:
    """Start jax on `device` and return its platform (cpu, gpu or tpu), after joining the other processes of a `distributed`
    run. What it compiles is kept in the user's cache, so that a second start is cheap (JAX_COMPILATION_CACHE_DIR, where set,
    is obeyed instead). `threads` limits what a CPU computes with, which is never more than its cores; 0 for all of them.

    Raises UserError if the device cannot be had, and on `auto` if the system shows an accelerator that jax cannot use.
    """
    keep_freed_memory()
    if threads < 0:
        raise UserError(f"--threads is {threads}; it must be 0, for all cores, or more.")
    if threads:
        os.environ["NPROC"] = str(usable_threads(threads))  # what XLA and the native kernels go by
    if device != "auto":
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(device, device)  # of processes that this one starts
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])

    distributed.join(distributed)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    try:
        platform = jax.default_backend()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # AssertionError where it knows a platform and finds no device of it
        wanted = (
            f"the device {device!r}" if device != "auto" else f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        )
        why = (str(error).splitlines() or ["it finds no such device"])[0]
        raise UserError(
            f"jax cannot use {wanted}: {why}. Pass `--device cpu`, or mend the driver or its plugin."
        ) from error
    extra = visible_accelerator()
    if device == "auto" and platform == "cpu" and extra is not None and "JAX_PLATFORMS" not in os.environ:
        raise UserError(
            f"This machine shows an accelerator that jax cannot see; install it with `uv sync --extra {extra}` (or "
            f"`pip install 'ufbert[{extra}]'`), or pass `--device cpu` to train on the CPU."
        )
    return platform
