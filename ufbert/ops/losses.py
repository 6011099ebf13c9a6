"""Losses as (sum, count), so that shards and micro-batches add up exactly."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "*rows v"], labels: Int[Array, "*rows"], weights: Float[Array, "*rows"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of -log softmax(logits)[label] in nats, in float32, and the sum of the weights."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weights), jnp.sum(weights)


def squared_error(
    predicted: Float[Array, "*rows"], target: Float[Array, "*rows"], weights: Float[Array, "*rows"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of squared differences, and the sum of the weights."""
    return jnp.sum(jnp.square(predicted.astype(jnp.float32) - target) * weights), jnp.sum(weights)
