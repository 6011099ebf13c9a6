"""Train one model by several processes over `jax.distributed`, each with its own devices, on one machine or on many.

All processes run the same program and must take the same decisions, because each jitted step is one computation of all of
them. Whatever may differ between them, time and signals above all, is therefore taken from process 0 (`from_main`) or
agreed on (`highest`). In a run of a single process these functions return their argument.
"""

import os
import sys
from typing import Any

import numpy as np

from ufbert.errors import UserError, first_line
from ufbert.runtime.console import phase


def join(where: str) -> None:
    """Join the other processes of a run, before jax touches a device. Only process 0 keeps its standard output.

    `where` is `HOST:PORT,INDEX,COUNT` (the address that process 0 listens on, this process's index, and the number of
    processes), `auto` (jax asks the TPU pod, Slurm or Open MPI), or empty for a run of a single process. Raises UserError if
    the others cannot be reached.
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
    """Return true in process 0, which writes the run's files and prints."""
    import jax

    return jax.process_index() == 0


def from_main(value: float) -> float:
    """Return the value that process 0 passes. All processes must call it, in the same order."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    bits = np.frombuffer(np.float64(value).tobytes(), np.uint32)  # as integers, because jax would round it to float32
    return float(np.frombuffer(np.asarray(multihost_utils.broadcast_one_to_all(bits)).tobytes(), np.float64)[0])


def highest(value: int | bool) -> int:
    """Return the largest value that any process passes. All processes must call it, in the same order."""
    import jax
    from jax.experimental import multihost_utils

    return value if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(value))))


def whole(tree: Any) -> Any:
    """Gather a tree of arrays that are split among processes, so that every process holds them whole."""
    import jax
    from jax.experimental import multihost_utils

    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def together(name: str) -> None:
    """Wait until all processes have called this. Raises UserError if one of them has ended."""
    from jax.experimental import multihost_utils

    try:
        with phase("waiting for the other processes"):
            multihost_utils.sync_global_devices(name)
    except Exception as error:  # jaxlib raises many kinds for a lost process
        raise UserError(f"Another process of this run ended before all were ready ({name}).") from error
