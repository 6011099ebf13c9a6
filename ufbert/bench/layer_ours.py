"""Our side of `ufbert bench layer`: the tree layers' paths, the routes that they take, and what the machine can do."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ufbert.bench.layer_paths import Tree, gather_layer, native_layer, stacked, tree_layers, tree_nodes
from ufbert.bench.layer_worker import Runner, Worker, jax_runner
from ufbert.cost.speeds import least_seconds, measured_flops
from ufbert.ops import native

READ_BYTES = 1 << 28
"""Bytes of the array whose reading is timed: more than caches hold."""


def read_bandwidth(seconds: float = 0.5) -> float:
    """Bytes/s of summing an array that does not fit in the caches, on all of XLA's threads: the best of some reads."""
    array = jnp.ones(READ_BYTES // 4, jnp.float32)
    return READ_BYTES / least_seconds(jax.jit(jnp.sum), array, seconds)


class OurWorker(Worker):
    """Answers for our paths; besides the common messages

    - `{"do": "machine"}`: `read` bytes/s and `float32` and `bfloat16` FLOP/s of this machine, measured now;
    - `{"do": "routes", "rows": R, "sample": [i, ...]}`: the layers' routes on inputs[0:R], see `routes`.
    """

    def __init__(
        self, folder: Path, runners: dict[str, Runner], weights: dict[str, list[Tree]], exact: list[Tree], threads: int
    ) -> None:
        """`weights` of every path, and `exact`, the float32 ones."""
        super().__init__(folder, runners, jnp.asarray, len(exact))
        self.weights, self.exact, self.threads = weights, exact, threads

    def routes(self, rows: int, sample: list[int]) -> dict[str, Any]:
        """Where rows go in every layer, on every path from the same float32 rows.

        Answers `changed`, by path the share of (row, layer) with a turn that float32 weights do not take, and `leaves`, the
        smallest share of a tree's leaves that float32 routes end in; writes to `routes.npz` the sampled rows of every layer's
        input `x` (l, k, d) and of the nodes by path (l, k, m, s).
        """
        x = jnp.asarray(self.inputs[:rows])
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
                found = np.asarray(nodes(x, self.weights[path][i]))
                kept[path].append(found[sample])
                changed[path].append(float((found != wanted).any(axis=(1, 2)).mean()))
            x = layer(x, weights)
        arrays: dict[str, Any] = {name: np.stack(found) for name, found in kept.items()}
        np.savez(self.folder / "routes.npz", **arrays)
        shares = {path: float(np.mean(found)) for path, found in changed.items()}
        return {"changed": shares, "leaves": min(leaves), "file": "routes.npz"}

    def machine(self) -> dict[str, Any]:
        """What this machine can do, measured."""
        speeds = {dtype: measured_flops(dtype=dtype) for dtype in ("float32", "bfloat16")}
        return {"read": read_bandwidth(), **speeds}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message."""
        own: dict[str, Callable[[], dict[str, Any]]] = {
            "machine": self.machine,
            "routes": lambda: self.routes(message["rows"], message["sample"]),
        }
        return own[message["do"]]() if message["do"] in own else super().answer(message)


def native_runner(layers: list[Tree], threads: int) -> Runner:
    """The kernels on these weights, as an engine would keep them: every argument of a call costs jax time, so all layers lie
    in one array of each kind."""
    weights, one, alone = stacked(layers), native_layer(threads, len(layers)), native_layer(threads, 1)
    single = jax.jit(lambda x, weights: alone(x, weights, 0))

    def all_layers(x: jax.Array, weights: Tree) -> jax.Array:
        for i in range(len(layers)):
            x = one(x, weights, i)
        return x

    whole = jax.jit(all_layers)
    return Runner(
        lambda x: whole(x, weights).block_until_ready(), lambda i, x: single(x, layers[i]).block_until_ready()
    )


def make_ours(
    folder: Path, arrays: dict[str, np.ndarray], paths: list[str], threads: int, facts: str
) -> tuple[str, Worker]:
    """What our process is, and what answers for it."""
    exact = tree_layers(arrays, "native")
    weights = {path: exact if path in ("gather", "native") else tree_layers(arrays, path) for path in paths}
    runners = {
        path: jax_runner(gather_layer, exact) if path == "gather" else native_runner(weights[path], threads)
        for path in paths
    }
    if any(path != "gather" for path in paths):
        facts += f", {native.instruction_set()} kernels of ufbert {importlib.metadata.version('ufbert')}"
    return facts, OurWorker(folder, runners, weights, exact, threads)
