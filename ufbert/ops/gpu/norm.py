"""A residual sum and the LayerNorm after it, in one pass over memory, and their gradient in another."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from ufbert.ops.gpu import tiles

MOST_PIECES = 6
"""Pieces of a row that a program holds: a row of 768 channels is three of 256, for Triton's tiles are powers of two."""
TILE = 4096
"""Numbers that a program holds of one array."""
PROGRAMS = 1024
"""Programs of the backward pass at most; each returns its share of the gradients of scale and bias."""
WARPS = 4


def fits(rows: int, d: int) -> bool:
    """Tell whether the kernels take so many rows of d channels."""
    return d // tiles.piece(d) <= MOST_PIECES and d <= TILE and rows > 0 and rows % _rows(d) == 0


def _rows(d: int) -> int:
    """Return the rows that a program holds at once."""
    return TILE // pl.next_power_of_2(d)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def add_and_norm(
    x: Float[Array, "r d"],
    y: Float[Array, "r d"] | None,
    scale: Float[Array, " d"],
    bias: Float[Array, " d"] | None,
    epsilon: float,
    dtype: Any,
    keep: bool = True,
) -> tuple[Float[Array, "r d"] | None, Float[Array, "r d"]]:
    """Return x + y in the type of x, or None if it is not to be kept, and its LayerNorm over channels as `dtype`.

    Both are computed in float32. Without y, that is x and its norm. Sizes must be such that `fits`.
    """
    total, normed = _sum_and_norm(x, y, scale, bias, epsilon, dtype, tiles.interpreted())
    return total if keep else None, normed


def _forward(
    x: Array, y: Array | None, scale: Array, bias: Array | None, epsilon: float, dtype: Any, keep: bool
) -> tuple[tuple[Array | None, Array], Any]:
    total, normed = add_and_norm(x, y, scale, bias, epsilon, dtype)
    like_y = None if y is None else jnp.zeros((0,), y.dtype)
    return (total if keep else None, normed), (total, like_y, scale, bias)


def _backward(
    epsilon: float, _dtype: Any, _keep: bool, saved: Any, dy: tuple[Array | None, Array]
) -> tuple[Array, Array | None, Array, Array | None]:
    total, like_y, scale, bias = saved
    y_dtype = None if like_y is None else like_y.dtype
    dx, for_y, shares = _gradient(total, *dy, scale, y_dtype, epsilon, tiles.interpreted())
    d_scale, d_bias = shares.sum(axis=0)
    return dx, for_y, d_scale, None if bias is None else d_bias


add_and_norm.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=(4, 5, 6))
def _sum_and_norm(
    x: Array, y: Array | None, scale: Array, bias: Array | None, epsilon: float, dtype: Any, interpret: bool
) -> tuple[Array, Array]:
    r, d = x.shape
    block, whole = pl.BlockSpec((_rows(d), d), lambda i: (i, 0)), pl.BlockSpec((d,), lambda i: (0,))
    arrays = [x, scale] + ([] if y is None else [y]) + ([] if bias is None else [bias])
    outputs = [jax.ShapeDtypeStruct((r, d), dtype)] + ([] if y is None else [jax.ShapeDtypeStruct((r, d), x.dtype)])
    out = pl.pallas_call(
        partial(_forward_kernel, added=y is not None, biased=bias is not None, epsilon=epsilon),
        grid=(r // _rows(d),),
        in_specs=[block if array.ndim == 2 else whole for array in arrays],
        out_specs=[block for _ in outputs],
        out_shape=outputs,
        compiler_params=tiles.triton(WARPS),
        interpret=interpret,
        name="norm_forward",
    )(*arrays)
    return x if y is None else out[1], out[0]


@partial(jax.jit, static_argnums=(4, 5, 6))
def _gradient(
    total: Array, d_total: Array | None, d_normed: Array, scale: Array, y_dtype: Any, epsilon: float, interpret: bool
) -> tuple[Array, Array | None, Array]:
    """Return the gradients of x and y (None where there is no y), and each program's of scale and bias."""
    r, d = total.shape
    steps = max(1, r // _rows(d) // PROGRAMS)
    while r % (_rows(d) * steps):
        steps -= 1
    programs = r // (_rows(d) * steps)
    block, whole = pl.BlockSpec((_rows(d) * steps, d), lambda i: (i, 0)), pl.BlockSpec((d,), lambda i: (0,))
    share = pl.BlockSpec((None, 2, d), lambda i: (i, 0, 0))
    twice = y_dtype is not None and y_dtype != total.dtype  # else one array serves as both gradients
    arrays = [total, d_normed, scale] + ([] if d_total is None else [d_total])
    outputs = [jax.ShapeDtypeStruct((programs, 2, d), jnp.float32), jax.ShapeDtypeStruct((r, d), total.dtype)]
    if twice:
        outputs.append(jax.ShapeDtypeStruct((r, d), y_dtype))
    shares, dx, *dy = pl.pallas_call(
        partial(_backward_kernel, steps=steps, kept=d_total is not None, epsilon=epsilon),
        grid=(programs,),
        in_specs=[block if array.ndim == 2 else whole for array in arrays],
        out_specs=[share, block] + [block] * twice,
        out_shape=outputs,
        compiler_params=tiles.triton(WARPS),
        interpret=interpret,
        name="norm_backward",
    )(*arrays)
    return dx, None if y_dtype is None else (dy[0] if twice else dx), shares


def _pieces(d: int) -> list[Any]:
    return [pl.ds(start, tiles.piece(d)) for start in range(0, d, tiles.piece(d))]


def _mean(parts: list[Array], d: int) -> Array:
    """Return the mean over the channels of rows that are given in pieces."""
    return sum(parts[1:], parts[0]).sum(axis=1, keepdims=True) / d


def _normed(parts: list[Array], d: int, epsilon: float) -> tuple[list[Array], Array]:
    """Return rows, given in pieces, at mean 0 and variance 1, and what that multiplied them by."""
    mean = _mean(parts, d)
    off = [part - mean for part in parts]
    rate = jax.lax.rsqrt(_mean([part * part for part in off], d) + epsilon)
    return [part * rate for part in off], rate


def _forward_kernel(x_ref: Any, scale_ref: Any, *refs: Any, added: bool, biased: bool, epsilon: float) -> None:
    d = x_ref.shape[1]
    pieces = _pieces(d)
    parts = [x_ref[:, piece].astype(jnp.float32) for piece in pieces]
    normed_ref = refs[added + biased]
    if added:
        y_ref, total_ref = refs[0], refs[-1]
        parts = [(part + y_ref[:, piece]).astype(total_ref.dtype) for part, piece in zip(parts, pieces, strict=True)]
        for part, piece in zip(parts, pieces, strict=True):
            total_ref[:, piece] = part
        parts = [part.astype(jnp.float32) for part in parts]  # rounded, as the gradient will see it
    for part, piece in zip(_normed(parts, d, epsilon)[0], pieces, strict=True):
        out = part * scale_ref[piece][None]
        if biased:
            out = out + refs[added][piece][None]
        normed_ref[:, piece] = out.astype(normed_ref.dtype)


def _backward_kernel(
    x_ref: Any, d_normed_ref: Any, scale_ref: Any, *refs: Any, steps: int, kept: bool, epsilon: float
) -> None:
    d = x_ref.shape[1]
    rows, pieces = x_ref.shape[0] // steps, _pieces(d)
    share_ref, *dx_refs = refs[int(kept) :]
    scales = [scale_ref[piece][None] for piece in pieces]

    def step(i: Array, sums: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        at = pl.ds(i * rows, rows)
        normed, rate = _normed([x_ref[at, piece].astype(jnp.float32) for piece in pieces], d, epsilon)
        dn = [d_normed_ref[at, piece].astype(jnp.float32) for piece in pieces]
        of_scale = [total + g * n for total, g, n in zip(sums[0], dn, normed, strict=True)]
        of_bias = [total + g for total, g in zip(sums[1], dn, strict=True)]
        dn = [g * scale for g, scale in zip(dn, scales, strict=True)]
        mean, along = _mean(dn, d), _mean([g * n for g, n in zip(dn, normed, strict=True)], d)
        for g, n, piece in zip(dn, normed, pieces, strict=True):
            dx = rate * (g - mean - n * along)
            if kept:
                dx = dx + refs[0][at, piece]
            for ref in dx_refs:
                ref[at, piece] = dx.astype(ref.dtype)
        return of_scale, of_bias

    zeros = [jnp.zeros((rows, piece.size), jnp.float32) for piece in pieces]
    for sums, place in zip(jax.lax.fori_loop(0, steps, step, (zeros, zeros)), (0, 1), strict=True):
        for part, piece in zip(sums, pieces, strict=True):
            share_ref[place, piece] = part.sum(axis=0)
