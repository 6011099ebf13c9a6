"""What the kernels share: sizes of tiles, which Triton wants to be powers of two, and how kernels are compiled."""

from typing import Any

import jax


def piece(n: int) -> int:
    """Return the largest power of two that divides n."""
    return n & -n


def interpreted() -> bool:
    """Tell whether kernels are interpreted: on a CPU, for tests. It is slow."""
    return jax.devices()[0].platform == "cpu"


def triton(warps: int) -> Any:
    """Return the settings with which Pallas compiles a kernel by Triton, for programs of so many warps."""
    from jax.experimental.pallas import triton  # a second to import, which only users of the kernels pay

    return triton.CompilerParams(num_warps=warps, num_stages=1)
