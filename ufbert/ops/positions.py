"""Position signals."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def sinusoid(length: int, d: int) -> Float[Array, "t d"]:
    """Row p holds sin(p / 10000^(2i/d)) on channel 2i and the cosine on channel 2i + 1 (Vaswani et al. 2017, 3.5)."""
    rate = jnp.exp(jnp.arange(0, d, 2) * (-jnp.log(10000.0) / d))
    angle = jnp.outer(jnp.arange(length), rate)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, -1)[:, :d]
