"""How an update is applied, in pretraining and in fine-tuning.

An optimizer moves all parameters but those with steps of their own, such as the thresholds of routed trees, which follow a
mean: the registry names them (`Layer.own_steps`), and their gradient is their step, whatever the learning rate.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ufbert.nn.registry import FEEDFORWARDS, MIXERS


def has_own_step(path: tuple[Any, ...]) -> bool:
    """Tell whether the gradient of the parameter at a path is its step: the optimizer must neither see nor move it."""
    names = [str(getattr(part, "key", part)) for part in path]
    layer = (MIXERS | FEEDFORWARDS).get(names[-2]) if len(names) > 1 else None
    return layer is not None and names[-1] in layer.own_steps


def own_steps_apart(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wrap an optimizer so that the gradients of parameters with steps of their own pass as they are, unseen by it."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        apart = jax.tree_util.tree_map_with_path
        rest = apart(lambda path, g: jnp.zeros_like(g) if has_own_step(path) else g, updates)
        direction, state = optimizer.update(rest, state, params)
        return apart(lambda path, u, g: g if has_own_step(path) else u, direction, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def apply_update(params: Any, direction: Any, lr: Array | float) -> Any:
    """Return params - lr * direction; of parameters with steps of their own, params - direction."""

    def updated(path: tuple[Any, ...], p: Array, u: Array) -> Array:
        return p - (1.0 if has_own_step(path) else lr) * u.astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(updated, params, direction)
