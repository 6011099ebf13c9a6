"""Which rows make up each batch of an epoch, and how long they are padded.

The lengths of an epoch's batches depend on the rows and the epoch alone, the rows in them on the seed. So several seeds can be
trained side by side, each on the very batches it would see alone.
"""

from typing import NamedTuple

import numpy as np

from ufbert.data.encode import Encoded, bucket


class BatchRows(NamedTuple):
    """The rows of one batch."""

    picks: np.ndarray
    """(batch_rows,) row numbers."""
    weights: np.ndarray
    """(batch_rows,) float32: 0 for a row that only fills up the epoch's last batch, else 1."""
    length: int
    """Tokens that rows are padded to."""


def epoch_batches(rows: Encoded, batch_rows: int, seed: int, epoch: int) -> list[BatchRows]:
    """Every row once, in batches of one length each: the shuffled rows of every length bucket, where what is left of a bucket
    joins the next longer one; in an order that is the same for every seed."""
    sizes = np.array([rows.only_len or bucket(len(ids), rows.max_len) for ids in rows.ids])
    rng, left, batches = np.random.default_rng([seed, epoch]), np.zeros(0, np.int64), []
    for size in np.unique(sizes):
        pool = np.concatenate([left, rng.permutation(np.flatnonzero(sizes == size))])
        whole = len(pool) // batch_rows * batch_rows
        full, left = pool[:whole].reshape(-1, batch_rows), pool[whole:]
        batches += [BatchRows(picks, np.ones(batch_rows, np.float32), int(size)) for picks in full]
    if len(left):
        filled = np.resize(left, batch_rows)
        batches.append(BatchRows(filled, (np.arange(batch_rows) < len(left)).astype(np.float32), int(sizes.max())))
    return [batches[i] for i in np.random.default_rng(epoch).permutation(len(batches))]
