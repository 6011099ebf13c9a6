"""Decisions fitted to a trained feedforward: hyperplanes through its inputs that part tokens which use other neurons.

A tree is grown from the root. At each node the tokens that reach it get a target, which says on which side each would be; the
node's direction is the regression of that target on the layer's input (for two classes, Fisher's linear discriminant), and its
threshold the median, so that the tokens of a calibration sample are spread evenly over the leaves.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ufbert.options.compress import Split

ROUNDS = 10
"""Rounds of a clustering into two, and of a power iteration."""
ENOUGH = 4096
"""Tokens of a node that are clustered; the others join the cluster that they are nearer to."""
RIDGE = 1e-2
"""Weight of a discriminant's ridge, over the mean variance of the inputs."""


class Decisions(NamedTuple):
    """A tree of n = 2^D - 1 decisions, numbered as in a heap; a token turns right where node . x + bias is above 0."""

    node: Float[np.ndarray, "n d"]
    """Of length 1."""
    bias: Float[np.ndarray, " n"]
    neurons: Bool[np.ndarray, "g f"]
    """The neurons of each leaf's cluster: all but for the split `neurons`."""


def grow(
    x: Float[np.ndarray, "n d"], contributions: Float[np.ndarray, "n f"], depth: int, split: Split, seed: int
) -> Decisions:
    """Grow a tree's decisions on tokens with these inputs, for which each neuron contributes so much.

    `tokens` clusters a node's tokens into two by the neurons that contribute for them. `neurons` cuts a node's neurons into two
    halves that are active together, and asks which half contributes more; it gives each leaf neurons of its own (as MoEfication
    gives each expert: Zhang et al. 2022, arXiv 2110.01786). `random` draws directions, to show what a fitted one is worth.
    """
    n, f, rng = 2**depth - 1, contributions.shape[1], np.random.default_rng(seed)
    node, bias = np.zeros((n, x.shape[1]), np.float32), np.zeros(n, np.float32)
    tokens, neurons = [np.arange(len(x))], [np.ones(f, bool)]  # of each node, the leaves last
    for i in range(n):
        own, mine = tokens[i], neurons[i]
        direction, left, right = rng.normal(size=x.shape[1]), mine, mine
        if split == "neurons":
            right = mine & _active_together(contributions[own], mine)
            left = mine & ~right
            direction = discriminant(x[own], contributions[own] @ (right.astype(np.float32) - left))
        elif split == "tokens":
            direction = discriminant(x[own], _two_kinds(contributions[own]))
        node[i] = direction / max(float(np.linalg.norm(direction)), 1e-12)
        logits = x[own] @ node[i]
        bias[i] = -np.median(logits) if len(own) else 0.0
        turns = logits + bias[i] > 0
        tokens += [own[~turns], own[turns]]
        neurons += [left, right]
    return Decisions(node, bias, np.stack(neurons[n:]))


def leaves(x: Float[np.ndarray, "n d"], decisions: Decisions) -> Int[np.ndarray, " n"]:
    """Return the leaf that each token reaches."""
    node, n = np.zeros(len(x), int), len(decisions.node)
    logits = x @ decisions.node.T + decisions.bias
    for _ in range((n + 1).bit_length() - 1):
        node = 2 * node + 1 + (logits[np.arange(len(x)), node] > 0)
    return node - n


def discriminant(x: Float[np.ndarray, "n d"], target: Float[np.ndarray, " n"]) -> Float[np.ndarray, " d"]:
    """Return the direction of the ridge regression of a target on the inputs."""
    centred = x - x.mean(axis=0) if len(x) else x
    scatter = (centred.T @ centred).astype(np.float64)
    scatter[np.diag_indices_from(scatter)] += RIDGE * float(scatter.diagonal().mean()) + 1e-12
    return np.linalg.solve(scatter, (centred.T @ target).astype(np.float64))


def _two_kinds(points: Float[np.ndarray, "n f"]) -> Float[np.ndarray, " n"]:
    """Cluster points into two by k-means, which starts from the sides of their principal axis. Returns -1 or 1 for each."""
    some = points[:: 1 + len(points) // ENOUGH]
    axis = _principal_axis(some - some.mean(axis=0))
    middle = float(some.mean(axis=0) @ axis)
    for _ in range(ROUNDS):
        right = some @ axis > middle
        if right.all() or not right.any():
            break
        far, near = some[right].mean(axis=0), some[~right].mean(axis=0)
        axis, middle = far - near, float(far @ far - near @ near) / 2
    return np.where(points @ axis > middle, 1.0, -1.0).astype(np.float32)


def _active_together(contributions: Float[np.ndarray, "n f"], among: Bool[np.ndarray, " f"]) -> Bool[np.ndarray, " f"]:
    """Cut the neurons `among` all into two halves that are active together, by the principal axis of their correlations."""
    own = contributions[:: 1 + len(contributions) // ENOUGH, among]
    scaled = (own - own.mean(axis=0)) / (own.std(axis=0) + 1e-6 * float(np.abs(own).max()) + 1e-12)
    axis = _principal_axis(scaled)
    half = np.zeros(len(among), bool)
    half[np.flatnonzero(among)[np.argsort(axis, kind="stable")[len(axis) // 2 :]]] = True
    return half


def _principal_axis(centred: Float[np.ndarray, "n f"]) -> Float[np.ndarray, " f"]:
    """Find the direction of the largest variance, by power iteration."""
    axis = centred[np.argmax(np.square(centred).sum(axis=1))]
    for _ in range(ROUNDS):
        axis = centred.T @ (centred @ axis)
        axis = axis / max(float(np.linalg.norm(axis)), 1e-30)
    return axis
