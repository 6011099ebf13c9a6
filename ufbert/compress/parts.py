"""The parts that structured pruning takes away: attention heads and hidden neurons, their scores, and models without them.

A part is a block of rows of the matrix that writes to the residual stream (`out`), and the columns of the matrices before it
that compute them. A model whose rows of `out` are zero, the masked model, answers as the one without the part.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from ufbert import nn
from ufbert.compress.material import Material
from ufbert.config import ModelConfig
from ufbert.hub.folder import flatten, unflatten

Scores = dict[str, Float[np.ndarray, "..."]]
"""Scores of the parts of each group, (*stack, parts), by the path of its `out`."""
Kept = dict[str, Bool[np.ndarray, "..."]]
"""True for the parts that stay."""


class Kind(NamedTuple):
    """The arrays of a mixer or feedforward whose parts can go."""

    out: str
    """(*stack, rows, d)."""
    columns: tuple[str, ...]
    """(*stack, ..., rows): matrices and biases, those that the layer has."""


KINDS = {
    "attention": Kind("out.kernel", tuple(f"{n}.{a}" for n in ("query", "key", "value") for a in ("kernel", "bias"))),
    "dense": Kind("out.kernel", ("in.kernel", "in.bias")),
    "glu": Kind("out.kernel", ("gate.kernel", "gate.bias", "value.kernel", "value.bias")),
    "switch": Kind("w_out", ("w_in",)),
    "leaf_tree": Kind("leaf_out", ("leaf_in", "leaf_in_bias")),
    "routed_tree": Kind("leaf_out", ("leaf_in", "leaf_in_bias")),
}


class Group(NamedTuple):
    """The heads of a layer, or its hidden neurons: of each of its leaves or experts, where it has such."""

    layer: int
    kind: str
    width: int
    """Rows of a part: the width of a head, or 1."""
    count: int
    """Parts of each stack."""

    @property
    def prefix(self) -> str:
        return f"encoder.layer_{self.layer:02d}.{self.kind}."

    @property
    def out(self) -> str:
        """Path of the matrix whose rows are the parts'."""
        return self.prefix + KINDS[self.kind].out

    @property
    def columns(self) -> list[str]:
        return [self.prefix + name for name in KINDS[self.kind].columns]


def head_groups(config: ModelConfig) -> list[Group]:
    """List the heads of every layer with attention."""
    kinds = ((i, config.of_layer(i)) for i, (mixer, _) in enumerate(config.layers) if mixer == "attention")
    return [Group(i, "attention", own.width_of_head, own.n_heads) for i, own in kinds]


def neuron_groups(config: ModelConfig) -> list[Group]:
    """List the hidden neurons of every layer that has such in columns, leaves or experts."""
    groups = []
    for i, (_, kind) in enumerate(config.layers):
        if kind in KINDS:
            width = config.leaf_width if kind in ("leaf_tree", "routed_tree") else config.of_layer(i).d_hidden
            groups.append(Group(i, kind, 1, width))
    return groups


def by_magnitude(params: nn.Params, groups: Sequence[Group]) -> Scores:
    """Score parts by the norm of all their weights (Han et al. 2015, applied to a part)."""
    flat, scores = flatten(params), Scores()
    for group in groups:
        out = flat[group.out]
        squares = np.square(out).sum(-1)
        for path in group.columns:
            if path in flat:
                columns = np.square(flat[path])
                squares = squares + (columns.sum(-2) if columns.ndim > squares.ndim else columns)
        scores[group.out] = np.sqrt(_parts(squares, group).sum(-1))
    return scores


def by_first_order(
    params: nn.Params,
    groups: Sequence[Group],
    gradient: Callable[..., Any],
    material: Material,
    batches: int,
    seed: int,
) -> Scores:
    """Score parts by how much the loss would change, to first order, without them: |sum of w * g| over the rows of `out`.

    That is the derivative by a gate on the part (Michel et al. 2019, equation 3; Molchanov et al. 2019). It is summed over
    `batches` batches, the first of the training rows; `gradient` is that of the loss of labels or masked words
    (`material.loss_gradient`).
    """
    key = jax.random.key(seed)
    totals = {group.out: np.zeros(0) for group in groups}
    flat = flatten(params)
    for number in range(batches):
        grads = flatten(gradient(params, material.batch(number), jax.random.fold_in(key, number)))
        for group in groups:
            products = (flat[group.out] * grads[group.out]).sum(-1)
            change = np.abs(_parts(products, group).sum(-1))
            totals[group.out] = totals[group.out] + change if number else change
    return totals


def alive(params: nn.Params, groups: Sequence[Group]) -> Kept:
    """Return which parts write anything at all, as those that were masked do not."""
    flat = flatten(params)
    return {group.out: _parts(np.abs(flat[group.out]).sum(-1), group).sum(-1) > 0 for group in groups}


def _parts(rows: np.ndarray, group: Group) -> np.ndarray:
    """Reshape (*stack, rows) to (*stack, parts, width)."""
    return rows.reshape(*rows.shape[:-1], group.count, group.width)


def keep_best(scores: Scores, groups: Sequence[Group], counts: Mapping[str, int], *, free: bool = False) -> Kept:
    """Keep the parts of the highest scores: so many in each group, or as many in all where the layers compete (`free`).

    Competing layers' scores are divided by their norm (Molchanov et al. 2017, section 2.2), and each keeps a part at least.
    Of equal scores the first part is kept.
    """
    kept: Kept = {}
    if free:
        joined = np.concatenate([scores[g.out] / max(1e-30, float(np.linalg.norm(scores[g.out]))) for g in groups])
        best = np.zeros(len(joined), bool)
        owners = np.repeat(np.arange(len(groups)), [g.count for g in groups])
        firsts = [int(np.flatnonzero(owners == i)[np.argmax(joined[owners == i])]) for i in range(len(groups))]
        order = [*firsts, *(i for i in np.argsort(-joined, kind="stable") if i not in set(firsts))]
        best[order[: max(len(groups), sum(counts[g.out] for g in groups))]] = True
        return {group.out: best[owners == i] for i, group in enumerate(groups)}
    for group in groups:
        order = np.argsort(-scores[group.out], axis=-1, kind="stable")[..., : counts[group.out]]
        mask = np.zeros(scores[group.out].shape, bool)
        np.put_along_axis(mask, order, True, axis=-1)
        kept[group.out] = mask
    return kept


def masks_of(kept: Kept, groups: Sequence[Group]) -> dict[str, Any]:
    """Return the masks of `out` matrices, a tree by the names of parameters, that zero the parts which go."""
    rows = {g.out: np.repeat(kept[g.out], g.width, axis=-1)[..., None].astype(np.float32) for g in groups}
    return unflatten(rows)


def without(
    params: nn.Params, config: ModelConfig, kept: Kept, groups: Sequence[Group]
) -> tuple[dict[str, Any], ModelConfig]:
    """Return parameters and configuration of the model without the parts that go."""
    flat = flatten(params)
    heads = [config.of_layer(i).n_heads for i in range(config.n_layers)]
    hidden = [config.of_layer(i).d_hidden for i in range(config.n_layers)]
    leaf_width = config.leaf_width
    for group in groups:
        rows = np.repeat(kept[group.out], group.width, axis=-1)
        n = int(kept[group.out].sum(-1).reshape(-1)[0])
        picks = np.argsort(~rows, axis=-1, kind="stable")[..., : n * group.width]  # those that stay, in their order
        flat[group.out] = np.take_along_axis(flat[group.out], picks[..., None], axis=-2)
        for path in group.columns:
            if path in flat:
                at = picks if flat[path].ndim == picks.ndim else picks[..., None, :]
                flat[path] = np.take_along_axis(flat[path], at, axis=-1)
        if group.kind == "attention":
            heads[group.layer] = n
        elif group.kind in ("leaf_tree", "routed_tree"):
            leaf_width = n
        else:
            hidden[group.layer] = n
    params = jax.tree.map(jnp.asarray, {**unflatten(flat), **{name: {} for name in params if not params[name]}})
    return params, with_widths(replace(config, leaf_width=leaf_width), heads, hidden)


def with_widths(config: ModelConfig, heads: Sequence[int], hidden: Sequence[int]) -> ModelConfig:
    """Return a configuration with other heads and hidden widths of its layers, in the shortest form that says so."""
    width = config.width_of_head
    uses_hidden = [n for n, (_, kind) in zip(hidden, config.layers, strict=True) if kind in ("dense", "glu", "switch")]
    uses_heads = [n for n, (mixer, _) in zip(heads, config.layers, strict=True) if mixer == "attention"]
    even_heads, even_hidden = len(set(uses_heads)) < 2, len(set(uses_hidden)) < 2
    n_heads = uses_heads[0] if uses_heads and even_heads else config.n_heads
    return replace(
        config,
        n_heads=n_heads,
        head_width=0 if even_heads and n_heads * width == config.d_model else width,
        layer_heads=() if even_heads else tuple(heads),
        d_hidden=uses_hidden[0] if uses_hidden and even_hidden else config.d_hidden,
        hidden_from="d_hidden",
        layer_hidden=() if even_hidden else tuple(hidden),
    )
