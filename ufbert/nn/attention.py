"""Multi-head self-attention."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from ufbert.config import ModelConfig
from ufbert.nn.layers import compute_dtype, dense
from ufbert.ops.attention import attention


class Attention(nn.Module):
    """Project to queries, keys and values, attend, project back. Dropout is on the attention weights."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], visible: Bool[Array, "b t t"] | None, key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        cfg = self.config
        x = x.astype(compute_dtype(cfg))
        heads = (*x.shape[:2], cfg.n_heads, cfg.d_model // cfg.n_heads)
        q, k, v = (dense(cfg, cfg.d_model, name)(x).reshape(heads) for name in ("query", "key", "value"))
        mixed = attention(q, k, v, visible, dropout=cfg.dropout, key=key)
        return dense(cfg, cfg.d_model, "out")(mixed.reshape(x.shape)).astype(jnp.float32)
