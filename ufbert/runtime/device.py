"""Start jax on a device."""

import os
import shutil
import subprocess
from pathlib import Path

import jax

from ufbert.config import Device
from ufbert.errors import UserError, first_line
from ufbert.runtime.console import phase
from ufbert.runtime.distributed import join
from ufbert.runtime.files import user_cache
from ufbert.runtime.memory import keep_freed_memory


def visible_accelerator() -> str | None:
    """Return the extra (`cuda` or `tpu`) that serves an accelerator of this system, or None if the system shows none."""
    if any(Path("/dev").glob("nvidia[0-9]*")) or _nvidia_smi_lists_gpus():
        return "cuda"
    if any(Path("/dev").glob("accel[0-9]*")):
        return "tpu"
    return None


def _nvidia_smi_lists_gpus() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listing = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU " in listing.stdout


def usable_threads(threads: int) -> int:
    """Limit a number of threads to the processors that this process may use; 0 takes all of them."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(threads or processors, processors)


def use_device(device: Device, distributed: str = "", threads: int = 0) -> str:
    """Start jax on `device` and return its platform (cpu, gpu or tpu).

    A `distributed` run (see `runtime.distributed.join`) is joined first. `threads` limits the CPU's threads; 0 takes as many
    as there are cores. Compiled programs are kept in the user's cache, or in JAX_COMPILATION_CACHE_DIR if that is set.

    Raises UserError if jax cannot use the device, or if `device` is auto and the system shows an accelerator that jax cannot
    use.
    """
    keep_freed_memory()
    if threads < 0:
        raise UserError(f"--threads is {threads}; it must be 0, for all cores, or more.")
    if threads:
        os.environ["NPROC"] = str(usable_threads(threads))  # XLA and the native kernels read it
    if device != "auto":
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(device, device)  # of processes that this one starts
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])

    join(distributed)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    try:
        with phase("starting jax on the device"):
            platform = jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        # jax raises an AssertionError without words if it knows the platform and has no device of it.
        why = first_line(error) if str(error) else "it finds no such device"
        platforms = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        raise UserError(
            f"jax cannot use {platforms if device == 'auto' else f'the device {device!r}'}: {why}. Pass `--device cpu`, or "
            "repair the driver or its plugin."
        ) from error
    extra = visible_accelerator()
    if device == "auto" and platform == "cpu" and extra is not None and "JAX_PLATFORMS" not in os.environ:
        raise UserError(
            f"This machine shows an accelerator that jax cannot see; install it with `uv sync --extra {extra}` (or "
            f"`pip install 'ufbert[{extra}]'`), or pass `--device cpu` to train on the CPU."
        )
    return platform
