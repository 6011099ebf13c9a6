"""The one encoder. BERT, crammed BERT and UltraFastBERT differ in its configuration only."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ufbert.config import FeedForwardKind, Mixer, ModelConfig
from ufbert.nn.attention import Attention
from ufbert.nn.embeddings import Embeddings
from ufbert.nn.feedforward import FEEDFORWARDS
from ufbert.nn.layers import layer_norm, maybe_dropout
from ufbert.ops.attention import visible_tokens

MIXERS: dict[str, type[nn.Module]] = {"attention": Attention}

Aux = dict[str, Array]
"""Weighted losses and counts that layers report besides their output; empty for dense and tree models."""


class Block(nn.Module):
    """A token mixer and a feedforward, each with a residual connection."""

    config: ModelConfig
    mixer: Mixer
    feedforward: FeedForwardKind

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], visible: Bool[Array, "b t t"] | None, key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        cfg = self.config
        weights_key, mixed_key, hidden_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        mix = MIXERS[self.mixer](cfg, name=self.mixer)
        feed = FEEDFORWARDS[self.feedforward](cfg, name=self.feedforward)
        mixer_norm, feedforward_norm = layer_norm(cfg, "mixer_norm"), layer_norm(cfg, "feedforward_norm")
        if cfg.norm == "pre":
            x = x + maybe_dropout(cfg, mix(mixer_norm(x), visible, weights_key), mixed_key)
            return x + maybe_dropout(cfg, feed(feedforward_norm(x)), hidden_key)
        x = mixer_norm(x + maybe_dropout(cfg, mix(x, visible, weights_key), mixed_key))
        return feedforward_norm(x + maybe_dropout(cfg, feed(x), hidden_key))


class Encoder(nn.Module):
    """ids -> hidden states.

    `segment_ids` (0 = padding, 1, 2, ... = documents of the row) says who may see whom; without it every token sees
    every token. `type_ids` are BERT's sentence A / B marks, used only if the config has token types.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
        position_ids: Int[Array, "#b t"] | None = None,
        key: Key[Array, ""] | None = None,
        deterministic: bool = True,
        *,
        type_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        cfg = self.config
        if position_ids is None:
            position_ids = jnp.arange(ids.shape[1])[None]
        if type_ids is None:
            type_ids = jnp.zeros_like(ids)
        visible = None if segment_ids is None else visible_tokens(segment_ids)
        drop = not deterministic and key is not None
        keys = jax.random.split(key, cfg.n_layers + 1) if drop else [None] * (cfg.n_layers + 1)
        x = Embeddings(cfg, name="embeddings")(ids, position_ids, type_ids, keys[0])
        for i, (mixer, feedforward) in enumerate(cfg.layers):
            x = Block(cfg, mixer, feedforward, name=f"layer_{i:02d}")(x, visible, keys[i + 1])
        if cfg.final_norm:
            x = layer_norm(cfg, "final_norm")(x)
        return x, {}
