"""Whole layers that go, and the depth of trees: what is taken away in one piece, before the tuning."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ufbert import nn
from ufbert.compress.material import Material, loss_gradient
from ufbert.config import ModelConfig
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, flatten, unflatten
from ufbert.ops.routed_tree import folded
from ufbert.runtime.console import phase, show


def with_layers(model: ModelFolder, layers: Sequence[int]) -> ModelFolder:
    """Return a model of some of the layers of another, in this order, which are numbered from 0.

    Raises UserError for layers that are not there, and for models whose layers are tied to each other.
    """
    config = model.config
    wrong = [i for i in layers if not 0 <= i < config.n_layers]
    if wrong or not layers:
        raise UserError(
            f"There is no layer {wrong[0] if wrong else ''} to keep: the model has the layers 0 to {config.n_layers - 1}."
        )
    if tuple(layers) == tuple(range(config.n_layers)):
        return model
    if config.unet_skips or config.value_embeddings:
        raise UserError("Layers that skips (unet_skips) or value embeddings join in pairs cannot go one by one.")
    if not config.first_norm and layers[0] != 0:
        raise UserError(f"The model has no norm before its first mixer, which layer {layers[0]} has; keep layer 0.")
    first = next((at for at, i in enumerate(layers) if i >= config.ngram_layer), len(layers) - 1)
    mixers, feedforwards = zip(*(config.layers[i] for i in layers), strict=True)
    kept = replace(
        config, n_layers=len(layers), mixer=mixers, feedforward=feedforwards, ngram_layer=first if config.ngram_layer else 0,
        layer_heads=tuple(config.layer_heads[i] for i in layers) if config.layer_heads else (),
        layer_hidden=tuple(config.layer_hidden[i] for i in layers) if config.layer_hidden else (),
    )  # fmt: skip
    encoder = {name: part for name, part in model.params["encoder"].items() if not name.startswith("layer_")}
    for at, i in enumerate(layers):
        encoder[f"layer_{at:02d}"] = model.params["encoder"][f"layer_{i:02d}"]
    return replace(model, config=kept, params={**model.params, "encoder": encoder})


def layer_pairs(layers: Sequence[int], n_layers: int) -> tuple[tuple[int, int], ...]:
    """Pair each layer that stays with the last of the teacher's layers whose work it takes over: that before the next."""
    ends = [*layers[1:], n_layers]
    return tuple((at, end - 1) for at, end in enumerate(ends))


def layers_to_keep(model: ModelFolder, count: int, material: Material | None, batches: int, seed: int) -> list[int]:
    """Choose layers to keep: one after the other goes whose absence costs least on `batches` batches of rows.

    Without rows, layers go at even distances, the first and the last stay (as DistilBERT starts: Sanh et al. 2019).
    """
    n = model.config.n_layers
    if material is None:
        return sorted({round(i) for i in np.linspace(0, n - 1, count)}) if count > 1 else [n - 1]
    layers, key = list(range(n)), jax.random.key(seed)
    rows = [material.batch(number) for number in range(batches)]
    with phase("finding the layers that matter least"):
        while len(layers) > count:
            first = 0 if model.config.first_norm else 1
            losses = {}
            score = None
            for i in layers[first:]:
                rest = with_layers(model, [j for j in layers if j != i])
                score = score or jax.jit(_loss_of(material, rest.config))
                each = [float(score(rest.params, row, jax.random.fold_in(key, at))) for at, row in enumerate(rows)]
                losses[i] = float(np.mean(each))
                show(f"without layer {i}: loss {losses[i]:.4f}")
            layers.remove(min(losses, key=lambda i: losses[i]))
    return layers


def _loss_of(material: Material, config: ModelConfig) -> Any:
    def loss(params: nn.Params, batch: Any, key: Any) -> Any:
        sums = material.outputs(config, params, batch, key, training=False).sums
        return sums.loss / jnp.maximum(sums.count, 1.0)

    return loss


TREES = {"tree": "w_out", "leaf_tree": "leaf_out", "routed_tree": "leaf_out"}
"""The weights of each kind of tree that write to the residual stream, (m, nodes, d) or (m, leaves, width, d)."""


def check_depth(config: ModelConfig, depth: int) -> None:
    """Raise UserError for trees that cannot become `depth` deep, or if there are none."""
    kinds = {kind for _, kind in config.layers} & set(TREES)
    if not kinds:
        raise UserError("The model has no trees, and --keep-depth is about their depth.")
    if not 0 <= depth < config.tree_depth:
        raise UserError(
            f"--keep-depth is {depth}; the trees of this model are {config.tree_depth} deep, and some must go."
        )
    if "routed_tree" in kinds and (config.tree_router == "token" or config.tree_gate == "path"):
        why = "choose leaves by a hash" if config.tree_router == "token" else "weigh a leaf by the mean over its path"
        raise UserError(
            f"The routed trees of this model {why}, so none of their branches can go without changing the others; --keep takes "
            "neurons out of their leaves."
        )


def with_depth(model: ModelFolder, depth: int, material: Material | None, batches: int, seed: int) -> ModelFolder:
    """Return a model whose trees are `depth` deep: level by level, the nodes go whose branches matter least.

    A tree stays a complete one, so one node of every path goes, with the lesser of its two branches, and the other takes its
    place (`shallower`). Branches are scored to first order on `batches` batches of rows, or by magnitude without rows; a
    branch that no token takes costs nothing. Raises UserError as `check_depth` does.
    """
    check_depth(model.config, depth)
    model = with_own_leaves(model)
    flat, config = flatten(model.params), model.config
    sizes = _branch_scores(model.params, config, material, batches, seed)
    for path, scores in sizes.items():
        prefix, kind = path.rpartition(".")[0], path.split(".")[2]
        trees = [cut_tree(of_tree, config.tree_depth, depth, leaves=kind != "tree") for of_tree in scores]
        nodes, ends = (np.array([tree[part] for tree in trees], int) for part in (0, 1))
        for name in [name for name in flat if name.startswith(f"{prefix}.")]:
            flat[name] = _picked(flat[name], name.removeprefix(f"{prefix}."), kind, nodes, ends)
    params = _with_empty(jax.tree.map(jnp.asarray, unflatten(flat)), model.params)
    return replace(model, config=replace(config, tree_depth=depth), params=params)


def _with_empty(params: dict[str, Any], like: nn.Params) -> dict[str, Any]:
    """Add the heads without parameters of their own, which have no path."""
    return {**params, **{name: {} for name in like if name not in params}}


def with_own_leaves(model: ModelFolder) -> ModelFolder:
    """Return a model that answers alike, in which the leaves of routed trees hold the sums with the nodes above them."""
    if model.config.leaf_ancestors == "none":
        return model
    flat = flatten(model.params)
    for i, (_, kind) in enumerate(model.config.layers):
        if kind == "routed_tree":
            prefix, own = f"encoder.layer_{i:02d}.{kind}.", model.params["encoder"][f"layer_{i:02d}"][kind]
            for side in ("in", "out"):
                flat.pop(f"{prefix}above_{side}", None)
                flat[f"{prefix}leaf_{side}"] = np.asarray(folded(own, side))
    params = _with_empty(jax.tree.map(jnp.asarray, unflatten(flat)), model.params)
    return replace(model, config=replace(model.config, leaf_ancestors="none"), params=params)


def _branch_scores(
    params: nn.Params, config: ModelConfig, material: Material | None, batches: int, seed: int
) -> dict[str, Float[np.ndarray, "m n"]]:
    """Score the neurons of every node, or of every leaf, of the trees of each layer, by the path of their weights."""
    flat = flatten(params)
    paths = {
        f"encoder.layer_{i:02d}.{kind}.{TREES[kind]}": kind
        for i, (_, kind) in enumerate(config.layers)
        if kind in TREES
    }

    def each(path: str, weights: np.ndarray) -> np.ndarray:
        """Sum over a leaf's neurons, and give a single tree an axis of its own."""
        summed = weights if paths[path] == "tree" else weights.sum(-1)
        return summed if summed.ndim == 2 else summed[None]

    if material is None:
        return {path: each(path, np.sqrt(np.square(flat[path]).sum(-1))) for path in paths}
    gradient, key = loss_gradient(material, config), jax.random.key(seed)
    scores: dict[str, Any] = dict.fromkeys(paths, 0.0)
    with phase("scoring the branches"):
        for number in range(batches):
            grads = flatten(gradient(params, material.batch(number), jax.random.fold_in(key, number)))
            for path in paths:
                scores[path] = scores[path] + each(path, np.abs((flat[path] * grads[path]).sum(-1)))
    return scores


def cut_tree(scores: Float[np.ndarray, " n"], depth: int, wanted: int, *, leaves: bool) -> tuple[list[int], list[int]]:
    """Choose the nodes and the ends of a tree that is `wanted` deep: their old numbers, in the order of the new heap.

    `scores` are of all 2^(depth+1) - 1 nodes of a tree whose nodes have neurons, or with `leaves` of its 2^depth leaves. The
    nodes are all of the former, and the deciding ones of the latter; the ends are the leaves, none of the former.
    """
    n = 2**depth - 1
    tree = Branch.grown(0, n if leaves else 2 * n + 1, scores, leaves=leaves)
    for _ in range(depth - wanted):
        tree = tree.shallower(leaves=leaves)[1]
        assert tree is not None
    order, level = [], [tree]
    while level:
        order += level
        level = [child for branch in level for child in branch.children]
    inner = [branch.number for branch in order if not leaves or branch.children]
    return inner, [branch.number - n for branch in order if leaves and not branch.children]


class Branch:
    """A node of a tree and what hangs below it."""

    def __init__(self, number: int, score: float, children: tuple["Branch", ...]) -> None:
        """`number` is that of the heap, in which leaves follow the nodes; `score` is of the node's own neurons."""
        self.number, self.score, self.children = number, score, children
        self.total: float = score + sum(child.total for child in children)

    @classmethod
    def grown(cls, number: int, n: int, scores: Float[np.ndarray, " k"], *, leaves: bool) -> "Branch":
        """Grow the branch at a node of a heap of n nodes; with `leaves`, those have numbers from n on, and the scores."""
        end = 2 * n + 1 if leaves else n
        below = [child for child in (2 * number + 1, 2 * number + 2) if child < end]
        own = scores[number - n] if leaves and number >= n else 0.0 if leaves else scores[number]
        return cls(number, float(own), tuple(cls.grown(child, n, scores, leaves=leaves) for child in below))

    def shallower(self, *, leaves: bool) -> tuple[float, "Branch | None"]:
        """Return the least that a level less costs, in scores that are lost, and the branch that is left of this.

        Either this node goes, and its better branch takes its place, or each of its branches gives up a level. A leaf of a
        tree with `leaves` cannot go, and of others the last node of a path leaves nothing.
        """
        if not self.children:
            return (float("inf"), self) if leaves else (self.score, None)
        worse, better = sorted(self.children, key=lambda child: child.total)
        gone = self.score + worse.total
        below = [child.shallower(leaves=leaves) for child in self.children]
        if gone <= sum(cost for cost, _ in below):
            return gone, better
        kept = tuple(child for _, child in below if child is not None)
        return sum(cost for cost, _ in below), Branch(self.number, self.score, kept)


def _picked(array: np.ndarray, name: str, kind: str, nodes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Take the nodes, or the leaves, that stay out of an array of a layer with trees; others are returned as they are."""
    if "." in name or name.startswith("master"):  # what every token uses
        return array
    at = nodes if kind == "tree" or name.startswith("node") else ends
    if kind == "leaf_tree":
        return array[at[0]]
    return np.stack([of_tree[picks] for of_tree, picks in zip(array, at, strict=True)])
