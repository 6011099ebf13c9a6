"""The batches of an epoch: which rows they hold, and how long these are padded.

The lengths of an epoch's batches depend on the rows and the epoch alone, the rows in them on the seed. So several runs can be
trained side by side, each on the very batches it would see alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ufbert import nn
from ufbert.data.encode import Encoded, bucket
from ufbert.runtime.console import show

EVAL_ROWS = 64
"""Rows that are scored at once."""


class BatchRows(NamedTuple):
    """The numbers of the rows of one batch."""

    picks: Int[np.ndarray, " b"]
    weights: Float[np.ndarray, " b"]
    """0 for a row that only fills up the epoch's last batch, else 1."""
    length: int
    """Tokens that rows are padded to."""


class TrainingRows(NamedTuple):
    """The rows that a classifier learns from, and the teacher's scores of them if there is one."""

    rows: Encoded
    features: Float[np.ndarray, "rows d"] | None
    """Of a probe: the pooled hidden states of each row, which are trained on instead."""
    targets: Float[np.ndarray, " rows"]
    """Class numbers, or standardised values."""
    teacher: Float[np.ndarray, "rows c"] | None


class TokenBatch(NamedTuple):
    """Padded rows, as `Batch` has them, on the device; of every run, or under `vmap` of one."""

    ids: Int[Array, "*r b t"]
    segment_ids: Int[Array, "*r b t"]
    type_ids: Int[Array, "*r b t"]


class Batches(NamedTuple):
    """One batch of every run, or under `vmap` of one."""

    inputs: TokenBatch | Float[Array, "*r b d"]
    """Tokens, or a probe's features."""
    targets: Float[Array, "*r b"]
    weights: Float[Array, "*r b"]
    """0 for rows that only fill up a batch."""
    teacher: Float[Array, "*r b c"] | None


def epoch_batches(rows: Encoded, batch_rows: int, seed: int, epoch: int) -> list[BatchRows]:
    """Put every row once into batches of one length each, in an order that is the same for every seed.

    The rows of every length bucket are shuffled and cut into batches; the rest of a bucket joins the next longer one.
    """
    sizes = np.array([rows.only_len or bucket(len(ids), rows.max_len) for ids in rows.ids])
    rng, rest, batches = np.random.default_rng([seed, epoch]), np.zeros(0, np.int64), []
    for size in np.unique(sizes):
        pool = np.concatenate([rest, rng.permutation(np.flatnonzero(sizes == size))])
        whole = len(pool) // batch_rows * batch_rows
        full, rest = pool[:whole].reshape(-1, batch_rows), pool[whole:]
        batches += [BatchRows(picks, np.ones(batch_rows, np.float32), int(size)) for picks in full]
    if len(rest):
        filled = np.resize(rest, batch_rows)
        batches.append(BatchRows(filled, (np.arange(batch_rows) < len(rest)).astype(np.float32), int(sizes.max())))
    return [batches[i] for i in np.random.default_rng(epoch).permutation(len(batches))]


def epoch_of_runs(training: TrainingRows, batch_rows: int, seeds: Sequence[int], epoch: int) -> Iterator[Batches]:
    """Iterate over an epoch, one batch of every run at a time. Runs of equal seed see the same rows."""
    orders = {seed: epoch_batches(training.rows, batch_rows, seed, epoch) for seed in seeds}
    for of_runs in zip(*(orders[seed] for seed in seeds), strict=True):
        picks, weights = np.stack([batch.picks for batch in of_runs]), np.stack([batch.weights for batch in of_runs])
        if training.features is None:
            padded = [training.rows.pad(batch.picks, batch.length) for batch in of_runs]
            inputs = TokenBatch(*(jnp.asarray(np.stack(arrays)) for arrays in zip(*padded, strict=True)))
        else:
            inputs = jnp.asarray(training.features[picks])
        teacher = None if training.teacher is None else jnp.asarray(training.teacher[picks])
        yield Batches(inputs, jnp.asarray(training.targets[picks]), jnp.asarray(weights), teacher)


def predict_rows(
    predict: Callable[..., Float[Array, "r b c"]], params: nn.Params, rows: Encoded | Float[np.ndarray, "rows d"]
) -> Float[np.ndarray, "r rows c"]:
    """Score encoded rows or a probe's features with every run, in their order; rows of like length share a batch."""
    lengths = [len(ids) for ids in rows.ids] if isinstance(rows, Encoded) else np.zeros(len(rows))
    order = np.argsort(lengths, kind="stable")
    scores = []
    for start in range(0, len(order), EVAL_ROWS):
        picks = np.resize(order[start : start + EVAL_ROWS], EVAL_ROWS)
        inputs = rows[picks] if isinstance(rows, np.ndarray) else TokenBatch(*map(jnp.asarray, rows.pad(picks)))
        scores.append(np.asarray(predict(params, inputs)))
        show(f"scoring  {min(start + EVAL_ROWS, len(order)):,}/{len(order):,} rows")
    return np.concatenate(scores, axis=1)[:, : len(order)][:, np.argsort(order)]
