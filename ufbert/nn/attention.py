"""The token mixers: attention and the Fourier transform. A new kind is a module here and an entry in `registry.py`."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ufbert.config import ModelConfig
from ufbert.nn.layers import Context, Linear, compute_dtype, dense
from ufbert.ops import native
from ufbert.ops.attention import attention
from ufbert.ops.fourier import fourier_mix
from ufbert.ops.rotary import rotate


class Attention(nn.Module):
    """Multi-head self-attention: project to queries, keys and values, attend, project back.

    Queries and keys are RMS-normalised first, then rotated, where the config says so. Dropout is on the attention weights.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Float[Array, "b t d"]:
        cfg = self.config
        x = x.astype(compute_dtype(cfg))
        heads = (*x.shape[:2], cfg.n_heads, cfg.d_model // cfg.n_heads)
        if context.packed:
            qkv = Linear(3 * cfg.d_model, cfg.use_bias, jnp.float32, None, name="qkv")(x).reshape(
                *x.shape[:2], 3, *heads[2:]
            )
            if cfg.qk_norm or cfg.positions == "rotary":
                q, k = self._placed(qkv[:, :, 0], qkv[:, :, 1], context)
                qkv = jnp.stack([q, k, qkv[:, :, 2]], axis=2)
            mixed = native.attention(qkv, context.segment_ids, padding_sees=cfg.only_len > 0)
        else:
            q, k, v = (dense(cfg, cfg.d_model, name)(x).reshape(heads) for name in ("query", "key", "value"))
            q, k = self._placed(q, k, context)
            implementation: Literal["xla", "cudnn"] | None = (
                None if cfg.attention_impl == "auto" else cfg.attention_impl
            )
            mixed = attention(q, k, v, context.visible, dropout=cfg.dropout, key=key, implementation=implementation)
        return dense(cfg, cfg.d_model, "out", closes_block=True)(mixed.reshape(x.shape)).astype(jnp.float32)

    def _placed(
        self, q: Float[Array, "b t h k"], k: Float[Array, "b t h k"], context: Context
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h k"]]:
        """Queries and keys normalised and rotated, where the config says so."""
        cfg = self.config
        if cfg.qk_norm:
            q, k = (
                nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=name)(part).astype(part.dtype)
                for name, part in (("query_norm", q), ("key_norm", k))
            )
        if cfg.positions == "rotary":
            q, k = (rotate(part, context.position_ids, cfg.rotary_base) for part in (q, k))
        return q, k


class Fourier(nn.Module):
    """FNet's mixing: the real part of the transform over tokens and channels. No parameters, no mask."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Float[Array, "b t d"]:
        scale = self.config.fourier_norm
        return fourier_mix(x, ortho=scale == "ortho" or (scale == "auto" and self.config.norm == "pre"))
