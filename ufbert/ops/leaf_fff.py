"""The original fast feedforward layer (Belcak & Wattenhofer 2023, "Fast Feedforward Networks", arXiv 2308.14711).

A binary tree of depth D whose 2^D - 1 inner nodes only decide, and whose 2^D leaves are small networks of width `w`.
Node v computes p_v = sigmoid(node_w_v . x + node_b_v), the share that goes right. A leaf's weight c is the product of
the shares on its path, so the weights of all leaves sum to one. Leaves are numbered by their path, the root's turn
being the highest bit.

- Training (`soft`): the output is the sum of c_leaf * leaf(x) over all leaves. Everything is computed and everything
  learns, the decisions too.
- Inference (`hard`): a token turns right where node_w . x + node_b >= 0 (not strictly: the uniform-node tree of
  `ufbert.ops.fff` is strict) and only its one leaf is computed.

The two agree only once the decisions have hardened, and the stock recipe (the mean node entropy in the loss) often
leaves them soft. There are two more remedies. A temperature that falls during training makes the mixture itself hard, if
it falls faster than the nodes shrink their weights against it (look at the entropy). `straight_through` computes the hard
output and sends back the soft gradient. The other ailment is leaves that no token reaches; `balance_loss` and a master
leaf (Charalampopoulos et al. 2024, arXiv 2405.16836) are for that.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ufbert.ops import native
from ufbert.ops.dense import Activation, activation_name, grouped_mlp

ENTROPY_CLAMP = 1e-6
"""Shares are kept this far from 0 and 1 inside the entropy, as the reference does."""


class LeafTree(NamedTuple):
    """The weights of one layer; n = 2^D - 1 nodes, g = 2^D leaves, o outputs."""

    node_w: Float[Array, "n d"]
    node_b: Float[Array, " n"]
    w_in: Float[Array, "g d w"]
    b_in: Float[Array, "g w"]
    w_out: Float[Array, "g w o"]
    b_out: Float[Array, "g o"]


def depth_of(tree: LeafTree) -> int:
    """Return a tree's depth D. Raises ValueError unless there are 2^D leaves and 2^D - 1 nodes."""
    leaves = tree.w_in.shape[0]
    depth = leaves.bit_length() - 1
    if leaves != 2**depth or tree.node_w.shape[0] != leaves - 1:
        raise ValueError(f"a tree of {leaves} leaves and {tree.node_w.shape[0]} nodes is not a full binary tree")
    return depth


def right_shares(
    x: Float[Array, "b d"], tree: LeafTree, temperature: Float[Array, ""] | float = 1.0
) -> Float[Array, "b n"]:
    """Compute sigmoid((node_w . x + node_b) / temperature) of every node, in float32."""
    z = jnp.einsum("bd,nd->bn", x, tree.node_w, precision=jax.lax.Precision.HIGHEST) + tree.node_b[None]
    return jax.nn.sigmoid(z / temperature)


def leak_regions(shares: Float[Array, "b n"], rate: float, key: Key[Array, ""]) -> Float[Array, "b n"]:
    """Swap left and right with probability `rate`, drawn for each token and node (the paper's region leak)."""
    return jnp.abs(jax.random.bernoulli(key, rate, shares.shape) - shares)


def leaf_weights(shares: Float[Array, "b n"]) -> Float[Array, "b g"]:
    """Compute the weight of every leaf: the product of the shares on its path."""
    weights = jnp.ones_like(shares, shape=(shares.shape[0], 1))
    width = 1  # nodes of a level, the first of which is node width - 1
    while width <= shares.shape[1]:
        right = shares[:, width - 1 : 2 * width - 1]
        weights = jnp.stack([weights * (1 - right), weights * right], axis=-1).reshape(shares.shape[0], 2 * width)
        width *= 2
    return weights


def hard_leaves(x: Float[Array, "b d"], tree: LeafTree) -> Int[Array, " b"]:
    """Find the leaf of each row, reading only the D nodes on its path; a tie turns right."""
    node = jnp.zeros((x.shape[0],), jnp.int32)
    for _ in range(depth_of(tree)):
        z = jnp.einsum("bd,bd->b", x, tree.node_w[node], precision=jax.lax.Precision.HIGHEST) + tree.node_b[node]
        node = 2 * node + 1 + (z >= 0)
    return node - (tree.w_in.shape[0] - 1)


def mixture(
    x: Float[Array, "b d"], tree: LeafTree, weights: Float[Array, "b g"], activation: Activation
) -> Float[Array, "b o"]:
    """Compute the sum over all leaves of weight * (activation(x w_in + b_in) w_out + b_out)."""
    hidden = activation(jnp.einsum("bd,gdw->bgw", x, tree.w_in) + tree.b_in[None])
    return jnp.einsum("bgw,gwo->bo", hidden * weights[..., None], tree.w_out) + weights @ tree.b_out


def descend(
    x: Float[Array, "b d"], tree: LeafTree, activation: Activation
) -> tuple[Float[Array, "b o"], Int[Array, " b"]]:
    """Compute each row's own leaf, from gathered weights. Returns the outputs and the numbers of the leaves."""
    leaf = hard_leaves(x, tree)
    return grouped_mlp(x, leaf, tree.w_in, tree.w_out, activation, tree.b_in, tree.b_out), leaf


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def descend_native(
    x: Float[Array, "b d"], tree: LeafTree, activation: Activation
) -> tuple[Float[Array, "b o"], Int[Array, " b"]]:
    """Compute `descend` by the C++ kernel. The gradient is that of `descend` itself."""
    return native.leaf_forward(x, *tree, activation=activation_name(activation))


def _forward(x: Array, tree: LeafTree, activation: Activation) -> tuple[tuple[Array, Array], tuple[Array, LeafTree]]:
    return descend_native(x, tree, activation), (x, tree)


def _backward(activation: Activation, saved: tuple[Array, LeafTree], g: tuple[Array, Array]) -> tuple[Array, LeafTree]:
    _, pull = jax.vjp(lambda x, tree: descend(x, tree, activation), *saved)
    return pull(g)


descend_native.defvjp(_forward, _backward)


def straight_through(shares: Float[Array, "b n"]) -> Float[Array, "b n"]:
    """Round the shares to 0 or 1 (a half turns right) and keep their soft gradient."""
    hard = (shares >= 0.5).astype(shares.dtype)
    return hard + shares - jax.lax.stop_gradient(shares)  # the last two cancel in value, not in gradient


def node_entropies(shares: Float[Array, "b n"], real: Bool[Array, " b"] | None = None) -> Float[Array, " n"]:
    """Compute the mean over rows of each node's entropy, in nats; at most ln 2. All rows count, those of other paths too."""
    p = jnp.clip(shares, ENTROPY_CLAMP, 1 - ENTROPY_CLAMP)
    entropy = -p * jnp.log(p) - (1 - p) * jnp.log1p(-p)
    return jnp.average(entropy, axis=0, weights=None if real is None else real.astype(entropy.dtype))


def balance_loss(weights: Float[Array, "b g"], real: Bool[Array, " b"] | None = None) -> Float[Array, ""]:
    """Compute g * sum over leaves of (share of rows whose heaviest leaf it is) * (its mean weight).

    It is 1 if all leaves are used alike and g if one takes every row. The first factor has no gradient. This is the balance
    loss of Switch, applied to leaves.
    """
    rows = jnp.ones(weights.shape[0]) if real is None else real.astype(weights.dtype)
    total = jnp.maximum(rows.sum(), 1.0)
    leaves = weights.shape[1]
    heaviest = jax.nn.one_hot(weights.argmax(axis=1), leaves, dtype=weights.dtype)
    return leaves * jnp.sum((rows @ heaviest / total) * (rows @ weights / total))


def soft_usage(weights: Float[Array, "b g"]) -> Float[Array, " g"]:
    """Sum the weight on each leaf over rows; the result sums to the number of rows."""
    return weights.sum(axis=0)
