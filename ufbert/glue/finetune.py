"""Fine-tune an encoder on one task, several runs (seeds, or learning rates) at once, and score it on dev every epoch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ufbert import nn
from ufbert.config import FinetuneConfig, ModelConfig
from ufbert.data.encode import Encoded, encode_texts
from ufbert.errors import UserError
from ufbert.glue.batches import TrainingRows, epoch_of_runs, predict_rows
from ufbert.glue.results import Point, Scores
from ufbert.glue.scores import dev_metrics
from ufbert.glue.step import (
    FinetuneSteps,
    Setting,
    State,
    cached_features,
    finetune_steps,
    learning_rate,
    pick_runs,
    start_state,
)
from ufbert.glue.tasks import Examples, Task, TaskData
from ufbert.hub.folder import ModelFolder, TaskInfo, with_task

Progress = Callable[[int, int, str], None]
"""Is told (updates done, updates in all, what happens)."""


class Run(NamedTuple):
    """What tells one run of a task from another."""

    seed: int
    """Of the head, the row order and dropout."""
    lr: float
    """Peak learning rate."""


class Trace(NamedTuple):
    """The record of a run, besides its weights."""

    curve: list[Point]
    """The mean training loss of each epoch, and the dev metrics after it."""
    losses: Float[np.ndarray, " updates"]
    """Training loss of each update."""
    scores: dict[str, Float[np.ndarray, "rows c"]]
    """By dev and test split, the classifier's scores in the labels' unit."""
    truncated: int
    """Rows of all splits that were cut to the longest row a model reads."""


class Diverged(NamedTuple):
    """A run with a loss, or with scores of its last weights, that are not finite."""

    run: Run
    update: int
    """The first such update, counted from 1."""


class Tuned(NamedTuple):
    """The outcome of one run."""

    run: Run
    model: ModelFolder
    metrics: dict[str, Scores]
    """By dev split, of the weights in `model`."""
    trace: Trace


class TargetScale(NamedTuple):
    """Regression targets are learnt standardised, because a small head reaches 0 to 5 too slowly."""

    mean: float
    spread: float

    def restore(self, scores: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Turn the classifier's scores into the labels' unit."""
        return scores * self.spread + self.mean

    def standardise(self, labels: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        return (labels - self.mean) / self.spread


class _EncodedTask(NamedTuple):
    """All that the runs of a task read."""

    data: TaskData
    training: TrainingRows
    splits: dict[str, Encoded | Float[np.ndarray, "rows d"]]
    """The rows of each dev and test split, or a probe's features of them."""
    scale: TargetScale
    truncated: int

    def scores(self, steps: FinetuneSteps, params: nn.Params, split: str) -> Float[np.ndarray, "r rows c"]:
        """Score a split with every run, in the labels' unit."""
        return self.scale.restore(predict_rows(steps.predict, params, self.splits[split]))


def finetune_task(
    model: ModelFolder,
    data: TaskData,
    tune: FinetuneConfig,
    runs: list[Run],
    *,
    from_scratch: bool = False,
    probe: bool = False,
    teacher: ModelFolder | None = None,
    keep_best: bool = False,
    progress: Progress = lambda done, total, event: None,
) -> list[Tuned | Diverged]:
    """Fine-tune `model`'s encoder under a fresh classifier, once for each of `runs`, all at once.

    The classifier's pooler is the model's, or its old classifier's, if it has one. `from_scratch` starts each run from random
    weights instead. `probe` leaves the encoder as it is. A `teacher` for the same task has its scores learnt along with the
    labels. The weights of the last epoch are kept, or with `keep_best` those of the best one on dev.
    """
    if tune.pooling != "model":
        model = replace(model, config=replace(model.config, pooling=tune.pooling))
    config = replace(model.config, dropout=tune.dropout)
    params = start_params(model, config, data.task, runs, from_scratch)
    encoded = _encode_task(model, config, data, tune, teacher, params["encoder"] if probe else None)
    state = start_state({"classifier": params["classifier"]} if probe else params, tune)
    steps = finetune_steps(Setting(config=config, tune=tune, is_regression=data.task.is_regression))
    keys = jnp.stack([jax.random.split(jax.random.key(run.seed))[1] for run in runs])
    losses = np.zeros((0, len(runs)), np.float32)
    curves: list[list[Point]] = [[] for _ in runs]
    best, best_metric, stale_epochs = None, np.full(len(runs), -np.inf), 0
    for epoch in range(tune.epochs):
        state, new_losses = _train_epoch(steps, state, encoded.training, tune, runs, keys, epoch, progress)
        losses = np.concatenate([losses, new_losses])
        if not np.isfinite(losses).all(axis=0).any():
            break  # every run has diverged
        metrics = _epoch_metrics(encoded, steps, state.params, len(runs))
        for curve, loss, scores in zip(curves, new_losses.mean(axis=0), metrics, strict=True):
            curve.append({"epoch": epoch + 1, "loss": float(loss), **scores})
        metric = np.array([scores[data.task.metrics[0]] for scores in metrics])
        points = " ".join(f"{100 * value:.1f}" for value in metric)
        total = tune.epochs * len(new_losses)
        progress(len(losses), total, f"epoch {epoch + 1}/{tune.epochs}, dev {data.task.metrics[0]} {points}")
        better = metric > best_metric
        best_metric, stale_epochs = np.where(better, metric, best_metric), 0 if better.any() else stale_epochs + 1
        if keep_best:
            best = pick_runs(better, state.params, state.params if best is None else best)
        if tune.early_stop and stale_epochs >= tune.early_stop:
            break
    return _outcomes(model, encoded, steps, state.params if best is None else best, runs, curves, losses)


def _encode_task(
    model: ModelFolder,
    config: ModelConfig,
    data: TaskData,
    tune: FinetuneConfig,
    teacher: ModelFolder | None,
    encoder: nn.Params | None,
) -> _EncodedTask:
    """Encode a task's rows, and with the `encoder` of every run compute a probe's features of them."""
    rows = encode_texts(model.tokenizer, data.train.texts, data.train.pairs, config, tune.max_len)
    splits = {name: _encode(model, examples, tune) for name, examples in (data.dev | data.test).items()}
    truncated = rows.truncated + sum(split.truncated for split in splits.values())
    labels = np.asarray(data.train.labels, float)
    is_regression = data.task.is_regression
    scale = TargetScale(float(labels.mean()), float(labels.std()) or 1.0) if is_regression else TargetScale(0.0, 1.0)
    taught = None if teacher is None else scale.standardise(teacher_scores(teacher, data.train, tune))
    features = None
    if encoder is not None:
        shared = jax.tree.map(lambda leaf: leaf[0], encoder)  # the same for every run
        features = cached_features(config, shared, rows)
        splits = {name: cached_features(config, shared, split) for name, split in splits.items()}
    training = TrainingRows(rows, features, scale.standardise(labels).astype(np.float32), taught)
    return _EncodedTask(data, training, {**splits}, scale, truncated)


def _encode(model: ModelFolder, examples: Examples, tune: FinetuneConfig) -> Encoded:
    return encode_texts(model.tokenizer, examples.texts, examples.pairs, model.config, tune.max_len)


def teacher_scores(teacher: ModelFolder, examples: Examples, tune: FinetuneConfig) -> Float[np.ndarray, "rows c"]:
    """Score rows with a fine-tuned model. Raises UserError if a score is not finite."""
    steps = finetune_steps(Setting(config=teacher.config, tune=tune))
    stacked = jax.tree.map(lambda leaf: leaf[None], teacher.params)
    scores = predict_rows(steps.predict, stacked, _encode(teacher, examples, tune))[0].astype(np.float32)
    if not np.isfinite(scores).all():
        raise UserError("The teacher's scores are not finite; fine-tune another teacher, at a lower rate (--tune.lr).")
    return scores


def start_params(model: ModelFolder, config: ModelConfig, task: Task, runs: list[Run], from_scratch: bool) -> nn.Params:
    """Return the parameters of every run, stacked along a first axis."""

    def of_run(run: Run) -> nn.Params:
        head_key, _ = jax.random.split(jax.random.key(run.seed))
        encoder = model.params["encoder"]
        if from_scratch:
            encoder = nn.init(config, jax.random.key(run.seed), heads=())["encoder"]
        classifier = nn.init_classifier(config, head_key, task.n_outputs)
        pooler = model.params.get("pooler") or model.params.get("classifier", {}).get("pooler")
        if pooler and not from_scratch:
            classifier = {**classifier, "pooler": pooler}
        return {"encoder": encoder, "classifier": classifier}

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(of_run, runs))


def _train_epoch(
    steps: FinetuneSteps,
    state: State,
    rows: TrainingRows,
    tune: FinetuneConfig,
    runs: list[Run],
    keys: Key[Array, " r"],
    epoch: int,
    progress: Progress,
) -> tuple[State, Float[np.ndarray, "updates r"]]:
    """Train every run on all rows once; return their state and the loss of each update."""
    peaks = np.array([run.lr for run in runs], np.float32)
    updates = math.ceil(len(rows.targets) / tune.batch_rows)
    total, losses = updates * tune.epochs, []
    batches = epoch_of_runs(rows, tune.batch_rows, [run.seed for run in runs], epoch)
    for step, batch in enumerate(batches, epoch * updates):
        lr = peaks * np.float32(learning_rate(step, total, tune))
        state, loss = steps.update(state, batch, keys, np.int32(step), lr)
        losses.append(loss)
        progress(step + 1, total, f"epoch {epoch + 1}/{tune.epochs}")
    return state, np.stack([np.asarray(loss) for loss in losses])  # read at the epoch's end, so that updates are queued


def _epoch_metrics(encoded: _EncodedTask, steps: FinetuneSteps, params: nn.Params, n_runs: int) -> list[Scores]:
    """Compute each run's metrics on the dev split that decides."""
    split, data = encoded.data.deciding_split, encoded.data
    scores = encoded.scores(steps, params, split)
    deciding = data._replace(dev={split: data.dev[split]})
    return [dev_metrics(deciding, {split: scores[i]})[split] for i in range(n_runs)]


def _outcomes(
    model: ModelFolder,
    encoded: _EncodedTask,
    steps: FinetuneSteps,
    params: nn.Params,
    runs: list[Run],
    curves: list[list[Point]],
    losses: Float[np.ndarray, "updates r"],
) -> list[Tuned | Diverged]:
    """Score all splits with the weights that are kept, and tell the runs that diverged from those that did not."""
    scores = {split: encoded.scores(steps, params, split) for split in encoded.splits}
    outcomes: list[Tuned | Diverged] = []
    for i, run in enumerate(runs):
        trace = Trace(curves[i], losses[:, i], {split: of[i] for split, of in scores.items()}, encoded.truncated)
        if update := _first_bad_update(trace):
            outcomes.append(Diverged(run, update))
            continue
        metrics = dev_metrics(encoded.data, trace.scores)
        params_of_run = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        tuned = _tuned_model(model, encoded, params_of_run, metrics[encoded.data.deciding_split])
        outcomes.append(Tuned(run, tuned, metrics, trace))
    return outcomes


def _first_bad_update(trace: Trace) -> int:
    """Return the first update, from 1, whose loss is not finite; the last one if its weights' scores are not; 0 for none."""
    bad = np.flatnonzero(~np.isfinite(trace.losses))
    if len(bad):
        return int(bad[0]) + 1
    return 0 if all(np.isfinite(scores).all() for scores in trace.scores.values()) else len(trace.losses)


def _tuned_model(
    model: ModelFolder, encoded: _EncodedTask, params: Mapping[str, nn.Params], metrics: Scores
) -> ModelFolder:
    """Return the model folder of a run, whose classifier answers in the labels' unit."""
    task, scale, out = encoded.data.task, encoded.scale, params["classifier"]["out"]
    out = {"kernel": out["kernel"] * scale.spread, "bias": out["bias"] * scale.spread + scale.mean}
    base = replace(model, params={"encoder": params.get("encoder", model.params["encoder"])})
    return with_task(base, {**params["classifier"], "out": out}, TaskInfo(task.name, task.label_names, metrics))
