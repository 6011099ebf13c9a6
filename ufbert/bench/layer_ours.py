"""Our tree layers in `ufbert bench layer`: the paths, the routes that rows take on them, and what the machine can do.

`python -m ufbert.bench.layer_ours FOLDER ufbert THREADS PATH ...` is our process. Besides the messages of
`ufbert.bench.worker` it answers

- `{"do": "machine"}`: `read` bytes/s and `float32` and `bfloat16` FLOP/s of this machine, measured now;
- `{"do": "routes", "rows": R, "sample": [i, ...]}`: the layers' routes on inputs[0:R], see `OurLayers.routes`.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ufbert.bench.layer_dense import jax_calls
from ufbert.bench.layer_job import Stored
from ufbert.bench.report import type_of
from ufbert.bench.worker import Answers, Call, Worker, serve
from ufbert.cost.speeds import least_seconds, measured_flops
from ufbert.ops import fff, native
from ufbert.runtime.device import use_device

READ_BYTES = 1 << 28
"""Bytes of the array whose reading is timed: more than caches hold."""

Tree = tuple[Any, Float[Array, "m n"], Any]
"""w_in, bias, w_out."""


def weight_types(path: str) -> tuple[str, str]:
    """Return the types of w_in and w_out on a path of ours: float32, bfloat16 or int8."""
    narrow = type_of(path)
    return ("float32" if path.endswith("-exact") else narrow), narrow


def narrowed(weights: Any, dtype: str) -> Any:
    """Return float32 weights as a kernel takes them."""
    return native.quantize(jnp.asarray(weights)) if dtype == "int8" else jnp.asarray(weights, dtype)


def as_stored(weights: Any) -> Stored:
    """Return a kernel's weights for the float64 evaluation."""
    if isinstance(weights, native.Quantized):
        return Stored(np.asarray(weights.rows), np.asarray(weights.scale))
    return Stored(np.asarray(weights))


def tree_layers(arrays: dict[str, np.ndarray], path: str) -> list[Tree]:
    """Return the weights of every layer as a path of ours keeps them."""
    in_type, out_type = weight_types(path)
    parts = (arrays[name] for name in ("tree_in", "tree_bias", "tree_out"))
    return [
        (narrowed(w_in, in_type), jnp.asarray(bias), narrowed(w_out, out_type))
        for w_in, bias, w_out in zip(*parts, strict=True)
    ]


def gather_layer(x: Float[Array, "b d"], weights: Tree) -> Float[Array, "b d"]:
    """Return rows + the layer of rows, by the gather path."""
    return x + fff.fast_feedforward(x, *weights, backend="gather")


def native_calls(layers: list[Tree], threads: int) -> dict[str, Call]:
    """Compile the kernels on these weights, as an engine would keep them."""
    # Every argument of a call costs jax time, so all layers lie in one array of each kind.
    stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)
    n = len(layers)

    def layer(x: Array, weights: Tree, i: int, of: int) -> Array:
        return native.tree_forward(x, *weights, residual=x, layer=i, layers=of, threads=threads)

    def chain(x: Array, weights: Tree) -> Array:
        for i in range(n):
            x = layer(x, weights, i, n)
        return x

    whole, single = jax.jit(chain), jax.jit(lambda x, weights: layer(x, weights, 0, 1))
    return {
        "chain": lambda i, x: whole(x, stacked).block_until_ready(),
        "layer": lambda i, x: single(x, layers[i % n]).block_until_ready(),
    }


def tree_nodes(path: str, threads: int) -> Callable[[Float[Array, "b d"], Tree], Array]:
    """Return a function: (rows, weights of a layer) -> the nodes that a path of ours visits, (b, m, s)."""
    if path == "gather":
        return lambda x, weights: fff.path_nodes(x, weights[0], weights[1])[0]
    return lambda x, weights: native.tree_forward_saving(x, *weights, threads=threads)[1]


def measure_machine() -> dict[str, float]:
    """Measure the bytes/s of reading memory on all of XLA's threads, and the FLOP/s of products by type."""
    array = jnp.ones(READ_BYTES // 4, jnp.float32)
    read = READ_BYTES / least_seconds(jax.jit(jnp.sum), array, 0.5)
    return {"read": read, **{dtype: measured_flops(dtype=dtype) for dtype in ("float32", "bfloat16")}}


class OurLayers(Worker):
    """Answers for our paths."""

    def __init__(self, folder: Path, paths: list[str], threads: int) -> None:
        arrays = dict(np.load(folder / "weights.npz"))
        self.exact, self.threads = tree_layers(arrays, "native"), threads
        plain = dict.fromkeys(("gather", "native"), self.exact)
        self.weights = {path: plain.get(path) or tree_layers(arrays, path) for path in paths}
        calls = {
            path: jax_calls(gather_layer, self.exact) if path == "gather" else native_calls(self.weights[path], threads)
            for path in paths
        }
        super().__init__(folder, calls, jnp.asarray)

    def routes(self, rows: int, sample: list[int]) -> dict[str, Any]:
        """Walk rows through every layer, on every path from the same float32 rows.

        Answers `changed`, by path the share of (row, layer) with a turn that float32 weights do not take, and `leaves`, the
        smallest share of a tree's leaves that float32 routes end in. Writes to `routes.npz` the sampled rows of every layer's
        input `x` (l, k, d) and of the nodes by path (l, k, m, s).
        """
        x = jnp.asarray(np.load(self.folder / "inputs.npy", mmap_mode="r")[:rows])
        layer, reference = jax.jit(gather_layer), jax.jit(tree_nodes("gather", self.threads))
        nodes_of = {path: jax.jit(tree_nodes(path, self.threads)) for path in self.weights}
        kept: dict[str, list[np.ndarray]] = {name: [] for name in ("x", *self.weights)}
        changed: dict[str, list[float]] = {path: [] for path in self.weights}
        leaves = []
        for i, weights in enumerate(self.exact):
            wanted = np.asarray(reference(x, weights))
            leaf_count = (weights[1].shape[1] + 1) // 2
            leaves += [len(np.unique(wanted[:, tree, -1])) / leaf_count for tree in range(wanted.shape[1])]
            kept["x"].append(np.asarray(x)[sample])
            for path, nodes in nodes_of.items():
                visited = np.asarray(nodes(x, self.weights[path][i]))
                kept[path].append(visited[sample])
                changed[path].append(float((visited != wanted).any(axis=(1, 2)).mean()))
            x = layer(x, weights)
        arrays: dict[str, Any] = {name: np.stack(layers) for name, layers in kept.items()}
        np.savez(self.folder / "routes.npz", **arrays)
        shares = {path: float(np.mean(layers)) for path, layers in changed.items()}
        return {"changed": shares, "leaves": min(leaves), "file": "routes.npz"}


def start(folder: Path, _name: str, threads: int, *paths: str) -> tuple[str, Answers]:
    """Get ready: facts, and the answers of this process."""
    use_device("cpu")
    facts = f"jax {importlib.metadata.version('jax')}"
    if any(path != "gather" for path in paths):
        facts += f", {native.instruction_set()} kernels of ufbert {importlib.metadata.version('ufbert')}"
    ours = OurLayers(folder, list(paths), threads)
    return facts, ours.answers() | {"routes": ours.routes, "machine": measure_machine}


if __name__ == "__main__":
    serve(start)
