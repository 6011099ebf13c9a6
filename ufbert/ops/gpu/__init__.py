"""Kernels for GPUs, in Pallas's Triton dialect: in one pass over memory what XLA computes in several.

On a CPU they are interpreted, for tests. `ufbert.nn.layers.gpu_kernels` says where layers take them.
"""

import functools
import sys

import jax
import jax.numpy as jnp

from ufbert.ops.gpu import attention, gates, loss, norm

__all__ = ["attention", "can_run", "gates", "loss", "norm"]

OLDEST = 8.0
"""Compute capability of the first GPUs that multiply in bfloat16 (Ampere, 2020)."""


@functools.cache
def can_run() -> bool:
    """Tell whether the default device takes the kernels, by compiling the smallest of them. If not, say once why."""
    smallest = jax.ShapeDtypeStruct((gates.TILE // 16, 2, 16), jnp.bfloat16)
    try:
        capability = float(getattr(jax.devices()[0], "compute_capability", OLDEST))  # an AMD GPU's is a name
        if capability < OLDEST:
            raise ValueError(f"they need compute capability {OLDEST}, and the device has {capability}")
        jax.jit(gates.gated_gelu).lower(smallest).compile()
    except Exception as error:  # whatever Pallas raises, XLA can do the work
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(f"no kernels for GPUs: {why}; XLA's are taken instead", file=sys.stderr, flush=True)
        return False
    return True
