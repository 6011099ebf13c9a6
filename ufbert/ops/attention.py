"""Softmax attention over whole rows, with the visibility rule of packed and padded rows."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ufbert.ops.dropout import dropout as drop


def visible_tokens(segment_ids: Int[Array, "b t"]) -> Bool[Array, "b t t"]:
    """[b, i, j] is true where token i may look at token j.

    `segment_ids` numbers the documents of a row from 1; 0 is padding. A token sees its own document and never padding.
    A padding position, whose output nobody reads, sees every real token, as in BERT with an attention mask.
    """
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    return (key != 0) & ((query == key) | (query == 0))


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    visible: Bool[Array, "b t t"] | None = None,
    *,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Float[Array, "b t h k"]:
    """softmax(q k^T / sqrt(k)) v, softmax in float32; `dropout` on the attention weights when `key` is given (then the
    weights are formed here, since `jax.nn.dot_product_attention` has no dropout)."""
    mask = None if visible is None else visible[:, None]
    if key is None or dropout == 0.0:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    logits = jnp.einsum("bqhk,bshk->bhqs", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(float(q.shape[-1]))
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits, axis=-1)
    weights = drop(weights, dropout, key).astype(v.dtype)
    return jnp.einsum("bhqs,bshk->bqhk", weights, v)
