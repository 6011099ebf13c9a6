"""The pure functions of pretraining: rows in, new state and sums out. `build_steps` compiles them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from ufbert import nn
from ufbert.config import PretrainConfig, RunConfig
from ufbert.data.tokenizer import SpecialIds
from ufbert.nn.ngrams import Rows, join_tables, split_tables, table_rows
from ufbert.ops.losses import Sums
from ufbert.ops.masking import Masked, mask_tokens, next_tokens
from ufbert.ops.row_updates import (
    TablesState,
    all_finite,
    row_gradient,
    scaled,
    spread,
    start_tables,
    update_tables,
)
from ufbert.pretrain.optim import apply_update, averaged, averaging_power, make_optimizer
from ufbert.pretrain.sharding import Layout


class StepInputs(NamedTuple):
    """The inputs of a step that depend on the clock, as arrays, so that nothing recompiles."""

    lr: Float[Array, ""]
    progress: Float[Array, ""]
    """Share of the budget spent, for what layers anneal."""
    mask_rate: Float[Array, ""]
    taken: Int[Array, ""]
    """Packed rows that the step consumes."""


class TrainState(NamedTuple):
    """All that a run must remember, but for the clock (`ledger.jsonl`) and the row order (drawn from the seed)."""

    params: Any
    opt_state: Any
    average: Any
    """Average of past weights, shaped like `params` without hashed tables; None where none is kept."""
    step: Int[Array, ""]
    """Steps done, skipped ones included."""
    rows_seen: Int[Array, ""]
    """Rows consumed: the position in the endless row order."""
    skipped: Int[Array, ""]
    """Steps skipped because their loss or gradient was not finite."""


class StepMetrics(NamedTuple):
    """The results of a step."""

    sums: Sums
    norm: Float[Array, ""]
    """Gradient norm before clipping."""
    applied: Bool[Array, ""]
    """False if the step was skipped, for a loss or gradient that was not finite."""


class Steps(NamedTuple):
    """Compiled functions: those below, with the arguments that belong to a configuration bound."""

    train_step: Callable[..., tuple[TrainState, StepMetrics]]
    """(state, rows, key, inputs, next_token=False) -> (state, metrics)."""
    add_gradient: Callable[..., tuple[Any, Sums]]
    """(params, rows, key, inputs, total, next_token=False) -> total."""
    apply_gradient: Callable[..., tuple[TrainState, StepMetrics]]
    """(state, total, inputs) -> (state, metrics)."""
    heldout_sums: Callable[..., tuple[Sums, dict[str, nn.Aux]]]
    """(params, rows, key) -> sums, and what each layer counted."""


def build_steps(run: RunConfig, special: SpecialIds, layout: Layout | None = None) -> Steps:
    """Compile the step functions of a configuration. The state is donated, and so is the total that a gradient is added to.

    `layout` places the new state where the old one was, on several devices.
    """
    return Steps(
        train_step=jax.jit(partial(train_step, run, special, layout), donate_argnums=0, static_argnames="next_token"),
        add_gradient=jax.jit(partial(add_gradient, run, special), donate_argnums=4, static_argnames="next_token"),
        apply_gradient=jax.jit(partial(apply_gradient, run.train, layout), donate_argnums=0),
        heldout_sums=jax.jit(partial(masked_lm_sums, run, special)),
    )


def train_step(
    run: RunConfig,
    special: SpecialIds,
    layout: Layout | None,
    state: TrainState,
    rows: Int[Array, "b t"],
    key: Key[Array, ""],
    inputs: StepInputs,
    next_token: bool = False,
) -> tuple[TrainState, StepMetrics]:
    """Take an optimizer step from one micro-batch: gradient and update in one program."""
    total = gradient(run, special, state.params, rows, key, inputs, next_token)
    return apply_gradient(run.train, layout, state, total, inputs)


def add_gradient(
    run: RunConfig,
    special: SpecialIds,
    params: Any,
    rows: Int[Array, "b t"],
    key: Key[Array, ""],
    inputs: StepInputs,
    total: tuple[Any, Sums] | None,
    next_token: bool = False,
) -> tuple[Any, Sums]:
    """Compute a micro-batch's gradient and loss, sums over masked tokens, and add them to the `total` before, if any.

    With `next_token` the sums are over tokens that predict the next one. Gradients of hashed tables are added in arrays of
    whole tables, for lists of rows would grow with every micro-batch.
    """
    grads, sums = gradient(run, special, params, rows, key, inputs, next_token)
    grads, of_tables = split_tables(grads)
    tables = split_tables(params)[1]
    if total is None:
        onto = jax.tree.map(jnp.zeros_like, tables)
    else:
        before, onto = split_tables(total[0])
        grads, sums = jax.tree.map(jnp.add, (before, total[1]), (grads, sums))
    return join_tables(grads, {name: spread(of_tables[name], onto[name]) for name in of_tables}), sums


def gradient(
    run: RunConfig,
    special: SpecialIds,
    params: Any,
    rows: Int[Array, "b t"],
    key: Key[Array, ""],
    inputs: StepInputs,
    next_token: bool = False,
) -> tuple[Any, Sums]:
    """Compute a micro-batch's gradient and loss, as sums. The gradient of a hashed table is a `RowGradient`."""
    objective = next_token_sums if next_token else masked_lm_sums
    params, tables = split_tables(params)
    read: dict[str, Any] = {}
    if tables:
        ids = rows if next_token else mask_rows(run, special, rows, key, inputs.mask_rate).ids
        read = table_rows(run.model, ids, document_segments(run, special, rows), causal=next_token)

    def loss(params: Any, gathered: Any) -> tuple[Float[Array, ""], Sums]:
        sums, _ = objective(run, special, params, rows, key, inputs, gathered or None)
        return sums.loss + sums.extra, sums

    gathered = {name: tables[name][at] for name, at in read.items()}
    # The gradient is taken here, and nowhere else in pretraining.
    (_, sums), (grads, of_rows) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, gathered)
    of_tables = {name: row_gradient(at, of_rows[name]) for name, at in read.items()}
    return join_tables(grads, of_tables), sums


def apply_gradient(
    train: PretrainConfig, layout: Layout | None, state: TrainState, total: tuple[Any, Sums], inputs: StepInputs
) -> tuple[TrainState, StepMetrics]:
    """Take an optimizer step along the mean gradient. If it or the loss is not finite, only the counts move on."""
    grads, sums = total
    grads, of_tables = split_tables(grads)
    grads = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1.0), grads)
    norm = optax.tree.norm(grads)
    applied = jnp.isfinite(norm) & jnp.isfinite(sums.loss + sums.extra) & all_finite(of_tables)
    params, tables = split_tables(state.params)
    opt_state, squares = state.opt_state if tables else (state.opt_state, {})
    others = state._replace(params=params, opt_state=opt_state)
    if nn.gpu_kernels() is not None:  # a branch would keep the gradients' casts and means from being part of the update
        new = jax.tree.map(partial(jnp.where, applied), _updated(train, others, grads, inputs.lr), others)
    else:
        new = jax.lax.cond(applied, lambda: _updated(train, others, grads, inputs.lr), lambda: others)
    if tables:
        of_tables = scaled(of_tables, 1.0 / jnp.maximum(sums.count, 1.0))
        tables, squares = update_tables(tables, squares, of_tables, inputs.lr * train.ngram_lr, applied)
        new = new._replace(params=join_tables(new.params, tables), opt_state=TablesState(new.opt_state, squares))
    new = new._replace(
        step=state.step + 1, rows_seen=state.rows_seen + inputs.taken, skipped=state.skipped + (1 - applied)
    )
    return new if layout is None else layout.constrained(new), StepMetrics(sums, norm, applied)


def _updated(train: PretrainConfig, state: TrainState, grads: Any, lr: Float[Array, ""]) -> TrainState:
    """Update the parameters, the optimizer's state, and the average of past weights."""
    direction, opt_state = make_optimizer(train).update(grads, state.opt_state, state.params)
    params, average = apply_update(state.params, direction, lr), state.average
    if average is not None:
        average = averaged(average, params, state.step - state.skipped + 1, averaging_power(train.average_width))
    return state._replace(params=params, opt_state=opt_state, average=average)


def masked_lm_sums(
    run: RunConfig,
    special: SpecialIds,
    params: Any,
    rows: Int[Array, "b t"],
    key: Key[Array, ""],
    inputs: StepInputs | None = None,
    ngrams: Rows | None = None,
) -> tuple[Sums, dict[str, nn.Aux]]:
    """Compute the masked-LM loss of packed rows, in nats, as sums. Logits are computed at the masked positions only.

    With `inputs`, layers behave as in training (without dropout: pretraining has none). Without, as in inference: hard,
    nothing dropped, no noise; and they count what they use. `ngrams` are the rows of hashed tables, if they were looked up.
    """
    masked = mask_rows(run, special, rows, key, None if inputs is None else inputs.mask_rate)
    model, segments = replace(run.model, dropout=0.0), document_segments(run, special, rows)
    if inputs is None:
        hidden, aux = nn.encode(params, model, masked.ids, segments, statistics=True, ngrams=ngrams)
    else:
        noise, progress = jax.random.fold_in(key, 1), inputs.progress
        hidden, aux = nn.encode(
            params, model, masked.ids, segments, key=noise, deterministic=False, progress=progress, ngrams=ngrams
        )
    return _sums(run, params, hidden, masked, aux), aux


def next_token_sums(
    run: RunConfig,
    special: SpecialIds,
    params: Any,
    rows: Int[Array, "b t"],
    key: Key[Array, ""],
    inputs: StepInputs,
    ngrams: Rows | None = None,
) -> tuple[Sums, dict[str, nn.Aux]]:
    """Compute the loss of the next tokens of packed rows, in nats, as sums; layers behave as in training.

    A token sees itself and those before it, as far as it may attend. It predicts the next one with the masked-LM head, at
    `train.next_token_rate` of the positions. `ngrams` are the rows of hashed tables, if they were looked up.
    """
    drawn = next_tokens(rows, key, rate=run.train.next_token_rate, special_ids=(special.pad, special.cls, special.sep))
    model, segments = replace(run.model, dropout=0.0), document_segments(run, special, rows)
    noise, progress = jax.random.fold_in(key, 1), inputs.progress
    hidden, aux = nn.encode(
        params, model, rows, segments, key=noise, deterministic=False, progress=progress, causal=True, ngrams=ngrams
    )
    return _sums(run, params, hidden, drawn, aux), aux


def document_segments(run: RunConfig, special: SpecialIds, rows: Int[Array, "b t"]) -> Int[Array, "b t"] | None:
    """Number the documents of packed rows, if tokens attend to their own only."""
    return 1 + jnp.cumsum(rows == special.cls, axis=1) if run.data.document_attention else None


def _sums(run: RunConfig, params: Any, hidden: Float[Array, "b t d"], drawn: Masked, aux: dict[str, nn.Aux]) -> Sums:
    """Add up the losses of the labels at their positions, and those of the layers."""
    picked = jnp.take_along_axis(hidden, drawn.positions[..., None], axis=1)
    sums = nn.masked_lm_sums(params, run.model, picked, drawn.labels, drawn.weights)
    return sums._replace(extra=nn.aux_loss(aux) * sums.count)


def mask_rows(
    run: RunConfig,
    special: SpecialIds,
    rows: Int[Array, "b t"],
    key: Key[Array, ""],
    rate: Float[Array, ""] | float | None = None,
) -> Masked:
    """Mask tokens as training does at `rate`, one of the recipe's; as evaluation does without it."""
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


def init_state(run: RunConfig, key: Key[Array, ""], layout: Layout | None = None, params: Any = None) -> TrainState:
    """Draw parameters if none are given, and make the state of a run that starts from them; in its places if `layout` is."""
    if params is None:
        params = nn.init(run.model, key)
    if layout is None:
        return state_of(run, params)
    if jax.process_count() > 1:  # each has drawn or read the same numbers
        params = jax.tree.map(np.asarray, params)
    places = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(run, layout))
    return jax.jit(partial(state_of, run), out_shardings=places)(params)


def state_of(run: RunConfig, params: Any) -> TrainState:
    """Make the state of a run that starts from these parameters."""
    others, tables = split_tables(params)
    average = jax.tree.map(jnp.zeros_like, others) if run.train.average_width else None
    zero = jnp.zeros((), jnp.int32)
    opt_state = start_tables(make_optimizer(run.train).init(others), tables)
    return TrainState(params, opt_state, average, zero, zero + 0, zero + 0)


def state_shapes(run: RunConfig, layout: Layout) -> TrainState:
    """Return the state as shapes with their places, for restoring."""
    return layout.abstract(jax.eval_shape(lambda: init_state(run, jax.random.key(0))))
