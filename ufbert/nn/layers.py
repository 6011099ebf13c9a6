"""Linear layers and LayerNorm, and the context that every mixer and feedforward is called with."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ufbert.config import ModelConfig
from ufbert.ops import gpu
from ufbert.ops.dense import product


class Aux(NamedTuple):
    """The report of a layer besides its output. All but `losses` is None unless it is asked for."""

    losses: dict[str, Float[Array, ""]]
    """Weighted losses by name, each a mean per token."""
    visits: Float[Array, "m n"] | None = None
    """Tokens that passed each node of each tree."""
    counts: dict[str, Float[Array, " p"]] | None = None
    """Tokens that each of the layer's other parts took, by the name of the parts: `leaves`, `experts`."""
    hidden: Float[Array, "b t d"] | None = None
    """The residual stream above the layer, if hidden states are asked for."""


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
    causal: bool = False
    """True if no token attends to one after it; `attention_mask` says so, too."""


def gpu_kernels() -> ModuleType | None:
    """Return `ufbert.ops.gpu` on a GPU that takes its kernels, and None elsewhere. This is the one place that decides it.

    Without the kernels, layers leave everything to XLA, as they do for odd sizes. So they do on several GPUs: XLA, which knows
    nothing of what is in a kernel, would have every device compute all rows.
    """
    alone = jax.default_backend() == "gpu" and jax.device_count() == 1
    return gpu if alone and gpu.can_run() else None


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

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows f"]:
        return affine(x, *self.weights(x.shape[-1]))

    @nn.compact
    def weights(self, d: int) -> tuple[Float[Array, "d f"], Float[Array, " f"] | None]:
        """Return W and b in the type of the product."""
        kernel = self.param("kernel", self.kernel_init, (d, self.width)).astype(self.dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)


def affine(
    x: Float[Array, "*rows d"], kernel: Float[Array, "d f"], bias: Float[Array, " f"] | None
) -> Float[Array, "*rows f"]:
    """Compute x W (+ b) in the type of W."""
    y = product(x.astype(kernel.dtype), kernel)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def side_by_side(x: Float[Array, "*rows d"], layers: Sequence[Linear]) -> Float[Array, "*rows f"]:
    """Compute the outputs of several layers for x in one product; they lie side by side."""
    kernels, biases = zip(*(layer.weights(x.shape[-1]) for layer in layers), strict=True)
    return affine(x, jnp.concatenate(kernels, axis=1), None if biases[0] is None else jnp.concatenate(biases))


class LayerNorm(nn.Module):
    """LayerNorm over channels, in float32."""

    epsilon: float
    use_bias: bool
    start: float = 1.0
    """Start of the scale."""

    def __call__(self, x: Float[Array, "*rows d"], y: Float[Array, "*rows d"] | None = None) -> Float[Array, "*rows d"]:
        """Return the norm of x + y, or of x if y is None."""
        return self._of_sum(x, y, jnp.dtype(jnp.float32), keep=False)[1]

    def with_sum(
        self, x: Float[Array, "*rows d"], y: Float[Array, "*rows d"] | None, dtype: jnp.dtype
    ) -> tuple[Float[Array, "*rows d"], Float[Array, "*rows d"]]:
        """Return x + y, or x if y is None, and its norm, which kernels for GPUs round to `dtype`."""
        total, normed = self._of_sum(x, y, dtype, keep=True)
        assert total is not None
        return total, normed

    def _plain(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        channels = (1,) * (x.ndim - 1) + x.shape[-1:]
        scale, bias = self.weights(x.shape[-1])
        x = x.astype(jnp.float32)
        off = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(off).mean(axis=-1, keepdims=True)
        y = off * (jax.lax.rsqrt(variance + self.epsilon) * scale.reshape(channels))
        return y if bias is None else y + bias.reshape(channels)

    @nn.compact
    def weights(self, d: int) -> tuple[Float[Array, " d"], Float[Array, " d"] | None]:
        """Return scale and bias."""
        scale = self.param("scale", nn.initializers.constant(self.start), (d,))
        return scale, self.param("bias", nn.initializers.zeros, (d,)) if self.use_bias else None

    def _of_sum(
        self, x: Float[Array, "*rows d"], y: Float[Array, "*rows d"] | None, dtype: jnp.dtype, keep: bool
    ) -> tuple[Float[Array, "*rows d"] | None, Float[Array, "*rows d"]]:
        d, kernels = x.shape[-1], gpu_kernels()
        if kernels is None or not kernels.norm.fits(x.size // d, d):
            x = x if y is None else x + y
            return x, self._plain(x)
        scale, bias = self.weights(d)
        flat = (x.reshape(-1, d), None if y is None else y.reshape(-1, d))
        total, normed = kernels.norm.add_and_norm(*flat, scale, bias, self.epsilon, dtype, keep)
        return None if total is None else total.reshape(x.shape), normed.reshape(x.shape)


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
