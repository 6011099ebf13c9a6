"""Choose and hide the tokens that a masked language model has to predict, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Masked(NamedTuple):
    """Rows with hidden tokens, and what was hidden. `k` positions a row, the same number in every row."""

    ids: Int[Array, "b t"]
    positions: Int[Array, "b k"]
    labels: Int[Array, "b k"]
    weights: Float[Array, "b k"]
    """1 where a position counts, 0 where the row had too few ordinary tokens."""


def count_masked(rate: float, seq_len: int) -> int:
    """Positions hidden in a row: round(rate * seq_len), at least one."""
    return max(1, round(rate * seq_len))


def mask_tokens(
    ids: Int[Array, "b t"],
    key: Key[Array, ""],
    *,
    rate: float,
    vocab_size: int,
    mask_id: int,
    special_ids: tuple[int, ...],
) -> Masked:
    """Hide exactly `count_masked` positions of every row, drawn without replacement among its ordinary tokens.

    Of k hidden positions, round(0.8 k) become `mask_id`, round(0.1 k) a random token, the rest stay as they are: the
    fixed split of crammed BERT (26, 3 and 3 of 32). Positions holding one of `special_ids` are never chosen, unless
    a row has too few others; then they weigh nothing.
    """
    b, t = ids.shape
    k = count_masked(rate, t)
    n_mask, n_random = round(0.8 * k), round(0.1 * k)
    draw_key, random_key = jax.random.split(key)
    special = jnp.isin(ids, jnp.array(special_ids, ids.dtype))
    score = jnp.where(special, -1.0, jax.random.uniform(draw_key, (b, t)))
    score, positions = jax.lax.top_k(score, k)
    labels = jnp.take_along_axis(ids, positions, axis=1)
    weights = (score >= 0).astype(jnp.float32)
    order = jnp.arange(k)[None]
    random_ids = jax.random.randint(random_key, (b, k), 0, vocab_size, ids.dtype)
    shown = jnp.where(order < n_mask, jnp.array(mask_id, ids.dtype), labels)
    shown = jnp.where((order >= n_mask) & (order < n_mask + n_random), random_ids, shown)
    shown = jnp.where(weights > 0, shown, labels)
    hidden = ids.at[jnp.arange(b)[:, None], positions].set(shown)
    return Masked(hidden, positions, labels, weights)
