"""The heads on top of the encoder: masked-LM logits, pooling, pooler and classifier."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ufbert.config import ModelConfig
from ufbert.nn.layers import compute_dtype, dense, gpu_kernels, layer_norm
from ufbert.ops.dense import ACTIVATIONS, dropout, token_logits
from ufbert.ops.losses import Sums, cross_entropy


class MaskedLMHead(nn.Module):
    """Token logits from hidden states, through the token embedding, or through a decoder of its own if that is not tied."""

    config: ModelConfig

    def __call__(
        self, hidden: Float[Array, "*rows d"], token_embedding: Float[Array, "v d"]
    ) -> Float[Array, "*rows v"]:
        hidden, decoder, bias = self.transformed(hidden, token_embedding)
        assert decoder is not None
        logits = token_logits(hidden, decoder)
        return logits if bias is None else logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)

    def sums(
        self,
        hidden: Float[Array, "*rows d"],
        token_embedding: Float[Array, "v d"],
        labels: Int[Array, "*rows"],
        weights: Float[Array, "*rows"],
    ) -> Sums:
        """Return the loss of the labels and those that have the highest logit, as `cross_entropy` does."""
        gpu = None if self.config.head_bias else gpu_kernels()
        if gpu is None or not gpu.loss.fits(len(token_embedding)):
            return cross_entropy(self(hidden, token_embedding), labels, weights)
        hidden, decoder, _ = self.transformed(hidden, token_embedding)
        assert decoder is not None
        flat = hidden.reshape(-1, hidden.shape[-1])
        total, correct = gpu.loss.token_loss(flat, decoder, labels.reshape(-1), weights.reshape(-1))
        return Sums(total, jnp.sum(weights), correct, jnp.zeros(()))

    @nn.compact
    def transformed(
        self, hidden: Float[Array, "*rows d"], token_embedding: Float[Array, "v d"] | None
    ) -> tuple[Float[Array, "*rows d"], Float[Array, "v d"] | None, Float[Array, " v"] | None]:
        """Return the rows that are multiplied by the decoder, and that, in the type of the product; and the logits' bias.

        Without an embedding there is no decoder either.
        """
        cfg = self.config
        if cfg.head_transform:
            hidden = layer_norm(cfg, "norm")(ACTIVATIONS[cfg.activation](dense(cfg, cfg.d_model, "transform")(hidden)))
        dtype = compute_dtype(cfg)
        decoder = token_embedding
        if token_embedding is not None and not cfg.tie_head:
            decoder = self.param("decoder", nn.initializers.zeros, token_embedding.shape)
        bias = self.param("bias", nn.initializers.zeros, (cfg.vocab_size,)) if cfg.head_bias else None
        return hidden.astype(dtype), None if decoder is None else decoder.astype(dtype), bias


def pool(
    config: ModelConfig,
    hidden: Float[Array, "b t d"],
    mask: Bool[Array, "b t"] | None = None,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "b d"]:
    """Take the hidden state of the token at `first`, or the mean over the tokens where `mask` is true (None: over all).

    `config.pooling` says which.
    """
    if config.pooling == "first":
        return hidden[:, first]
    weights = jnp.ones(hidden.shape[:2]) if mask is None else mask.astype(jnp.float32)
    return jnp.einsum("bt,btd->bd", weights, hidden) / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)


class Pooler(nn.Module):
    """The layer between pooling and a classifier: tanh(W x + b) as in BERT, or LayerNorm(activation(W x)) as in ModernBERT."""

    config: ModelConfig

    @nn.compact
    def __call__(self, pooled: Float[Array, "b d"]) -> Float[Array, "b p"]:
        cfg = self.config
        if cfg.pooler == "transform":
            return layer_norm(cfg, "norm")(ACTIVATIONS[cfg.activation](dense(cfg, cfg.pooler_width, "dense")(pooled)))
        return jnp.tanh(dense(cfg, cfg.pooler_width, "dense", use_bias=True)(pooled).astype(jnp.float32))


class ClassifierHead(nn.Module):
    """Pooler, dropout, and a linear layer to `n_outputs` scores (one for regression)."""

    config: ModelConfig
    n_outputs: int

    @nn.compact
    def __call__(self, pooled: Float[Array, "b d"], key: Key[Array, ""] | None = None) -> Float[Array, "b c"]:
        x = dropout(Pooler(self.config, name="pooler")(pooled), self.config.dropout, key)
        return dense(self.config, self.n_outputs, "out", use_bias=True)(x).astype(jnp.float32)
