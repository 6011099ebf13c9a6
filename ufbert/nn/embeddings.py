"""The embeddings: vectors from token ids."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ufbert.config import ModelConfig
from ufbert.nn.layers import compute_dtype, dense, layer_norm
from ufbert.ops.dense import dropout
from ufbert.ops.mixing import sinusoid


class Embeddings(nn.Module):
    """Sum of token, position and token-type embeddings and what is `added`, normalised and projected if the config says so."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"],
        position_ids: Int[Array, "#b t"],
        type_ids: Int[Array, "b t"],
        key: Key[Array, ""] | None,
        added: Float[Array, "b t d"] | None = None,
    ) -> Float[Array, "b t d"]:
        cfg = self.config
        normal = nn.initializers.normal(cfg.init_std)
        tokens = self.param("tokens", normal, (cfg.vocab_size, cfg.d_model))
        x = tokens[ids]
        x = jnp.where((ids == cfg.pad_id)[..., None], jax.lax.stop_gradient(x), x)  # as torch's padding_idx
        if cfg.positions == "learned":
            x = x + self.param("positions", normal, (cfg.max_len, cfg.d_model))[position_ids]
        elif cfg.positions == "scaled_sinusoid":
            scale = self.param("position_scale", nn.initializers.constant(cfg.d_model**-0.5), (1,))
            x = x + scale[0] * sinusoid(cfg.max_len, cfg.d_model)[position_ids]
        if cfg.n_token_types:
            x = x + self.param("types", normal, (cfg.n_token_types, cfg.d_model))[type_ids]
        if added is not None:
            x = x + added
        if cfg.embedding_norm:
            x = layer_norm(cfg, "norm")(x)
        if cfg.embedding_projection:
            x = dense(cfg, cfg.d_model, "projection", use_bias=True)(x.astype(compute_dtype(cfg)))
        return dropout(x.astype(jnp.float32), cfg.dropout, key)
