"""Rotary positions (RoFormer: Su et al. 2021, arXiv 2104.09864, section 3.2)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x: Float[Array, "b t h k"], position_ids: Int[Array, "#b t"], base: float) -> Float[Array, "b t h k"]:
    """Turn the plane of channels (i, i + k/2) of a token at position p by the angle p * base^(-2i/k).

    The product of a rotated query and a rotated key then depends on their distance only. Pairing channel i with
    i + k/2 (not with its neighbour) is the layout of Hugging Face's checkpoints. float32 inside.
    """
    half = x.shape[-1] // 2
    rate = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_ids[:, :, None, None].astype(jnp.float32) * rate[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    one, other = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1).astype(x.dtype)
