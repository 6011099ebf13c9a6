"""The pure functions of pretraining: rows in, new state and sums out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from ufbert import nn
from ufbert.config import RunConfig
from ufbert.data.tokenizer import SpecialIds
from ufbert.ops.losses import Sums, cross_entropy
from ufbert.ops.masking import Masked, mask_tokens
from ufbert.pretrain.optim import apply_update, averaged, averaging_power, make_optimizer
from ufbert.pretrain.sharding import Layout


class Controls(NamedTuple):
    """What the clock decides about one update, as arrays, so that nothing recompiles."""

    lr: Float[Array, ""]
    progress: Float[Array, ""]
    """Share of the budget spent, for what layers anneal."""
    mask_rate: Float[Array, ""]
    taken: Int[Array, ""]
    """Packed rows that the update consumes."""


class TrainState(NamedTuple):
    """All that a run must remember; the clock and the row order are functions of it and of the run folder."""

    params: Any
    opt_state: Any
    average: Any
    """Average of past weights, shaped like `params`; None where none is kept."""
    step: Int[Array, ""]
    """Updates done, skipped ones included."""
    rows_seen: Int[Array, ""]
    """Rows consumed: the position in the endless row order."""
    skipped: Int[Array, ""]
    """Updates skipped because their loss or gradient was not finite."""


class Outcome(NamedTuple):
    """What an update reports."""

    sums: Sums
    norm: Float[Array, ""]
    """Gradient norm before clipping."""
    applied: Bool[Array, ""]
    """False if the update was skipped, for a loss or gradient that was not finite."""


class Steps(NamedTuple):
    """Jitted functions of one configuration."""

    update: Callable[..., tuple[TrainState, Outcome]]
    """(state, rows, key, controls) -> (state, outcome): one update from one micro-batch."""
    gradient: Callable[..., Any]
    """(params, rows, key, controls, total) -> total: add one micro-batch's (gradient, sums) to `total`; start from None."""
    finish: Callable[..., tuple[TrainState, Outcome]]
    """(state, total, controls) -> (state, outcome): one update from accumulated gradients."""
    evaluate: Callable[..., tuple[Sums, nn.Aux]]
    """(params, rows, key) -> sums and counts of what was used, as inference computes: hard, nothing dropped, no noise."""


def mask_rows(
    run: RunConfig,
    special: SpecialIds,
    rows: Int[Array, "b t"],
    key: Key[Array, ""],
    rate: Float[Array, ""] | float | None = None,
) -> Masked:
    """The masking of training at `rate`, one of the recipe's; of evaluation without."""
    max_rate = run.train.eval_mask_rate if rate is None else max(run.train.mask_rate)
    return mask_tokens(
        rows,
        key,
        rate=max_rate if rate is None else rate,
        max_rate=max_rate,
        vocab_size=run.model.vocab_size,
        mask_id=special.mask,
        special_ids=(special.pad, special.cls, special.sep),
    )


def masked_lm_sums(
    params: Any,
    run: RunConfig,
    special: SpecialIds,
    rows: Int[Array, "b t"],
    key: Key[Array, ""],
    controls: Controls | None = None,
) -> tuple[Sums, nn.Aux]:
    """Masked-LM loss of packed rows, in nats, as sums. Logits are computed at the hidden positions only.

    With `controls`, layers behave as in training (without dropout: pretraining has none); without as in inference, and
    they count what they use.
    """
    masked = mask_rows(run, special, rows, key, None if controls is None else controls.mask_rate)
    segments = 1 + jnp.cumsum(rows == special.cls, axis=1) if run.data.document_attention else None
    model = replace(run.model, dropout=0.0)
    if controls is None:
        hidden, aux = nn.encode(params, model, masked.ids, segments, statistics=True)
    else:
        noise, progress = jax.random.fold_in(key, 1), controls.progress
        hidden, aux = nn.encode(params, model, masked.ids, segments, key=noise, deterministic=False, progress=progress)
    picked = jnp.take_along_axis(hidden, masked.positions[..., None], axis=1)
    logits = nn.masked_lm_logits(params, run.model, picked)
    sums = cross_entropy(logits, masked.labels, masked.weights)
    return sums._replace(extra=nn.aux_loss(aux) * sums.count), aux


def init_state(run: RunConfig, key: Key[Array, ""]) -> TrainState:
    """Fresh parameters and optimizer state."""
    return state_of(run, nn.init(run.model, key))


def state_of(run: RunConfig, params: Any) -> TrainState:
    """The state of a run that starts from these parameters."""
    average = jax.tree.map(jnp.zeros_like, params) if run.train.average_width else None
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, make_optimizer(run.train).init(params), average, zero, zero + 0, zero + 0)


def build_steps(run: RunConfig, special: SpecialIds, layout: Layout | None = None) -> Steps:
    """The jitted step functions of a configuration. The state is donated, and so is the total that `gradient` adds to.

    `layout` places the new state where the old one was, on several devices.
    """
    optimizer = make_optimizer(run.train)
    gamma = averaging_power(run.train.average_width) if run.train.average_width else 0.0

    def loss_and_sums(params: Any, rows: Array, key: Array, controls: Controls) -> tuple[Array, Sums]:
        sums, _ = masked_lm_sums(params, run, special, rows, key, controls)
        return sums.loss + sums.extra, sums

    def gradient(params: Any, rows: Array, key: Array, controls: Controls, total: Any) -> Any:
        (_, sums), grads = jax.value_and_grad(loss_and_sums, has_aux=True)(params, rows, key, controls)
        found = (grads, sums)
        return found if total is None else jax.tree.map(jnp.add, total, found)

    def moved(state: TrainState, grads: Any, controls: Controls) -> TrainState:
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = apply_update(state.params, direction, controls.lr)
        average = state.average
        if average is not None:
            average = averaged(average, params, state.step - state.skipped + 1, gamma)
        return state._replace(params=params, opt_state=opt_state, average=average)

    def finish(state: TrainState, total: Any, controls: Controls) -> tuple[TrainState, Outcome]:
        grads, sums = total
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1.0), grads)
        norm = optax.tree.norm(grads)
        applied = jnp.isfinite(norm) & jnp.isfinite(sums.loss + sums.extra)
        new = jax.lax.cond(applied, lambda: moved(state, grads, controls), lambda: state)
        new = new._replace(
            step=state.step + 1, rows_seen=state.rows_seen + controls.taken, skipped=state.skipped + (1 - applied)
        )
        return new if layout is None else layout.constrained(new), Outcome(sums, norm, applied)

    def update(state: TrainState, rows: Array, key: Array, controls: Controls) -> tuple[TrainState, Outcome]:
        return finish(state, gradient(state.params, rows, key, controls, None), controls)

    def evaluate(params: Any, rows: Array, key: Array) -> tuple[Sums, nn.Aux]:
        return masked_lm_sums(params, run, special, rows, key)

    return Steps(
        update=jax.jit(update, donate_argnums=0),
        gradient=jax.jit(gradient, donate_argnums=4),
        finish=jax.jit(finish, donate_argnums=0),
        evaluate=jax.jit(evaluate),
    )
