"""Held-out loss: the same rows and masks in every evaluation, of every recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ufbert import nn
from ufbert.config import RunConfig
from ufbert.data.prepared import PreparedData
from ufbert.data.tokenizer import special_ids
from ufbert.ops.fff import effective_share, usage_summary
from ufbert.ops.losses import Sums
from ufbert.pretrain.sharding import Layout
from ufbert.pretrain.step import Steps, mask_rows


@dataclass(frozen=True)
class Heldout:
    """Held-out rows with fixed masks, cut into equal batches."""

    batches: Int[np.ndarray, "n b t"]
    unigram_loss: float
    """Loss of guessing masked tokens by frequency: mean -log p(token) in nats, p the add-one training frequencies."""


class Evaluation(NamedTuple):
    """The result of an evaluation."""

    loss: float
    """Nats per masked token."""
    accuracy: float
    usage: dict[str, dict[str, float]]
    """Per layer, how the parts of trees, leaf trees and switch layers were used; empty for dense models."""


def evaluation_key(batch: int) -> jax.Array:
    """Return the masking key of a held-out batch: the same in every run and evaluation."""
    return jax.random.fold_in(jax.random.key(20231122), batch)


def heldout_of(run: RunConfig, data: PreparedData) -> Heldout:
    """Take the held-out batches of a run, and compute the unigram loss on their masks."""
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
    """Compute held-out loss, accuracy and usage of parameters; None if `stop`, asked between batches, said so."""
    divides = len(heldout.batches[0]) % len(layout.devices) == 0  # a small held-out text is not worth splitting
    results: list[tuple[Sums, dict[str, nn.Aux]]] = []
    for i, rows in enumerate(heldout.batches):
        if i > 1:
            # Else all batches are dispatched before the first is done, and `stop` comes too late for any of them.
            jax.block_until_ready(results[-2])
        if i and stop():
            return None
        results.append(steps.heldout_sums(params, layout.rows(rows) if divides else rows, evaluation_key(i)))
    sums, reports = zip(*results, strict=True)
    loss, count, correct = (sum(float(getattr(part, name)) for part in sums) for name in ("loss", "count", "correct"))
    totals = jax.tree.map(lambda *counts: sum(np.asarray(count, np.float64) for count in counts), *reports)
    usage = {layer: summary for layer, aux in totals.items() if (summary := _usage_summary(aux))}
    return Evaluation(loss / max(count, 1.0), correct / max(count, 1.0), usage)


def _usage_summary(aux: nn.Aux) -> dict[str, float]:
    """Summarise a layer's counts over all batches: shares of its parts in use, and numbers of dead ones."""
    summary = {} if aux.visits is None else usage_summary(np.asarray(aux.visits))
    for parts, tokens in (aux.counts or {}).items():
        summary |= {f"{parts}_in_use": effective_share(np.asarray(tokens)), f"{parts}_dead": float(np.sum(tokens == 0))}
    return summary
