"""The rows that a compression tunes, calibrates and scores on: those of a task, or text."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from ufbert import nn
from ufbert.config import DataConfig, FinetuneConfig, ModelConfig, PretrainConfig, RunConfig
from ufbert.data.encode import Encoded, encode_texts
from ufbert.data.prepared import PreparedData
from ufbert.data.shards import RowOrder
from ufbert.data.tokenizer import special_ids
from ufbert.errors import UserError
from ufbert.glue.batches import Batches, TokenBatch, epoch_batches, predict_rows
from ufbert.glue.run import read_tasks, subset
from ufbert.glue.scores import dev_metrics
from ufbert.glue.step import Setting, finetune_steps
from ufbert.glue.tasks import Examples, Task, TaskData
from ufbert.hub.folder import ModelFolder
from ufbert.inference.engine import Engine
from ufbert.ops.losses import Sums, cross_entropy, distillation, squared_error
from ufbert.options.compress import CompressOptions
from ufbert.options.train import TextOptions
from ufbert.pretrain.corpus import locate_rows, prepare_rows
from ufbert.pretrain.evaluation import evaluate, heldout_of
from ufbert.pretrain.sharding import Layout
from ufbert.pretrain.step import build_steps, document_segments, mask_rows
from ufbert.runtime.console import phase


class Outputs(NamedTuple):
    """What a model makes of a batch."""

    sums: Sums
    """Of the loss of labels or masked words; `extra` is the layers' own, times `count`."""
    logits: Float[Array, "n c"]
    """The classifier's scores, or the logits of masked words."""
    weights: Float[Array, " n"]
    """0 for what only fills up, else 1."""
    hidden: tuple[Float[Array, "b t d"], ...]
    """The residual stream above each layer, bottom first."""
    real: Bool[Array, "b t"]
    """False on padding."""


class Material(ABC):
    """Rows and the loss on them."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores, the deciding one first."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """Unit of a loss in the deciding score: points or nats."""

    @abstractmethod
    def batch(self, step: int) -> Any:
        """Return the rows of update `step`, as arrays."""

    @abstractmethod
    def tokens(self, step: int) -> TokenBatch:
        """Return the tokens of those rows, as a model reads them."""

    @abstractmethod
    def outputs(
        self, config: ModelConfig, params: nn.Params, batch: Any, key: Key[Array, ""], *, training: bool
    ) -> Outputs:
        """Compute what a model makes of a batch: with noise and dropout in `training`. Equal keys mask equal words."""

    @abstractmethod
    def taught(self, student: Outputs, teacher: Outputs, temperature: float) -> Float[Array, ""]:
        """Sum the distance of the student's logits from the teacher's, over the rows or words that count."""

    @abstractmethod
    def score(self, model: ModelFolder) -> dict[str, float]:
        """Score a model by every name of `metrics`."""

    @abstractmethod
    def lost(self, before: float, after: float) -> float:
        """Return what the deciding score lost, in `unit`; negative for a gain."""

    @abstractmethod
    def describe(self) -> str:
        """Name the rows for a reader."""


def read_material(options: CompressOptions, model: ModelFolder) -> Material | None:
    """Read the rows that the options name; None if they name none.

    Raises UserError if the model lacks the head for them, and for what cannot be read.
    """
    is_task = bool(options.tasks) or options.is_custom
    if is_task and options.corpus:
        raise UserError("Give a task or --corpus, not both: a model is scored by one of them.")
    if is_task:
        return _task_material(options, model)
    return _text_material(options, model) if options.corpus else None


def _task_material(options: CompressOptions, model: ModelFolder) -> "TaskMaterial":
    if "classifier" not in model.heads or model.task is None:
        raise UserError(
            f"{options.folder} has no classifier, so it cannot be tuned on a task; fine-tune it first (ufbert finetune), or "
            "give --corpus to tune it on text."
        )
    skipped, tasks = read_tasks(options)
    if len(tasks) != 1:
        names = [data.task.name for data in tasks] or skipped
        raise UserError(f"--tasks names {', '.join(names) or 'nothing'}; a model is tuned on one task.")
    (data,) = tasks
    if model.task.labels != data.task.label_names or model.task.independent:
        theirs = ", ".join(model.task.labels) or "a value"
        raise UserError(
            f"{options.folder} was fine-tuned for the labels {theirs}, and {data.task.folder} has "
            f"{', '.join(data.task.label_names) or 'a value'}."
        )
    if options.train_rows:
        data = data._replace(train=subset(data.train, options.train_rows, options.seed))
    with phase("tokenising the rows"):
        return TaskMaterial(data, model, options.max_len, options.batch_rows, options.seed)


@phase("reading the text", stays=False)
def _text_material(options: CompressOptions, model: ModelFolder) -> "TextMaterial":
    if "masked_lm" not in model.heads:
        raise UserError(
            f"{options.folder} has no masked-LM head, so it cannot be tuned on text; give its task (--tasks), or a model "
            "folder that has the head."
        )
    config = model.config
    seq_len = config.only_len or min(options.max_len or config.max_len, config.max_len)
    data = DataConfig(seq_len=seq_len, max_tokens=options.max_tokens)
    text = TextOptions(
        model=config, data=data, corpus=options.corpus, prepared=options.prepared, init_from=options.folder
    )
    rows = prepare_rows(locate_rows(text), 0.0)
    return TextMaterial(config, rows, data, options.corpus, options.batch_rows, options.seed)


@dataclass(frozen=True)
class TaskMaterial(Material):
    """The rows of a task."""

    data: TaskData
    model: ModelFolder
    """The model that reads them first; all others read them by its tokenizer."""
    max_len: int
    batch_rows: int
    seed: int

    @property
    def task(self) -> Task:
        return self.data.task

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.task.metrics

    @property
    def unit(self) -> str:
        return "points"

    @cached_property
    def rows(self) -> Encoded:
        """The training rows, encoded."""
        return self._encode(self.data.train)

    @cached_property
    def dev(self) -> dict[str, Encoded]:
        """The rows of each dev split, encoded."""
        return {split: self._encode(examples) for split, examples in self.data.dev.items()}

    @cached_property
    def labels(self) -> Float[np.ndarray, " rows"]:
        """Class numbers, or values."""
        return np.asarray(self.data.train.labels, np.float32)

    def _encode(self, examples: Examples) -> Encoded:
        model = self.model
        return encode_texts(model.tokenizer, examples.texts, examples.pairs, model.config, self.max_len)

    def batch(self, step: int) -> Batches:
        each = -(-len(self.labels) // self.batch_rows)
        picks, weights, length = self._epoch(step // each)[step % each]
        inputs = TokenBatch(*map(jnp.asarray, self.rows.pad(picks, length)))
        return Batches(inputs, jnp.asarray(self.labels[picks]), jnp.asarray(weights), None)

    def tokens(self, step: int) -> TokenBatch:
        inputs = self.batch(step).inputs
        assert isinstance(inputs, TokenBatch)
        return inputs

    @cached_property
    def _epoch(self) -> Callable[[int], Any]:
        kept: dict[int, Any] = {}

        def epoch(number: int) -> Any:
            if number not in kept:
                kept.clear()
                kept[number] = epoch_batches(self.rows, self.batch_rows, self.seed, number)
            return kept[number]

        return epoch

    @property
    def _variance(self) -> float:
        """Of the values of a regression, by which squared errors are divided."""
        return float(self.labels.var()) or 1.0

    def outputs(
        self, config: ModelConfig, params: nn.Params, batch: Any, key: Key[Array, ""], *, training: bool
    ) -> Outputs:
        encoder_key, head_key = jax.random.split(key) if training else (None, None)
        inputs = batch.inputs
        hidden, aux = nn.encode(
            params, config, inputs.ids, inputs.segment_ids, key=encoder_key, deterministic=not training,
            type_ids=inputs.type_ids, hidden_states=True,
        )  # fmt: skip
        real = inputs.segment_ids != 0
        scores = nn.classify(params, config, nn.pool(config, hidden, real), head_key)
        if self.task.is_regression:
            sums = squared_error(scores[:, 0], batch.targets, batch.weights)
            sums = sums._replace(loss=sums.loss / self._variance)
        else:
            sums = cross_entropy(scores, batch.targets.astype(jnp.int32), batch.weights)
        sums = sums._replace(extra=nn.aux_loss(aux) * sums.count)
        return Outputs(sums, scores, batch.weights, _states(aux), real)

    def taught(self, student: Outputs, teacher: Outputs, temperature: float) -> Float[Array, ""]:
        if self.task.is_regression:
            return squared_error(student.logits[:, 0], teacher.logits[:, 0], student.weights).loss / self._variance
        return distillation(student.logits, teacher.logits, student.weights, temperature)

    def score(self, model: ModelFolder) -> dict[str, float]:
        if model.quantized is not None:
            engine = Engine(model)
            return dev_metrics(self.data, {split: engine.scores(rows) for split, rows in self.dev.items()})[
                self.data.deciding_split
            ]
        predict = finetune_steps(Setting(config=model.config, tune=FinetuneConfig())).predict
        stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], model.params)
        with phase("scoring the dev rows", stays=False):
            scores = {split: predict_rows(predict, stacked, rows)[0] for split, rows in self.dev.items()}
        return dev_metrics(self.data, scores)[self.data.deciding_split]

    def lost(self, before: float, after: float) -> float:
        return 100.0 * (before - after)

    def describe(self) -> str:
        dev = len(self.data.dev[self.data.deciding_split].texts)
        return f"{self.task.folder}: {len(self.labels):,} training and {dev:,} dev rows"


@dataclass(frozen=True)
class TextMaterial(Material):
    """Packed rows of text, of which a quarter of the words are masked, as in pretraining."""

    config: ModelConfig
    """Of the model that reads them first."""
    data: PreparedData
    shape: DataConfig
    corpus: str
    batch_rows: int
    seed: int

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("loss", "accuracy")

    @property
    def unit(self) -> str:
        return "nats"

    def run(self, config: ModelConfig) -> RunConfig:
        """Return the settings of pretraining that mask and evaluate the rows of a model."""
        return RunConfig(config, PretrainConfig(micro_rows=self.batch_rows), self.shape)

    def batch(self, step: int) -> Array:
        return jnp.asarray(self.data.train.take(self._order.take(step * self.batch_rows, self.batch_rows)))

    def tokens(self, step: int) -> TokenBatch:
        run, special = self.run(self.config), special_ids(self.data.tokenizer)
        batch = self.batch(step)
        masked = mask_rows(run, special, batch, jax.random.key(step), max(run.train.mask_rate))
        segments = document_segments(run, special, batch)
        return TokenBatch(masked.ids, jnp.ones_like(batch) if segments is None else segments, jnp.zeros_like(batch))

    @cached_property
    def _order(self) -> RowOrder:
        return RowOrder(len(self.data.train), self.seed)

    def outputs(
        self, config: ModelConfig, params: nn.Params, batch: Any, key: Key[Array, ""], *, training: bool
    ) -> Outputs:
        run, special = self.run(config), special_ids(self.data.tokenizer)
        masked = mask_rows(run, special, batch, key, max(run.train.mask_rate))
        segments, noise = document_segments(run, special, batch), jax.random.fold_in(key, 1)
        hidden, aux = nn.encode(
            params, replace(config, dropout=0.0), masked.ids, segments, key=noise if training else None,
            deterministic=not training, hidden_states=True,
        )  # fmt: skip
        picked = jnp.take_along_axis(hidden, masked.positions[..., None], axis=1)
        logits = nn.masked_lm_logits(params, config, picked)
        sums = cross_entropy(logits, masked.labels, masked.weights)
        sums = sums._replace(extra=nn.aux_loss(aux) * sums.count)
        flat = logits.reshape(-1, logits.shape[-1])
        return Outputs(sums, flat, masked.weights.reshape(-1), _states(aux), jnp.ones(batch.shape, bool))

    def taught(self, student: Outputs, teacher: Outputs, temperature: float) -> Float[Array, ""]:
        return distillation(student.logits, teacher.logits, student.weights, temperature)

    def score(self, model: ModelFolder) -> dict[str, float]:
        run = self.run(model.config)
        steps, layout = build_steps(run, special_ids(self.data.tokenizer)), Layout(run)
        with phase("scoring the held-out rows", stays=False):
            found = evaluate(steps, model.params, self._heldout(run), layout)
        assert found is not None
        return {"loss": found.loss, "accuracy": found.accuracy}

    @cached_property
    def _heldout(self) -> Callable[[RunConfig], Any]:
        kept: list[Any] = []

        def heldout(run: RunConfig) -> Any:
            if not kept:  # the masks depend on the rows alone
                kept.append(heldout_of(run, self.data))
            return kept[0]

        return heldout

    def lost(self, before: float, after: float) -> float:
        return after - before

    def describe(self) -> str:
        facts = self.data.manifest
        rows = f"{facts.train_rows:,} training and {facts.heldout_rows:,} held-out rows"
        return f"{self.corpus}: {rows} of {facts.seq_len} tokens"


def _states(aux: dict[str, nn.Aux]) -> tuple[Float[Array, "b t d"], ...]:
    return tuple(layer.hidden for layer in aux.values() if layer.hidden is not None)


def loss_gradient(material: Material, config: ModelConfig) -> Callable[..., Any]:
    """Return the jitted (params, batch, key) -> gradient of the mean loss of labels or masked words, as in inference."""

    def loss(params: nn.Params, batch: Any, key: Key[Array, ""]) -> Float[Array, ""]:
        sums = material.outputs(config, params, batch, key, training=False).sums
        return sums.loss / jnp.maximum(sums.count, 1.0)

    return jax.jit(jax.grad(loss))
