"""Nonlinearities by name."""

from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array

Activation = Callable[[Array], Array]

gelu: Activation = partial(jax.nn.gelu, approximate=False)
"""The exact (erf) GELU of BERT and the tree layers; the tanh form differs by up to 5e-4."""


def symmetric_gelu(z: Array) -> Array:
    """gelu(z) + gelu(-z) = z erf(z / sqrt 2): even, close to |z|, smooth at zero."""
    return z * jax.lax.erf(z * 2.0**-0.5)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "symmetric_gelu": symmetric_gelu,
}


def activation_name(activation: Activation) -> str:
    """The name in ACTIVATIONS. Raises ValueError for a function that is not there, as the native kernels know only those."""
    for name, known in ACTIVATIONS.items():
        if known is activation:
            return name
    raise ValueError(f"the native kernels know the activations {', '.join(ACTIVATIONS)}, not {activation}")
