"""Attention of short rows: one program computes a head of a row, and no (t, t) array leaves the chip."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from ufbert.ops.gpu import tiles

SIZES = (16, 32, 64, 128)
"""Lengths of rows, and head widths: all scores of a head are held in registers, whose number is limited."""
SHARED_BYTES = 96 * 1024
"""Shared memory that a program may take; GPUs of 2020 and later have 99 kB or more for one."""
FORWARD_WARPS, BACKWARD_WARPS = 8, 8
LOG2_E = 1.4426950408889634
MASKED = -1e30
"""Score of a key that a query may not see."""


def fits(t: int, k: int, dtype: jnp.dtype) -> bool:
    """Tell whether the kernels take rows of t tokens and heads of k channels in this type."""
    return t in SIZES and k in SIZES and t * (t + 4 * k) * dtype.itemsize <= SHARED_BYTES


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention(
    qkv: Float[Array, "b t 3 h k"], segment_ids: Int[Array, "b t"] | None, causal: bool = False
) -> Float[Array, "b t h k"]:
    """Compute softmax(q k^T / sqrt(k)) v of queries, keys and values that lie side by side, with the softmax in float32.

    A token attends to those of its segment; one of segment 0, padding, to all that are not padding. With `causal`, to none
    after it. Sizes must be such that `fits`.
    """
    return _call(_forward_kernel, qkv, segment_ids, None, causal, tiles.interpreted())


def _forward(qkv: Array, segment_ids: Array | None, causal: bool) -> tuple[Array, Any]:
    return attention(qkv, segment_ids, causal), (qkv, segment_ids)


def _backward(causal: bool, saved: Any, dy: Array) -> tuple[Array, None]:
    qkv, segment_ids = saved
    dy = dy.astype(qkv.dtype)
    return _call(_backward_kernel, qkv, segment_ids, dy, causal, tiles.interpreted()), None


attention.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=(0, 4, 5))
def _call(kernel: Any, qkv: Array, segment_ids: Array | None, dy: Array | None, causal: bool, interpret: bool) -> Array:
    b, t, _, h, k = qkv.shape
    part = [pl.BlockSpec((None, t, None, None, k), partial(lambda j, i, head: (i, 0, j, head, 0), j)) for j in range(3)]
    row = pl.BlockSpec((None, t), lambda i, head: (i, 0))
    mixed = pl.BlockSpec((None, t, None, k), lambda i, head: (i, 0, head, 0))
    packed = pl.BlockSpec((None, t, 3, None, k), lambda i, head: (i, 0, 0, head, 0))
    backward = dy is not None
    arrays = [qkv, qkv, qkv] + ([] if segment_ids is None else [segment_ids]) + ([dy] if backward else [])
    specs = part + ([] if segment_ids is None else [row]) + ([mixed] if backward else [])
    shape = qkv.shape if backward else (b, t, h, k)
    return pl.pallas_call(
        partial(kernel, segmented=segment_ids is not None, causal=causal),
        grid=(b, h),
        in_specs=specs,
        out_specs=packed if backward else mixed,
        out_shape=jax.ShapeDtypeStruct(shape, qkv.dtype),
        compiler_params=tiles.triton(BACKWARD_WARPS if backward else FORWARD_WARPS),
        interpret=interpret,
        name="attention_backward" if backward else "attention_forward",
    )(*arrays)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Compute the product of two matrices along an axis of each, in float32."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _exponentials(q: Array, k: Array, segment: Array | None, causal: bool) -> tuple[Array, Array, Array]:
    """Return exp(scores - their highest) of a head in float32, the inverse of its sums, and 0 for queries that see no key."""
    t, scale = len(q), q.shape[-1] ** -0.5 * LOG2_E  # a base of 2 is one instruction
    scores = _dot(q, k, 1, 1)
    seen = None
    if segment is not None:
        query, key = segment[:, None], segment[None, :]
        seen = (key != 0) & ((query == key) | (query == 0))
    if causal:
        before = jnp.arange(t)[:, None] >= jnp.arange(t)[None, :]
        seen = before if seen is None else seen & before
    if seen is not None:
        scores = jnp.where(seen, scores, MASKED)
    highest = scores.max(axis=1, keepdims=True)
    powers = jnp.exp2((scores - highest) * scale)
    return powers, 1.0 / powers.sum(axis=1, keepdims=True), jnp.where(highest > MASKED, 1.0, 0.0)


def _forward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, segmented: bool, causal: bool) -> None:
    segment = refs[0][...] if segmented else None
    powers, inverse, _ = _exponentials(q_ref[...], k_ref[...], segment, causal)
    v = v_ref[...]
    refs[-1][...] = (_dot(powers.astype(v.dtype), v, 1, 0) * inverse).astype(v.dtype)


def _backward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, segmented: bool, causal: bool) -> None:
    segment = refs[0][...] if segmented else None
    dy_ref, d_ref = refs[-2:]
    q, k, dy = q_ref[...], k_ref[...], dy_ref[...]
    powers, inverse, sees = _exponentials(q, k, segment, causal)
    weights = powers * inverse
    d_ref[:, 2, :] = _dot(weights.astype(dy.dtype), dy, 0, 0).astype(dy.dtype)
    d_weights = _dot(dy, v_ref[...], 1, 1)
    mean = (weights * d_weights).sum(axis=1, keepdims=True)
    d_scores = (weights * (d_weights - mean) * (sees * q.shape[-1] ** -0.5)).astype(q.dtype)
    d_ref[:, 0, :] = _dot(d_scores, k, 1, 0).astype(q.dtype)
    d_ref[:, 1, :] = _dot(d_scores, q, 0, 0).astype(q.dtype)
