"""Several processes that train one model, over `jax.distributed`: each drives its own devices, on one machine or on many.

All of them run the same program and must take every decision alike, for each jitted step is one computation of all. What
may differ between them, time and signals above all, is therefore asked of process 0 (`from_main`) or of everyone
(`highest`). In a run of a single process these functions return what they are given.
"""

import os
import sys
from typing import Any

import numpy as np

from ufbert.errors import UserError, first_line


def join(where: str) -> None:
    """Join the others; must come before jax touches a device. Where `where` is "", there are none.

    `where` is `auto` (jax finds TPU pods, Slurm and Open MPI by itself) or `HOST:PORT,INDEX,COUNT`: the address that
    process 0 shall listen on, this process's index and the number of processes. Only process 0 keeps its standard output.
    Raises UserError if the others cannot be found.
    """
    if not where:
        return
    import jax

    try:
        if where == "auto":
            jax.distributed.initialize()
        else:
            address, index, count = where.split(",")
            jax.distributed.initialize(address, int(count), int(index), cluster_detection_method="deactivate")
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"--distributed={where}: cannot join the other processes: {first_line(error)}. Write `auto` on a TPU "
            "pod, under Slurm or Open MPI, else HOST:PORT,INDEX,COUNT, such as 10.0.0.1:8476,0,2."
        ) from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def is_main() -> bool:
    """Whether this process writes the run's files and speaks to the person."""
    import jax

    return jax.process_index() == 0


def from_main(value: float) -> float:
    """The value that process 0 gives. All must call it, in the same order."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    bits = np.frombuffer(np.float64(value).tobytes(), np.uint32)  # jax would round it to float32
    return float(np.frombuffer(np.asarray(multihost_utils.broadcast_one_to_all(bits)).tobytes(), np.float64)[0])


def highest(value: int | bool) -> int:
    """The largest value that a process gives. All must call it, in the same order."""
    import jax
    from jax.experimental import multihost_utils

    return value if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(value))))


def whole(tree: Any) -> Any:
    """A tree of arrays that may be split among processes, as arrays that each process has all of."""
    import jax
    from jax.experimental import multihost_utils

    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def together(name: str) -> None:
    """Wait until all processes are here. Raises UserError if one of them is gone."""
    from jax.experimental import multihost_utils

    try:
        multihost_utils.sync_global_devices(name)
    except Exception as error:
        raise UserError(f"Another process of this run ended before all were ready ({name}).") from error
