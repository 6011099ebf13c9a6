"""Masking, on the device: choose the tokens that a language model has to predict, and replace those that are masked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Masked(NamedTuple):
    """Rows as the model sees them, and the labels that it has to predict. Each row has the same number `k` of slots."""

    ids: Int[Array, "b t"]
    positions: Int[Array, "b k"]
    labels: Int[Array, "b k"]
    weights: Float[Array, "b k"]
    """1 where a label counts, 0 in slots beyond the rate and where the row had too few ordinary tokens."""


def count_masked(rate: float, seq_len: int) -> int:
    """Return how many positions of a row are masked: round(rate * seq_len), at least one."""
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
    """Mask exactly round(rate * t) positions of every row, drawn without replacement among its ordinary tokens.

    Of k masked positions, round(0.8 k) become `mask_id`, round(0.1 k) a random token, and the rest stay as they are: the
    fixed split of crammed BERT (26, 3 and 3 of 32). `special_ids` are never masked. The result has `count_masked(max_rate,
    t)` slots a row, whatever the rate; those beyond it weigh nothing.
    """
    b, t = ids.shape
    slots = count_masked(max_rate, t)  # static, while `rate` may be an array that changes without a recompilation
    k = jnp.clip(jnp.round(rate * t), 1, slots)
    n_mask, n_random = jnp.round(0.8 * k), jnp.round(0.1 * k)
    draw_key, random_key = jax.random.split(key)
    special = jnp.isin(ids, jnp.array(special_ids, ids.dtype))
    # The highest of random scores are a draw without replacement. In a row with too few ordinary tokens special ones are
    # drawn as well; their negative score gives them no weight, and they are shown as they are.
    score = jnp.where(special, -1.0, jax.random.uniform(draw_key, (b, t)))
    score, positions = jax.lax.top_k(score, slots)
    labels = jnp.take_along_axis(ids, positions, axis=1)
    order = jnp.arange(slots)[None]
    weights = ((score >= 0) & (order < k)).astype(jnp.float32)
    random_ids = jax.random.randint(random_key, (b, slots), 0, vocab_size, ids.dtype)
    shown = jnp.where(order < n_mask, jnp.array(mask_id, ids.dtype), labels)
    shown = jnp.where((order >= n_mask) & (order < n_mask + n_random), random_ids, shown)
    shown = jnp.where(weights > 0, shown, labels)
    masked = ids.at[jnp.arange(b)[:, None], positions].set(shown)
    return Masked(masked, positions, labels, weights)


def next_tokens(ids: Int[Array, "b t"], key: Key[Array, ""], *, rate: float, special_ids: tuple[int, ...]) -> Masked:
    """Draw positions that predict the token after them: round(rate * t) of every row without replacement, or all t - 1.

    The last token of a row has no next one, and `special_ids` are never predicted: the token after a document is the next
    one's [CLS]. The rows stay as they are.
    """
    b, t = ids.shape
    slots, following = min(count_masked(rate, t), t - 1), ids[:, 1:]
    special = jnp.isin(following, jnp.array(special_ids, ids.dtype))
    if slots == t - 1:
        positions = jnp.broadcast_to(jnp.arange(t - 1)[None], (b, t - 1))
        return Masked(ids, positions, following, (~special).astype(jnp.float32))
    score, positions = jax.lax.top_k(jnp.where(special, -1.0, jax.random.uniform(key, following.shape)), slots)
    labels = jnp.take_along_axis(following, positions, axis=1)
    return Masked(ids, positions, labels, (score >= 0).astype(jnp.float32))
