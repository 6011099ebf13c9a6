"""The small parts that every block is made of, and what a layer may need to know beside its input."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ufbert.config import ModelConfig
from ufbert.ops import linear

Aux = dict[str, Array]
"""What layers report beside their output: weighted losses (names ending in `_loss`), and, where statistics are asked for,
counts (`layer_00.visits`, ...). Empty for dense models."""


class Context(NamedTuple):
    """What a layer may need beside its input."""

    visible: Bool[Array, "b t t"] | None
    """Which token may look at which; None: every one at every one."""
    real: Bool[Array, "b t"] | None
    """False on padding; None: there is none."""
    position_ids: Int[Array, "#b t"]
    training: bool
    """Whether soft decisions, noise and capacities apply. Dropout also needs a key."""
    progress: Float[Array, ""] | float
    """Share of the budget spent, for what is annealed."""
    statistics: bool
    """Whether to count which nodes, leaves and experts are used."""


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The type of the matrix products: `config.dtype`, with auto resolved for the default device."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def dense(
    config: ModelConfig, width: int, name: str, use_bias: bool | None = None, closes_block: bool = False
) -> nn.Dense:
    """A linear layer; biased as the config says unless `use_bias` does. One that `closes_block` writes to the residual
    stream, and starts at zero if the config says so."""
    zero = closes_block and config.zero_init_out
    return nn.Dense(
        width,
        use_bias=config.use_bias if use_bias is None else use_bias,
        dtype=compute_dtype(config),
        kernel_init=nn.initializers.zeros if zero else nn.initializers.normal(config.init_std),
        dot_general=linear.dot_general,
        name=name,
    )


def layer_norm(config: ModelConfig, name: str) -> nn.LayerNorm:
    """LayerNorm over channels, in float32, with scale and (unless the config says otherwise) bias."""
    return nn.LayerNorm(
        epsilon=config.norm_eps, dtype=jnp.float32, use_bias=config.norm_bias, use_fast_variance=False, name=name
    )
