"""Held-out loss: the same rows and masks in every evaluation, of every recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ufbert import nn
from ufbert.config import RunConfig
from ufbert.data.prepared import PreparedData
from ufbert.data.tokenizer import special_ids
from ufbert.ops.fff import effective_share, usage_summary
from ufbert.pretrain.sharding import Layout
from ufbert.pretrain.step import Steps, mask_rows


@dataclass(frozen=True)
class Heldout:
    """Held-out rows with fixed masks, cut into equal batches, and the loss of guessing by frequency on the same masks."""

    batches: np.ndarray
    """(batches, rows, seq_len) int32."""
    unigram_loss: float
    """-mean log p(token) over the hidden positions, p the add-one training frequencies, in nats."""


class Evaluation(NamedTuple):
    """What an evaluation found."""

    loss: float
    """Nats per hidden token."""
    accuracy: float
    usage: dict[str, dict[str, float]]
    """Per layer, how the parts of trees, leaf trees and switch layers were used; empty for dense models."""


def evaluation_key(batch: int) -> jax.Array:
    """The masking key of a held-out batch: the same in every run and evaluation."""
    return jax.random.fold_in(jax.random.key(20231122), batch)


def heldout_of(run: RunConfig, data: PreparedData) -> Heldout:
    """The held-out batches of a run."""
    rows = data.heldout_sample(run.data.eval_rows)
    size = min(len(rows), run.train.micro_rows)
    batches = rows[: len(rows) // size * size].reshape(-1, size, rows.shape[1])
    log_p, special = data.unigram_log_probs(), special_ids(data.tokenizer)
    mask = jax.jit(lambda rows, key: mask_rows(run, special, rows, key))
    total = count = 0.0
    for i, batch in enumerate(batches):
        masked = mask(jnp.asarray(batch), evaluation_key(i))
        weights = np.asarray(masked.weights, np.float64)
        total += float(-(log_p[np.asarray(masked.labels)] * weights).sum())
        count += float(weights.sum())
    return Heldout(batches, total / max(count, 1.0))


def evaluate(
    steps: Steps, params: nn.Params, heldout: Heldout, layout: Layout, stop: Callable[[], bool] = lambda: False
) -> Evaluation | None:
    """Held-out loss and accuracy of parameters; None if `stop`, asked after every batch but the last, said so."""
    even = len(heldout.batches[0]) % len(layout.devices) == 0  # a small held-out text is not worth splitting
    found = []
    for i, rows in enumerate(heldout.batches):
        if i > 1:
            jax.block_until_ready(
                found[-2]
            )  # else all are dispatched before the first is done, and none can be left out
        if i and stop():
            return None
        found.append(steps.evaluate(params, layout.rows(rows) if even else rows, evaluation_key(i)))
    loss, count, correct = (
        sum(float(getattr(sums, name)) for sums, _ in found) for name in ("loss", "count", "correct")
    )
    return Evaluation(loss / max(count, 1.0), correct / max(count, 1.0), _usage([aux for _, aux in found]))


def _usage(counts: list[nn.Aux]) -> dict[str, dict[str, Any]]:
    totals = {name: sum(np.asarray(aux[name], np.float64) for aux in counts) for name in counts[0] if "." in name}
    usage = {}
    for name, total in totals.items():
        layer, what = name.split(".")
        if what == "visits":
            usage[layer] = usage_summary(np.asarray(total))
        else:
            usage[layer] = {
                f"{what}_in_use": effective_share(np.asarray(total)),
                f"{what}_dead": float(np.sum(total == 0)),
            }
    return usage
