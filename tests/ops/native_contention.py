"""How long calls of the native tree layer take while other processes want the processors, too.

    python tests/ops/native_contention.py --busy 3

Times every call of the jitted forward pass at several numbers of rows (d 768, depth 11), alone and beside `--busy` processes
that do nothing but count, and prints median, 99th percentile and longest, as multiples of the median alone. Beside them stands
what any code suffers: a loop in one thread that takes as much processor time as the call's median. A kernel whose threads
wait for each other shows as calls that are several times slower than that loop.
"""

import argparse
import subprocess
import sys
import time

import jax
import numpy as np

from ufbert.ops import native

D_MODEL, DEPTH = 768, 11


def layer(rows: int):
    """A call without arguments: one layer over random rows, other rows each time."""
    rng, n = np.random.default_rng(rows), 2 ** (DEPTH + 1) - 1
    w_in, w_out = (jax.numpy.asarray(rng.normal(size=(1, n, D_MODEL)).astype(np.float32) / 28) for _ in "io")
    bias = jax.numpy.zeros((1, n))
    inputs = [jax.numpy.asarray(rng.normal(size=(rows, D_MODEL)).astype(np.float32)) for _ in range(4)]
    forward = jax.jit(native.tree_forward)
    turn = iter(range(sys.maxsize))

    def call() -> None:
        forward(inputs[next(turn) % len(inputs)], w_in, bias, w_out).block_until_ready()

    return call


def spin(seconds: float):
    """A call without arguments that keeps one thread busy for so much processor time."""

    def call() -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    return call


def timed(call, seconds: float) -> np.ndarray:
    """How long each call took, as many as fit, at least ten."""
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 10 or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return np.array(times)


def said(times: np.ndarray, unit: float) -> str:
    ratios = np.quantile(times, [0.5, 0.99, 1.0]) / unit
    return "median {:6.2f}   99 % {:7.2f}   longest {:7.2f}".format(*ratios) + f"   ({len(times)} calls)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=3, help="processes beside this one")
    parser.add_argument("--seconds", type=float, default=2.5, help="how long to repeat each call, in each company")
    given = parser.parse_args()
    if native.unavailable():
        print(f"There are no native kernels: {native.unavailable()}.", file=sys.stderr)
        return 2
    calls = {rows: layer(rows) for rows in (8, 128, 4096)}
    alone = {}
    for rows, call in calls.items():
        timed(call, 0.2)
        alone[rows] = timed(call, given.seconds)
    units = {rows: float(np.median(times)) for rows, times in alone.items()}
    spins_alone = {rows: timed(spin(unit), given.seconds / 2) for rows, unit in units.items()}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(given.busy)]
    try:
        time.sleep(0.5)
        beside = {rows: timed(call, given.seconds) for rows, call in calls.items()}
        spins = {rows: timed(spin(unit), given.seconds) for rows, unit in units.items()}
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(f"{native.instruction_set()} kernels; multiples of each layer's median alone")
    for rows, unit in units.items():
        print(f"{rows} rows, {1e3 * unit:.3f} ms alone")
        for name, times in (
            ("layer alone", alone[rows]),
            (f"layer beside {given.busy}", beside[rows]),
            ("loop alone", spins_alone[rows]),
            (f"loop beside {given.busy}", spins[rows]),
        ):
            print(f"  {name:16}{said(times, unit)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
