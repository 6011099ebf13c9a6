"""Trees whose inner nodes only decide and whose leaves hold neurons, with the remedies that make the leaves worth having.

A layer is `m` trees of depth D, side by side and summed. A token goes down each: at node v it turns right if
`node_w . x + node_bias > 0`, and after D decisions it has reached one of g = 2^D leaves, a small network of `w` neurons. In
training as in inference a token uses one leaf of each tree, so that nothing has to harden. What keeps such trees from being
useful, and what is done about it here:

- *Decisions are uneven.* What hidden states have in common moves faster than a threshold can learn, and sends all of them one
  way. So a node's threshold is a running mean of its tokens' logits (`centred`), whatever the learning rate, without a loss
  that pulls at the weights.
- *A decision has no gradient.* `path_gate` multiplies a leaf's output by a number that grows with the margins of the decisions
  that led there, as a gate does in Switch; `leaf_shares` sends back the gradient of the soft mixture of all leaves;
  `annealed_shares` are that mixture, which hardens while it is trained.
- *A leaf sees a g-th of the text.* `with_ancestors` adds to a leaf's weights those of the nodes above it, which learn from
  all tokens that pass them. After training the sums can be stored, so that inference knows nothing of them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ufbert.ops.dense import Activation, cut_into_blocks


class Path(NamedTuple):
    """The way of b tokens down m trees."""

    leaf: Int[Array, "b m"]
    """The leaf reached, numbered by its path, the root's turn being the highest bit."""
    nodes: Int[Array, "b m s"]
    """The nodes that decided, root first, numbered as in a heap."""
    logits: Float[Array, "b m s"]
    """Their logits."""


class LeafBias(NamedTuple):
    """The biases of the leaves of m trees."""

    b_in: Float[Array, "m g w"]
    """Of their neurons."""
    b_out: Float[Array, "m g o"]
    """Of their outputs."""


def node_logits(
    x: Float[Array, "b d"], node_w: Float[Array, "m n d"], node_bias: Float[Array, "m n"]
) -> Float[Array, "b m n"]:
    """Compute the logit of every node, in float32. The threshold (`node_bias`) gets no gradient: it is moved by `centred`."""
    z = jnp.einsum("bd,mnd->bmn", x, node_w, precision=jax.lax.Precision.HIGHEST)
    return z + jax.lax.stop_gradient(node_bias)[None]


def directions(node_w: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Scale the weights of nodes to length 1, so that a margin grows by a better direction and not by longer weights."""
    return node_w / jnp.maximum(jnp.linalg.norm(node_w, axis=-1, keepdims=True), 1e-12)


def descend(logits: Float[Array, "b m n"]) -> Path:
    """Follow the logits of all n = 2^D - 1 nodes from the root to a leaf; right where a logit is above 0."""
    b, m, n = logits.shape
    node, nodes, path = jnp.zeros((b, m), jnp.int32), [], []
    for _ in range((n + 1).bit_length() - 1):
        z = jnp.take_along_axis(logits, node[..., None], axis=-1)[..., 0]
        nodes.append(node)
        path.append(z)
        node = 2 * node + 1 + (z > 0)
    if not nodes:
        return Path(node, jnp.zeros((b, m, 0), jnp.int32), jnp.zeros((b, m, 0), logits.dtype))
    return Path(node - n, jnp.stack(nodes, -1), jnp.stack(path, -1))


def path_gate(path: Path) -> Float[Array, "b m"]:
    """Compute the mean over a path's decisions of 2 sigmoid(|logit|): from 1, all undecided, to 2, all certain."""
    if path.logits.shape[-1] == 0:
        return jnp.ones(path.leaf.shape)
    return jnp.mean(2.0 * jax.nn.sigmoid(jnp.abs(path.logits)), axis=-1)


def hashed_leaves(ids: Int[Array, " b"], m: int, g: int) -> Int[Array, "b m"]:
    """Choose a leaf of each of m trees by the token alone: MurmurHash3's finalizer of id * m + tree, modulo g."""
    bits = (ids[:, None] * m + jnp.arange(m)[None]).astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return ((bits ^ (bits >> 16)) % jnp.uint32(g)).astype(jnp.int32)


def leaf_shares(logits: Float[Array, "b m n"]) -> Float[Array, "b m g"]:
    """Compute 1 for the leaf that a token reaches and 0 for the others, with the gradient of the soft mixture.

    In that mixture node v sends sigmoid(logit) of a token right, and a leaf's share is the product along its path.
    """
    soft = jax.nn.sigmoid(logits)
    return _products((logits > 0).astype(soft.dtype) + soft - jax.lax.stop_gradient(soft))


def annealed_shares(
    logits: Float[Array, "b m n"], progress: Float[Array, ""] | float, until: float
) -> Float[Array, "b m g"]:
    """Compute every leaf's share of a mixture that hardens: node v sends sigmoid(logit / (1 - progress / until)) right.

    From the share `until` of the budget on, a token is all but wholly in the leaf that it reaches.
    """
    left = jnp.maximum(1e-3, 1.0 - progress / max(until, 1e-6))
    return _products(jax.nn.sigmoid(logits / left))


def _products(right: Float[Array, "b m n"]) -> Float[Array, "b m g"]:
    """Multiply the shares along every path, from those that nodes send right."""
    b, m, n = right.shape
    shares = jnp.ones((b, m, 1), right.dtype)
    for level in range((n + 1).bit_length() - 1):
        turn = right[..., 2**level - 1 : 2 ** (level + 1) - 1]
        shares = jnp.stack([shares * (1 - turn), shares * turn], axis=-1).reshape(b, m, 2 ** (level + 1))
    return shares


def centred(
    path: Path, node_bias: Float[Array, "m n"], share: float, real: Bool[Array, " b"] | None = None
) -> Float[Array, ""]:
    """Return 0, with a gradient for every threshold: `share` of the mean logit of the tokens that reach its node.

    The optimizer takes it from the threshold as it is, whatever the learning rate (`pretrain.optim`), so that a threshold is
    less a running mean, which splits its node's tokens evenly. A node that no token reaches keeps its threshold.
    """
    rows = jnp.ones(path.leaf.shape[:1]) if real is None else real.astype(jnp.float32)
    means = []
    for level in range(path.nodes.shape[-1]):
        here = jax.nn.one_hot(path.nodes[..., level] - (2**level - 1), 2**level) * rows[:, None, None]
        total = jnp.einsum("bmk,bm->mk", here, path.logits[..., level], precision=jax.lax.Precision.HIGHEST)
        means.append(total / jnp.maximum(here.sum(axis=0), 1.0))
    if not means:
        return jnp.zeros(())
    step = jax.lax.stop_gradient(share * jnp.concatenate(means, axis=-1))
    return jnp.sum(step * (node_bias - jax.lax.stop_gradient(node_bias)))


def with_ancestors(leaves: Float[Array, "m g *shape"], above: Float[Array, "m a *shape"]) -> Float[Array, "m g *shape"]:
    """Add to each leaf's weights those of its ancestors. `above` has the root's, or those of whole levels from the root on."""
    for level in range((above.shape[1] + 1).bit_length() - 1):
        weights = above[:, 2**level - 1 : 2 ** (level + 1) - 1]
        leaves = leaves + jnp.repeat(weights, leaves.shape[1] // 2**level, axis=1)
    return leaves


def folded(params: Mapping[str, Any], side: str) -> Float[Array, "m g a b"]:
    """Return the weights of a layer's leaves, of their `side` "in" (d, w) or "out" (w, d), with their ancestors' added."""
    leaves = jnp.asarray(params[f"leaf_{side}"])
    return with_ancestors(leaves, jnp.asarray(params.get(f"above_{side}", leaves[:, :0])))


def leaf_bias(params: Mapping[str, Any]) -> LeafBias | None:
    """Return the biases of a layer's leaves, None if it has none."""
    if "leaf_in_bias" not in params:
        return None
    return LeafBias(jnp.asarray(params["leaf_in_bias"]), jnp.asarray(params["leaf_out_bias"]))


def masked(
    x: Float[Array, "b d"],
    shares: Float[Array, "b m g"],
    w_in: Float[Array, "m g d w"],
    w_out: Float[Array, "m g w o"],
    activation: Activation,
    bias: LeafBias | None = None,
) -> Float[Array, "b o"]:
    """Compute the sum over trees and leaves of share * (activation(x w_in + b_in) w_out + b_out), from all neurons."""
    m, g, d, w = w_in.shape
    hidden = x @ jnp.moveaxis(w_in, 2, 0).reshape(d, m * g * w)
    hidden = activation(hidden if bias is None else hidden + bias.b_in.reshape(1, -1))
    hidden = hidden.reshape(-1, m, g, w) * shares[..., None].astype(hidden.dtype)
    y = hidden.reshape(-1, m * g * w) @ w_out.reshape(m * g * w, -1)
    if bias is None:
        return y
    return y + shares.reshape(-1, m * g).astype(y.dtype) @ bias.b_out.reshape(m * g, -1)


def grouped(
    x: Float[Array, "b d"],
    leaf: Int[Array, "b m"],
    gate: Float[Array, "b m"],
    w_in: Float[Array, "m g d w"],
    w_out: Float[Array, "m g w o"],
    activation: Activation,
    bias: LeafBias | None = None,
) -> Float[Array, "b o"]:
    """Compute the sum over trees of gate * (activation(x w_in + b_in) w_out + b_out) of the leaf reached, from those alone.

    Pairs of a token and a tree are cut into blocks of one leaf each (`cut_into_blocks`), however uneven the leaves are.
    """
    (b, m), (g, d, w) = leaf.shape, w_in.shape[1:]
    blocks = cut_into_blocks((leaf + g * jnp.arange(m)[None]).reshape(-1), m * g)
    n = len(blocks.owner)
    pair = jnp.full((n * blocks.size,), b * m, jnp.int32).at[blocks.slot].set(jnp.arange(b * m, dtype=jnp.int32))
    tiles = _into_places(m, x, blocks.slot, pair).reshape(n, blocks.size, d)
    hidden = jnp.einsum("nbd,ndw->nbw", tiles, _of_owners(m * g, w_in.reshape(m * g, d, w), blocks.owner))
    if bias is not None:
        hidden = hidden + _of_owners(m * g, bias.b_in.reshape(m * g, 1, w), blocks.owner)
    hidden = activation(hidden)
    y = jnp.einsum("nbw,nwo->nbo", hidden, _of_owners(m * g, w_out.reshape(m * g, w, -1), blocks.owner))
    if bias is not None:
        y = y + _of_owners(m * g, bias.b_out.reshape(m * g, 1, -1), blocks.owner)
    y = _from_places(y.reshape(n * blocks.size, -1), blocks.slot, pair)
    return jnp.einsum("bmo,bm->bo", y.reshape(b, m, -1), gate.astype(y.dtype))


# Derived by jax, the gradients of the three functions below would be scatters that add. A GPU adds in no certain order, so two
# runs of one seed would differ, and it would add a leaf's blocks in bfloat16.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _into_places(m: int, x: Float[Array, "b d"], slot: Int[Array, " r"], pair: Int[Array, " p"]) -> Float[Array, "p d"]:
    """Put row i // m into the place `slot[i]` of each pair i. `pair` has the pair of each place, or r where there is none."""
    return jnp.take(x, pair // m, axis=0, mode="fill", fill_value=0)


def _into_places_forward(m: int, x: Array, slot: Array, pair: Array) -> tuple[Array, Array]:
    return _into_places(m, x, slot, pair), slot


def _into_places_backward(m: int, slot: Array, g: Array) -> tuple[Array, None, None]:
    return g[slot].reshape(-1, m, g.shape[1]).sum(axis=1), None, None


_into_places.defvjp(_into_places_forward, _into_places_backward)


@jax.custom_vjp
def _from_places(y: Float[Array, "p o"], slot: Int[Array, " r"], pair: Int[Array, " p"]) -> Float[Array, "r o"]:
    """Read the place of each pair."""
    return y[slot]


def _from_places_forward(y: Array, slot: Array, pair: Array) -> tuple[Array, Array]:
    return y[slot], pair


def _from_places_backward(pair: Array, g: Array) -> tuple[Array, None, None]:
    return jnp.take(g, pair, axis=0, mode="fill", fill_value=0), None, None


_from_places.defvjp(_from_places_forward, _from_places_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_owners(g: int, weights: Float[Array, "g a c"], owner: Int[Array, " n"]) -> Float[Array, "n a c"]:
    """Gather the weights of each block's leaf, of g leaves."""
    return weights[owner]


def _of_owners_forward(g: int, weights: Array, owner: Array) -> tuple[Array, Array]:
    return weights[owner], owner


def _of_owners_backward(g: int, owner: Array, dy: Array) -> tuple[Array, None]:
    def add(dy: Array, owner: Array) -> Array:
        return jnp.zeros((g, *dy.shape[1:]), dy.dtype).at[owner].add(dy)

    def multiply(dy: Array, owner: Array) -> Array:
        mine = jax.nn.one_hot(owner, g, dtype=dy.dtype)
        return jnp.einsum("ng,nac->gac", mine, dy, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.platform_dependent(dy, owner, cpu=add, default=multiply), None


_of_owners.defvjp(_of_owners_forward, _of_owners_backward)
