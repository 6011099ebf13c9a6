"""The feedforward sublayers: dense, gated and tree. A new kind is a module here and an entry in FEEDFORWARDS."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ufbert.config import ModelConfig
from ufbert.nn.layers import compute_dtype, dense
from ufbert.ops.fff import fast_feedforward, gelu


class DenseFeedForward(nn.Module):
    """gelu(x W_in) W_out."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        hidden = gelu(dense(self.config, self.config.d_hidden, "in")(x))
        return dense(self.config, x.shape[-1], "out")(hidden).astype(jnp.float32)


class GluFeedForward(nn.Module):
    """(gelu(x W_gate) * x W_value) W_out: GEGLU (Shazeer 2020, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        cfg = self.config
        hidden = gelu(dense(cfg, cfg.d_hidden, "gate")(x)) * dense(cfg, cfg.d_hidden, "value")(x)
        return dense(cfg, x.shape[-1], "out")(hidden).astype(jnp.float32)


class TreeFeedForward(nn.Module):
    """K trees of depth D (`ufbert.ops.fff`). A node is one contiguous row of `w_in` and of `w_out`.

    Initialised as the reference trains it: N(0, init_std) for both matrices, zero bias (the class's own uniform
    initialisation is overwritten there).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        cfg = self.config
        shape = (cfg.n_trees, cfg.nodes_per_tree, cfg.d_model)
        normal = nn.initializers.normal(cfg.init_std)
        w_in = self.param("w_in", normal, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[:2])
        w_out = self.param("w_out", normal, shape)
        return fast_feedforward(x, w_in, bias, w_out, backend=tree_backend(cfg), dtype=compute_dtype(cfg))


def tree_backend(config: ModelConfig) -> Literal["masked", "gather"]:
    """`config.tree_backend`, with auto resolved for the default device: gather on a CPU, else masked."""
    if config.tree_backend == "auto":
        return "gather" if jax.default_backend() == "cpu" else "masked"
    return config.tree_backend


FEEDFORWARDS: dict[str, type[nn.Module]] = {
    "dense": DenseFeedForward,
    "glu": GluFeedForward,
    "tree": TreeFeedForward,
}
