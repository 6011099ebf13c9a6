"""The token mixers: attention and the Fourier transform. A new kind is a module here and an entry in `registry.py`."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ufbert.config import ModelConfig
from ufbert.nn.layers import Context, compute_dtype, dense, gpu_kernels, side_by_side
from ufbert.ops.mixing import attention, fourier_mix, rotate


class Attention(nn.Module):
    """Multi-head self-attention: project to queries, keys and values, attend, project back.

    Value embeddings, where the context has them, are added to the values. If the config says so, queries and keys are
    RMS-normalised, and then rotated. Dropout is on the attention weights.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Float[Array, "b t d"]:
        cfg = self.config
        x = x.astype(compute_dtype(cfg))
        heads = (*x.shape[:2], cfg.n_heads, cfg.width_of_head)
        joined = (*x.shape[:2], cfg.n_heads * cfg.width_of_head)
        parts = [dense(cfg, joined[-1], name) for name in ("query", "key", "value")]
        out = dense(cfg, cfg.d_model, "out", closes_block=True)
        drops = key is not None and cfg.dropout > 0
        gpu = gpu_kernels() if cfg.attention_impl == "auto" and not drops else None
        if gpu is not None and gpu.attention.fits(heads[1], heads[3], x.dtype):
            packed = side_by_side(x, parts).reshape(*heads[:2], 3, *heads[2:])
            if context.values is not None or cfg.qk_norm or cfg.positions == "rotary":
                packed = jnp.stack(self._placed(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], context), axis=2)
            return out(gpu.attention.attention(packed, context.segment_ids, context.causal).reshape(joined))
        q, k, v = self._placed(*(part(x).reshape(heads) for part in parts), context)
        implementation = None if cfg.attention_impl == "auto" else cfg.attention_impl
        mask = context.attention_mask
        mixed = attention(q, k, v, mask, dropout=cfg.dropout, key=key, implementation=implementation)
        return out(mixed.reshape(joined)).astype(jnp.float32)

    def _placed(
        self, q: Float[Array, "b t h k"], k: Float[Array, "b t h k"], v: Float[Array, "b t h k"], context: Context
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h k"], Float[Array, "b t h k"]]:
        """Add value embeddings, normalise and rotate, as far as the config says so."""
        cfg, heads = self.config, q.shape
        if context.values is not None:
            v = v + context.values.reshape(heads).astype(v.dtype)
        if cfg.qk_norm:
            q, k = (
                nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=name)(part).astype(part.dtype)
                for name, part in (("query_norm", q), ("key_norm", k))
            )
        if cfg.positions == "rotary":
            q, k = (rotate(part, context.position_ids, cfg.rotary_base) for part in (q, k))
        return q, k, v


class Fourier(nn.Module):
    """FNet's mixing (Lee-Thorp et al. 2021, arXiv 2105.03824): the real part of the transform over tokens and channels.

    It has no parameters and no mask.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Float[Array, "b t d"]:
        scale = self.config.fourier_norm
        return fourier_mix(x, ortho=scale == "ortho" or (scale == "auto" and self.config.norm == "pre"))
