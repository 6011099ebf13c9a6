"""What sits on top of the encoder."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ufbert.config import ModelConfig
from ufbert.nn.layers import compute_dtype, dense, layer_norm
from ufbert.ops.dense import ACTIVATIONS, dropout


class MaskedLMHead(nn.Module):
    """Hidden states to token logits through the (tied) token embedding."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "*rows d"], token_embedding: Float[Array, "v d"]
    ) -> Float[Array, "*rows v"]:
        cfg = self.config
        if cfg.head_transform:
            hidden = layer_norm(cfg, "norm")(ACTIVATIONS[cfg.activation](dense(cfg, cfg.d_model, "transform")(hidden)))
        dtype = compute_dtype(cfg)
        logits = jnp.einsum(
            "...d,vd->...v", hidden.astype(dtype), token_embedding.astype(dtype), preferred_element_type=jnp.float32
        )
        if cfg.head_bias:
            bias = self.param("bias", nn.initializers.zeros, (cfg.vocab_size,))
            logits = logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)
        return logits


def pooled_input(
    config: ModelConfig, hidden: Float[Array, "b t d"], segment_ids: Int[Array, "b t"] | None = None
) -> Float[Array, "b d"]:
    """The first token's hidden state, or the mean over the tokens whose segment is not 0 (padding; without `segment_ids`
    all tokens are real)."""
    if config.pooling == "first":
        return hidden[:, 0]
    real = jnp.ones(hidden.shape[:2]) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)
    return jnp.einsum("bt,btd->bd", real, hidden) / jnp.maximum(real.sum(axis=1, keepdims=True), 1.0)


class Pooler(nn.Module):
    """What a classifier sees: tanh(W h + b) as in BERT, or LayerNorm(activation(W h)) as in ModernBERT, h the pooled
    input."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "b t d"], segment_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b p"]:
        cfg, h = self.config, pooled_input(self.config, hidden, segment_ids)
        if cfg.pooler == "transform":
            return layer_norm(cfg, "norm")(ACTIVATIONS[cfg.activation](dense(cfg, cfg.pooler_width, "dense")(h)))
        return jnp.tanh(dense(cfg, cfg.pooler_width, "dense", use_bias=True)(h).astype(jnp.float32))


class ClassifierHead(nn.Module):
    """Pooler, dropout, and a linear layer to `n_outputs` scores (one for regression)."""

    config: ModelConfig
    n_outputs: int

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "b t d"],
        segment_ids: Int[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b c"]:
        pooled = dropout(Pooler(self.config, name="pooler")(hidden, segment_ids), self.config.dropout, key)
        return dense(self.config, self.n_outputs, "out", use_bias=True)(pooled).astype(jnp.float32)
