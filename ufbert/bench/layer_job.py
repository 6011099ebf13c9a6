"""The job of `ufbert bench layer`: files, and the right answers, by the plainest float64 arithmetic that gives them.

A tree layer is x + `ufbert.ops.fff`; its dense rival is x + gelu(x w_in^T + bias) w_out, the two products of a BERT.
Layers with weights of their own stand in a chain, since a layer that is called twice finds its weights in the cache.

`weights.npz` in the job folder holds `tree_in` and `tree_out` (l, m, n, d), `tree_bias` (l, m, n), `dense_in` and
`dense_out` (l, f, d), `dense_bias` (l, f). `inputs.npy` holds rows (r, d), other ones for every call.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ufbert.bench.report import BYTES, Work, distinct_nodes, type_of
from ufbert.options.bench import BenchLayerOptions


class RightAnswers(NamedTuple):
    """The right results of a chain for some rows."""

    y: np.ndarray
    """(k, d), float64."""
    margin: np.ndarray
    """(k,) smallest absolute logit of a routing decision; below rounding, either turn is right. Infinite without turns."""


def work(name: str, rows: int, options: BenchLayerOptions) -> Work:
    """Count the bytes and operations that a layer needs for so many rows.

    A tree layer reads the nodes that its rows visit, each once, a dense layer its weights; rows come and go as float32.
    """
    d, steps = options.d_model, options.tree_depth + 1
    kind, moved = type_of(name), 2 * rows * d * 4
    if name == "gather" or name.startswith("native"):
        w_in = 4 if name.endswith("-exact") else BYTES[kind]
        nodes = options.n_trees * distinct_nodes(rows, options.tree_depth)
        return Work(nodes * d * (w_in + BYTES[kind]) + moved, 4.0 * rows * options.n_trees * steps * d, "float32")
    return Work(2.0 * options.dense * d * BYTES[kind] + moved, 4.0 * rows * options.dense * d, kind)


def write_job(folder: Path, options: BenchLayerOptions, zeros: bool) -> None:
    """Draw weights and inputs, or fill both with zeros.

    Rows are N(0, 1) and input weights N(0, 1/d), so that logits are of order 1. Output weights are N(0, 1/(4 k)) for the k
    neurons that a row uses, so that a layer adds about a third of its input's size and a chain neither dies nor blows up.
    """
    rng = np.random.default_rng(options.seed)
    d, f, layers, trees = options.d_model, options.dense, options.layers, options.n_trees
    n, used = 2 ** (options.tree_depth + 1) - 1, trees * (options.tree_depth + 1)

    def draw(scale: float, *size: int) -> np.ndarray:
        if zeros:
            return np.zeros(size, np.float32)
        return rng.standard_normal(size, np.float32) * np.float32(scale)

    arrays: dict[str, Any] = {
        "tree_in": draw(d**-0.5, layers, trees, n, d),
        "tree_bias": draw(0.1, layers, trees, n),
        "tree_out": draw((4 * used) ** -0.5, layers, trees, n, d),
        "dense_in": draw(d**-0.5, layers, f, d),
        "dense_bias": draw(0.1, layers, f),
        "dense_out": draw((4 * f) ** -0.5, layers, f, d),
    }
    np.savez(folder / "weights.npz", **arrays)
    # Four different batches of the largest size, and enough rows that small batches reach the whole tree.
    np.save(folder / "inputs.npy", draw(1.0, 4 * max(*options.rows, 2**options.tree_depth, 16), d))


def samples(rows: int) -> list[int]:
    """Return the rows that are compared with the right answer: 16, evenly spaced from the first to the last."""
    return sorted(set(np.linspace(0, rows - 1, 16).astype(int).tolist()))


def gelu(z: np.ndarray) -> np.ndarray:
    """Return the exact GELU, in float64, by the C library's erf."""
    erf = np.frompyfunc(math.erf, 1, 1)(z * 0.5**0.5).astype(np.float64)
    return 0.5 * z * (1 + erf)


class Stored(NamedTuple):
    """Weights as a kernel keeps them."""

    rows: np.ndarray
    """(..., d) float32, bfloat16 or int8."""
    scale: np.ndarray | None = None
    """(...) float32, the factor of an int8 row."""

    def take(self, index: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return the rows at an index, as float64 numbers."""
        rows = self.rows[index].astype(np.float64)
        return rows if self.scale is None else rows * self.scale[index].astype(np.float64)[..., None]


def tree_layer(
    x: np.ndarray, w_in: Stored, bias: np.ndarray, w_out: Stored
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x + the trees' output for rows (k, d) in float64, the nodes visited (k, m, s), and the smallest margins (k,)."""
    m, n = bias.shape
    depth = (n + 1).bit_length() - 2
    tree = np.arange(m)[None]
    node, y, visited = np.zeros((len(x), m), int), x.astype(np.float64), []
    margin = np.full(len(x), np.inf)
    for step in range(depth + 1):
        at = (np.broadcast_to(tree, node.shape), node)
        z = np.einsum("kd,kmd->km", x.astype(np.float64), w_in.take(at)) + bias[at]
        y = y + np.einsum("km,kmd->kd", gelu(z), w_out.take(at))
        visited.append(node)
        if step < depth:
            margin = np.minimum(margin, np.abs(z).min(axis=1))
            node = 2 * node + 1 + (z > 0)
    return y, np.stack(visited, -1), margin


def tree_chain(x: np.ndarray, layers: list[tuple[Stored, np.ndarray, Stored]]) -> RightAnswers:
    """Send rows through tree layers, float64 throughout."""
    y, margin = x.astype(np.float64), np.full(len(x), np.inf)
    for w_in, bias, w_out in layers:
        y, _, nearest = tree_layer(y, w_in, bias, w_out)
        margin = np.minimum(margin, nearest)
    return RightAnswers(y, margin)


def dense_chain(x: np.ndarray, weights: dict[str, np.ndarray]) -> RightAnswers:
    """Send rows through the dense layers, float64 throughout."""
    y = x.astype(np.float64)
    parts = (weights[name] for name in ("dense_in", "dense_bias", "dense_out"))
    for w_in, bias, w_out in zip(*parts, strict=True):
        y = y + gelu(y @ w_in.T.astype(np.float64) + bias) @ w_out.astype(np.float64)
    return RightAnswers(y, np.full(len(x), np.inf))
