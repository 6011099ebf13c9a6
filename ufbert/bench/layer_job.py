"""What the contestants of `ufbert bench layer` compute, the files that they get, and the answers that they should give.

A tree layer is x + `ufbert.ops.fff`; its dense rival is x + gelu(x w_in^T + bias) w_out, the two products of a BERT. Several
layers with weights of their own stand in a chain, since a layer that is called twice finds its weights in the cache.

`weights.npz` in the job folder holds `tree_in` and `tree_out` (l, m, n, d), `tree_bias` (l, m, n), `dense_in` and `dense_out`
(l, f, d), `dense_bias` (l, f); `inputs.npy` holds rows (r, d), of which every call takes others than the call before.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Layers(NamedTuple):
    """The sizes of a chain."""

    d: int
    """Width."""
    depth: int
    """Of the trees."""
    trees: int
    """Parallel trees."""
    dense: int
    """Neurons of the dense layer."""
    layers: int
    """Layers in the chain."""

    @property
    def nodes(self) -> int:
        """Nodes of a tree."""
        return 2 ** (self.depth + 1) - 1


class Answers(NamedTuple):
    """What a chain makes of some rows."""

    y: np.ndarray
    """(k, d), float64."""
    margin: np.ndarray
    """(k,) the smallest absolute logit that decided a turn: below rounding, the turn is anybody's. Infinite without turns."""


def input_rows(shape: Layers, rows: tuple[int, ...]) -> int:
    """Rows to draw: four different batches of the largest size, and enough that small ones reach the whole tree."""
    return 4 * max(*rows, 2**shape.depth, 16)


def write_job(folder: Path, shape: Layers, rows: tuple[int, ...], seed: int, zeros: bool) -> None:
    """Draw weights and inputs, or fill both with zeros.

    Rows are N(0, 1) and input weights N(0, 1/d), so that logits are of order 1. Output weights are N(0, 1/(4 k)) for the k
    neurons that a row uses, so that a layer adds about a third of its input's size and a chain neither dies nor blows up.
    """
    rng = np.random.default_rng(seed)
    d, n, f, layers = shape.d, shape.nodes, shape.dense, shape.layers

    def draw(scale: float, *size: int) -> np.ndarray:
        if zeros:
            return np.zeros(size, np.float32)
        return rng.standard_normal(size, np.float32) * np.float32(scale)

    used = shape.trees * (shape.depth + 1)
    arrays: dict[str, Any] = {
        "tree_in": draw(d**-0.5, layers, shape.trees, n, d),
        "tree_bias": draw(0.1, layers, shape.trees, n),
        "tree_out": draw((4 * used) ** -0.5, layers, shape.trees, n, d),
        "dense_in": draw(d**-0.5, layers, f, d),
        "dense_bias": draw(0.1, layers, f),
        "dense_out": draw((4 * f) ** -0.5, layers, f, d),
    }
    np.savez(folder / "weights.npz", **arrays)
    np.save(folder / "inputs.npy", draw(1.0, input_rows(shape, rows), d))


def samples(rows: int) -> list[int]:
    """Which of so many rows are compared with the right answer: 16, evenly spaced from the first to the last."""
    return sorted(set(np.linspace(0, rows - 1, 16).astype(int).tolist()))


def gelu(z: np.ndarray) -> np.ndarray:
    """The exact GELU, in float64, by the C library's erf."""
    erf = np.frompyfunc(math.erf, 1, 1)(z * 0.5**0.5).astype(np.float64)
    return 0.5 * z * (1 + erf)


class Stored(NamedTuple):
    """Weights as a kernel keeps them."""

    rows: np.ndarray
    """(..., d) float32, bfloat16 or int8."""
    scale: np.ndarray | None = None
    """(...), what an int8 row's numbers count."""

    def take(self, index: tuple[np.ndarray, ...]) -> np.ndarray:
        """The rows at an index, as float64 numbers."""
        rows = self.rows[index].astype(np.float64)
        return rows if self.scale is None else rows * self.scale[index].astype(np.float64)[..., None]


def tree_layer(
    x: np.ndarray, w_in: Stored, bias: np.ndarray, w_out: Stored
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows (k, d) to x + their trees' output in float64, the nodes visited (k, m, s), and the smallest margins (k,)."""
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


def tree_chain(x: np.ndarray, layers: list[tuple[Stored, np.ndarray, Stored]]) -> Answers:
    """Rows through tree layers, float64 throughout."""
    y, margin = x.astype(np.float64), np.full(len(x), np.inf)
    for w_in, bias, w_out in layers:
        y, _, nearest = tree_layer(y, w_in, bias, w_out)
        margin = np.minimum(margin, nearest)
    return Answers(y, margin)


def dense_chain(x: np.ndarray, weights: dict[str, np.ndarray]) -> Answers:
    """Rows through the dense layers, float64 throughout."""
    y = x.astype(np.float64)
    parts = (weights[name] for name in ("dense_in", "dense_bias", "dense_out"))
    for w_in, bias, w_out in zip(*parts, strict=True):
        y = y + gelu(y @ w_in.T.astype(np.float64) + bias) @ w_out.astype(np.float64)
    return Answers(y, np.full(len(x), np.inf))
