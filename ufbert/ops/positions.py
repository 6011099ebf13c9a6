"""Position signals."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sinusoid(position_ids: Int[Array, "b t"], d: int) -> Float[Array, "b t d"]:
    """sin(p / 10000^(2i/d)) on even channels 2i, the cosine on odd ones (Vaswani et al. 2017, section 3.5)."""
    rate = jnp.exp(jnp.arange(0, d, 2) * (-jnp.log(10000.0) / d))
    angle = jnp.einsum("bt,i->bti", position_ids.astype(jnp.float32), rate)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*position_ids.shape, -1)[..., :d]
