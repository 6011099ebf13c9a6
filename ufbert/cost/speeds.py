"""The speed of a device in training, from the table of peaks or measured."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ufbert.cost.devices import DevicePeaks, device_of_kind
from ufbert.cost.reached import reached
from ufbert.runtime.console import phase

CPU_UTILISATION = 1.1
"""Speed of a whole step over that of its parts measured alone, since XLA fuses one part with the next. Four presets at two
scales lay between 1.06 and 1.15."""


class Speeds(NamedTuple):
    """Speeds of a device in training; utilisation is already in the numbers."""

    products: float
    """FLOP/s of matrix products in the model's type."""
    float32: float
    """FLOP/s of routing's float32 products."""
    bandwidth: float
    """Bytes/s, of the bytes that XLA counts for a CPU program."""
    source: str
    """Origin of the numbers, for people."""

    def seconds(self, flops: float, routing_flops: float, n_bytes: float) -> float:
        """Estimate the time of `flops` operations, `routing_flops` of which are float32, and `n_bytes` of memory traffic.

        Both add up: an instruction, or a kernel, waits for the one before it.
        """
        arithmetic = max(0.0, flops - routing_flops) / self.products + routing_flops / self.float32
        return arithmetic + n_bytes / self.bandwidth


def peak_speeds(device: DevicePeaks, dtype: str) -> Speeds:
    """Estimate the speeds of a device of the table, at what it reaches of its peaks."""
    shares, peak = reached(device.name), device.products(dtype)
    share = shares.float32 if peak == device.float32 else shares.products
    source = (
        f"{share:.0%} of {peak / 1e12:,.1f} TFLOP/s {dtype}, {shares.float32:.0%} of {device.float32 / 1e12:,.1f} TFLOP/s "
        f"float32 for routing, {device.bandwidth / 1e9:,.0f} GB/s ({device.source})"
    )
    return Speeds(share * peak, shares.float32 * device.float32, device.bandwidth / shares.traffic, source)


@phase("measuring this device")
def device_peak() -> tuple[float, str]:
    """Return the peak FLOP/s of the default device and its source. A model's FLOP/s over it is its utilisation (MFU).

    For a device of the table this is the vendor's dense peak of the type that models compute in there. For any other, CPUs
    included, a large matrix product is measured for a fifth of a second.
    """
    import jax

    device = device_of_kind(jax.devices()[0].device_kind)
    if device is not None:
        return device.products(device.dtype), device.source
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return measured_flops(), f"a {dtype} matrix product, measured here"


def measured_flops(seconds: float = 0.2, dtype: str = "auto") -> float:
    """Measure the FLOP/s of matrix products on the default device. `auto` is float32 on a CPU and bfloat16 elsewhere."""
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    n, kind = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    a = jax.random.normal(jax.random.key(0), (n, n), kind if dtype == "auto" else jnp.dtype(dtype))
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=precision) * (1 / n))
    return 2 * n**3 / least_seconds(multiply, a, seconds)


def least_seconds(function: Callable[[Any], Any], argument: Any, seconds: float) -> float:
    """Call a jitted function once to compile it, then again for `seconds`, and return the shortest time of a call."""
    function(argument).block_until_ready()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        function(argument).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best
