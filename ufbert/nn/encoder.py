"""The encoder. BERT, crammed BERT, UltraFastBERT, FNet and Switch differ in its configuration only."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ufbert.config import ModelConfig
from ufbert.errors import UserError
from ufbert.nn.embeddings import Embeddings, ValueEmbeddings
from ufbert.nn.layers import Aux, Context, compute_dtype, layer_norm
from ufbert.nn.ngrams import Ngrams, Rows
from ufbert.nn.registry import FEEDFORWARDS, MIXERS
from ufbert.ops.dense import dropout
from ufbert.ops.mixing import attention_mask, causal_mask


class Block(nn.Module):
    """A token mixer and a feedforward, each with a residual connection.

    The residual stream comes in as a sum x + y, whose y may be None, and goes out as one, so that a norm can take the sum on
    its way. Also returns what the feedforward reports.
    """

    config: ModelConfig
    mixer: str
    feedforward: str
    has_mixer_norm: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], y: Float[Array, "b t d"] | None, context: Context, key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"] | None, Aux]:
        cfg = self.config
        weights_key, mixed_key, hidden_key, noise_key = (None,) * 4 if key is None else jax.random.split(key, 4)
        mix = MIXERS[self.mixer].module(cfg, name=self.mixer)
        feed = FEEDFORWARDS[self.feedforward].module(cfg, name=self.feedforward)
        feedforward_norm = layer_norm(cfg, "feedforward_norm")
        if cfg.norm == "pre":
            if self.has_mixer_norm:
                x, normed = layer_norm(cfg, "mixer_norm").with_sum(x, y, read_dtype(cfg, self.mixer))
            else:
                x = normed = taken(x, y)
            mixed = dropout(mix(normed, context, weights_key), cfg.dropout, mixed_key)
            if self.feedforward == "none":
                return x, mixed, Aux({})
            x, normed = feedforward_norm.with_sum(x, mixed, read_dtype(cfg, self.feedforward))
            y, aux = feed(normed, context, noise_key)
            return x, dropout(y, cfg.dropout, hidden_key), aux
        x = taken(x, y)
        mixed = dropout(mix(x, context, weights_key), cfg.dropout, mixed_key)
        x = layer_norm(cfg, "mixer_norm")(x, mixed)
        if self.feedforward == "none":
            return x, None, Aux({})
        y, aux = feed(x, context, noise_key)
        return feedforward_norm(x, dropout(y, cfg.dropout, hidden_key)), None, aux


def taken(x: Float[Array, "b t d"], y: Float[Array, "b t d"] | None) -> Float[Array, "b t d"]:
    """Return x + y, or x if y is None."""
    return x if y is None else x + y


def read_dtype(config: ModelConfig, kind: str) -> jnp.dtype:
    """Return the type in which a mixer or feedforward of this kind reads its input; that of products, if it can."""
    return compute_dtype(config) if kind in ("attention", "dense", "glu") else jnp.dtype(jnp.float32)


class Encoder(nn.Module):
    """ids -> hidden states, and what each layer reports, by its name.

    A token attends to the tokens with its number in `segment_ids`: 1, 2, ... for the documents of a row, 0 for padding.
    Without it every token attends to every token. `type_ids` are BERT's sentence A / B marks, used only if the config has
    token types. With `deterministic=False` layers compute as in training (soft decisions, capacities); dropout and noise
    need a `key`, too. `progress` is the share of the budget spent, for what is annealed. With `statistics`, layers count
    which of their parts are used; with `hidden_states`, each returns the residual stream above it. With `causal`, attention
    sees no later token, nor do hashed tables; other mixers may. `ngrams` are the rows of hashed tables that the tokens read,
    if they were looked up before.

    Raises UserError, when traced, if a model with Fourier mixers gets rows of another length than it reads.
    """

    config: ModelConfig
    has_blocks: bool = True
    """False leaves the blocks out, to draw what lies outside them."""

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
        progress: Float[Array, ""] | float = 1.0,
        statistics: bool = False,
        ngrams: Rows | None = None,
        causal: bool = False,
        hidden_states: bool = False,
    ) -> tuple[Float[Array, "b t d"], dict[str, Aux]]:
        cfg = self.config
        if cfg.only_len and ids.shape[1] != cfg.only_len:
            raise UserError(
                f"This model mixes padding in, so it reads rows of {cfg.only_len} tokens, not {ids.shape[1]}."
            )
        if position_ids is None:
            position_ids = jnp.arange(ids.shape[1])[None]
        if type_ids is None:
            type_ids = jnp.zeros_like(ids)
        real = None if segment_ids is None else segment_ids != 0
        mask = None if segment_ids is None else attention_mask(segment_ids)
        if causal:
            mask = causal_mask(*ids.shape) if mask is None else mask & causal_mask(*ids.shape)
        context = Context(
            mask, segment_ids, real, position_ids, not deterministic, progress, statistics, ids=ids, causal=causal
        )
        drop = not deterministic and key is not None
        keys = jax.random.split(key, cfg.n_layers + 1) if drop else [None] * (cfg.n_layers + 1)
        near = Ngrams(cfg, name="ngrams")(ids, segment_ids, ngrams, causal) if cfg.ngram_rows else None
        added = None if cfg.ngram_layer else near
        x = Embeddings(cfg, name="embeddings")(ids, position_ids, type_ids, keys[0], added)
        values = ValueEmbeddings(cfg, name="value_embeddings")(ids) if cfg.value_embeddings else [None] * cfg.n_layers
        n_skips = cfg.n_layers // 2 if cfg.unet_skips else 0
        skip_scales = self.param("skip_scales", nn.initializers.ones, (n_skips,)) if n_skips else jnp.zeros(0)
        y = None  # the residual stream is x + y
        aux: dict[str, Aux] = {}
        outputs: list[Float[Array, "b t d"]] = []
        for i, (mixer, feedforward) in enumerate(cfg.layers if self.has_blocks else ()):
            name = f"layer_{i:02d}"
            if near is not None and 0 < i == cfg.ngram_layer:
                x, y = taken(x, y) + near, None
            if (lower := cfg.skips[i]) is not None:
                x, y = taken(x, y) + skip_scales[lower] * outputs[lower], None
            block = Block(cfg.of_layer(i), mixer, feedforward, has_mixer_norm=i > 0 or cfg.first_norm, name=name)
            x, y, aux[name] = block(x, y, context._replace(values=values[i]), keys[i + 1])
            if cfg.unet_skips:
                x, y = taken(x, y), None
                outputs.append(x)
            if hidden_states:
                aux[name] = aux[name]._replace(hidden=taken(x, y))
        if cfg.final_norm:
            return layer_norm(cfg, "final_norm", cfg.final_norm_start)(x, y), aux
        return taken(x, y), aux
