"""Fine-tune an encoder on one task, several runs (seeds, or learning rates) at once, and score it on dev every epoch."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ufbert import nn
from ufbert.config import FinetuneConfig, ModelConfig
from ufbert.data.encode import Encoded, encode_texts
from ufbert.errors import UserError
from ufbert.glue.batches import TrainingRows, epoch_of_runs, predict_rows
from ufbert.glue.results import Point, Scores
from ufbert.glue.scores import dev_metrics, split_metrics
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
from ufbert.runtime.console import phase

Progress = Callable[[int, int, str], None]
"""Gets updates done, updates in all, and a text about the event."""


class Run(NamedTuple):
    """A run of a task, as opposed to its other runs."""

    seed: int
    """Of the head, the row order and dropout."""
    lr: float
    """Peak learning rate."""


class Trace(NamedTuple):
    """The record of a run, besides its weights."""

    curve: list[Point]
    """The mean training loss of each epoch, and the dev metrics after it."""
    losses: Float[np.ndarray, " updates"]
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


class _Job(NamedTuple):
    """All that the runs of a task have in common."""

    data: TaskData
    tune: FinetuneConfig
    runs: list[Run]
    steps: FinetuneSteps
    training: TrainingRows
    splits: Mapping[str, Encoded | Float[np.ndarray, "rows d"]]
    """The rows of each dev and test split, or a probe's features of them."""
    truncated: int
    mean: float
    spread: float
    """Of the regression targets, which are standardised because a small head reaches 0 to 5 too slowly; 0 and 1 for classes."""

    def scores(self, params: nn.Params, split: str) -> Float[np.ndarray, "r rows c"]:
        """Score a split with every run, in the labels' unit."""
        return predict_rows(self.steps.predict, params, self.splits[split]) * self.spread + self.mean


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
    with phase("tokenising the rows and starting the runs"):
        params = start_params(model, replace(model.config, dropout=tune.dropout), data.task, runs, from_scratch)
        job = _prepare(model, data, tune, runs, teacher, params["encoder"] if probe else None)
        state = start_state({"classifier": params["classifier"]} if probe else params, tune)
    losses = np.zeros((0, len(runs)), np.float32)
    curves: list[list[Point]] = [[] for _ in runs]
    best, best_metric, stale_epochs = None, np.full(len(runs), -np.inf), 0
    for epoch in range(tune.epochs):
        state, new_losses = _train_epoch(job, state, epoch, progress)
        losses = np.concatenate([losses, new_losses])
        if not np.isfinite(losses).all(axis=0).any():
            break  # every run has diverged
        with phase("scoring the dev rows", stays=False):
            scores = job.scores(state.params, data.deciding_split)
        metrics = [split_metrics(data, data.deciding_split, of_run) for of_run in scores]
        for curve, loss, of_run in zip(curves, new_losses.mean(axis=0), metrics, strict=True):
            curve.append({"epoch": epoch + 1, "loss": float(loss), **of_run})
        metric = np.array([of_run[data.task.metrics[0]] for of_run in metrics])
        points = " ".join(f"{100 * value:.1f}" for value in metric)
        event = f"epoch {epoch + 1}/{tune.epochs}, dev {data.task.metrics[0]} {points}"
        progress(len(losses), tune.epochs * len(new_losses), event)
        better = metric > best_metric
        best_metric, stale_epochs = np.where(better, metric, best_metric), 0 if better.any() else stale_epochs + 1
        if keep_best:
            best = pick_runs(better, state.params, state.params if best is None else best)
        if tune.early_stop and stale_epochs >= tune.early_stop:
            break
    return _outcomes(job, model, state.params if best is None else best, curves, losses)


def _prepare(
    model: ModelFolder, data: TaskData, tune: FinetuneConfig, runs: list[Run], teacher: ModelFolder | None, encoder: Any
) -> _Job:
    """Encode a task's rows, and compute a probe's features of them with the `encoder` parameters of every run."""
    config = replace(model.config, dropout=tune.dropout)
    rows = _encode(model, data.train, tune)
    encoded = {name: _encode(model, examples, tune) for name, examples in (data.dev | data.test).items()}
    labels = np.asarray(data.train.labels, float)
    mean, spread = (float(labels.mean()), float(labels.std()) or 1.0) if data.task.is_regression else (0.0, 1.0)
    taught = None if teacher is None else (teacher_scores(teacher, data.train, tune) - mean) / spread
    features, splits = None, {**encoded}
    if encoder is not None:
        shared = jax.tree.map(lambda leaf: leaf[0], encoder)  # the same for every run
        with phase("computing the features of all rows"):
            features = cached_features(config, shared, rows)
            splits = {name: cached_features(config, shared, split) for name, split in encoded.items()}
    training = TrainingRows(rows, features, ((labels - mean) / spread).astype(np.float32), taught)
    truncated = rows.truncated + sum(split.truncated for split in encoded.values())
    steps = finetune_steps(Setting(config=config, tune=tune, is_regression=data.task.is_regression))
    return _Job(data, tune, runs, steps, training, splits, truncated, mean, spread)


def _encode(model: ModelFolder, examples: Examples, tune: FinetuneConfig) -> Encoded:
    return encode_texts(model.tokenizer, examples.texts, examples.pairs, model.config, tune.max_len)


@phase("asking the teacher")
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
    job: _Job, state: State, epoch: int, progress: Progress
) -> tuple[State, Float[np.ndarray, "updates r"]]:
    """Train every run on all rows once; return their state and the loss of each update."""
    tune, runs = job.tune, job.runs
    keys = jnp.stack([jax.random.split(jax.random.key(run.seed))[1] for run in runs])
    peaks = np.array([run.lr for run in runs], np.float32)
    updates = math.ceil(len(job.training.targets) / tune.batch_rows)
    total, losses = updates * tune.epochs, []
    batches = epoch_of_runs(job.training, tune.batch_rows, [run.seed for run in runs], epoch)
    for step, batch in enumerate(batches, epoch * updates):
        lr = peaks * np.float32(learning_rate(step, total, tune))
        shapes = job.data.task.n_outputs, batch.teacher is None, *map(jnp.shape, jax.tree.leaves(batch.inputs))
        with nullcontext() if shapes in job.steps.compiled else phase("compiling the update"):
            state, loss = job.steps.update(state, batch, keys, np.int32(step), lr)
        job.steps.compiled.add(shapes)
        losses.append(loss)
        progress(step + 1, total, f"epoch {epoch + 1}/{tune.epochs}")
    return state, np.stack([np.asarray(loss) for loss in losses])  # read at the epoch's end, so that updates are queued


def _outcomes(
    job: _Job, model: ModelFolder, params: Any, curves: list[list[Point]], losses: Float[np.ndarray, "updates r"]
) -> list[Tuned | Diverged]:
    """Score all splits with the weights that are kept, and tell the runs that diverged from those that did not."""
    with phase("scoring the rows of every split"):
        scores = {split: job.scores(params, split) for split in job.splits}
    outcomes: list[Tuned | Diverged] = []
    for i, run in enumerate(job.runs):
        trace = Trace(curves[i], losses[:, i], {split: of[i] for split, of in scores.items()}, job.truncated)
        if update := _first_bad_update(trace):
            outcomes.append(Diverged(run, update))
            continue
        metrics = dev_metrics(job.data, trace.scores)
        params_of_run = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        outcomes.append(Tuned(run, _tuned_model(job, model, params_of_run, metrics), metrics, trace))
    return outcomes


def _first_bad_update(trace: Trace) -> int:
    """Return the first update, from 1, whose loss is not finite; the last one if its weights' scores are not; 0 for none."""
    bad = np.flatnonzero(~np.isfinite(trace.losses))
    if len(bad):
        return int(bad[0]) + 1
    return 0 if all(np.isfinite(scores).all() for scores in trace.scores.values()) else len(trace.losses)


def _tuned_model(
    job: _Job, model: ModelFolder, params: Mapping[str, nn.Params], metrics: dict[str, Scores]
) -> ModelFolder:
    """Return the model folder of a run, whose classifier answers in the labels' unit."""
    task, out = job.data.task, params["classifier"]["out"]
    out = {"kernel": out["kernel"] * job.spread, "bias": out["bias"] * job.spread + job.mean}
    base = replace(model, params={"encoder": params.get("encoder", model.params["encoder"])})
    info = TaskInfo(task.name, task.label_names, metrics[job.data.deciding_split], pairs=len(task.text) == 2)
    return with_task(base, {**params["classifier"], "out": out}, info)
