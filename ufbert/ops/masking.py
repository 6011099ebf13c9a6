"""Choose and hide the tokens that a masked language model has to predict, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Masked(NamedTuple):
    """Rows with hidden tokens, and what was hidden. `k` slots a row, the same number in every row."""

    ids: Int[Array, "b t"]
    positions: Int[Array, "b k"]
    labels: Int[Array, "b k"]
    weights: Float[Array, "b k"]
    """1 where a position is hidden, 0 in slots beyond the rate and where the row had too few ordinary tokens."""


def count_masked(rate: float, seq_len: int) -> int:
    """Positions hidden in a row: round(rate * seq_len), at least one."""
    return max(1, round(rate * seq_len))


def mask_tokens(
    ids: Int[Array, "b t"],
    key: Key[Array, ""],
    *,
    rate: Float[Array, ""] | float,
    max_rate: float,
    vocab_size: int,
    mask_id: int,
    special_ids: tuple[int, ...],
) -> Masked:
    """Hide exactly round(rate * t) positions of every row, drawn without replacement among its ordinary tokens.

    `rate` may be an array, so that it can change without a recompilation; the result has `count_masked(max_rate, t)` slots a
    row, and those beyond the rate weigh nothing. Of k hidden positions, round(0.8 k) become `mask_id`, round(0.1 k) a random
    token, the rest stay as they are: the fixed split of crammed BERT (26, 3 and 3 of 32). Positions holding one of
    `special_ids` are never chosen, unless a row has too few others; then they weigh nothing.
    """
    b, t = ids.shape
    slots = count_masked(max_rate, t)
    k = jnp.clip(jnp.round(rate * t), 1, slots)
    n_mask, n_random = jnp.round(0.8 * k), jnp.round(0.1 * k)
    draw_key, random_key = jax.random.split(key)
    special = jnp.isin(ids, jnp.array(special_ids, ids.dtype))
    score = jnp.where(special, -1.0, jax.random.uniform(draw_key, (b, t)))
    score, positions = jax.lax.top_k(score, slots)
    labels = jnp.take_along_axis(ids, positions, axis=1)
    order = jnp.arange(slots)[None]
    weights = ((score >= 0) & (order < k)).astype(jnp.float32)
    random_ids = jax.random.randint(random_key, (b, slots), 0, vocab_size, ids.dtype)
    shown = jnp.where(order < n_mask, jnp.array(mask_id, ids.dtype), labels)
    shown = jnp.where((order >= n_mask) & (order < n_mask + n_random), random_ids, shown)
    shown = jnp.where(weights > 0, shown, labels)
    hidden = ids.at[jnp.arange(b)[:, None], positions].set(shown)
    return Masked(hidden, positions, labels, weights)
