"""The pure functions of pretraining: rows in, new state and sums out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from ufbert import nn
from ufbert.config import RunConfig
from ufbert.data.tokenizer import SpecialIds
from ufbert.ops.losses import Sums, cross_entropy
from ufbert.ops.masking import Masked, mask_tokens
from ufbert.pretrain.optim import apply_update, make_optimizer


class TrainState(NamedTuple):
    """All that a run must remember; the clock and the row order are functions of it and of the run folder."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]
    """Updates done."""
    rows_seen: Int[Array, ""]
    """Rows consumed: the position in the endless row order."""


class Steps(NamedTuple):
    """Jitted functions of one configuration. `taken` is the number of packed rows that an update consumes."""

    update: Callable[..., Any]
    """(state, rows, key, lr, taken, progress) -> (state, sums, gradient norm): one update from one micro-batch."""
    gradient: Callable[..., Any]
    """(params, rows, key, progress, total) -> total: add one micro-batch's (gradient, sums) to `total`; start from None."""
    finish: Callable[..., Any]
    """(state, total, lr, taken) -> (state, sums, gradient norm): one update from accumulated gradients."""
    evaluate: Callable[..., tuple[Sums, nn.Aux]]
    """(params, rows, key) -> sums and counts of what was used, as inference computes: hard, nothing dropped, no noise."""


def mask_rows(run: RunConfig, special: SpecialIds, rows: Int[Array, "b t"], key: Key[Array, ""]) -> Masked:
    """The masking that both training and evaluation use."""
    return mask_tokens(
        rows,
        key,
        rate=run.train.mask_rate,
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
    progress: Float[Array, ""] | None = None,
) -> tuple[Sums, nn.Aux]:
    """Masked-LM loss of packed rows, in nats, as sums. Logits are computed at the hidden positions only.

    With `progress`, the share of the budget spent, layers behave as in training (without dropout: pretraining has
    none); without it as in inference, and they count what they use.
    """
    masked = mask_rows(run, special, rows, key)
    segments = 1 + jnp.cumsum(rows == special.cls, axis=1) if run.data.document_attention else None
    model = replace(run.model, dropout=0.0)
    if progress is None:
        hidden, aux = nn.encode(params, model, masked.ids, segments, statistics=True)
    else:
        noise = jax.random.fold_in(key, 1)
        hidden, aux = nn.encode(params, model, masked.ids, segments, key=noise, deterministic=False, progress=progress)
    picked = jnp.take_along_axis(hidden, masked.positions[..., None], axis=1)
    logits = nn.masked_lm_logits(params, run.model, picked)
    sums = cross_entropy(logits, masked.labels, masked.weights)
    return sums._replace(extra=nn.aux_loss(aux) * sums.count), aux


def init_state(run: RunConfig, key: Key[Array, ""]) -> TrainState:
    """Fresh parameters and optimizer."""
    params = nn.init(run.model, key)
    opt_state = make_optimizer(run.train).init(params)
    return TrainState(params, opt_state, step=jnp.zeros((), jnp.int32), rows_seen=jnp.zeros((), jnp.int32))


def build_steps(run: RunConfig, special: SpecialIds) -> Steps:
    """The jitted step functions of a configuration. The state is donated, and so is the total that `gradient` adds to."""
    optimizer = make_optimizer(run.train)

    def loss_and_sums(params: Any, rows: Array, key: Array, progress: Array) -> tuple[Array, Sums]:
        sums, _ = masked_lm_sums(params, run, special, rows, key, progress)
        return sums.loss + sums.extra, sums

    def gradient(params: Any, rows: Array, key: Array, progress: Array, total: Any) -> Any:
        (_, sums), grads = jax.value_and_grad(loss_and_sums, has_aux=True)(params, rows, key, progress)
        found = (grads, sums)
        return found if total is None else jax.tree.map(jnp.add, total, found)

    def finish(state: TrainState, total: Any, lr: Array, taken: Array) -> tuple[TrainState, Sums, Array]:
        grads, sums = total
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1.0), grads)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = apply_update(state.params, direction, lr)
        new = TrainState(params, opt_state, state.step + 1, state.rows_seen + taken)
        return new, sums, optax.tree.norm(grads)

    def update(
        state: TrainState, rows: Array, key: Array, lr: Array, taken: Array, progress: Array
    ) -> tuple[TrainState, Sums, Array]:
        return finish(state, gradient(state.params, rows, key, progress, None), lr, taken)

    def evaluate(params: Any, rows: Array, key: Array) -> tuple[Sums, nn.Aux]:
        return masked_lm_sums(params, run, special, rows, key)

    return Steps(
        update=jax.jit(update, donate_argnums=0),
        gradient=jax.jit(gradient, donate_argnums=4),
        finish=jax.jit(finish, donate_argnums=0),
        evaluate=jax.jit(evaluate),
    )
