"""Dropout whose mask costs next to nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """x with a share `rate` of its entries set to 0 and the rest divided by 1 - rate; x itself without a key, or at rate 0."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(kept(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0).astype(x.dtype)


def kept(key: Key[Array, ""], share: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Which entries stay: each with probability `share`, independently of the others.

    An entry's random number is a hash of its position and the key: MurmurHash3's finalizer (Appleby 2011), twice. jax's own
    generator is a loop that XLA cannot fuse with anything; with several runs side by side on a CPU it took half of an update.
    Dropout needs no more randomness than this, and nothing else uses it.
    """
    seeds = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    position = jax.lax.iota(jnp.uint32, int(np.prod(shape))).reshape(shape)
    bits = _mixed(_mixed(position ^ seeds[0]) + seeds[-1])
    return bits < np.uint32(min(share * 2.0**32, 2.0**32 - 1))


def _mixed(bits: Array) -> Array:
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
