"""Fine-tune an encoder on one task: AdamW, cosine decay after a warm-up, length buckets, the score on dev."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ufbert import nn
from ufbert.config import FinetuneConfig, ModelConfig
from ufbert.data.encode import Encoded, encode_texts
from ufbert.errors import UserError
from ufbert.glue.metrics import score
from ufbert.glue.sources import Rows
from ufbert.glue.tasks import Task
from ufbert.hub.folder import ModelFolder, TaskInfo, with_task
from ufbert.ops.losses import cross_entropy, squared_error

EVAL_ROWS = 64


class Tuned(NamedTuple):
    """The outcome of one task and seed."""

    model: ModelFolder
    metrics: dict[str, float]
    """Dev metrics after the last epoch."""
    curve: list[dict[str, float]]
    """Training loss and dev metrics after each epoch."""


class _State(NamedTuple):
    params: Any
    opt_state: Any


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear rise over `warmup * total` updates, then half a cosine to zero at `total`."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def finetune_task(
    model: ModelFolder,
    task: Task,
    train: Rows,
    dev: Rows,
    config: FinetuneConfig,
    seed: int,
    progress: Callable[[str], None] = lambda message: None,
) -> Tuned:
    """Fine-tune every weight of `model`'s encoder under a fresh classifier and score it on dev after each epoch."""
    if len(train.labels) < config.batch_rows:
        raise UserError(
            f"{task.name} has {len(train.labels)} training rows, fewer than one batch of {config.batch_rows}."
        )
    rows = encode_texts(model.tokenizer, train.texts, train.pairs, model.config, config.max_len)
    dev_rows = encode_texts(model.tokenizer, dev.texts, dev.pairs, model.config, config.max_len)
    mean, spread = _target_scale(task, train)
    targets = ((np.asarray(train.labels) - mean) / spread).astype(np.float32)
    head_key, step_key = jax.random.split(jax.random.key(seed))
    encoder = jax.tree.map(jnp.array, model.params["encoder"])  # copied: the update donates its input
    params = {"encoder": encoder, "classifier": nn.init_classifier(model.config, head_key, task.n_outputs)}
    optimizer = _optimizer(config)
    update = _build_update(model.config, task, optimizer)
    predict = build_predict(model.config)
    state = _State(params, optimizer.init(params))
    per_epoch = len(targets) // config.batch_rows
    total, step, curve, metrics = per_epoch * config.epochs, 0, [], {}
    for epoch in range(config.epochs):
        losses = []
        for picks in _epoch_batches(rows, config.batch_rows, np.random.default_rng([seed, epoch])):
            batch = rows.pad(picks)
            lr = learning_rate(step, total, config.peak_lr(model.config), config.warmup)
            key = jax.random.fold_in(step_key, step)
            state, loss = update(state, batch, targets[picks], key, np.float32(lr))
            losses.append(loss)
            step += 1
            if step % 20 == 0:
                progress(f"{task.name} seed {seed}: epoch {epoch + 1}/{config.epochs}, update {step:,}/{total:,}")
        scores = predict_rows(predict, state.params, dev_rows) * spread + mean
        metrics = score(task.metrics, decide(task, scores), np.asarray(dev.labels))
        curve.append({"epoch": epoch + 1, "loss": float(np.mean([float(x) for x in losses])), **metrics})
        progress(f"{task.name} seed {seed}: epoch {epoch + 1}/{config.epochs}, {format_metrics(metrics)}")
    info = TaskInfo(task.name, task.label_names, metrics)
    classifier = _rescaled(state.params["classifier"], mean, spread)
    tuned = with_task(replace(model, params={"encoder": state.params["encoder"]}), classifier, info)
    return Tuned(tuned, metrics, curve)


def _target_scale(task: Task, train: Rows) -> tuple[float, float]:
    """Mean and spread of regression targets, which are learnt standardised: a small head reaches 0 to 5 too slowly."""
    if not task.is_regression:
        return 0.0, 1.0
    return float(np.mean(train.labels)), float(np.std(train.labels)) or 1.0


def _rescaled(classifier: Any, mean: float, spread: float) -> Any:
    """The classifier whose outputs are `spread * outputs + mean`."""
    out = {"kernel": classifier["out"]["kernel"] * spread, "bias": classifier["out"]["bias"] * spread + mean}
    return {**classifier, "out": out}


def decide(task: Task, scores: np.ndarray) -> np.ndarray:
    """Class numbers, or values for regression, from classifier scores (rows, outputs)."""
    return scores[:, 0] if task.is_regression else scores.argmax(axis=-1)


def format_metrics(metrics: dict[str, float]) -> str:
    """`accuracy 81.4, f1 85.0`, in points of a hundred."""
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items())


def build_predict(config: ModelConfig) -> Callable[..., Any]:
    """Jitted (params, batch) -> classifier scores (rows, outputs), without dropout."""

    def predict(params: Any, batch: Any) -> Any:
        hidden, _ = nn.encode(params, config, batch.ids, batch.segment_ids, type_ids=batch.type_ids)
        return nn.classify(params, config, hidden, batch.segment_ids)

    return jax.jit(predict)


def predict_rows(predict: Callable[..., Any], params: Any, rows: Encoded) -> np.ndarray:
    """Classifier scores of every row, in order; rows of like length share a batch."""
    order = np.argsort([len(ids) for ids in rows.ids], kind="stable")
    scores: list[np.ndarray | None] = [None] * len(order)
    for start in range(0, len(order), EVAL_ROWS):
        picks = order[start : start + EVAL_ROWS]
        padded = np.concatenate([picks, np.repeat(picks[-1:], EVAL_ROWS - len(picks))])
        found = np.asarray(predict(params, rows.pad(padded)))
        for i, row in zip(picks, found, strict=False):
            scores[i] = row
    return np.stack([row for row in scores if row is not None])


def _epoch_batches(rows: Encoded, batch_rows: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffled batches. Rows are sorted by length within pools of 50 batches, so padding is small and order random."""
    order = rng.permutation(len(rows.ids))
    lengths = np.array([len(ids) for ids in rows.ids])
    batches = []
    for start in range(0, len(order), 50 * batch_rows):
        pool = order[start : start + 50 * batch_rows]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_rows] for i in range(0, len(pool) - batch_rows + 1, batch_rows)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        optax.add_decayed_weights(config.weight_decay),
    )


def _build_update(config: ModelConfig, task: Task, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Jitted (state, batch, targets, key, lr) -> (state, mean loss). The state is donated."""

    def loss_of(params: Any, batch: Any, targets: Any, key: Any) -> Any:
        encoder_key, head_key = jax.random.split(key)
        hidden, aux = nn.encode(
            params, config, batch.ids, batch.segment_ids, key=encoder_key, deterministic=False, type_ids=batch.type_ids
        )
        scores = nn.classify(params, config, hidden, batch.segment_ids, head_key)
        weights = jnp.ones(targets.shape)
        if task.is_regression:
            sums = squared_error(scores[:, 0], targets, weights)
        else:
            sums = cross_entropy(scores, targets.astype(jnp.int32), weights)
        return sums.loss / sums.count + nn.aux_loss(aux)

    def update(state: _State, batch: Any, targets: Any, key: Any, lr: Any) -> tuple[_State, Any]:
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch, targets, key)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, direction)
        return _State(params, opt_state), loss

    return jax.jit(update, donate_argnums=0)
