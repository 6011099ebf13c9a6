"""Rows of hashed tables: which row of each table a token reads, by its own id and its neighbours'.

The hash, for whoever computes it elsewhere: all numbers are unsigned and of 32 bits, products are taken modulo 2^32.

    mix(x):  x = (x ^ (x >> 16)) * 0x45D9F3B;  x = (x ^ (x >> 16)) * 0x45D9F3B;  return x ^ (x >> 16)
    row(table, ids):  h = mix(seed of the table);  for each id: h = mix(h ^ id);  return h mod rows

`mix` is a bijection, so two bigrams of equal first id never share all 32 bits. Its factor is below 2^31, so that a product fits
in a signed number of 64 bits, which is what ONNX has.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

FACTOR = 0x45D9F3B
"""Factor of the mixing function (a multiply-xorshift hash that is in wide use)."""


class Ngram(NamedTuple):
    """One kind of table."""

    seed: int
    offsets: tuple[int, ...]
    """Places of the ids that are hashed, in this order, counted from the token."""


NGRAMS: dict[str, Ngram] = {
    "around": Ngram(1, (-1, 1)),
    "before": Ngram(2, (-1, 0)),
    "after": Ngram(3, (0, 1)),
    "trigram": Ngram(4, (-1, 0, 1)),
}
"""The tables by their names in `ModelConfig.ngram_keys`. Stored models depend on the seeds and the order of the ids."""


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Spread the bits of each number over all 32, one to one."""
    for _ in range(2):
        x = (x ^ (x >> 16)) * jnp.uint32(FACTOR)
    return x ^ (x >> 16)


def table_seed(key: str) -> UInt32[Array, ""]:
    """Return the hash of a table before any id is mixed in."""
    return mix(jnp.uint32(NGRAMS[key].seed))


def neighbour(
    ids: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None, offset: int, missing: int
) -> Int[Array, "b t"]:
    """Return the id `offset` places further on in each token's document; `missing` where the document or the row has ended.

    `segment_ids` numbers the documents of a row; None if each row is one.
    """
    if offset == 0:
        return ids

    def moved(x: Int[Array, "b t"], fill: int) -> Int[Array, "b t"]:
        filled = jnp.full_like(x[:, :1], fill)
        return jnp.concatenate([x[:, 1:], filled] if offset == 1 else [filled, x[:, :-1]], axis=1)

    found = moved(ids, missing)
    return found if segment_ids is None else jnp.where(moved(segment_ids, -1) == segment_ids, found, missing)


def ngram_rows(
    ids: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None,
    *,
    keys: Sequence[str],
    rows: int,
    missing: int,
    causal: bool = False,
) -> dict[str, Int[Array, "b t"]]:
    """Return the row of each table that every token reads, by the table's name.

    `rows` is the length of a table, and `missing` the id that stands for a neighbour that is not there: with `causal`, for
    every right one.
    """
    found = {}
    for key in keys:
        h = table_seed(key)
        for offset in NGRAMS[key].offsets:
            is_hidden = causal and offset > 0
            near = jnp.full_like(ids, missing) if is_hidden else neighbour(ids, segment_ids, offset, missing)
            h = mix(h ^ near.astype(jnp.uint32))
        found[key] = (h % jnp.uint32(rows)).astype(jnp.int32)
    return found
