"""The pretraining loop: the only place that decides when files are read and written.

Order of a session: (1) restore the newest good checkpoint, or initialise; (2) evaluate, which also compiles; (3) until the
clock is done or a signal comes: dispatch update n, then read the numbers of update n - 1, evaluate and checkpoint when their
share of the budget comes; (4) last evaluation; (5) last save. The clock covers all of it.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ufbert import nn
from ufbert.config import RunConfig
from ufbert.cost.flops import train_flops_per_token
from ufbert.data.order import RowOrder
from ufbert.data.prepared import PreparedData
from ufbert.data.tokenizer import special_ids
from ufbert.errors import Interrupted, UserError
from ufbert.hub.folder import ModelFolder, save_model
from ufbert.pretrain.budget import Clock
from ufbert.pretrain.checkpoint import Checkpoints
from ufbert.pretrain.evaluation import Evaluation, Heldout, evaluate, heldout_of
from ufbert.pretrain.reference import Point, Reference, no_reference_complaint
from ufbert.pretrain.reserve import EndCosts
from ufbert.pretrain.schedules import lr_share, mask_rate, n_checkpoints, rows_per_update
from ufbert.pretrain.sharding import Layout
from ufbert.pretrain.step import Controls, Outcome, Steps, TrainState, build_steps, init_state, state_of
from ufbert.runtime import distributed
from ufbert.runtime.console import LiveLine
from ufbert.runtime.files import write_json
from ufbert.runtime.memory import memory_bytes
from ufbert.runtime.metrics import Resumed, Writer
from ufbert.runtime.signals import StopSignals
from ufbert.runtime.typed import read_lines

MAX_ROLLBACKS = 3
"""A run that must go back to a checkpoint more often than this is given up."""


@dataclass(frozen=True)
class Surroundings:
    """What a session is given beside its configuration and data."""

    folder: Path
    seed: int
    restarts: int
    """Sessions of this run before this one."""
    identity: dict[str, str]
    """What its checkpoints belong to."""
    peak_flops: float
    """FLOP/s of the device at best, for the utilisation; 0 if unknown."""
    reference: Reference | None = None
    """A curve to hold the run to."""
    open_writer: Callable[[int | None], Writer] = lambda _: Writer(())
    """Opens the metrics, dropping what came after the given step."""


@dataclass
class _Session:
    """What a session carries between phases."""

    run: RunConfig
    data: PreparedData
    around: Surroundings
    clock: Clock
    layout: Layout
    steps: Steps
    heldout: Heldout
    checkpoints: Checkpoints
    signals: StopSignals
    shapes: TrainState
    """The state as shapes with their places, for restoring."""
    state: TrainState
    metrics: Writer
    live: LiveLine
    flops_per_token: float
    costs: EndCosts
    heldout_loss: float = float("inf")
    skipped_in_row: int = 0
    rollbacks: int = 0
    complained: bool = False

    @property
    def step(self) -> int:
        return int(self.state.step)

    def asked(self) -> signal.Signals | None:
        """The signal to stop that this or another process of the run got. All must ask, in the same order."""
        number = distributed.highest(self.signals.asked or 0)
        return signal.Signals(number) if number else None

    def over(self, step: int) -> bool:
        """Whether no further work of update `step` may begin. All must ask, in the same order."""
        return self.clock.done(step) or self.asked() is not None


def train(run: RunConfig, data: PreparedData, clock: Clock, around: Surroundings) -> dict[str, Any]:
    """Train to the end of the clock and return the run's summary, which is also in `summary.json` of the run folder.

    Continues from `checkpoints/` of the run folder if there are any. Raises UserError if no checkpoint is good, the disk
    fails, or the numbers do not stay finite; Interrupted once all is saved after SIGTERM or SIGINT.
    """
    live, layout = LiveLine(), Layout(run)
    key = jax.random.key(around.seed)
    steps, heldout = build_steps(run, special_ids(data.tokenizer), layout), heldout_of(run, data)
    shapes = layout.abstract(jax.eval_shape(lambda: init_state(run, key)))
    checkpoints = Checkpoints(around.folder / "checkpoints", around.identity, run.train.keep_checkpoints)
    restored = checkpoints.restore(shapes, live.say)
    state = initial_state(run, key, shapes) if restored is None else restored.state
    metrics = around.open_writer(int(state.step) if around.restarts else None)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with StopSignals() as signals:
        session = _Session(
            run, data, around, clock, layout, steps, heldout, checkpoints, signals, shapes, state, metrics, live,
            flops_per_token=train_flops_per_token(run, masked_trees=nn.tree_backend(run.model, run.micro_tokens) == "masked"),
            costs=EndCosts(save_guess=0.5 + size / 200e6, evaluations=1 if state.average is None else 2),
        )  # fmt: skip
        try:
            if restored is not None:
                _note_resumption(session, restored.spent)
            if not clock.done(session.step):
                compiling = _compile_evaluation(session)
                _evaluate(session, record=restored is None)
                # The first update compiles, which costs about twice what compiling the evaluation did: where that much is not
                # left, as after a late resume, it must not begin. The schedule knows nothing of it.
                clock.reserve(session.costs.reserve() + 2.0 * compiling)
                if not session.over(session.step):
                    clock.reserve(session.costs.reserve())
                    _updates(session, key)
            if session.asked() is not None:
                raise _interruption(session)
            return _finish(session)
        finally:
            metrics.close()
            checkpoints.close()


def initial_state(run: RunConfig, key: jax.Array, shapes: TrainState) -> TrainState:
    """Fresh parameters and optimizer state, placed like `shapes`."""
    params = nn.init(run.model, key)
    if jax.process_count() > 1:  # each has drawn the same numbers
        params = jax.tree.map(np.asarray, params)
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(lambda params: state_of(run, params), out_shardings=places)(params)


def _note_resumption(session: _Session, spent_at_save: float) -> None:
    """Say and record what the interruption cost: work after the checkpoint, done once more or dropped, and the start-up."""
    clock, step = session.clock, session.step
    lost = max(0.0, session.clock.spent_before - spent_at_save)
    start = clock.spent() - session.clock.spent_before
    session.live.say(
        f"resumed from the checkpoint of step {step:,}; {clock.left(step)}; the restart cost {lost:.1f} s of work after that "
        f"checkpoint and {start:.1f} s of start-up so far"
    )
    cost = {"lost_seconds": lost, "start_seconds": start, "devices": len(session.layout.devices)}
    session.metrics.write({"step": step, "event": "resumed", **cost})


def _updates(session: _Session, key: jax.Array) -> None:
    """Phase 3: updates until the clock is done or a signal comes."""
    run, cfg, clock = session.run, session.run.train, session.clock
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    order = RowOrder(len(session.data.train), seed, shuffled=run.data.order == "shuffled")
    saves = n_checkpoints(cfg, clock.seconds)
    step, position = session.step, int(session.state.rows_seen)
    fraction = clock.fraction(step)
    evals_done, saves_done = int(fraction * cfg.n_evals), int(fraction * saves)
    pending: dict[str, Any] | None = None
    last, speed = time.monotonic(), 0.0
    while not session.over(step):
        fraction = clock.fraction(step)
        due_eval, due_save = int(fraction * cfg.n_evals) > evals_done, int(fraction * saves) > saves_done
        if (due_eval and fraction < 1.0) or due_save:
            pending = _report(session, pending)
            if due_eval and fraction < 1.0:
                evals_done = int(fraction * cfg.n_evals)
                _evaluate(session)
            if due_save and not session.skipped_in_row:
                saves_done = int(fraction * saves)
                if isfinite(session.heldout_loss):  # else there is nothing to go back to
                    _checkpoint(session)
            last = time.monotonic()
        clock.reserve(session.costs.reserve())
        fraction = clock.fraction(step)
        picks = order.take(position, rows_per_update(cfg, fraction))
        length = run.data.short_len if fraction < run.data.short_until else run.data.seq_len
        controls = Controls(
            jnp.float32(cfg.peak_lr * lr_share(cfg, fraction)),
            jnp.float32(fraction),
            jnp.float32(mask_rate(cfg, fraction)),
            jnp.int32(len(picks)),
        )
        session.signals.save_first()
        outcome = _one_update(session, step, picks, length, jax.random.fold_in(key, step + 1), controls)
        if outcome is None:
            break
        step, position = step + 1, position + len(picks)
        waited = pending is not None  # else nothing was in flight, and the dispatch alone says nothing about speed
        _report(session, pending)
        now = time.monotonic()
        if waited:
            session.costs.updated(now - last, len(picks) * length)
            speed = len(picks) * run.data.seq_len / max(now - last, 1e-9)
        pending = {
            "step": step, "outcome": outcome, "lr": float(controls.lr), "mask_rate": mask_rate(cfg, fraction),
            "rows": len(picks), "length": length, "fraction": fraction, "tokens": position * run.data.seq_len,
            "tokens_per_second": speed,
        }  # fmt: skip
        last = now
    _report(session, pending)


def _one_update(
    session: _Session, step: int, picks: np.ndarray, length: int, key: jax.Array, controls: Controls
) -> Outcome | None:
    """Dispatch one update; None if the clock ran out or a signal came between its micro-batches, which are then dropped."""
    steps, micro = session.steps, session.run.train.micro_rows

    def rows(part: np.ndarray) -> Any:
        return session.layout.rows(session.data.train.take(part).reshape(-1, length))

    if len(picks) == micro:
        session.state, outcome = steps.update(session.state, rows(picks), key, controls)
        return outcome
    total = None
    for i in range(0, len(picks), micro):
        if i and session.over(step):
            return None
        micro_key = jax.random.fold_in(key, i)
        total = steps.gradient(session.state.params, rows(picks[i : i + micro]), micro_key, controls, total)
    session.state, outcome = steps.finish(session.state, total, controls)
    return outcome


def _report(session: _Session, pending: dict[str, Any] | None) -> None:
    """Read and write the numbers of an update that was dispatched earlier."""
    if pending is None:
        return
    outcome: Outcome = pending.pop("outcome")
    sums, applied = outcome.sums, bool(outcome.applied)
    count = max(float(sums.count), 1.0)
    record: dict[str, Any] = {
        **pending,
        "loss": float(sums.loss) / count,
        "accuracy": float(sums.correct) / count,
        "gradient_norm": float(outcome.norm),
        "spent": round(session.clock.spent(), 3),
    }
    if float(sums.extra):
        record["extra_loss"] = float(sums.extra) / count
    if session.around.peak_flops:
        speed = record["tokens_per_second"] * session.flops_per_token
        record["utilisation"] = speed / session.around.peak_flops / len(session.layout.devices)
    if not applied:
        record["skipped"] = True
    session.metrics.write(record)
    session.live.show(
        f"{session.clock.left(record['step'])}  step {record['step']:,}  {record['tokens_per_second']:,.0f} tokens/s  "
        f"loss {record['loss']:.3f}  lr {record['lr']:.2e}"
    )
    session.skipped_in_row = 0 if applied else session.skipped_in_row + 1
    if not applied and session.skipped_in_row == 1:
        session.live.say(f"step {record['step']:,}: loss or gradient is not finite; the update is skipped")
    if session.skipped_in_row >= session.run.train.max_skipped:
        _roll_back(session)


def _roll_back(session: _Session) -> None:
    """Take the weights of the last good checkpoint, and go on with the text that comes next."""
    session.rollbacks, session.skipped_in_row = session.rollbacks + 1, 0
    what = f"{session.run.train.max_skipped} updates in a row were not finite"
    if session.rollbacks > MAX_ROLLBACKS:
        raise UserError(
            f"{what}, for the {session.rollbacks}th time; the run is given up at step {session.step}. Lower --train.peak-lr or "
            "look at the text; the checkpoints are kept."
        )
    now, restored = session.state, session.checkpoints.restore(session.shapes, session.live.say)
    fresh = jax.random.key(session.around.seed)
    state = initial_state(session.run, fresh, session.shapes) if restored is None else restored.state
    session.state = state._replace(step=now.step, rows_seen=now.rows_seen, skipped=now.skipped)
    step = 0 if restored is None else restored.step
    session.live.say(f"step {session.step:,}: {what}; the weights go back to those of step {step:,}")
    session.metrics.write({"step": session.step, "event": "rolled back", "to_step": step})


def _compile_evaluation(session: _Session) -> float:
    """Evaluate one batch, which compiles; the seconds that takes are not what a later evaluation will take."""
    began, first = time.monotonic(), replace(session.heldout, batches=session.heldout.batches[:1])
    evaluate(session.steps, session.state.params, first, session.layout)
    return time.monotonic() - began


def _held_out(session: _Session, params: nn.Params) -> Evaluation:
    """What an evaluation of these parameters finds; where a signal comes during it, save and raise Interrupted."""
    found = evaluate(session.steps, params, session.heldout, session.layout, lambda: session.asked() is not None)
    if found is None:
        raise _interruption(session)
    return found


def _evaluate(session: _Session, record: bool = True) -> None:
    """Held-out loss in nats; written to the metrics under `heldout_loss` if it is to be recorded."""
    began, clock = time.monotonic(), session.clock
    found = _held_out(session, session.state.params)
    session.costs.evaluated(time.monotonic() - began)
    session.heldout_loss = found.loss
    if not record:
        return
    step, gain = session.step, session.heldout.unigram_loss - found.loss
    now = Point(clock.fraction(step), int(session.state.rows_seen) * session.run.data.seq_len, gain)
    facts: dict[str, Any] = {"step": step, "heldout_loss": found.loss, "heldout_accuracy": found.accuracy}
    facts |= {"fraction": now.share, "tokens": now.tokens, "memory_bytes": memory_bytes()}
    facts |= {"skipped_updates": int(session.state.skipped), "spent": round(clock.spent(), 3)}
    session.metrics.write({**facts, **({"usage": found.usage} if found.usage else {})})
    session.live.say(
        f"step {step:,}: held-out loss {found.loss:.3f} nats ({gain:+.3f} below word frequency), accuracy {found.accuracy:.1%}"
    )
    reference = session.around.reference
    complaint = no_reference_complaint(now) if reference is None else reference.complaint(now)
    if complaint is not None and not session.complained:
        session.complained = True
        session.live.say(f"warning: {complaint}")
        session.metrics.write({"step": step, "event": "off track", "why": complaint})


def _checkpoint(session: _Session, wait: bool = False) -> None:
    """Start to save the state; the session's first time, and if asked, wait for it: that measures what a save takes."""
    seconds, first = session.checkpoints.wait(), not session.costs.knows_saves
    if seconds is not None:
        session.costs.saved(seconds)
    session.checkpoints.save(session.step, session.state, session.heldout_loss, session.clock.spent())
    if (wait or first) and (seconds := session.checkpoints.wait()) is not None:
        session.costs.saved(seconds)


def _interruption(session: _Session) -> Interrupted:
    """Save after a signal; what to raise then."""
    asked = session.asked() or signal.SIGTERM
    session.signals.save_first()
    session.checkpoints.wait()
    if session.step not in session.checkpoints.steps():
        _checkpoint(session, wait=True)
    session.metrics.write({"step": session.step, "event": "interrupted", "signal": asked.name})
    return Interrupted(
        f"{asked.name}: saved at step {session.step:,} after {session.clock.spent():.1f} s of the budget; go on with "
        f"`train --resume --out={session.around.folder}`",
        128 + asked,
    )


def _finish(session: _Session) -> dict[str, Any]:
    """Phases 4 and 5: last evaluation, model folder, last checkpoint, summary."""
    run, clock, around, data = session.run, session.clock, session.around, session.data
    _evaluate(session)
    params, loss, averaged = session.state.params, session.heldout_loss, None
    if session.state.average is not None:
        averaged = _held_out(session, session.state.average).loss
        if averaged < loss or not isfinite(loss):
            params, loss = session.state.average, averaged
    if not isfinite(loss):
        raise UserError(
            f"The run has diverged: its held-out loss at step {session.step:,} is {loss}, so no model is written. Start a new "
            f"one with a lower --train.peak-lr, or go on from its last checkpoint with `train --resume --out={around.folder}`."
        )
    params = distributed.whole(params)
    if distributed.is_main():
        save_model(around.folder / "model", ModelFolder(run.model, params, data.tokenizer))
    step, rows = session.step, int(session.state.rows_seen)
    session.checkpoints.wait()
    if step not in session.checkpoints.steps():
        _checkpoint(session)
    session.checkpoints.wait()
    resumed = list(read_lines(around.folder / "metrics.jsonl", Resumed))
    summary = {
        "heldout_loss": loss,
        "unigram_loss": session.heldout.unigram_loss,
        "gain_over_unigram": session.heldout.unigram_loss - loss,
        **({} if averaged is None else {"averaged_heldout_loss": averaged, "last_heldout_loss": session.heldout_loss}),
        "steps": step,
        "skipped_updates": int(session.state.skipped),
        "rollbacks": session.rollbacks,
        "tokens": rows * run.data.seq_len,
        "passes": rows / len(data.train),
        "spent_seconds": round(clock.spent(), 2),
        "budget_seconds": clock.seconds,
        "restarts": around.restarts,
        "restart_seconds": round(sum(r.lost_seconds + r.start_seconds for r in resumed), 2),
        "parameters": nn.count_params(run.model),
        "flops_per_token": session.flops_per_token,
        "peak_flops": around.peak_flops,
        "memory_bytes": memory_bytes(),
        "tree_backend": nn.tree_backend(run.model, run.micro_tokens),
        "device": str(jax.devices()[0].device_kind),
        "devices": len(session.layout.devices),
        "processes": jax.process_count(),
    }
    if distributed.is_main():
        write_json(around.folder / "summary.json", summary)
    return summary
