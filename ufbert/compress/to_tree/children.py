"""A trained dense feedforward as a tree, and its honest controls: as few neurons, the same ones for every token, and none.

Each dense layer becomes a `routed_tree` whose decisions are fitted to its inputs (`splits`) and whose leaves hold the neurons
that count for their tokens, copies where several leaves want one (`neurons`). All of it is computed from what the layers read
on a sample of text, without a gradient; tuning comes after. A tree of depth 0 is a narrow dense layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from ufbert.compress.to_tree.neurons import Neurons, Outputs, moments, most_useful, refitted
from ufbert.compress.to_tree.splits import Decisions, grow, leaves
from ufbert.config import ModelConfig
from ufbert.config.model import ActivationName
from ufbert.errors import UserError
from ufbert.nn import Params
from ufbert.ops.dense import ACTIVATIONS
from ufbert.options.compress import Choice, Refit, Split

Samples = Sequence[Float[np.ndarray, "n d"]]
"""Tokens that each layer's feedforward reads, bottom first."""
Child = tuple[ModelConfig, Params]
CANDIDATES = 3
"""Neurons, over the width of a leaf, among which a greedy choice is made."""


@dataclass(frozen=True, kw_only=True)
class TreeSettings:
    """How dense feedforwards become trees."""

    neurons: tuple[int, ...]
    """Neurons that a token uses (its decisions, those of its leaf, and the shared ones); a child for each number."""
    depth: int = 4
    """Decisions of a token, of which there are 2^depth leaves. 0 keeps the same neurons for every token."""
    shared: int = 0
    """Neurons that every token uses besides those of its leaf."""
    split: Split = "neurons"
    choice: Choice = "greedy"
    refit: Refit = "ridge"
    ridge: float = 0.1
    seed: int = 0
    """Of random splits."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of a leaf of each child."""
        return tuple(n - self.depth - self.shared for n in self.neurons)


class Gauge(NamedTuple):
    """How much errors of a feedforward weigh."""

    tokens: Float[np.ndarray, " n"]
    """The square error of each token of a sample."""
    outputs: Float[np.ndarray, " o"]
    """The error of each output."""


class Tree(NamedTuple):
    """A feedforward of g leaves of w neurons, and s neurons that every token uses."""

    decisions: Decisions
    kept: Int[np.ndarray, "g w"]
    """The neurons of the dense layer that each leaf holds."""
    leaf_out: Float[np.ndarray, "g w o"]
    leaf_out_bias: Float[np.ndarray, "g o"]
    shared: Int[np.ndarray, " s"]
    shared_out: Float[np.ndarray, "s o"]


def to_trees(config: ModelConfig, params: Params, samples: Samples, settings: TreeSettings) -> list[Child]:
    """Turn every dense feedforward of a model into a tree, or with depth 0 into a narrow dense layer: a child for each width.

    Raises UserError for a model without dense feedforwards or with trees, and for settings that do not fit.
    """
    check(config, settings)
    return _with_feedforwards(config, params, samples, settings, fit)


def without(config: ModelConfig, params: Params, samples: Samples) -> Child:
    """Let every dense feedforward answer all tokens alike, with its mean: a neuron of weight zero, and the bias.

    Raises UserError as `to_trees` does.
    """
    settings = TreeSettings(neurons=(1,), depth=0)
    check(config, settings)
    return _with_feedforwards(config, params, samples, settings, _mean_alone)[0]


def _with_feedforwards(
    config: ModelConfig, params: Params, samples: Samples, settings: TreeSettings, fit: Callable[..., list[Tree]]
) -> list[Child]:
    """Put what `fit` makes of each dense feedforward in its place: a child for each width."""
    is_narrow = settings.depth == 0 and config.use_bias
    encoders = [dict(params["encoder"]) for _ in settings.neurons]
    for i, x in enumerate(samples):
        layer = params["encoder"][name := f"layer_{i:02d}"]
        if "dense" not in layer:
            continue
        neurons = neurons_of(layer["dense"])
        rest = {part: value for part, value in layer.items() if part != "dense"}
        trees = fit(x, neurons, config.activation, settings, gauge_of(config, layer, x, neurons))
        for encoder, tree in zip(encoders, trees, strict=True):
            laid_out = (
                {"dense": narrow_params(neurons, tree)} if is_narrow else {"routed_tree": tree_params(neurons, tree)}
            )
            encoder[name] = rest | laid_out
    configs = [child_config(config, settings, n) for n in settings.neurons]
    return [(child, {**params, "encoder": encoder}) for child, encoder in zip(configs, encoders, strict=True)]


def _mean_alone(
    x: Float[np.ndarray, "n d"], neurons: Neurons, activation: ActivationName, settings: TreeSettings, gauge: Gauge
) -> list[Tree]:
    mean = activations(x, neurons, activation).mean(axis=0) @ neurons.w_out + neurons.b_out
    decisions = grow(x[:1], np.ones((1, len(neurons.w_out)), np.float32), 0, "random", 0)
    none = np.zeros(0, int)
    return [
        Tree(
            decisions,
            np.zeros((1, 1), int),
            np.zeros((1, 1, len(mean)), np.float32),
            mean[None],
            none,
            neurons.w_out[:0],
        )
    ]


def check(config: ModelConfig, settings: TreeSettings) -> None:
    """Raise UserError for a model that has nothing to turn into trees, and for settings that do not fit it."""
    if "dense" not in config.feedforward:
        kinds = ", ".join(config.feedforward)
        raise UserError(
            f"No layer of this model has a dense feedforward, which could become a tree; its kinds are {kinds}."
        )
    if others := {"tree", "leaf_tree", "routed_tree"} & set(config.feedforward):
        names = ", ".join(sorted(others))
        raise UserError(
            f"Some layers of this model are trees already ({names}), and all trees of a model have one size."
        )
    if settings.choice == "cluster" and settings.split != "neurons":
        raise UserError(
            "Leaves have clusters of neurons to choose from only where neurons are split (--split neurons)."
        )
    fewest = min(config.of_layer(i).d_hidden for i, (_, kind) in enumerate(config.layers) if kind == "dense")
    for n, width in zip(settings.neurons, settings.widths, strict=True):
        if width < 1:
            raise UserError(
                f"{n} neurons a token, less {settings.depth} decisions and {settings.shared} shared neurons, leave none for a "
                "leaf."
            )
        if max(width, settings.shared) > fewest:
            raise UserError(
                f"Leaves of {width} neurons besides {settings.shared} shared ones cannot be had: a layer has {fewest}."
            )


def child_config(config: ModelConfig, settings: TreeSettings, n: int) -> ModelConfig:
    """Configure the child of which a token uses n neurons a layer."""
    if settings.depth == 0 and config.use_bias:
        own = tuple(n if kind == "dense" else config.of_layer(i).d_hidden for i, (_, kind) in enumerate(config.layers))
        return replace(config, d_hidden=own[0], layer_hidden=own if len(set(own)) > 1 else ())
    kinds = tuple("routed_tree" if kind == "dense" else kind for kind in config.feedforward)
    return replace(
        config, feedforward=kinds, n_trees=1, tree_depth=settings.depth, master_leaf=settings.shared,
        leaf_width=n - settings.depth - settings.shared, leaf_bias=True, leaf_ancestors="none", tree_router="state",
        tree_gate="none", tree_even=0.0,
    )  # fmt: skip


def neurons_of(dense: Params) -> Neurons:
    """Return the weights of a dense feedforward, with biases of 0 if it has none."""
    w_in, w_out = (np.asarray(dense[side]["kernel"]) for side in ("in", "out"))
    b_in, b_out = (
        np.asarray(dense[side].get("bias", np.zeros(w.shape[1], w.dtype))) for side, w in (("in", w_in), ("out", w_out))
    )
    return Neurons(w_in, b_in, w_out, b_out)


def gauge_of(config: ModelConfig, layer: Params, x: Float[np.ndarray, "n d"], neurons: Neurons) -> Gauge:
    """Return the weights of a layer's errors.

    The norm above a post-norm feedforward divides by the deviation of its token, and passes on little of an error along what
    the token mostly is: without these weights a few tokens and one output make up nearly all of the error (in MiniLM, 97 %).
    """
    if config.norm == "pre":
        return Gauge(np.ones(len(x), np.float32), np.ones(config.d_model, np.float32))
    stream = x + activations(x, neurons, config.activation) @ neurons.w_out + neurons.b_out
    deviation = stream.std(axis=1, keepdims=True) + 1e-6
    passed = 1.0 - np.square((stream - stream.mean(axis=1, keepdims=True)) / deviation) / config.d_model
    scale = np.abs(np.asarray(layer["feedforward_norm"]["scale"]))
    return Gauge(1.0 / np.square(deviation[:, 0]), scale * np.sqrt(np.square(passed).mean(axis=0)))


def activations(x: Float[np.ndarray, "n d"], neurons: Neurons, activation: ActivationName) -> Float[np.ndarray, "n f"]:
    """Compute the activations of a layer's neurons."""
    return np.asarray(ACTIVATIONS[activation](jnp.asarray(x @ neurons.w_in + neurons.b_in)))


def fit(
    x: Float[np.ndarray, "n d"], neurons: Neurons, activation: ActivationName, settings: TreeSettings, gauge: Gauge
) -> list[Tree]:
    """Fit trees to a layer's neurons, given tokens that the layer reads: one for each width, all with the same decisions.

    Raises UserError for fewer than four tokens a leaf.
    """
    n_leaves = 2**settings.depth
    if len(x) < 4 * n_leaves:
        raise UserError(
            f"{n_leaves} leaves need at least {4 * n_leaves} tokens to be fitted to, and there are {len(x)}."
        )
    active = activations(x, neurons, activation)
    left, rest = active @ neurons.w_out, neurons.w_out.copy()  # what is to be answered, less what shared neurons answer
    keep = partial(_keep, settings=settings, gauge=gauge)
    decisions = grow(x, np.abs(active) * _norms(rest, gauge), settings.depth, settings.split, settings.seed)
    shared, shared_out = np.zeros(0, int), rest[:0]
    if settings.shared:
        everything = np.ones(len(rest), bool)
        ((shared, (shared_out, _)),) = keep(active, left, rest, gauge.tokens, (settings.shared,), everything)
        left, rest[shared] = left - active[:, shared] @ shared_out, rest[shared] - shared_out
    leaf, of_leaves = leaves(x, decisions), []
    for g, cluster in enumerate(decisions.neurons):
        own = leaf == g
        of_leaves.append(keep(active[own], left[own], rest, gauge.tokens[own], settings.widths, cluster))
    trees = []
    for of_width in zip(*of_leaves, strict=True):
        kept, outputs = zip(*of_width, strict=True)
        out, bias = (np.stack(part) for part in zip(*outputs, strict=True))
        trees.append(Tree(decisions, np.stack(kept), out, bias + neurons.b_out, shared, shared_out))
    return trees


def _keep(
    active: Float[np.ndarray, "n f"],
    left: Float[np.ndarray, "n o"],
    w_out: Float[np.ndarray, "f o"],
    tokens: Float[np.ndarray, " n"],
    widths: tuple[int, ...],
    cluster: Bool[np.ndarray, " f"],
    settings: TreeSettings,
    gauge: Gauge,
) -> list[tuple[Int[np.ndarray, " k"], Outputs]]:
    """Choose neurons to answer a sample of tokens, and refit them, for each width; the narrower is part of the wider."""
    k, greedy, weight = max(widths), settings.choice == "greedy", _norms(w_out, gauge)
    if settings.choice == "cluster":
        weight = weight * np.where(cluster, 1.0, 1e-6)  # others come after those of the cluster
    c = min(len(w_out), max(CANDIDATES * k, 256)) if greedy else k
    sample = moments(active, left, tokens, weight, c)
    order = most_useful(sample, gauge.outputs, k) if greedy else np.arange(k)
    return [
        (sample.candidates[order[:width]], refitted(sample, w_out, order[:width], settings.refit, settings.ridge))
        for width in widths
    ]


def _norms(w_out: Float[np.ndarray, "f o"], gauge: Gauge) -> Float[np.ndarray, " f"]:
    return np.linalg.norm(w_out * gauge.outputs, axis=1)


def tree_params(neurons: Neurons, tree: Tree) -> dict[str, Any]:
    """Lay a tree out as the parameters of a `routed_tree`."""
    params: dict[str, Any] = {
        "node": tree.decisions.node[None],
        "node_bias": tree.decisions.bias[None],
        "leaf_in": np.moveaxis(neurons.w_in[:, tree.kept], 0, 1)[None],
        "leaf_in_bias": neurons.b_in[tree.kept][None],
        "leaf_out": tree.leaf_out[None],
        "leaf_out_bias": tree.leaf_out_bias[None],
    }
    if len(tree.shared):
        params["shared_in"] = {"kernel": neurons.w_in[:, tree.shared], "bias": neurons.b_in[tree.shared]}
        params["shared_out"] = {"kernel": tree.shared_out}
    return params


def narrow_params(neurons: Neurons, tree: Tree) -> dict[str, Any]:
    """Lay a tree without decisions out as the parameters of a `dense` feedforward."""
    order, w_out = np.concatenate([tree.kept[0], tree.shared]), np.concatenate([tree.leaf_out[0], tree.shared_out])
    return {
        "in": {"kernel": neurons.w_in[:, order], "bias": neurons.b_in[order]},
        "out": {"kernel": w_out, "bias": tree.leaf_out_bias[0]},
    }


def answers(
    x: Float[np.ndarray, "n d"], neurons: Neurons, tree: Tree, activation: ActivationName
) -> Float[np.ndarray, "n o"]:
    """Compute what a tree answers."""
    active, leaf = activations(x, neurons, activation), leaves(x, tree.decisions)
    y = tree.leaf_out_bias[leaf] + active[:, tree.shared] @ tree.shared_out
    for g, kept in enumerate(tree.kept):
        y[leaf == g] += active[leaf == g][:, kept] @ tree.leaf_out[g]
    return y


def unexplained(wanted: Float[np.ndarray, "n d"], found: Float[np.ndarray, "n d"]) -> float:
    """Measure a squared error over the variance of what is wanted: 0 is equal, 1 is its mean."""
    return float(np.square(found - wanted).sum() / np.square(wanted - wanted.mean(axis=0)).sum())
