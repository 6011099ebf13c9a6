"""Mix information between tokens: attention, the Fourier transform, and positions."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ufbert.ops.dense import dropout as drop
from ufbert.ops.dense import settled


def attention_mask(segment_ids: Int[Array, "b t"]) -> Bool[Array, "b t t"]:
    """Return the mask of packed and padded rows: [b, i, j] is true where query i may attend to key j.

    `segment_ids` numbers the documents of a row from 1; 0 is padding. A token attends to its own document.
    """
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    # Padding, whose output nobody reads, attends to every real token, as it does in BERT.
    return (key != 0) & ((query == key) | (query == 0))


def causal_mask(b: int, t: int) -> Bool[Array, "b t t"]:
    """Return the mask of rows whose tokens attend to none after them: [b, i, j] is true where j <= i."""
    return jnp.broadcast_to(jnp.tri(t, dtype=bool)[None], (b, t, t))


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    mask: Bool[Array, "b t t"] | None = None,
    *,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Float[Array, "b t h k"]:
    """Compute softmax(q k^T / sqrt(k)) v, with the softmax in float32. With a `key`, drop a share of the attention weights."""
    mask = None if mask is None else mask[:, None]
    if key is None or dropout == 0.0:
        if implementation is None and jax.default_backend() == "cpu":
            return _attend(q, k, v, mask)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    # jax.nn.dot_product_attention has no dropout, so the weights are formed here.
    logits = jnp.einsum("bqhk,bshk->bhqs", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(float(q.shape[-1]))
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits, axis=-1)
    weights = drop(weights, dropout, key).astype(v.dtype)
    return jnp.einsum("bhqs,bshk->bqhk", weights, v)


@jax.custom_vjp
def _attend(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    mask: Bool[Array, "b 1 t t"] | None,
) -> Float[Array, "b t h k"]:
    """Compute attention for a CPU: heads first, and what several products read is computed once."""
    return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, tuple[Any, ...]]:
    q, k, v = (settled(x.transpose(0, 2, 1, 3)) for x in (q, k, v))
    logits = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    weights = settled(jax.nn.softmax(logits, axis=-1))
    y = jnp.einsum("bhqs,bhsk->bhqk", weights.astype(v.dtype), v)
    return y.transpose(0, 2, 1, 3), (q, k, v, mask, weights, y)


def _attend_backward(saved: tuple[Any, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, weights, y = saved
    dy = settled(dy.transpose(0, 2, 1, 3))
    dv = jnp.einsum("bhqs,bhqk->bhsk", weights.astype(dy.dtype), dy)
    d_weights = jnp.einsum("bhqk,bhsk->bhqs", dy, v, preferred_element_type=jnp.float32)
    # The mean of d_weights under the weights, which a softmax subtracts, is that of dy over y (Dao et al. 2022, appendix B.2).
    mean = jnp.einsum("bhqk,bhqk->bhq", dy, y, preferred_element_type=jnp.float32)[..., None]
    d_logits = weights * (d_weights - mean) * q.shape[-1] ** -0.5
    if mask is not None:  # the weights of a row without a real token are not zero
        d_logits = jnp.where(mask, d_logits, 0.0)
    d_logits = settled(d_logits.astype(q.dtype))
    dq = jnp.einsum("bhqs,bhsk->bhqk", d_logits, k)
    dk = jnp.einsum("bhqs,bhqk->bhsk", d_logits, q)
    dq, dk, dv = (d.transpose(0, 2, 1, 3) for d in (dq, dk, dv))
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def fourier_mix(x: Float[Array, "b t d"], *, ortho: bool) -> Float[Array, "b t d"]:
    """Compute Re(F_tokens(F_channels(x))) in float32 (FNet: Lee-Thorp et al. 2021, arXiv 2105.03824, section 3.2).

    There is no mask, so padding is mixed in: a row has one answer only at one length. FNet does not normalise the
    transform, because its post-norm takes the scale away. `ortho` divides by sqrt(t d), which a pre-norm residual stream
    needs.
    """
    return jnp.fft.fft2(x.astype(jnp.float32), axes=(-2, -1), norm="ortho" if ortho else None).real


def sinusoid(length: int, d: int) -> Float[Array, "t d"]:
    """Return vectors of positions: in row p, sin(p / 10000^(2i/d)) on channel 2i and the cosine on channel 2i + 1 (Vaswani et
    al. 2017, section 3.5)."""
    rate = jnp.exp(jnp.arange(0, d, 2) * (-jnp.log(10000.0) / d))
    angle = jnp.outer(jnp.arange(length), rate)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, -1)[:, :d]


def rotate(x: Float[Array, "b t h k"], position_ids: Int[Array, "#b t"], base: float) -> Float[Array, "b t h k"]:
    """Rotate the plane of channels (i, i + k/2) of a token at position p by the angle p * base^(-2i/k), in float32.

    The product of a rotated query and a rotated key then depends only on their distance (RoFormer: Su et al. 2021,
    arXiv 2104.09864, section 3.2).
    """
    half = x.shape[-1] // 2
    rate = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_ids[:, :, None, None].astype(jnp.float32) * rate[None, None, None]
    # Unsettled, they would be computed for every row and head, at each use.
    return _turned(x, settled(jnp.cos(angle)), settled(jnp.sin(angle)))


@jax.custom_vjp
def _turned(x: Float[Array, "b t h k"], cos: Float[Array, "#b t 1 r"], sin: Float[Array, "#b t 1 r"]) -> Array:
    # RoFormer pairs neighbouring channels; pairing i with i + k/2 is the layout of Hugging Face's checkpoints.
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def _turned_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return _turned(x, cos, sin), (cos, sin)


def _turned_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    cos, sin = saved
    # The gradient is turned back. XLA's own gradient of a concatenation is a sum of padded halves, slow on a CPU.
    return _turned(settled(dy), cos, -sin), None, None


_turned.defvjp(_turned_forward, _turned_backward)
