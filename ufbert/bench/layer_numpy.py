"""The dense layer in NumPy: two products by its BLAS, and a GELU that takes as little as NumPy can make it take."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

BLOCK = 1 << 15
"""Numbers that pass through the GELU together, so that they stay in a core's cache."""

FIT = (0.79746246, 0.037046284, -0.00035800564)
"""gelu(z) = z/2 (1 + tanh(z p(z^2))) to 3e-5 with this p, fitted to the exact GELU; NumPy has no erf."""


def gelu_in_place(z: np.ndarray) -> None:
    """Replace a contiguous array by its GELU."""
    p, u = np.empty_like(z), np.empty_like(z)
    np.multiply(z, z, out=u)
    np.minimum(u, 36.0, out=u)  # beyond, tanh is 1, and p turns negative
    np.multiply(u, FIT[2], out=p)
    np.add(p, FIT[1], out=p)
    np.multiply(p, u, out=p)
    np.add(p, FIT[0], out=p)
    np.multiply(p, z, out=p)
    np.tanh(p, out=p)
    np.add(p, 1.0, out=p)
    np.multiply(z, 0.5, out=z)
    np.multiply(z, p, out=z)


class NumpyDense:
    """Layers with weights w_in (l, d, f), bias (l, f) and w_out (l, f, d), on `threads` threads."""

    def __init__(self, weights: dict[str, np.ndarray], threads: int) -> None:
        self.w_in = [np.ascontiguousarray(w.T) for w in weights["dense_in"]]
        self.bias, self.w_out = list(weights["dense_bias"]), list(weights["dense_out"])
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def layer(self, i: int, x: np.ndarray) -> np.ndarray:
        """x + layer i of x, (b, d)."""
        hidden = x @ self.w_in[i]
        if self.pool is None or hidden.size <= 2 * BLOCK:
            self._activate(hidden, i)
        else:  # NumPy lets go of the interpreter's lock, so threads share the work
            wait([self.pool.submit(self._activate, part, i) for part in self._parts(hidden)])
        y = hidden @ self.w_out[i]
        y += x
        return y

    def _activate(self, hidden: np.ndarray, i: int) -> None:
        rows = max(1, BLOCK // hidden.shape[1])
        for start in range(0, len(hidden), rows):
            block = hidden[start : start + rows]
            block += self.bias[i]
            gelu_in_place(block)

    def _parts(self, hidden: np.ndarray) -> Iterator[np.ndarray]:
        rows = -(-len(hidden) // self.threads)
        return (hidden[start : start + rows] for start in range(0, len(hidden), rows))

    def chain(self, x: np.ndarray) -> np.ndarray:
        """All layers."""
        for i in range(len(self.w_out)):
            x = self.layer(i, x)
        return x
