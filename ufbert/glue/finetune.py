"""Fine-tune an encoder on one task: several runs (seeds, or learning rates) at once, by `vmap`, scored on dev every epoch.

The arrays of the state have one leading axis, r, for the runs. Each run sees its own batches; their lengths are the same for
all (`batches`), so one jitted update serves every run, and every task of equal shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ufbert import nn
from ufbert.config import FinetuneConfig, ModelConfig
from ufbert.data.encode import Batch, Encoded, encode_texts
from ufbert.errors import UserError
from ufbert.glue.batches import epoch_batches
from ufbert.glue.metrics import score
from ufbert.glue.outcome import decide
from ufbert.glue.rows import Rows, TaskData
from ufbert.glue.tasks import Task
from ufbert.hub.folder import ModelFolder, TaskInfo, with_task
from ufbert.ops.losses import cross_entropy, distillation, squared_error

EVAL_ROWS = 64


class Run(NamedTuple):
    """What tells one run of a task from another."""

    seed: int
    """Of the head, the row order and dropout."""
    lr: float
    """Peak learning rate."""


class Trace(NamedTuple):
    """What a run left besides its weights."""

    curve: list[dict[str, float]]
    """Mean training loss of each epoch, and the metrics of the first dev split after it."""
    losses: np.ndarray
    """(updates,) training loss of each update."""
    scores: dict[str, np.ndarray]
    """By dev and test split, the classifier's scores (rows, outputs), in the labels' unit."""
    truncated: int
    """Rows of all splits that were cut to the longest row a model reads."""


class Diverged(NamedTuple):
    """A run of which something was no finite number: its loss, or the scores of its last weights."""

    run: Run
    update: int
    """At which update first, the first being 1."""


class Tuned(NamedTuple):
    """The outcome of one run."""

    run: Run
    model: ModelFolder
    metrics: dict[str, dict[str, float]]
    """By dev split, of the weights in `model`."""
    trace: Trace


@dataclass(frozen=True)
class Setting:
    """What a jitted update is made for; tasks of equal setting share it."""

    config: ModelConfig
    tune: FinetuneConfig
    is_regression: bool
    probe: bool
    """Whether only the classifier is trained, on features that are kept."""
    taught: bool
    """Whether a teacher's scores are part of the loss."""


class Batches(NamedTuple):
    """One batch of every run: NumPy arrays, in jitted functions traced ones."""

    inputs: Any
    """Batch of (r, b, t) arrays; of a probe, features (r, b, d)."""
    targets: Any
    """(r, b) class numbers or standardised values."""
    weights: Any
    """(r, b), 0 for rows that only fill up a batch."""
    teacher: Any
    """(r, b, c) scores, or None."""


class State(NamedTuple):
    """Parameters and optimizer state of every run."""

    params: Any
    opt_state: Any


class _Target(NamedTuple):
    """How regression targets are learnt: standardised, because a small head reaches 0 to 5 too slowly."""

    mean: float
    spread: float


def learning_rate(step: int, total: int, config: FinetuneConfig) -> float:
    """Share of the peak rate at update `step` of `total`: a linear rise, then a cosine or a line down to zero."""
    rise = max(1, int(config.warmup * total))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, total - rise)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


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
    progress: Callable[[int, int, str], None] = lambda done, of, what: None,
) -> list[Tuned | Diverged]:
    """Fine-tune `model`'s encoder under a fresh classifier (whose pooler is the model's or its classifier's, where it has one),
    once for each of `runs`, all at once.

    `from_scratch` starts each run from random weights instead; `probe` leaves the encoder as it is; a `teacher` for the
    same task has its scores learnt beside the labels. The weights of the last epoch are kept, or with `keep_best` those of
    the best one on dev. `progress` is told (updates done, updates in all, what happens).
    """
    task = data.task
    if tune.pooling != "model":
        model = replace(model, config=replace(model.config, pooling=tune.pooling))
    config = replace(model.config, dropout=tune.dropout)
    setting = Setting(config, tune, task.is_regression, probe, teacher is not None)
    steps = steps_of(setting)
    rows = encode_texts(model.tokenizer, data.train.texts, data.train.pairs, config, tune.max_len)
    held = {name: _encoded(model, part, tune) for name, part in (data.dev | data.test).items()}
    target = _target_of(task, data.train)
    targets = ((np.asarray(data.train.labels) - target.mean) / target.spread).astype(np.float32)
    taught = None if teacher is None else (scores_of(teacher, data.train, tune) - target.mean) / target.spread
    params = start_params(model, config, task, runs, from_scratch)
    features, truncated = None, rows.truncated + sum(part.truncated for part in held.values())
    if probe:
        encoder = jax.tree.map(lambda leaf: leaf[0], params["encoder"])  # the same for every run
        features = cached_features(config, encoder, rows)
        held = {name: cached_features(config, encoder, part) for name, part in held.items()}
        params = {"classifier": params["classifier"]}
    state = start_state(params, tune)
    keys = jnp.stack([jax.random.split(jax.random.key(run.seed))[1] for run in runs])
    peaks = np.array([run.lr for run in runs], np.float32)
    total = math.ceil(len(targets) / tune.batch_rows) * tune.epochs
    curves: list[list[dict[str, float]]] = [[] for _ in runs]
    best, best_score, stale, step = None, np.full(len(runs), -np.inf), 0, 0
    losses: list[Any] = []
    for epoch in range(tune.epochs):
        before = len(losses)
        for batches in _epoch(rows, features, targets, taught, runs, epoch, tune.batch_rows):
            lr = peaks * np.float32(learning_rate(step, total, tune))
            state, loss = steps.update(state, batches, keys, np.int32(step), lr)
            losses.append(loss)
            step += 1
            progress(step, total, f"epoch {epoch + 1}/{tune.epochs}")
        scores = {name: _rescaled(predict_rows(steps.predict, state.params, held[name]), target) for name in data.dev}
        losses[before:] = [np.asarray(loss) for loss in losses[before:]]
        if not np.isfinite(losses).all(axis=0).any():
            break  # no run is left
        found = [metrics_of(data, {name: of_runs[i] for name, of_runs in scores.items()}) for i in range(len(runs))]
        mean = np.mean(losses[before:], axis=0)
        for i, metrics in enumerate(found):
            curves[i].append({"epoch": epoch + 1, "loss": float(mean[i]), **metrics[task_split(data)]})
        score_now = np.array([metrics[task_split(data)][task.metrics[0]] for metrics in found])
        progress(step, total, f"epoch {epoch + 1}/{tune.epochs}, dev {task.metrics[0]} {_points(score_now)}")
        better = score_now > best_score
        best_score, stale = np.where(better, score_now, best_score), 0 if better.any() else stale + 1
        if keep_best:
            best = _chosen(better, state.params, state.params if best is None else best)
        if tune.early_stop and stale >= tune.early_stop:
            break
    kept = state.params if best is None else best
    scores = {name: _rescaled(predict_rows(steps.predict, kept, part), target) for name, part in held.items()}
    return [
        _outcome(
            run, data, model, jax.tree.map(lambda leaf, i=i: leaf[i], kept), target,
            Trace(curves[i], np.stack(losses)[:, i], {name: found[i] for name, found in scores.items()}, truncated),
        )
        for i, run in enumerate(runs)
    ]  # fmt: skip


def _first_bad_update(trace: Trace) -> int:
    """The first update, from 1, whose loss is not finite, or the last one if its weights' scores are not; 0 for none."""
    bad = np.flatnonzero(~np.isfinite(trace.losses))
    if len(bad):
        return int(bad[0]) + 1
    return 0 if all(np.isfinite(scores).all() for scores in trace.scores.values()) else len(trace.losses)


def task_split(data: TaskData) -> str:
    """The dev split that decides."""
    return next(iter(data.dev))


def _encoded(model: ModelFolder, rows: Rows, tune: FinetuneConfig) -> Encoded:
    return encode_texts(model.tokenizer, rows.texts, rows.pairs, model.config, tune.max_len)


def _target_of(task: Task, train: Rows) -> _Target:
    if not task.is_regression:
        return _Target(0.0, 1.0)
    return _Target(float(np.mean(train.labels or [0.0])), float(np.std(train.labels or [0.0])) or 1.0)


def start_params(model: ModelFolder, config: ModelConfig, task: Task, runs: list[Run], from_scratch: bool) -> Any:
    """Parameters of every run, stacked."""

    def one(run: Run) -> Any:
        head_key, _ = jax.random.split(jax.random.key(run.seed))
        encoder = model.params["encoder"]
        if from_scratch:
            encoder = nn.init(config, jax.random.key(run.seed), heads=())["encoder"]
        classifier = nn.init_classifier(config, head_key, task.n_outputs)
        pooler = model.params.get("pooler") or model.params.get("classifier", {}).get("pooler")
        if pooler and not from_scratch:
            classifier = {**classifier, "pooler": pooler}
        return {"encoder": encoder, "classifier": classifier}

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[one(run) for run in runs])


def _epoch(
    rows: Encoded,
    features: np.ndarray | None,
    targets: np.ndarray,
    teacher: np.ndarray | None,
    runs: list[Run],
    epoch: int,
    batch_rows: int,
) -> Any:
    """The batches of an epoch, one of every run at a time."""
    orders = {run.seed: epoch_batches(rows, batch_rows, run.seed, epoch) for run in runs}
    for together in zip(*(orders[run.seed] for run in runs), strict=True):
        picks = np.stack([one.picks for one in together])
        weights = np.stack([one.weights for one in together])
        if features is None:
            padded = [rows.pad(one.picks, one.length) for one in together]
            inputs: Any = Batch(*(np.stack(arrays) for arrays in zip(*padded, strict=True)))
        else:
            inputs = features[picks]
        yield Batches(inputs, targets[picks], weights, None if teacher is None else teacher[picks])


class Steps(NamedTuple):
    """Jitted functions of one setting, over all runs."""

    update: Callable[..., Any]
    """(state, batches, keys, step, lr (r,)) -> (state, mean losses (r,)). The state is donated."""
    predict: Callable[..., Any]
    """(params, one batch for all runs) -> classifier scores (r, rows, outputs), without dropout."""


@lru_cache(maxsize=32)
def steps_of(setting: Setting) -> Steps:
    """The jitted functions of a setting, made once."""
    optimizer = _optimizer(setting.tune)

    def loss_of(params: Any, batch: Batches, key: Any) -> Any:
        scores, extra = classifier_scores(setting, params, batch.inputs, key)
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
        return loss / jnp.maximum(sums.count, 1.0) + extra

    def update_one(state: State, batch: Batches, key: Any, step: Any, lr: Any) -> tuple[State, Any]:
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch, jax.random.fold_in(key, step))
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, direction)
        return State(params, opt_state), loss

    def predict_one(params: Any, inputs: Any) -> Any:
        return classifier_scores(setting, params, inputs, None)[0]

    return Steps(
        jax.jit(jax.vmap(update_one, in_axes=(0, 0, 0, None, 0)), donate_argnums=0),
        jax.jit(jax.vmap(predict_one, in_axes=(0, None))),
    )


def classifier_scores(setting: Setting, params: Any, inputs: Any, key: Any) -> tuple[Any, Any]:
    """Scores (b, c) and what layers add to the loss; with a key as in training, without as in inference."""
    encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
    if setting.probe:
        return nn.classify(params, setting.config, inputs, head_key), 0.0
    hidden, aux = nn.encode(
        params, setting.config, inputs.ids, inputs.segment_ids, key=encoder_key, deterministic=key is None,
        type_ids=inputs.type_ids,
    )  # fmt: skip
    pooled = nn.pool(setting.config, hidden, inputs.segment_ids != 0)
    return nn.classify(params, setting.config, pooled, head_key), nn.aux_loss(aux)


def start_state(params: Any, tune: FinetuneConfig) -> State:
    """The state of runs whose parameters are stacked along a first axis."""
    return State(params, jax.vmap(_optimizer(tune).init)(params))


def _optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    parts = [
        optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=partial(jax.tree.map, lambda leaf: leaf.ndim > 1)),
    ]
    return optax.chain(*([optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []), *parts)


@jax.jit
def _chosen(better: Any, new: Any, old: Any) -> Any:
    """Per run, the new arrays where they are better."""
    return jax.tree.map(lambda n, o: jnp.where(better.reshape((-1,) + (1,) * (n.ndim - 1)), n, o), new, old)


def predict_rows(predict: Callable[..., Any], params: Any, rows: Encoded | np.ndarray) -> np.ndarray:
    """Scores (r, rows, outputs) of encoded rows or of features (rows, d), in order; rows of like length share a batch."""
    lengths = [len(ids) for ids in rows.ids] if isinstance(rows, Encoded) else np.zeros(len(rows))
    order = np.argsort(lengths, kind="stable")
    found = []
    for start in range(0, len(order), EVAL_ROWS):
        picks = np.resize(order[start : start + EVAL_ROWS], EVAL_ROWS)
        inputs = rows.pad(picks) if isinstance(rows, Encoded) else rows[picks]
        found.append(np.asarray(predict(params, inputs)))
    return np.concatenate(found, axis=1)[:, : len(order)][:, np.argsort(order)]


def cached_features(config: ModelConfig, encoder: Any, rows: Encoded) -> np.ndarray:
    """(rows, d): what the classifier's pooler reads of each row."""

    def features(params: Any, batch: Any) -> Any:
        hidden, _ = nn.encode({"encoder": params[0]}, config, batch.ids, batch.segment_ids, type_ids=batch.type_ids)
        return nn.pool(config, hidden, batch.segment_ids != 0)[None]

    return predict_rows(jax.jit(features), [encoder], rows)[0]


def scores_of(model: ModelFolder, rows: Rows, tune: FinetuneConfig) -> np.ndarray:
    """The scores (rows, outputs) of a fine-tuned model folder."""
    setting = Setting(model.config, tune, False, False, False)
    encoded = _encoded(model, rows, tune)
    stacked = jax.tree.map(lambda leaf: leaf[None], model.params)
    scores = predict_rows(steps_of(setting).predict, stacked, encoded)[0].astype(np.float32)
    if not np.isfinite(scores).all():
        raise UserError(
            "The teacher's scores are no finite numbers; fine-tune another teacher, at a lower rate (--tune.lr)."
        )
    return scores


def _rescaled(scores: np.ndarray, target: _Target) -> np.ndarray:
    return scores * target.spread + target.mean


def metrics_of(data: TaskData, scores: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """By dev split, the task's metrics of scores (rows, outputs); what is no finite number counts as 0."""
    finite = {name: np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0) for name, found in scores.items()}
    return {
        name: score(data.task.metrics, decide(data.task, finite[name]), np.asarray(rows.labels))
        for name, rows in data.dev.items()
    }


def _outcome(
    run: Run, data: TaskData, model: ModelFolder, params: Any, target: _Target, trace: Trace
) -> Tuned | Diverged:
    """A run's scores and its model folder, whose classifier answers in the labels' unit."""
    if update := _first_bad_update(trace):
        return Diverged(run, update)
    metrics = metrics_of(data, trace.scores)
    info = TaskInfo(data.task.name, data.task.label_names, metrics[task_split(data)])
    out = params["classifier"]["out"]
    out = {"kernel": out["kernel"] * target.spread, "bias": out["bias"] * target.spread + target.mean}
    base = replace(model, params={"encoder": params.get("encoder", model.params["encoder"])})
    return Tuned(run, with_task(base, {**params["classifier"], "out": out}, info), metrics, trace)


def format_metrics(metrics: dict[str, float]) -> str:
    """`accuracy 81.4, f1 85.0`, in points of a hundred."""
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items())


def _points(values: np.ndarray) -> str:
    return " ".join(f"{100 * value:.1f}" for value in values)
