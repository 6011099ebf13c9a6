"""Fourier token mixing (FNet: Lee-Thorp et al. 2021, arXiv 2105.03824, section 3.2)."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def fourier_mix(x: Float[Array, "b t d"], *, ortho: bool) -> Float[Array, "b t d"]:
    """Re(F_tokens(F_channels(x))), in float32: every output sees every input, and nothing is learned.

    There is no mask, so padding is mixed in: a row has one answer only at one length. The transform is unnormalised, as
    in FNet, whose post-norm takes the scale away; `ortho` divides by sqrt(t d), which a pre-norm residual stream needs.
    """
    return jnp.fft.fft2(x.astype(jnp.float32), axes=(-2, -1), norm="ortho" if ortho else None).real
