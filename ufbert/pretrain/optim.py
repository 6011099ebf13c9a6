"""AdamW with clipping and the crammed learning-rate triangle."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ufbert.config import PretrainConfig
from ufbert.nn import Params


def triangle(fraction: float) -> float:
    """Learning rate over its peak at a share of the budget: min(0.25 + x, 4 (1 - x)), crammed BERT's schedule."""
    return max(0.0, min(0.25 + fraction, 4.0 * (1.0 - fraction)))


def rows_per_update(config: PretrainConfig, fraction: float) -> int:
    """Batch size at a share of the budget: linear from micro_rows to batch_rows at `ramp_until`, in whole micro-batches."""
    share = 1.0 if config.ramp_until <= 0 else min(1.0, fraction / config.ramp_until)
    target = config.micro_rows + share * (config.batch_rows - config.micro_rows)
    return max(1, round(target / config.micro_rows)) * config.micro_rows


def decays(path: tuple[Any, ...]) -> bool:
    """Whether weight decay applies to the parameter at this path: to all but norms and biases."""
    names = [str(getattr(part, "key", part)) for part in path]
    return not (names[-1].endswith("bias") or any(name.endswith("norm") for name in names))


def decay_mask(params: Params) -> Any:
    """True at every parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)


def is_position_scale(params: Params) -> Any:
    """True at the scalar that multiplies the position sinusoid."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "position_scale", params)


def make_optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """Clipped AdamW whose updates still lack the factor -lr, which the step multiplies in (it is an argument there)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.masked(optax.scale(config.position_scale_lr), is_position_scale),
    )


def apply_update(params: Params, direction: Any, lr: jax.Array) -> Any:
    """params - lr * direction."""
    return jax.tree.map(lambda p, u: p - lr * u.astype(jnp.float32), params, direction)
