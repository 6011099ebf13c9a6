"""Losses as sums and counts, so that shards and micro-batches add up exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Sums(NamedTuple):
    """Totals over weighted positions. Divide by `count` at the end."""

    loss: Float[Array, ""]
    count: Float[Array, ""]
    correct: Float[Array, ""]
    extra: Float[Array, ""]
    """Weighted auxiliary losses of the layers (balance, hardening, ...), times `count`."""


def cross_entropy(logits: Float[Array, "*rows v"], labels: Int[Array, "*rows"], weights: Float[Array, "*rows"]) -> Sums:
    """Sum -log softmax(logits)[label] in nats, in float32, and the labels that have the highest logit.

    Where all logits are equal, as a decoder of zeros leaves them, no label counts as correct.
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    total = jax.nn.logsumexp(logits, axis=-1)
    loss, prefers = total - picked, total - highest < jnp.log(logits.shape[-1]) - 1e-4
    correct = jnp.sum((picked >= highest) * prefers * weights)
    return Sums(jnp.sum(loss * weights), jnp.sum(weights), correct, jnp.zeros(()))


def distillation(
    logits: Float[Array, "*rows v"],
    teacher: Float[Array, "*rows v"],
    weights: Float[Array, "*rows"],
    temperature: float,
) -> Float[Array, ""]:
    """Sum T^2 KL(softmax(teacher / T) || softmax(logits / T)) in nats (Hinton et al. 2015, section 2).

    The factor T^2 keeps its gradient as large as that of the labels' loss.
    """
    target = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    predicted = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.sum(jnp.sum(jnp.exp(target) * (target - predicted), axis=-1) * weights)


def squared_error(
    predicted: Float[Array, "*rows"], target: Float[Array, "*rows"], weights: Float[Array, "*rows"]
) -> Sums:
    """Sum the squared differences; nothing counts as correct."""
    loss = jnp.square(predicted.astype(jnp.float32) - target)
    return Sums(jnp.sum(loss * weights), jnp.sum(weights), jnp.zeros(()), jnp.zeros(()))
