"""The uniform-node fast feedforward layer of UltraFastBERT (Belcak & Wattenhofer 2023, arXiv 2311.10770, section 2).

A layer is `m` binary trees whose `n = 2^(D+1) - 1` nodes are neurons: a row of input weights, a bias, a row of
output weights. Nodes are numbered as in a heap (root 0, children 2i+1 and 2i+2). A token `x` starts at the root. At
each node it computes the logit `z = w_in . x + bias`, adds `gelu(z) * w_out` to the output, and goes on to the right
child if `z > 0`, else to the left one, until it has visited D+1 nodes. The layer's output is the sum over trees.
Nothing else is computed: with D = 11, 12 of 4095 neurons.

Training uses the same hard path. The decision itself has no gradient; a node learns because its activation takes part
in the output, so a batch gives gradient to the visited nodes alone.

Four backends compute this, equal up to float32 rounding, in value and in gradient (in a narrower type `masked` rounds its
product with the output weights, too):

- `masked` multiplies by all the weights and zeroes the activations off the path. Wasteful and regular: the oracle, and
  what an accelerator likes.
- `gather` reads only the rows on the path, forward and backward.
- `native` does so in C++ (`ufbert.ops.native`), on CPUs.
- `pallas` does so in kernels for NVIDIA GPUs (`ufbert.ops.tree_kernels`), which have not been run on one yet.

Routing is float32 arithmetic whatever the type of the other products, and turns right on `z > 0` (strictly).
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ufbert.ops import native, tree_kernels
from ufbert.ops.dense import Activation, activation_name, gelu

Backend = Literal["masked", "gather", "native", "pallas"]

GEMM_LEVELS = 7
"""In `gather`'s backward, gradients of this many top levels (127 nodes, which most tokens share) are summed by one
small matrix product instead of a scatter."""


def tree_depth(n: int) -> int:
    """Return the depth D of a tree of n = 2^(D+1) - 1 nodes. Raises ValueError for any other n."""
    depth = (n + 1).bit_length() - 2
    if n < 1 or 2 ** (depth + 1) - 1 != n:
        raise ValueError(f"a tree has 2^(D+1) - 1 nodes, not {n}")
    return depth


def usual_backend(platform: str, rows: int, depth: int, *, native_kernels: bool) -> Backend:
    """Choose the backend that `auto` computes `rows` rows with on a platform of jax (cpu, gpu or tpu).

    A CPU takes the native kernels if it has them. Without them it takes `masked` for shallow trees whose rows visit every
    node anyway, and `gather` for others. A GPU takes `gather` for deep trees only: `pallas` was never timed. A TPU always takes
    `masked`: products are its strength. The depths were measured (docs/results/speed.md).
    """
    if platform == "gpu":
        return "gather" if depth > 9 else "masked"
    if platform != "cpu":
        return "masked"
    if native_kernels:
        return "native"
    return "masked" if depth <= 5 and rows * (depth + 1) >= 2 ** (depth + 1) - 1 else "gather"


def fast_feedforward(
    x: Float[Array, "*rows d"],
    w_in: Float[Array, "m n d"],
    bias: Float[Array, "m n"],
    w_out: Float[Array, "m n d"],
    *,
    backend: Backend,
    activation: Activation = gelu,
    dtype: Any = jnp.float32,
) -> Float[Array, "*rows d"]:
    """Compute a layer of m trees for each row of x.

    `dtype` is the type of `masked`'s output product, and the one in which `pallas` reads weights that decide nothing.
    """
    flat = x.reshape(-1, x.shape[-1])
    if backend == "masked" or not len(flat):
        y = _masked(flat, w_in, bias, w_out, activation, dtype)
    else:
        y = _on_path(backend, activation, dtype, flat, w_in, bias, w_out)
    return y.reshape(x.shape)


def path_nodes(
    x: Float[Array, "b d"], w_in: Float[Array, "m n d"], bias: Float[Array, "m n"]
) -> tuple[Int[Array, "b m s"], Float[Array, "b m s"]]:
    """Find the s = D + 1 nodes that each row visits in each tree, root first. Returns them and their logits."""
    m, n, d = w_in.shape
    # One gather over the nodes of all trees is faster than one for each tree: node v of tree i is row i * n + v.
    weights, flat_bias = w_in.reshape(m * n, d), bias.reshape(m * n)
    offset = jnp.arange(m, dtype=jnp.int32)[None] * n
    node = jnp.zeros((x.shape[0], m), jnp.int32)
    nodes, logits = [], []
    for _ in range(tree_depth(n) + 1):
        flat = node + offset
        # HIGHEST, because an accelerator's default product (TF32 or bfloat16) would send some rows to the wrong child.
        z = jnp.einsum("bd,bmd->bm", x, weights[flat], precision=jax.lax.Precision.HIGHEST) + flat_bias[flat]
        nodes.append(node)
        logits.append(z)
        node = 2 * node + 1 + (z > 0)  # the left child is 2v + 1, the right one 2v + 2
    return jnp.stack(nodes, -1), jnp.stack(logits, -1)


def decided_nodes(x: Float[Array, "b d"], route: Float[Array, "m k d"]) -> Int[Array, "b m s"]:
    """Find the nodes that each row visits in each tree, root first. Its k = 2^D - 1 inner nodes turn right on route . x > 0."""
    m, k, d = route.shape
    weights, offset = route.reshape(m * k, d), jnp.arange(m, dtype=jnp.int32)[None] * k
    node = jnp.zeros((x.shape[0], m), jnp.int32)
    nodes = [node]
    for _ in range((k + 1).bit_length() - 1):
        z = jnp.einsum("bd,bmd->bm", x, weights[node + offset], precision=jax.lax.Precision.HIGHEST)
        node = 2 * node + 1 + (z > 0)
        nodes.append(node)
    return jnp.stack(nodes, -1)


def path_mask(logits: Float[Array, "b m n"]) -> Float[Array, "b m n"]:
    """Return 1 where a node is on the row's path and 0 elsewhere, from the logits of all nodes."""
    depth = tree_depth(logits.shape[-1])
    # Level by level: a node's children are on the path if it is, and if it turns to them.
    on_path = [jnp.ones_like(logits[..., :1], dtype=bool)]
    for level in range(depth):
        right = logits[..., 2**level - 1 : 2 ** (level + 1) - 1] > 0
        children = jnp.stack([on_path[-1] & ~right, on_path[-1] & right], axis=-1)
        on_path.append(children.reshape(*right.shape[:-1], 2 ** (level + 1)))
    return jnp.concatenate(on_path, axis=-1).astype(logits.dtype)


def _masked(
    x: Float[Array, "b d"],
    w_in: Float[Array, "m n d"],
    bias: Float[Array, "m n"],
    w_out: Float[Array, "m n d"],
    activation: Activation,
    dtype: Any,
) -> Float[Array, "b d"]:
    z = jnp.einsum("bd,mnd->bmn", x, w_in, precision=jax.lax.Precision.HIGHEST) + bias[None]
    # The decision is a step function, so its gradient is zero; the mask is a constant of the backward pass.
    active = activation(z) * jax.lax.stop_gradient(path_mask(z))
    y = jnp.einsum("bmn,mnd->bd", active.astype(dtype), w_out.astype(dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _on_path(
    backend: Backend,
    activation: Activation,
    dtype: Any,
    x: Float[Array, "b d"],
    w_in: Float[Array, "m n d"],
    bias: Float[Array, "m n"],
    w_out: Float[Array, "m n d"],
) -> Float[Array, "b d"]:
    if backend == "native":
        return native.tree_forward(x, w_in, bias, w_out, activation=activation_name(activation))
    return _on_path_forward(backend, activation, dtype, x, w_in, bias, w_out)[0]


def _on_path_forward(
    backend: Backend, activation: Activation, dtype: Any, x: Array, w_in: Array, bias: Array, w_out: Array
) -> tuple[Array, tuple[Any, ...]]:
    if backend == "pallas":
        return tree_kernels.forward(activation, dtype, x, w_in, bias, w_out)
    if backend == "native":
        y, *path = native.tree_forward_saving(x, w_in, bias, w_out, activation=activation_name(activation))
    else:
        y, *path = _gather_forward(activation, x, w_in, bias, w_out)
    return y, (x, w_in, w_out, *path)


def _on_path_backward(
    backend: Backend, activation: Activation, dtype: Any, saved: tuple[Any, ...], g: Array
) -> tuple[Array, Array, Array, Array]:
    """Return the gradients of x, w_in, bias and w_out. Those of nodes that no row visited are exactly zero."""
    if backend == "pallas":
        return tree_kernels.backward(activation, dtype, saved, g)
    if backend == "native":
        return native.tree_backward(*saved, g, activation=activation_name(activation))
    return _gather_backward(activation, *saved, g)


_on_path.defvjp(_on_path_forward, _on_path_backward)


def _gather_forward(
    activation: Activation,
    x: Float[Array, "b d"],
    w_in: Float[Array, "m n d"],
    bias: Float[Array, "m n"],
    w_out: Float[Array, "m n d"],
) -> tuple[Float[Array, "b d"], Int[Array, "b m s"], Float[Array, "b m s"]]:
    """Compute the output, the nodes of every path and their logits."""
    nodes, z = path_nodes(x, w_in, bias)
    return _weighted_rows(activation(z), nodes, w_out), nodes, z


def _weighted_rows(
    active: Float[Array, "b m s"], nodes: Int[Array, "b m s"], w_out: Float[Array, "m n d"]
) -> Float[Array, "b d"]:
    """Compute the sum over trees and levels of a node's activation times its output weights."""
    m, n, d = w_out.shape
    flat = nodes + jnp.arange(m, dtype=jnp.int32)[None, :, None] * n
    weights = w_out.reshape(m * n, d)
    y = jnp.zeros((len(nodes), d), active.dtype)
    for s in range(nodes.shape[-1]):  # a level at a time: all of them at once would be b * m * s * d gathered numbers
        y = y + jnp.einsum("bm,bmd->bd", active[..., s], weights[flat[..., s]])
    return y


def _gather_backward(
    activation: Activation,
    x: Float[Array, "b d"],
    w_in: Float[Array, "m n d"],
    w_out: Float[Array, "m n d"],
    nodes: Int[Array, "b m s"],
    z: Float[Array, "b m s"],
    g: Float[Array, "b d"],
) -> tuple[Array, Array, Array, Array]:
    m, n, d = w_in.shape
    flat = nodes + jnp.arange(m, dtype=jnp.int32)[None, :, None] * n
    in_rows, out_rows = w_in.reshape(m * n, d), w_out.reshape(m * n, d)
    active, activation_vjp = jax.vjp(activation, z)
    n_steps = nodes.shape[-1]
    d_active = jnp.stack([jnp.einsum("bd,bmd->bm", g, out_rows[flat[..., s]]) for s in range(n_steps)], axis=-1)
    (dz,) = activation_vjp(d_active)
    dx = jnp.zeros_like(x)
    for s in range(n_steps):
        dx = dx + jnp.einsum("bm,bmd->bd", dz[..., s], in_rows[flat[..., s]])
    d_in = _sum_by_node(nodes, dz, x, n)
    d_out = _sum_by_node(nodes, active, g, n)
    d_bias = jnp.zeros((m * n,), z.dtype).at[flat.reshape(-1)].add(dz.reshape(-1)).reshape(m, n)
    return dx, d_in, d_bias, d_out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_of_nodes(
    activation: Activation,
    x: Float[Array, "b d"],
    nodes: Int[Array, "b m s"],
    w_in: Float[Array, "m n d"],
    bias: Float[Array, "m n"],
    w_out: Float[Array, "m n d"],
) -> Float[Array, "b d"]:
    """Compute the sum of activation(w_in . x + bias) w_out over given nodes of each row, root first, reading those alone."""
    return _sum_of_nodes_forward(activation, x, nodes, w_in, bias, w_out)[0]


def _sum_of_nodes_forward(
    activation: Activation, x: Array, nodes: Array, w_in: Array, bias: Array, w_out: Array
) -> tuple[Array, tuple[Any, ...]]:
    m, n, d = w_in.shape
    flat, weights = nodes + jnp.arange(m, dtype=jnp.int32)[None, :, None] * n, w_in.reshape(m * n, d)
    by_level = [jnp.einsum("bd,bmd->bm", x, weights[flat[..., s]]) for s in range(nodes.shape[-1])]
    z = jnp.stack(by_level, axis=-1) + bias.reshape(m * n)[flat]
    return _weighted_rows(activation(z), nodes, w_out), (x, w_in, w_out, nodes, z)


def _sum_of_nodes_backward(activation: Activation, saved: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    dx, d_in, d_bias, d_out = _gather_backward(activation, *saved, g)
    return dx, None, d_in, d_bias, d_out


sum_of_nodes.defvjp(_sum_of_nodes_forward, _sum_of_nodes_backward)


def _sum_by_node(
    nodes: Int[Array, "b m s"], weight: Float[Array, "b m s"], row: Float[Array, "b d"], n: int
) -> Float[Array, "m n d"]:
    """Compute out[m, v] = sum of weight[b, m, s] * row[b] over all (b, s) with nodes[b, m, s] = v."""
    b, m, n_steps = nodes.shape
    top = min(GEMM_LEVELS, n_steps)
    n_top = 2**top - 1
    # Many rows meet in the top nodes, where a scatter would have to add them one after the other. There the weights are
    # spread over one column a node (level s has 2^s nodes, from 2^s - 1 on), and a product sums them.
    columns = [
        weight[..., s, None] * jax.nn.one_hot(nodes[..., s] - (2**s - 1), 2**s, dtype=weight.dtype) for s in range(top)
    ]
    out = jnp.zeros((m, n, row.shape[-1]), row.dtype)
    out = out.at[:, :n_top].set(jnp.einsum("bmn,bd->mnd", jnp.concatenate(columns, axis=-1), row))
    if top < n_steps:
        tree = jnp.broadcast_to(jnp.arange(m)[None, :, None], (b, m, n_steps - top))
        out = out.at[tree, nodes[..., top:]].add(weight[..., top:, None] * row[:, None, None, :])
    return out


def node_visits(nodes: Int[Array, "b m s"], n: int, real: Bool[Array, " b"] | None = None) -> Float[Array, "m n"]:
    """Count the rows that visit each node. Rows that are not `real` are left out.

    The counts of every level sum to the number of real rows.
    """
    b, m, _ = nodes.shape
    tree = jnp.broadcast_to(jnp.arange(m)[None, :, None], nodes.shape)
    rows = jnp.ones((b,)) if real is None else real.astype(jnp.float32)
    return jnp.zeros((m, n)).at[tree, nodes].add(jnp.broadcast_to(rows[:, None, None], nodes.shape))


def balance_loss(
    nodes: Int[Array, "b m s"], logits: Float[Array, "b m s"], n: int, real: Bool[Array, " b"] | None = None
) -> Float[Array, ""]:
    """Measure how unevenly the nodes split their rows: 1 if every visited node sends half of them each way, at most 2.

    The loss of a node is 2 (f p + (1 - f)(1 - p)). f is the share of its visitors that turn right, and has no gradient. p is
    the mean of sigmoid(logit) over them, and has one. The result is the mean over nodes, weighted by their visitors. This is
    the balance loss of Switch with two experts at every node; the paper trains without one.
    """
    if logits.shape[-1] == 1:
        return jnp.ones(())
    rows = jnp.ones((nodes.shape[0],)) if real is None else real.astype(jnp.float32)
    deciding, z = nodes[..., :-1], logits[..., :-1]  # a node of the last level has no children to choose from
    tree = jnp.broadcast_to(jnp.arange(nodes.shape[1])[None, :, None], deciding.shape)

    def by_node(values: Float[Array, "b m s"]) -> Float[Array, "m n"]:
        return jnp.zeros((nodes.shape[1], n)).at[tree, deciding].add(values * rows[:, None, None])

    visits = by_node(jnp.ones_like(z))
    count = jnp.maximum(visits, 1.0)
    f = jax.lax.stop_gradient(by_node((z > 0).astype(z.dtype)) / count)
    p = by_node(jax.nn.sigmoid(z)) / count
    return jnp.sum(visits * 2 * (f * p + (1 - f) * (1 - p))) / jnp.maximum(visits.sum(), 1.0)


def usage_summary(visits: np.ndarray) -> dict[str, float]:
    """Summarise the visits (m, n) to the nodes of a layer's trees.

    `nodes_visited` is the share of nodes with a visitor. `leaves_in_use` is the effective share of the leaves, averaged over
    trees. `dead_subtrees` counts the nodes without a visitor whose parent has one; a dead half of a tree counts as one.
    """
    n = visits.shape[1]
    depth = tree_depth(n)
    parents = (np.arange(1, n) - 1) // 2
    dead = (visits[:, 1:] == 0) & (visits[:, parents] > 0)
    leaves = visits[:, 2**depth - 1 :].astype(np.float64)
    return {
        "nodes_visited": float(np.mean(visits > 0)),
        "leaves_in_use": float(np.mean([effective_share(row) for row in leaves])),
        "dead_subtrees": float(dead.sum()),
    }


def effective_share(counts: np.ndarray) -> float:
    """Return exp(entropy of the counts) over their number: 1 if all are equal, 1/k if one of k takes all, 0 without any."""
    total = counts.sum()
    if total <= 0:
        return 0.0
    p = counts[counts > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()) / len(counts))
