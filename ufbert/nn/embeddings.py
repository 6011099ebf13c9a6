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


class ValueEmbeddings(nn.Module):
    """Vectors of tokens for the values of attention: for each layer, bottom first, (b, t, d), or None where it uses no table.

    At the start a vector is about half as long as the value that attention projects from a normalised input: both have
    weights of `init_std`, and such an input is sqrt(d) long.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"]) -> list[Float[Array, "b t d"] | None]:
        cfg = self.config
        shape = (cfg.value_embeddings, cfg.vocab_size, cfg.d_model)
        tables = self.param("tables", nn.initializers.normal(cfg.init_std), shape)
        uses = [i for i, table in enumerate(cfg.value_tables) if table is not None]
        scales = self.param("scales", nn.initializers.constant(cfg.d_model**0.5 / 2), (len(uses),))
        return token_values(cfg, tables, scales, ids)


def token_values(
    config: ModelConfig, tables: Float[Array, "n v d"], scales: Float[Array, " uses"], ids: Int[Array, "b t"]
) -> list[Float[Array, "b t d"] | None]:
    """Look up what each layer's table has for the tokens, times the layer's scale; None for a layer that uses no table.

    `scales` are of the layers that use a table, bottom first.
    """
    n, v, d = tables.shape
    # One gather from all tables, so that the gradient is one scatter.
    vectors = tables.reshape(n * v, d)[ids[None] + v * jnp.arange(n).reshape(n, 1, 1)]
    left = iter(scales)
    return [None if table is None else next(left) * vectors[table] for table in config.value_tables]
