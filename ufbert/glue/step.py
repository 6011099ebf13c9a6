"""The pure functions of fine-tuning: a batch of every run in, new states and losses out.

Several runs (seeds, or learning rates) are trained at once by `vmap`: the arrays of the state have one leading axis, r, for
the runs. The batches of all runs have the same lengths (`batches`), so one jitted update serves every run, and every task of
equal setting.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from ufbert import nn
from ufbert.config import FinetuneConfig, ModelConfig
from ufbert.data.encode import Encoded
from ufbert.glue.batches import Batches, TokenBatch, predict_rows
from ufbert.nn.ngrams import Rows, join_tables, split_tables, table_rows
from ufbert.nn.updates import apply_update, own_steps_apart
from ufbert.ops.losses import cross_entropy, distillation, squared_error
from ufbert.ops.row_updates import TablesState, row_gradient, start_tables, update_tables

NGRAM_LR = 1.0
"""Learning rate of hashed tables, over that of everything else."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that a jitted step depends on; tasks of equal setting share it."""

    config: ModelConfig
    tune: FinetuneConfig
    is_regression: bool = False


class State(NamedTuple):
    """Parameters and optimizer state of every run."""

    params: nn.Params
    opt_state: Any
    """Of the optimizer; with hashed tables a `TablesState`."""


class FinetuneSteps(NamedTuple):
    """Jitted functions of one setting, over all runs."""

    update: Callable[..., tuple[State, Float[Array, " r"]]]
    """(state, batches, keys (r,), step, lr (r,)) -> (state, mean losses). The state is donated."""
    predict: Callable[..., Float[Array, "r b c"]]
    """(params, one batch for all runs) -> the classifier's scores, without dropout."""
    compiled: set[tuple[Any, ...]]
    """The shapes that `update` has met, for which it need not be compiled again."""


def learning_rate(step: int, total: int, config: FinetuneConfig) -> float:
    """Return the share of the peak rate at update `step` of `total`: a linear rise, then a cosine or a line down to zero."""
    rise = max(1, int(config.warmup * total))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, total - rise)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@lru_cache(maxsize=32)
def finetune_steps(setting: Setting) -> FinetuneSteps:
    """Return the jitted functions of a setting, made once."""
    update = jax.vmap(partial(_update, setting), in_axes=(0, 0, 0, None, 0))
    predict = jax.vmap(lambda params, inputs: classifier_scores(setting, params, inputs, None)[0], in_axes=(0, None))
    return FinetuneSteps(jax.jit(update, donate_argnums=0), jax.jit(predict), set())


def _update(
    setting: Setting, state: State, batch: Batches, key: Key[Array, ""], step: Int[Array, ""], lr: Float[Array, ""]
) -> tuple[State, Float[Array, ""]]:
    """Update one run with one batch; return its new state and the mean loss. Of hashed tables the rows that it reads change."""
    params, tables = split_tables(state.params)
    opt_state, squares = state.opt_state if tables else (state.opt_state, {})
    inputs: Any = batch.inputs
    read = table_rows(setting.config, inputs.ids, inputs.segment_ids) if tables else {}
    gathered = {name: tables[name][rows] for name, rows in read.items()}
    gradient = jax.value_and_grad(_loss, argnums=(0, 1))
    loss, (grads, of_rows) = gradient(params, gathered, setting, batch, jax.random.fold_in(key, step))
    direction, opt_state = make_optimizer(setting.tune).update(grads, opt_state, params)
    params: Any = apply_update(params, direction, lr)
    if tables:
        of_tables = {name: row_gradient(rows, of_rows[name]) for name, rows in read.items()}
        tables, squares = update_tables(tables, squares, of_tables, lr * NGRAM_LR)
        opt_state = TablesState(opt_state, squares)
    return State(join_tables(params, tables), opt_state), loss


def _loss(params: nn.Params, rows: Rows, setting: Setting, batch: Batches, key: Key[Array, ""]) -> Float[Array, ""]:
    """Return the mean loss of a batch: of labels in nats or squared units, mixed with the teacher's, plus the layers' own.

    `rows` are those of hashed tables that the batch reads.
    """
    scores, layers_loss = classifier_scores(setting, params, batch.inputs, key, rows or None)
    if setting.is_regression:
        sums = squared_error(scores[:, 0], batch.targets, batch.weights)
    else:
        sums = cross_entropy(scores, batch.targets.astype(jnp.int32), batch.weights)
    loss = sums.loss
    if batch.teacher is not None:
        share = setting.tune.teacher_weight
        if setting.is_regression:
            taught = squared_error(scores[:, 0], batch.teacher[:, 0], batch.weights).loss
        else:
            taught = distillation(scores, batch.teacher, batch.weights, setting.tune.temperature)
        loss = (1.0 - share) * loss + share * taught
    return loss / jnp.maximum(sums.count, 1.0) + layers_loss


def classifier_scores(
    setting: Setting,
    params: nn.Params,
    inputs: TokenBatch | Float[Array, "b d"],
    key: Key[Array, ""] | None,
    ngrams: Rows | None = None,
) -> tuple[Float[Array, "b c"], Float[Array, ""] | float]:
    """Return the scores of a batch, or of a probe's features, and the losses of the layers; dropout if `key` is given.

    `ngrams` are the rows of hashed tables, if they were looked up before.
    """
    encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
    if not isinstance(inputs, TokenBatch):
        return nn.classify(params, setting.config, inputs, head_key), 0.0
    hidden, aux = nn.encode(
        params, setting.config, inputs.ids, inputs.segment_ids, key=encoder_key, deterministic=key is None,
        type_ids=inputs.type_ids, ngrams=ngrams,
    )  # fmt: skip
    pooled = nn.pool(setting.config, hidden, inputs.segment_ids != 0)
    return nn.classify(params, setting.config, pooled, head_key), nn.aux_loss(aux)


def cached_features(config: ModelConfig, encoder: nn.Params, rows: Encoded) -> Float[np.ndarray, "rows d"]:
    """Compute the pooled hidden states of each row, which the classifier's pooler reads."""

    def features(params: nn.Params, batch: TokenBatch) -> Float[Array, "1 b d"]:
        hidden, _ = nn.encode({"encoder": params}, config, batch.ids, batch.segment_ids, type_ids=batch.type_ids)
        return nn.pool(config, hidden, batch.segment_ids != 0)[None]

    return predict_rows(jax.jit(features), encoder, rows)[0]


def start_state(params: nn.Params, tune: FinetuneConfig) -> State:
    """Return the state of runs whose parameters are stacked along a first axis."""

    def opt_state(params: nn.Params) -> Any:
        others, tables = split_tables(params)
        return start_tables(make_optimizer(tune).init(others), tables)

    return State(params, jax.vmap(opt_state)(params))


def make_optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    """Make AdamW, after clipping if the configuration says so. Its updates lack the factor -lr."""
    parts = [
        optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=partial(jax.tree.map, lambda leaf: leaf.ndim > 1)),
    ]
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return own_steps_apart(optax.chain(*clip, *parts))


@jax.jit
def pick_runs(better: Bool[Array, " r"], new: nn.Params, old: nn.Params) -> nn.Params:
    """Take the new arrays of the runs that are better, and the old ones of the others."""
    return jax.tree.map(lambda n, o: jnp.where(better.reshape((-1,) + (1,) * (n.ndim - 1)), n, o), new, old)
