"""The dense layers of jax and NumPy for `ufbert bench layer`, each the best that its library gives.

`python -m ufbert.bench.layer_dense FOLDER NAME THREADS` is a process with one of them: `jax`, `jax-bf16` or `numpy`.
NumPy has no erf, so its GELU is a fit to 3e-5; its error is printed with the others.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ufbert.bench.worker import Answers, Call, Worker, serve
from ufbert.ops.dense import gelu
from ufbert.runtime.device import use_device

Layer = Callable[[Float[Array, "b d"], Any], Float[Array, "b d"]]
"""(rows, weights of a layer) -> rows + the layer of rows. Weights are arguments, so that XLA does not fold them in."""

BLOCK = 1 << 15
"""Numbers that pass through NumPy's GELU together, so that they stay in a core's cache."""

FIT = (0.79746246, 0.037046284, -0.00035800564)
"""gelu(z) = z/2 (1 + tanh(z p(z^2))) to 3e-5 with this p, fitted to the exact GELU."""


def jax_calls(layer: Layer, weights: list[Any]) -> dict[str, Call]:
    """Compile a jax layer: the works `chain`, all layers in a call, and `layer`, another one at every call."""

    def chain(x: Array, layers: list[Any]) -> Array:
        for layer_weights in layers:
            x = layer(x, layer_weights)
        return x

    whole, single, n = jax.jit(chain), jax.jit(layer), len(weights)
    return {
        "chain": lambda i, x: whole(x, weights).block_until_ready(),
        "layer": lambda i, x: single(x, weights[i % n]).block_until_ready(),
    }


def dense_layers(arrays: dict[str, np.ndarray], dtype: str) -> list[tuple[Array, Array, Array]]:
    """Return the weights w_in (d, f), bias and w_out (f, d) of every dense layer."""
    parts = (arrays[name] for name in ("dense_in", "dense_bias", "dense_out"))
    return [
        (jnp.asarray(np.ascontiguousarray(w_in.T), dtype), jnp.asarray(bias), jnp.asarray(w_out, dtype))
        for w_in, bias, w_out in zip(*parts, strict=True)
    ]


def dense_layer(dtype: str) -> Layer:
    """Return the dense layer with products of a type. Float32 sums between them measured fastest with bfloat16, too."""

    def layer(x: Array, weights: tuple[Array, Array, Array]) -> Array:
        w_in, bias, w_out = weights
        hidden = jnp.dot(x.astype(dtype), w_in, preferred_element_type=jnp.float32) + bias[None]
        return x + jnp.dot(gelu(hidden).astype(dtype), w_out, preferred_element_type=jnp.float32)

    return layer


def gelu_in_place(z: np.ndarray) -> None:
    """Replace a contiguous array by its GELU, with as little work as NumPy can be made to do."""
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
    """The dense layers by two products of NumPy's BLAS, on `threads` threads."""

    def __init__(self, arrays: dict[str, np.ndarray], threads: int) -> None:
        self.w_in = [np.ascontiguousarray(w.T) for w in arrays["dense_in"]]
        self.bias, self.w_out = list(arrays["dense_bias"]), list(arrays["dense_out"])
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def layer(self, i: int, x: np.ndarray) -> np.ndarray:
        """Return x + layer i (modulo the layers) of x, (b, d)."""
        i %= len(self.w_out)
        hidden = x @ self.w_in[i]
        if self.pool is None or hidden.size <= 2 * BLOCK:
            self._activate(hidden, i)
        else:  # NumPy lets go of the interpreter's lock, so threads share the work
            rows = -(-len(hidden) // self.threads)
            parts = (hidden[start : start + rows] for start in range(0, len(hidden), rows))
            wait([self.pool.submit(self._activate, part, i) for part in parts])
        y = hidden @ self.w_out[i]
        y += x
        return y

    def _activate(self, hidden: np.ndarray, i: int) -> None:
        rows = max(1, BLOCK // hidden.shape[1])
        for start in range(0, len(hidden), rows):
            block = hidden[start : start + rows]
            block += self.bias[i]
            gelu_in_place(block)

    def chain(self, x: np.ndarray) -> np.ndarray:
        """Return x after all layers."""
        for i in range(len(self.w_out)):
            x = self.layer(i, x)
        return x


def start(folder: Path, name: str, threads: int) -> tuple[str, Answers]:
    """Get ready to compute jax, jax-bf16 or numpy: facts, and the answers of this process."""
    arrays = dict(np.load(folder / "weights.npz"))
    if name == "numpy":
        dense, blas = NumpyDense(arrays, threads), np.show_config("dicts")["Build Dependencies"]["blas"]
        calls: dict[str, Call] = {"chain": lambda i, x: dense.chain(x), "layer": dense.layer}
        return f"numpy {np.__version__}, {blas['name']} {blas['version']}", Worker(folder, {name: calls}).answers()
    use_device("cpu")
    dtype = "bfloat16" if name == "jax-bf16" else "float32"
    calls = jax_calls(dense_layer(dtype), dense_layers(arrays, dtype))
    return f"jax {jax.__version__}", Worker(folder, {name: calls}, jnp.asarray).answers()


if __name__ == "__main__":
    serve(start)
