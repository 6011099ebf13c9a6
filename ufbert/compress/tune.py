"""The tuning that every method shares: a student learns from labels or masked words and, if there is one, from its teacher.

The loss of a batch is (1 - w) * task + w * T^2 KL(teacher / T || student / T) + v * hidden, each a mean. The first two are
those of Hinton et al. (2015) and of DistilBERT (Sanh et al. 2019, section 2). `hidden` is TinyBERT's distance of hidden states
(Jiao et al. 2020, equation 8), mean((H_s W - H_t)^2) over the tokens, divided by mean(H_t^2) so that its size says the same
of every layer, and averaged over pairs of layers. W is the identity for equal widths, and else one learned matrix for all
pairs.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ufbert import nn
from ufbert.compress.material import Material, Outputs
from ufbert.config import FinetuneConfig
from ufbert.errors import Interrupted, UserError
from ufbert.glue.step import learning_rate, make_optimizer
from ufbert.hub.folder import ModelFolder
from ufbert.nn.updates import apply_update
from ufbert.options.compress import TuneOptions
from ufbert.pretrain.budget import Clock, Ledger, StepClock, WallClock, parse_budget
from ufbert.pretrain.checkpoint import Checkpoints
from ufbert.runtime.console import phase, say, show
from ufbert.runtime.metrics import JsonlWriter, Writer
from ufbert.runtime.signals import StopSignals

SCHEDULE = FinetuneConfig(schedule="linear", warmup=0.1, adam_b2=0.999, clip_norm=1.0)
"""AdamW with a rate that rises for a tenth of the budget and then falls to zero."""
SAVE_SECONDS = 120.0
"""Seconds of the budget between two checkpoints."""

Masks = Mapping[str, Any]
"""A tree of 0 and 1 by the names of parameters, for those that are kept at zero in places; it broadcasts to their shape."""


class TuneState(NamedTuple):
    """All that a tuning must remember, but for the clock."""

    params: Any
    """`student`, and `projection` where the teacher is of another width."""
    opt_state: Any
    masks: Any
    step: Int[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a student learns, and from whom."""

    student: ModelFolder
    """Its configuration, and the weights that it starts from."""
    material: Material
    options: TuneOptions
    teacher: ModelFolder | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    """(layer of the student, layer of the teacher) whose hidden states are compared."""


def even_pairs(student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """Pair every layer of a student with one of its teacher's, evenly, the last with the last (TinyBERT's uniform map)."""
    return tuple((i, (i + 1) * teacher_layers // student_layers - 1) for i in range(student_layers))


def start_state(lesson: Lesson, masks: Masks | None = None, step: int = 0) -> TuneState:
    """Return the state of a tuning that begins with the student's weights, zero where `masks` are, at update `step`."""
    params: dict[str, Any] = {"student": masked(lesson.student.params, masks or {})}
    teacher, width = lesson.teacher, lesson.student.config.d_model
    if teacher is not None and lesson.pairs and teacher.config.d_model != width:
        key = jax.random.key(lesson.options.seed)
        params["projection"] = width**-0.5 * jax.random.normal(key, (width, teacher.config.d_model))
    params = jax.tree.map(jnp.array, params)  # its own: the state is donated
    opt_state = make_optimizer(SCHEDULE).init(params)
    return TuneState(params, opt_state, jax.tree.map(jnp.asarray, dict(masks or {})), jnp.array(step, jnp.int32))


def masked(params: nn.Params, masks: Masks) -> dict[str, Any]:
    """Multiply parameters by the masks of their names; the others stay."""
    return {
        name: part if name not in masks else masked(part, masks[name]) if hasattr(part, "items") else part * masks[name]
        for name, part in params.items()
    }


class Tuning:
    """A tuning under way: compiled functions, clock and checkpoints."""

    def __init__(self, lesson: Lesson, clock: Clock, folder: Path, name: str = "tuning") -> None:
        """Tune by `clock` in an output folder; a tuning of several parts needs a `name` for the checkpoints of each.

        Raises UserError if the teacher has another vocabulary.
        """
        self.lesson, self.clock, self.folder = lesson, clock, folder
        teacher, config = lesson.teacher, lesson.student.config
        if teacher is not None and teacher.config.vocab_size != config.vocab_size:
            raise UserError(
                f"The teacher has {teacher.config.vocab_size:,} word pieces and the student {config.vocab_size:,}; both must "
                "have one tokenizer."
            )
        self.config = config if teacher is None else replace(config, dropout=0.0)
        self._update = jax.jit(partial(_update, lesson, self.config), donate_argnums=0)
        self._teacher = None if teacher is None else jax.tree.map(jnp.asarray, dict(teacher.params))
        self._checkpoints = Checkpoints(folder / "checkpoints" / name, {"tuning": name}, keep=1)
        self._compiled: set[tuple[Any, ...]] = set()

    def restored(self, fresh: TuneState) -> TuneState:
        """Return the state of the newest checkpoint, or `fresh` if there is none."""
        found = self._checkpoints.restore(jax.tree.map(_abstract, fresh), say)
        return fresh if found is None else found.state

    def run(self, state: TuneState, until: float = 1.0) -> TuneState:
        """Tune until the share `until` of the budget, and return the state.

        Raises UserError if the loss is not finite; Interrupted once all is saved after a signal.
        """
        step, options = int(state.step), self.lesson.options
        peak = options.lr or 0.04 / self.config.d_model
        key = jax.random.key(options.seed)
        metrics = Writer([JsonlWriter(self.folder / "metrics.jsonl", step)])
        in_flight: tuple[dict[str, Any], Array] | None = None
        saved = self.clock.spent()
        try:
            with StopSignals() as signals, phase("tuning"):
                while self.clock.fraction(step) < until and not self.clock.done(step):
                    fraction = self.clock.fraction(step)
                    if signals.asked is not None:
                        break
                    if self.clock.spent() > saved + SAVE_SECONDS:
                        saved = self.clock.spent()
                        self._save(step, state, signals)
                    lr = peak * learning_rate(int(fraction * 1e6), 1_000_000, SCHEDULE)
                    batch = self.lesson.material.batch(step)
                    shapes = tuple(map(jnp.shape, jax.tree.leaves(batch)))
                    with nullcontext() if shapes in self._compiled else phase("compiling the update"):
                        state, loss = self._update(
                            state, batch, jax.random.fold_in(key, step), jnp.float32(lr), self._teacher
                        )
                    self._compiled.add(shapes)
                    step += 1
                    self._note(metrics, in_flight)
                    in_flight = {"step": step, "lr": lr, "spent": self.clock.spent()}, loss
                self._note(metrics, in_flight)
                if until == 1.0 or signals.asked is not None:
                    self._save(step, state, signals)
                if signals.asked is not None:
                    raise Interrupted(
                        f"{signals.asked.name}: saved at update {step:,}; go on with the same command and --resume",
                        128 + signals.asked,
                    )
        finally:
            metrics.close()
        return state

    def close(self) -> None:
        """Finish the save under way."""
        self._checkpoints.close()

    def _save(self, step: int, state: TuneState, signals: StopSignals) -> None:
        signals.save_first()
        with phase("saving a checkpoint", stays=False):
            if step not in self._checkpoints.steps():
                self._checkpoints.save(step, state, 0.0, self.clock.spent())
            self._checkpoints.wait()

    def _note(self, metrics: Writer, in_flight: tuple[dict[str, Any], Array] | None) -> None:
        """Read the loss of an update that was dispatched earlier, and show it."""
        if in_flight is None:
            return
        record, loss = in_flight[0], float(in_flight[1])
        if not loss < float("inf"):
            raise UserError(f"The loss is not finite at update {record['step']:,}; take a lower rate (--lr).")
        metrics.write({**record, "loss": loss})
        show(f"{self.clock.left(record['step'])}  update {record['step']:,}  loss {loss:.4f}  lr {record['lr']:.1e}")


def _abstract(leaf: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _update(
    lesson: Lesson, config: Any, state: TuneState, batch: Any, key: Key[Array, ""], lr: Float[Array, ""], teacher: Any
) -> tuple[TuneState, Float[Array, ""]]:
    """Take a step of AdamW; masked entries stay zero."""

    def loss_of(params: Any) -> Float[Array, ""]:
        student = lesson.material.outputs(config, params["student"], batch, key, training=True)
        if lesson.teacher is None:
            return (student.sums.loss + student.sums.extra) / jnp.maximum(student.sums.count, 1.0)
        taught = lesson.material.outputs(lesson.teacher.config, teacher, batch, key, training=False)
        return lesson_loss(lesson, student, jax.lax.stop_gradient(taught), params.get("projection"))

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    direction, opt_state = make_optimizer(SCHEDULE).update(grads, state.opt_state, state.params)
    params: Any = apply_update(state.params, direction, lr)
    params["student"] = masked(params["student"], state.masks)
    return TuneState(params, opt_state, state.masks, state.step + 1), loss


def lesson_loss(
    lesson: Lesson, student: Outputs, teacher: Outputs, projection: Float[Array, "d e"] | None
) -> Float[Array, ""]:
    """Compute the loss of a batch from what student and teacher make of it, as this file's first lines define it."""
    options, count = lesson.options, jnp.maximum(student.sums.count, 1.0)
    taught = lesson.material.taught(student, teacher, options.temperature)
    loss = (1.0 - options.teacher_weight) * student.sums.loss + options.teacher_weight * taught + student.sums.extra
    distances = [
        hidden_distance(student.hidden[i], teacher.hidden[j], student.real, projection) for i, j in lesson.pairs
    ]
    hidden = sum(distances, jnp.zeros(())) / max(1, len(distances))
    return loss / count + options.hidden_weight * hidden


def hidden_distance(student: Array, teacher: Array, real: Array, projection: Array | None) -> Float[Array, ""]:
    """Compute mean((H_s W - H_t)^2) / mean(H_t^2) over the tokens that are real; W is the identity if None."""
    student = student if projection is None else student @ projection
    weight = real[..., None].astype(jnp.float32)
    distance = jnp.sum(weight * jnp.square(student - teacher))
    return distance / jnp.maximum(jnp.sum(weight * jnp.square(teacher)), 1e-6)


def tuned(
    lesson: Lesson, clock: Clock, folder: Path, masks: Masks | None = None, name: str = "tuning", step: int = 0
) -> ModelFolder:
    """Tune a student to the end of the clock, or go on where an earlier session stopped, and return it.

    A part of a tuning has a `name`, and begins at update `step`.
    """
    tuning = Tuning(lesson, clock, folder, name)
    try:
        state = tuning.run(tuning.restored(start_state(lesson, masks, step)))
    finally:
        tuning.close()
    return replace(lesson.student, params=state.params["student"])


def with_clock[T](options: TuneOptions, folder: Path, work: Callable[[Clock], T]) -> T:
    """Call `work` with a clock of the budget that is left, and note in `ledger.jsonl` what it spends."""
    budget, ledger = parse_budget(options.budget), Ledger(folder / "ledger.jsonl")
    spent = ledger.spent_before
    clock = StepClock(budget.steps, spent) if budget.steps else WallClock(budget.seconds or 0.0, spent)
    ledger.start(clock)
    try:
        return work(clock)
    finally:
        ledger.close()
