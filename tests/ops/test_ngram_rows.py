"""Rows of hashed tables: those of a loop over tokens, within documents and rows, spread evenly."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from ufbert.ops.ngrams import NGRAMS, ngram_rows

PAD = 0
PLACES = {"around": (-1, 1), "before": (-1, 0), "after": (0, 1), "trigram": (-1, 0, 1)}


def mixed(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    return x ^ (x >> 16)


def row_of(table: int, ids: list[int], rows: int) -> int:
    h = mixed(table)
    for one in ids:
        h = mixed(h ^ one)
    return h % rows


@pytest.mark.parametrize("rows", [1, 7, 4096, 65536, 1_000_003])
def test_rows_are_those_of_a_loop(rows):
    rng = np.random.default_rng(rows)
    ids, segments = rng.integers(0, 65536, (3, 9)), np.array([[1] * 9, [1, 1, 1, 2, 2, 3, 3, 3, 3], [1] * 5 + [0] * 4])
    found = ngram_rows(jnp.asarray(ids), jnp.asarray(segments), keys=tuple(PLACES), rows=rows, missing=PAD)
    assert list(found) == list(NGRAMS)
    for table, (name, places) in enumerate(PLACES.items(), 1):
        for b in range(3):
            for t in range(9):
                near = [
                    int(ids[b, t + p]) if 0 <= t + p < 9 and segments[b, t + p] == segments[b, t] else PAD
                    for p in places
                ]
                assert int(found[name][b, t]) == row_of(table, near, rows)


def test_a_packed_row_reads_what_its_documents_read_alone():
    parts = [np.array([[2, 9, 8, 3]]), np.array([[2, 7, 3]]), np.array([[2, 3]])]
    segments = np.repeat([1, 2, 3], [4, 3, 2])[None]
    options = {"keys": tuple(PLACES), "rows": 5000, "missing": PAD}
    packed = ngram_rows(jnp.asarray(np.concatenate(parts, axis=1)), jnp.asarray(segments), **options)
    alone = [ngram_rows(jnp.asarray(part), None, **options) for part in parts]
    for name in PLACES:
        np.testing.assert_array_equal(packed[name], np.concatenate([rows[name] for rows in alone], axis=1))


def test_rows_of_a_table_are_used_alike():
    """Chi-squared over 1,000 rows, each expected 65 times: its spread is 45."""
    ids = jnp.arange(65536).reshape(1, -1)
    for rows in (1000, 1024):
        for name, found in ngram_rows(ids, None, keys=tuple(PLACES), rows=rows, missing=PAD).items():
            counts = np.bincount(np.asarray(found).ravel(), minlength=rows)
            chi = float(((counts - 65536 / rows) ** 2 / (65536 / rows)).sum())
            assert abs(chi - rows) < 6 * (2 * rows) ** 0.5, (name, chi)


def test_tables_do_not_share_their_collisions():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 4096, (1, 2000)))
    found = ngram_rows(ids, None, keys=tuple(PLACES), rows=256, missing=PAD)
    pairs = Counter(zip(np.asarray(found["before"]).ravel(), np.asarray(found["after"]).ravel(), strict=True))
    assert max(pairs.values()) <= 4
