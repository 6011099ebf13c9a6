"""int8 rounding that is chosen by its effect: weights by the error of a layer's output, inputs by that of what they become.

A clip is a share of the largest number of a column, row or input: numbers beyond it are cut, and the others get finer steps.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CLIPS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
"""Clips of weights that are tried."""
INPUT_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)
"""Clips of a linear layer's input that are tried; a few channels may be far larger than all others."""


@jax.jit
def rounded_columns(
    weights: Float[Array, "*g d f"], x: Float[Array, "n d"] | None = None
) -> tuple[Int[Array, "*g d f"], Float[Array, "*g f"]]:
    """Round each column to whole numbers from -127 to 127 times a factor, and return both.

    Of all clips each column takes that with the least squared error of its outputs for the rows `x`, or without rows of its
    weights.
    """
    most = jnp.maximum(jnp.abs(weights).max(axis=-2, keepdims=True), jnp.finfo(jnp.float32).tiny * 127)

    def off(clip: Float[Array, ""]) -> Float[Array, "*g f"]:
        factor = most * (clip / 127)
        lost = weights - jnp.clip(jnp.round(weights / factor), -127, 127) * factor
        return jnp.square(lost if x is None else x @ lost).sum(axis=-2)

    clips = jnp.asarray(CLIPS)
    best = jnp.argmin(jax.lax.map(off, clips), axis=0)
    factor = most[..., 0, :] * (clips[best] / 127)
    return jnp.clip(jnp.round(weights / factor[..., None, :]), -127, 127).astype(jnp.int8), factor


@jax.jit
def input_rounding(
    x: Float[Array, "n d"], low: Float[Array, ""], high: Float[Array, ""], weights: Float[Array, "d f"]
) -> Float[Array, "2"]:
    """Choose step and zero of a linear layer's input, to which `step * (whole - zero)` is near, whole = 0 .. 255.

    Of all clips of the range from `low` to `high`, which is made to hold 0, that with the least squared error of the outputs
    for the rows `x`.
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 1e-30)

    def span(clip: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        step = clip * (high - low) / 255
        return step, jnp.round(-clip * low / step)

    def off(clip: Float[Array, ""]) -> Float[Array, ""]:
        step, zero = span(clip)
        near = step * (jnp.clip(jnp.round(x / step) + zero, 0, 255) - zero)
        return jnp.square((x - near) @ weights).sum()

    clips = jnp.asarray(INPUT_CLIPS)
    return jnp.stack(span(clips[jnp.argmin(jax.lax.map(off, clips))]))
