"""The Switch feedforward: one of many experts for each token (Fedus et al. 2021, arXiv 2101.03961, section 2)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ufbert.ops.dense import Activation, grouped_mlp


class Routing(NamedTuple):
    """Routing decisions for r tokens. All float32."""

    probability: Float[Array, "r e"]
    """Softmax over experts."""
    expert: Int[Array, " r"]
    """The most probable expert."""
    gate: Float[Array, " r"]
    """Its probability. It multiplies the expert's output, and so carries the gradient to the router."""
    balance_loss: Float[Array, ""]
    """e * sum over experts of (share of tokens sent there, no gradient) * (mean probability); 1 at perfect balance."""
    z_loss: Float[Array, ""]
    """Mean squared log-sum-exp of the logits (ST-MoE: Zoph et al. 2022, arXiv 2202.08906, eq. 5)."""


def route(
    x: Float[Array, "r d"],
    router: Float[Array, "d e"],
    real: Bool[Array, " r"] | None = None,
    *,
    jitter: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Routing:
    """Choose one expert for each token, in float32. Padding (`real` false) is left out of the losses.

    With a `key`, the router's input is multiplied by noise between 1 - jitter and 1 + jitter.
    """
    x = x.astype(jnp.float32)
    if key is not None and jitter > 0.0:
        x = x * jax.random.uniform(key, x.shape, minval=1.0 - jitter, maxval=1.0 + jitter)
    logits = jnp.einsum("rd,de->re", x, router, precision=jax.lax.Precision.HIGHEST)
    probability = jax.nn.softmax(logits, axis=-1)
    expert = jnp.argmax(probability, axis=-1).astype(jnp.int32)
    rows = jnp.ones(x.shape[0]) if real is None else real.astype(jnp.float32)
    total, n_experts = jnp.maximum(rows.sum(), 1.0), router.shape[1]
    sent = rows @ jax.nn.one_hot(expert, n_experts) / total
    balance = n_experts * jnp.sum(sent * (rows @ probability / total))
    z_loss = jnp.sum(rows * jnp.square(jax.nn.logsumexp(logits, axis=-1))) / total
    gate = jnp.take_along_axis(probability, expert[:, None], axis=-1)[:, 0]
    return Routing(probability, expert, gate, balance, z_loss)


def capacity(n_tokens: int, n_experts: int, factor: float) -> int:
    """Return the most tokens that an expert takes: ceil(tokens / experts * factor)."""
    return max(1, math.ceil(n_tokens / n_experts * factor))


def kept_tokens(
    expert: Int[Array, " r"], n_experts: int, limit: int, real: Bool[Array, " r"] | None = None
) -> tuple[Bool[Array, " r"], Int[Array, " r"]]:
    """Queue the tokens before their experts in order. Returns a mask of the first `limit` of each queue, and all places.

    Padding is in no queue; its place is -1.
    """
    chosen = jax.nn.one_hot(expert, n_experts, dtype=jnp.int32)
    if real is not None:
        chosen = chosen * real[:, None].astype(jnp.int32)
    # Down a column, the running count numbers the tokens that chose this expert, from 1; all other columns of a row are zero.
    place = jnp.sum(jnp.cumsum(chosen, axis=0) * chosen, axis=1) - 1
    return (place >= 0) & (place < limit), place


def switch_with_capacity(
    x: Float[Array, "r d"],
    routing: Routing,
    w_in: Float[Array, "e d f"],
    w_out: Float[Array, "e f d"],
    activation: Activation,
    limit: int,
    real: Bool[Array, " r"] | None = None,
) -> tuple[Float[Array, "r d"], Bool[Array, " r"]]:
    """Compute gate * expert(x) for at most `limit` tokens an expert. Returns the outputs and a mask of the tokens computed.

    The others get zero: the residual stream carries them past the layer.
    """
    n_experts, d = w_in.shape[0], x.shape[1]
    kept, place = kept_tokens(routing.expert, n_experts, limit, real)
    # Shapes are static: each expert computes `limit` slots, filled or not. Slot n_experts * limit lies outside, so that
    # mode="drop" drops the tokens that are not kept.
    slot = jnp.where(kept, routing.expert * limit + place, n_experts * limit)
    queues = jnp.zeros((n_experts * limit, d), x.dtype).at[slot].set(x, mode="drop").reshape(n_experts, limit, d)
    y = jnp.einsum("ecf,efd->ecd", activation(jnp.einsum("ecd,edf->ecf", queues, w_in)), w_out)
    y = y.reshape(n_experts * limit, d)[jnp.minimum(slot, n_experts * limit - 1)]
    return jnp.where(kept, routing.gate, 0.0)[:, None].astype(x.dtype) * y, kept


def switch_whole(
    x: Float[Array, "r d"],
    routing: Routing,
    w_in: Float[Array, "e d f"],
    w_out: Float[Array, "e f d"],
    activation: Activation,
    real: Bool[Array, " r"] | None = None,
) -> Float[Array, "r d"]:
    """Compute gate * expert(x) for every real token, however many chose the same expert.

    For inference: no token's answer depends on the rest of its batch.
    """
    gate = routing.gate if real is None else jnp.where(real, routing.gate, 0.0)
    return gate[:, None].astype(x.dtype) * grouped_mlp(x, routing.expert, w_in, w_out, activation)
