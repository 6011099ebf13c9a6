"""Linear layers and LayerNorm, and the context that every mixer and feedforward is called with."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ufbert.config import ModelConfig
from ufbert.ops.dense import product


class Aux(NamedTuple):
    """The report of a layer besides its output. All but `losses` is None unless statistics are asked for."""

    losses: dict[str, Float[Array, ""]]
    """Weighted losses by name, each a mean per token."""
    visits: Float[Array, "m n"] | None = None
    """Tokens that passed each node of each tree."""
    counts: dict[str, Float[Array, " p"]] | None = None
    """Tokens that each of the layer's other parts took, by the name of the parts: `leaves`, `experts`."""


class Context(NamedTuple):
    """The arguments of a mixer or feedforward besides its input."""

    attention_mask: Bool[Array, "b t t"] | None
    """True where a query (second axis) may attend to a key (third axis). None for no mask."""
    segment_ids: Int[Array, "b t"] | None
    """The document of each token, from 1; 0 on padding. None if each row is one document."""
    real: Bool[Array, "b t"] | None
    """False on padding. None if there is no padding."""
    position_ids: Int[Array, "#b t"]
    training: bool
    """True if soft decisions, noise and capacities apply. Dropout also needs a key."""
    progress: Float[Array, ""] | float
    """Share of the budget spent, for what is annealed."""
    statistics: bool
    """True to count which nodes, leaves and experts are used."""
    values: Float[Array, "b t d"] | None = None
    """Added to the values of attention in this layer. None for nothing."""
    ids: Int[Array, "b t"] | None = None
    """The tokens, for layers that choose by them."""


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Return the type of the matrix products: `config.dtype`, with auto resolved for the default device."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


class Linear(nn.Module):
    """x W (+ b)."""

    width: int
    use_bias: bool
    dtype: Any
    kernel_init: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows f"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.width))
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.width,))
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + bias.shape)
        return y


class LayerNorm(nn.Module):
    """LayerNorm over channels, in float32."""

    epsilon: float
    use_bias: bool
    start: float = 1.0
    """Start of the scale."""

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        channels = (1,) * (x.ndim - 1) + x.shape[-1:]
        scale = self.param("scale", nn.initializers.constant(self.start), x.shape[-1:]).reshape(channels)
        x = x.astype(jnp.float32)
        off = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(off).mean(axis=-1, keepdims=True)
        y = off * (jax.lax.rsqrt(variance + self.epsilon) * scale)
        return y + self.param("bias", nn.initializers.zeros, x.shape[-1:]).reshape(channels) if self.use_bias else y


def dense(
    config: ModelConfig, width: int, name: str, use_bias: bool | None = None, closes_block: bool = False
) -> Linear:
    """Make a linear layer. It has a bias if `use_bias`, by default `config.use_bias`.

    A layer that `closes_block` writes to the residual stream; its kernel starts at zero if `config.zero_init_out`.
    """
    zero = closes_block and config.zero_init_out
    return Linear(
        width,
        use_bias=config.use_bias if use_bias is None else use_bias,
        dtype=compute_dtype(config),
        kernel_init=nn.initializers.zeros if zero else nn.initializers.normal(config.init_std),
        name=name,
    )


def layer_norm(config: ModelConfig, name: str, start: float = 1.0) -> LayerNorm:
    """Make a LayerNorm with a scale, which starts at `start`, and a bias if `config.norm_bias`."""
    return LayerNorm(epsilon=config.norm_eps, use_bias=config.norm_bias, start=start, name=name)
