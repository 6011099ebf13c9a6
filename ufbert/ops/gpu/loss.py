"""The loss of tokens under a vocabulary's logits: the logits are read once, for the loss and its gradient."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from ufbert.ops.gpu import tiles

WARPS = 16
LOGITS = jnp.float32
LOG2_E = 1.4426950408889634
TILE = 8192
"""Logits that a program holds."""


def fits(v: int) -> bool:
    """Tell whether the kernel takes a vocabulary of v tokens."""
    return tiles.piece(v) >= 256


@jax.custom_vjp
def token_loss(
    x: Float[Array, "n d"],
    embedding: Float[Array, "v d"],
    labels: Int[Array, " n"],
    weights: Float[Array, " n"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum -log softmax(x embedding^T)[label] in nats, and the labels that have the highest logit, both weighted.

    Products are in the type of x, logits and the loss in float32. Where all logits are equal, no label counts as correct.
    """
    loss, correct, _ = _rows(x, embedding, labels, weights, tiles.interpreted())
    return loss, correct


@partial(jax.jit, static_argnums=4)
def _rows(x: Array, embedding: Array, labels: Array, weights: Array, interpret: bool) -> tuple[Array, Array, Array]:
    """Return loss and hits, summed, and the gradient of the loss in the logits."""
    logits = jax.lax.dot_general(x, embedding, (((1,), (1,)), ((), ())), preferred_element_type=LOGITS)
    n, v = logits.shape
    row, number = pl.BlockSpec((None, v), lambda i: (i, 0)), pl.BlockSpec((None,), lambda i: (i,))
    loss, correct, d_logits = pl.pallas_call(
        partial(_kernel, piece=min(TILE, tiles.piece(v))),
        grid=(n,),
        in_specs=[row, number, number],
        out_specs=[number, number, row],
        out_shape=[
            jax.ShapeDtypeStruct((n,), jnp.float32),
            jax.ShapeDtypeStruct((n,), jnp.float32),
            jax.ShapeDtypeStruct((n, v), x.dtype),
        ],
        compiler_params=tiles.triton(WARPS),
        interpret=interpret,
        name="token_loss",
    )(logits, labels, weights)
    return jnp.sum(loss), jnp.sum(correct), d_logits


def _forward(x: Array, embedding: Array, labels: Array, weights: Array) -> tuple[Any, Any]:
    loss, correct, d_logits = _rows(x, embedding, labels, weights, tiles.interpreted())
    return (loss, correct), (x, embedding, d_logits)


def _backward(saved: Any, dy: tuple[Array, Array]) -> tuple[Array, Array, None, None]:
    x, embedding, d_logits = saved
    by_loss = dy[0]  # the number of hits has no gradient
    dx = jax.lax.dot_general(d_logits, embedding, (((1,), (0,)), ((), ())))
    d_embedding = jax.lax.dot_general(d_logits, x, (((0,), (0,)), ((), ())))
    return (dx * by_loss).astype(x.dtype), (d_embedding * by_loss).astype(embedding.dtype), None, None


token_loss.defvjp(_forward, _backward)


def _kernel(
    logits_ref: Any, label_ref: Any, weight_ref: Any, loss_ref: Any, correct_ref: Any, d_ref: Any, *, piece: int
) -> None:
    v = logits_ref.shape[0]
    label, weight = label_ref[...], weight_ref[...]

    def scan(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        highest, total = state
        logits = logits_ref[pl.ds(i * piece, piece)].astype(jnp.float32)
        higher = jnp.maximum(highest, logits)
        return higher, total * jnp.exp2((highest - higher) * LOG2_E) + jnp.exp2((logits - higher) * LOG2_E)

    start = jnp.full((piece,), -1e30, jnp.float32), jnp.zeros((piece,), jnp.float32)
    by_place, totals = jax.lax.fori_loop(0, v // piece, scan, start)
    highest = by_place.max()
    total = highest + jnp.log((totals * jnp.exp(by_place - highest)).sum())
    picked = logits_ref[label].astype(jnp.float32)
    loss_ref[...] = (total - picked) * weight
    prefers = total - highest < jnp.log(jnp.float32(v)) - 1e-4
    correct_ref[...] = jnp.where((picked >= highest) & prefers, weight, 0.0)

    def write(i: Array, _: None) -> None:
        at = pl.ds(i * piece, piece)
        share = jnp.exp2((logits_ref[at].astype(jnp.float32) - total) * LOG2_E) - (
            jnp.arange(piece) + i * piece == label
        )
        d_ref[at] = (share * weight).astype(d_ref.dtype)

    jax.lax.fori_loop(0, v // piece, write, None)
