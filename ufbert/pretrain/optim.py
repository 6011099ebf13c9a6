"""The optimizer: AdamW, or Muon for dense matrices; weight decay, clipping, and the average of past weights."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ufbert.config import PretrainConfig
from ufbert.nn import Params
from ufbert.nn.registry import FEEDFORWARDS, MIXERS
from ufbert.nn.updates import own_steps_apart

Group = Literal["muon", "adamw"]

MUON_RMS = 0.2
"""Root mean square of Muon's updates, about that of AdamW's, so that both take one learning rate (arXiv 2502.16982)."""


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(part, "key", part)) for part in path]


def group(path: tuple[Any, ...]) -> Group:
    """Return the optimizer of the parameter at a path, if Muon is in use.

    muon: those that the entry of a layer's kind names, such as the kernels of attention (query, key, value and out are
    matrices of their own) and of dense and GLU feedforwards. adamw: all others, such as embeddings, norms, biases and heads.
    """
    names, layers = _names(path), MIXERS | FEEDFORWARDS
    layer = layers.get(names[2]) if names[0] == "encoder" and len(names) > 3 else None
    return "muon" if layer is not None and names[-1] in layer.muon else "adamw"


def decays(path: tuple[Any, ...]) -> bool:
    """Tell whether weight decay applies to the parameter at a path: to all but norms, biases and the rows of hashed tables, of
    which a rare one would decay while no text needs it."""
    names = _names(path)
    return not (names[1:-1] == ["ngrams"] or names[-1].endswith("bias") or any(name.endswith("norm") for name in names))


def groups(params: Params, stacks: bool = True) -> Any:
    """Map every parameter to its `group`. Without `stacks`, those of more than two axes have AdamW."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: group(path) if stacks or leaf.ndim == 2 else "adamw", params
    )


def decay_mask(params: Params) -> Any:
    """Map every parameter to whether weight decay applies to it."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)


def is_position_scale(params: Params) -> Any:
    """Map the scalar that multiplies the position sinusoid to True, all else to False."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "position_scale", params)


def is_decision(path: tuple[Any, ...]) -> bool:
    """Tell whether a parameter is the weights by which routed trees decide."""
    return _names(path)[-2:] == ["routed_tree", "node"]


def _by_level(path: tuple[Any, ...], update: Array, power: float) -> Array:
    """Scale the update of a routed tree's node at level l by 2^(-l * power); nodes are stored level by level."""
    *_, layer, name = ["", *_names(path)]
    if layer != "routed_tree" or not name.startswith(("above_", "leaf_")) or power == 0:
        return update
    n = update.shape[1]
    first = n if name.startswith("leaf_") else 1  # a heap's number of the first node, from 1
    levels = np.log2(np.arange(first, first + n)).astype(int)
    return update * jnp.asarray(2.0 ** (-power * levels), update.dtype).reshape(1, -1, *[1] * (update.ndim - 2))


def make_optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """Make clipped AdamW, or Muon and AdamW. Of routed trees, decisions are slowed by `decision_lr`, and leaves by their level.

    Their updates lack the factor -lr: `apply_update` multiplies it in, for it is an argument of the step.
    """

    optimizer = _optimizer(config)

    def slowed(path: tuple[Any, ...], u: Array) -> Array:
        return config.decision_lr * u if is_decision(path) else _by_level(path, u, config.leaf_lr_power)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        direction, state = optimizer.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(slowed, direction), state

    return own_steps_apart(optax.GradientTransformation(optimizer.init, update))


def _optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps)
    labels = partial(groups, stacks=config.muon_stacks)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        adam if config.optimizer == "adamw" else optax.partition({"muon": _muon(config), "adamw": adam}, labels),
        _decay(config),
        optax.masked(optax.scale(config.position_scale_lr), is_position_scale),
    )


def _decay(config: PretrainConfig) -> optax.GradientTransformation:
    """Make decoupled weight decay, or the cautious one: where the update moves an entry away from zero, that is not decayed."""
    if not config.cautious_decay:
        return optax.add_decayed_weights(config.weight_decay, mask=decay_mask)

    def decayed(update: Any, params: Any) -> Any:
        # The update is subtracted, so equal signs pull towards zero (Chen et al. 2025, arXiv 2510.12402, algorithm 1).
        return update + config.weight_decay * jnp.where(update * params >= 0, params, 0.0)

    return optax.masked(optax.stateless_with_tree_map(decayed), decay_mask)


def _muon(config: PretrainConfig) -> optax.GradientTransformation:
    """Make Muon: momentum, orthogonalised by Newton-Schulz (Jordan 2024), scaled to MUON_RMS times `muon_lr_share`.

    Kernels are (inputs, outputs), or stacks of such matrices, (n, inputs, outputs), each orthogonalised by itself.
    An orthogonalised (a, b) matrix has entries of root mean square 1 / sqrt(max(a, b)).
    """

    def dimensions(kernels: Any) -> Any:
        return jax.tree.map(
            lambda kernel: optax.contrib.MuonDimensionNumbers(kernel.ndim - 2, kernel.ndim - 1), kernels
        )

    def orthogonal(updates: Any, _: Any) -> Any:
        matrices, structure = jax.tree.flatten(updates)
        # Of hundreds of small products an accelerator spends most of the time on the start; a CPU, on the copies.
        each = (
            [orthogonalised(x) for x in matrices] if jax.default_backend() == "cpu" else orthogonalised_as_one(matrices)
        )
        size = MUON_RMS * config.muon_lr_share
        return jax.tree.unflatten(structure, [size * math.sqrt(max(x.shape[-2:])) * x for x in each])

    return optax.chain(
        optax.contrib.scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=dimensions, ns_steps=0),
        optax.stateless(orthogonal),
    )


def orthogonalised(x: Float[Array, "*stack a b"], steps: int = 5) -> Float[Array, "*stack a b"]:
    """Bring the singular values of a matrix of norm 1, or of each of a stack, near 1 by steps of Newton-Schulz (Jordan 2024).

    optax's own has the same steps, but XLA on a CPU turns matrices over in it, for half as much time again.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalised(x.mT, steps).mT
    for _ in range(steps):
        square = jnp.einsum("...ik,...jk->...ij", x, x)  # not x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def orthogonalised_as_one(matrices: Sequence[Float[Array, "..."]]) -> list[Float[Array, "..."]]:
    """Orthogonalise matrices and stacks of them, (..., a, b), those of one shape, lying or standing, in one stack."""
    lying = [x.mT if x.shape[-2] > x.shape[-1] else x for x in matrices]
    results: list[Array] = list(matrices)
    for shape in dict.fromkeys(x.shape[-2:] for x in lying):
        places = [i for i, x in enumerate(lying) if x.shape[-2:] == shape]
        stack = jnp.concatenate([lying[i].reshape(-1, *shape) for i in places])
        ends = np.cumsum([lying[i].size // math.prod(shape) for i in places])
        for i, part in zip(places, jnp.split(orthogonalised(stack), ends[:-1]), strict=True):
            part = part.reshape(lying[i].shape)
            results[i] = part.mT if matrices[i].shape != lying[i].shape else part
    return results


def averaging_power(width: float) -> float:
    """Return gamma of the profile (t / T)^gamma whose standard deviation is `width` * T (Karras et al. 2024, arXiv 2312.02696,
    equation 11: width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)))."""
    low, high = 0.0, 1.0 / width
    for _ in range(60):
        gamma = (low + high) / 2
        wide = math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) > width
        low, high = (gamma, high) if wide else (low, gamma)
    return (low + high) / 2


def averaged(average: Params, params: Params, t: Int[Array, ""], gamma: float) -> Any:
    """Return the average after update t (from 1): beta * average + (1 - beta) * params, beta = (1 - 1/t)^(gamma + 1).

    Its window grows with the run, so that it needs no knowledge of the end.
    """
    beta: Float[Array, ""] = (1.0 - 1.0 / t.astype(jnp.float32)) ** (gamma + 1.0)
    return jax.tree.map(lambda a, p: a + (1.0 - beta) * (p - a), average, params)  # exact for what never moves
