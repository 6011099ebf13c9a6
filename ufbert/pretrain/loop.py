"""The pretraining loop: the order of events from the start of the clock to the summary.

Order of a session, all of it on the clock:
1. Restore the newest good checkpoint, or initialise: from random numbers, or from a model.
2. Evaluate, which compiles the evaluation; the first step compiles the step. A model that the run starts from is saved as the
   first checkpoint.
3. Until the clock is done or a signal comes, dispatch step n, then read the numbers of step n - 1. Evaluate and checkpoint when
   their share of the budget comes, and draw the page.
4. Evaluate for the last time.
5. Write the model, the last checkpoint and the summary.
"""

import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ufbert import nn
from ufbert.config import RunConfig
from ufbert.data.prepared import PreparedData
from ufbert.data.shards import RowOrder
from ufbert.data.tokenizer import special_ids
from ufbert.errors import Interrupted, UserError
from ufbert.hub.folder import ModelFolder, save_model
from ufbert.nn.ngrams import averaged_params
from ufbert.pretrain.ahead import Ahead
from ufbert.pretrain.budget import Clock, EndCosts, guessed_save_seconds
from ufbert.pretrain.checkpoint import Checkpoints
from ufbert.pretrain.evaluation import Evaluation, Heldout, evaluate, heldout_of
from ufbert.pretrain.reference import Reference
from ufbert.pretrain.reporter import Reporter
from ufbert.pretrain.schedules import Stage, lr_share, mask_rate, n_checkpoints, rows_per_step, stage
from ufbert.pretrain.sharding import Layout
from ufbert.pretrain.step import StepInputs, StepMetrics, Steps, TrainState, build_steps, init_state, state_shapes
from ufbert.runtime import distributed
from ufbert.runtime.console import phase, say
from ufbert.runtime.memory import memory_bytes
from ufbert.runtime.metrics import EvaluationRecord, Resumed, StepRecord, Writer
from ufbert.runtime.run_folder import Summary, write_summary
from ufbert.runtime.signals import StopSignals
from ufbert.runtime.typed import read_lines

MAX_ROLLBACKS = 3
"""A run that must go back to a checkpoint more often than this is given up."""


@dataclass(frozen=True)
class RunContext:
    """The inputs of a session of a run."""

    run: RunConfig
    data: PreparedData
    clock: Clock
    folder: Path
    seed: int
    restarts: int
    """Sessions of this run before this one."""
    identity: dict[str, str]
    """The identity of its checkpoints."""
    peak_flops: float
    """FLOP/s of a device at best, for the utilisation; 0 if unknown."""
    reference: Reference | None = None
    """A curve to hold the run to."""
    started_from: str | None = None
    """The model folder that the run starts from, and its hash."""
    start: Callable[[jax.Array], Any] = lambda key: None
    """Reads the parameters that the run starts from; None to draw them. What the model lacks is drawn by the key."""
    open_writer: Callable[[int | None], Writer] = lambda _: Writer(())
    """Opens the metrics, dropping what came after the given step."""
    refresh_page: Callable[[float, Callable[[str], None]], Any] = lambda fraction, say: None
    """Draws the run's page at a share of the budget, unless that would cost too much."""


@dataclass
class _Session:
    """The state that a session carries between phases: its means, and, from `state` on, what changes."""

    context: RunContext
    layout: Layout
    steps: Steps
    ahead: Ahead
    heldout: Heldout
    checkpoints: Checkpoints
    signals: StopSignals
    reporter: Reporter
    costs: EndCosts
    state: TrainState
    heldout_loss: float = float("inf")
    skipped_in_row: int = 0
    rollbacks: int = 0

    @property
    def step(self) -> int:
        return int(self.state.step)

    def stop_signal(self) -> signal.Signals | None:
        """Return the signal to stop that this or another process of the run got. All must ask, in the same order."""
        number = distributed.highest(self.signals.asked or 0)
        return signal.Signals(number) if number else None

    def is_over(self, step: int) -> bool:
        """Tell whether no further work of `step` may begin. All must ask, in the same order."""
        return self.context.clock.done(step) or self.stop_signal() is not None


def train(context: RunContext) -> Summary:
    """Train to the end of the clock and return the run's summary, which is also in `summary.json` of the run folder.

    Continues from `checkpoints/` of the run folder if there are any. Raises UserError if no checkpoint is good, the disk
    fails, or the numbers do not stay finite; Interrupted once all is saved after SIGTERM or SIGINT.
    """
    run, clock, layout = context.run, context.clock, Layout(context.run)
    key = jax.random.key(context.seed)
    steps = build_steps(run, special_ids(context.data.tokenizer), layout)
    with phase("counting the words of the text"):
        heldout = heldout_of(run, context.data)
    ahead = Ahead(run, steps, layout, heldout.batches.shape[1:])
    checkpoints = Checkpoints(context.folder / "checkpoints", context.identity, run.train.keep_checkpoints)
    with phase("making or restoring the weights"):
        restored = checkpoints.restore(state_shapes(run, layout), say)
        state = init_state(run, key, layout, context.start(key)) if restored is None else restored.state
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    costs = EndCosts(guessed_save_seconds(size), evaluations=1 if state.average is None else 2)
    metrics = context.open_writer(int(state.step) if context.restarts else None)
    reporter = Reporter(run, clock, metrics, context.reference, context.peak_flops * len(layout.devices))
    with StopSignals() as signals:
        session = _Session(context, layout, steps, ahead, heldout, checkpoints, signals, reporter, costs, state)
        try:
            if restored is not None:
                reporter.resumption(session.step, restored.spent, len(layout.devices))
            if not clock.done(session.step):
                began = time.monotonic()
                with phase("compiling the evaluation"):
                    ahead.wait_for_evaluation()
                    evaluate(steps, state.params, replace(heldout, batches=heldout.batches[:1]), layout)
                compile_seconds = time.monotonic() - began
                _evaluate(session, record=restored is None)
                if restored is None and context.started_from is not None:
                    _checkpoint(session)  # the folder may be gone when the run goes on
                # The first step compiles, which costs about twice what compiling the evaluation did. If that much is not
                # left, as after a late resume, it must not begin. The schedule knows nothing of it.
                clock.reserve(costs.reserve() + 2.0 * compile_seconds)
                if not session.is_over(session.step):
                    clock.reserve(costs.reserve())
                    with phase("training"):
                        _take_steps(session, key)
            if session.stop_signal() is not None:
                raise _interruption(session)
            if session.step == 0 and clock.seconds is not None:
                raise UserError(
                    f"A budget of {clock.seconds:,.0f} s is too short to train in: after {clock.spent():,.0f} s the rest is "
                    "needed for the end. Give more; what was compiled is kept for the next run."
                )
            return _finish(session)
        finally:
            metrics.close()
            checkpoints.close()


def _take_steps(session: _Session, key: jax.Array) -> None:
    """Phase 3: take steps until the clock is done or a signal comes."""
    run, data, clock = session.context.run, session.context.data, session.context.clock
    cfg, n_saves = run.train, n_checkpoints(run.train, clock.seconds)
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    order = RowOrder(len(data.train), seed, shuffled=run.data.order == "shuffled")
    step, position = session.step, int(session.state.rows_seen)
    fraction = clock.fraction(step)
    evals_done, saves_done = int(fraction * cfg.n_evals), int(fraction * n_saves)
    in_flight: tuple[StepRecord, StepMetrics] | None = None
    last, speed = time.monotonic(), 0.0
    compiled: set[tuple[Stage, bool]] = set()
    while not session.is_over(step):
        fraction = clock.fraction(step)
        due_eval = fraction < 1.0 and int(fraction * cfg.n_evals) > evals_done
        due_save = int(fraction * n_saves) > saves_done
        if due_eval or due_save:
            _settle(session, in_flight)
            in_flight = None
            if due_eval:
                evals_done = int(fraction * cfg.n_evals)
                _evaluate(session)
            if due_save and not session.skipped_in_row:
                saves_done = int(fraction * n_saves)
                if isfinite(session.heldout_loss):  # else there is nothing to go back to
                    _checkpoint(session)
            with phase("drawing the page", stays=False):
                session.context.refresh_page(fraction, say)
            last = time.monotonic()

        # Evaluations and saves have taken time, and said what the end will take: ask the clock again.
        clock.reserve(session.costs.reserve())
        fraction = clock.fraction(step)
        picks = order.take(position, rows_per_step(cfg, fraction))
        at = stage(run, fraction)
        lr, rate = cfg.peak_lr * lr_share(cfg, fraction), mask_rate(cfg, fraction)
        inputs = StepInputs(jnp.float32(lr), jnp.float32(fraction), jnp.float32(rate), jnp.int32(len(picks)))
        session.signals.save_first()
        is_whole = len(picks) == cfg.micro_rows
        with nullcontext() if (at, is_whole) in compiled else phase("compiling the training step"):
            if not compiled and not session.ahead.wait_for_update(session.is_over, step):
                break
            metrics = _dispatch(session, step, picks, at, jax.random.fold_in(key, step + 1), inputs)
        compiled.add((at, is_whole))
        if metrics is None:
            break
        step, position = step + 1, position + len(picks)
        # While the device computes this step, read the numbers of the one before.
        _settle(session, in_flight)
        now = time.monotonic()
        if in_flight is not None:  # else the dispatch alone was timed, which says nothing about speed
            session.costs.stepped(now - last, len(picks) * at.length)
            speed = len(picks) * run.data.seq_len / max(now - last, 1e-9)
        last = now
        record = StepRecord(
            step=step, lr=float(inputs.lr), mask_rate=rate, rows=len(picks), length=at.length,
            fraction=fraction, tokens=position * run.data.seq_len, tokens_per_second=speed,
            next_token=at.next_token or None,
        )  # fmt: skip
        in_flight = record, metrics
    _settle(session, in_flight)


def _dispatch(
    session: _Session, step: int, picks: Int[np.ndarray, " n"], at: Stage, key: jax.Array, inputs: StepInputs
) -> StepMetrics | None:
    """Dispatch a step on the rows `picks`, in micro-batches.

    Returns None if the clock ran out or a signal came between them; what was computed is dropped.
    """
    steps, micro, text = session.steps, session.context.run.train.micro_rows, session.context.data.train

    def rows(part: np.ndarray) -> Any:
        return session.layout.rows(text.take(part).reshape(-1, at.length))

    if len(picks) == micro:
        session.state, metrics = steps.train_step(session.state, rows(picks), key, inputs, next_token=at.next_token)
        return metrics
    total = None
    for i in range(0, len(picks), micro):
        if i and session.is_over(step):
            return None
        micro_key = jax.random.fold_in(key, i)
        batch = rows(picks[i : i + micro])
        total = steps.add_gradient(session.state.params, batch, micro_key, inputs, total, next_token=at.next_token)
    session.state, metrics = steps.apply_gradient(session.state, total, inputs)
    return metrics


def _settle(session: _Session, in_flight: tuple[StepRecord, StepMetrics] | None) -> None:
    """Report a step that was dispatched earlier, and go back to a checkpoint if too many in a row were not finite."""
    if in_flight is None:
        return
    applied = session.reporter.step(*in_flight)
    session.skipped_in_row = 0 if applied else session.skipped_in_row + 1
    if session.skipped_in_row == 1:
        say(f"step {in_flight[0].step:,}: loss or gradient is not finite; the update is skipped")
    if session.skipped_in_row >= session.context.run.train.max_skipped:
        _roll_back(session)


def _roll_back(session: _Session) -> None:
    """Take the weights of the last good checkpoint, and go on with the text that comes next."""
    run, layout = session.context.run, session.layout
    session.rollbacks, session.skipped_in_row = session.rollbacks + 1, 0
    why = f"{run.train.max_skipped} updates in a row were not finite"
    if session.rollbacks > MAX_ROLLBACKS:
        raise UserError(
            f"{why}, for the {session.rollbacks}th time; the run is given up at step {session.step}. Lower --train.peak-lr or "
            "look at the text; the checkpoints are kept."
        )
    now, restored = session.state, session.checkpoints.restore(state_shapes(run, layout), say)
    key, to_step = jax.random.key(session.context.seed), 0 if restored is None else restored.step
    first = session.context.start(key) if restored is None else None
    state = init_state(run, key, layout, first) if restored is None else restored.state
    session.state = state._replace(step=now.step, rows_seen=now.rows_seen, skipped=now.skipped)
    say(f"step {session.step:,}: {why}; the weights go back to those of step {to_step:,}")
    session.reporter.event(session.step, "rolled back", to_step=to_step)


def _held_out(session: _Session, params: nn.Params) -> Evaluation:
    """Evaluate parameters. If a signal comes during it, save and raise Interrupted."""
    with phase("evaluating", stays=False):
        result = evaluate(
            session.steps, params, session.heldout, session.layout, lambda: session.stop_signal() is not None
        )
    if result is None:
        raise _interruption(session)
    return result


def _evaluate(session: _Session, record: bool = True) -> None:
    """Evaluate the state, and report the result if it is to be recorded."""
    began = time.monotonic()
    result = _held_out(session, session.state.params)
    session.costs.evaluated(time.monotonic() - began)
    session.heldout_loss = result.loss
    if record:
        session.reporter.evaluation(session.state, result, session.heldout.unigram_loss)


@phase("saving a checkpoint", stays=False)
def _checkpoint(session: _Session, wait: bool = False) -> None:
    """Start to save the state. The session's first time, and if asked, wait for it, which measures what a save takes."""
    seconds, first = session.checkpoints.wait(), not session.costs.knows_saves
    if seconds is not None:
        session.costs.saved(seconds)
    session.checkpoints.save(session.step, session.state, session.heldout_loss, session.context.clock.spent())
    if (wait or first) and (seconds := session.checkpoints.wait()) is not None:
        session.costs.saved(seconds)


def _interruption(session: _Session) -> Interrupted:
    """Save after a signal, and return what to raise then."""
    received = session.stop_signal() or signal.SIGTERM
    session.signals.save_first()
    with phase("saving the last checkpoint"):
        session.checkpoints.wait()
        if session.step not in session.checkpoints.steps():
            _checkpoint(session, wait=True)
    session.reporter.event(session.step, "interrupted", signal=received.name)
    return Interrupted(
        f"{received.name}: saved at step {session.step:,} after {session.context.clock.spent():.1f} s of the budget; go on "
        f"with `train --resume --out={session.context.folder}`",
        128 + received,
    )


def _finish(session: _Session) -> Summary:
    """Phases 4 and 5: last evaluation, model folder, last checkpoint, summary."""
    context, folder = session.context, session.context.folder
    _evaluate(session)
    params, loss, averaged = session.state.params, session.heldout_loss, None
    if session.state.average is not None:
        average = averaged_params(params, session.state.average)
        averaged = _held_out(session, average).loss
        if averaged < loss or not isfinite(loss):
            params, loss = average, averaged
    if not isfinite(loss):
        raise UserError(
            f"The run has diverged: its held-out loss at step {session.step:,} is {loss}, so no model is written. Start a new "
            f"one with a lower --train.peak-lr, or go on from its last checkpoint with `train --resume --out={folder}`."
        )
    with phase("saving the model and the last checkpoint"):
        params = distributed.whole(params)
        if distributed.is_main():
            save_model(folder / "model", ModelFolder(context.run.model, params, context.data.tokenizer))
        session.checkpoints.wait()
        if session.step not in session.checkpoints.steps():
            _checkpoint(session)
        session.checkpoints.wait()
    summary = _summary(session, loss, averaged)
    if distributed.is_main():
        write_summary(folder, summary)
    return summary


def _summary(session: _Session, loss: float, averaged: float | None) -> Summary:
    """Sum up a run: `loss` is that of the weights that were written, `averaged` that of the average if there is one."""
    context, run, rows = session.context, session.context.run, int(session.state.rows_seen)
    metrics = context.folder / "metrics.jsonl"
    resumed = list(read_lines(metrics, Resumed))
    first = (
        next((r for r in read_lines(metrics, EvaluationRecord) if r.step == 0), None) if context.started_from else None
    )
    return Summary(
        heldout_loss=loss,
        unigram_loss=session.heldout.unigram_loss,
        gain_over_unigram=session.heldout.unigram_loss - loss,
        averaged_heldout_loss=averaged,
        last_heldout_loss=None if averaged is None else session.heldout_loss,
        steps=session.step,
        skipped_updates=int(session.state.skipped),
        rollbacks=session.rollbacks,
        tokens=rows * run.data.seq_len,
        passes=rows / len(context.data.train),
        spent_seconds=round(context.clock.spent(), 2),
        budget_seconds=context.clock.seconds,
        restarts=context.restarts,
        restart_seconds=round(sum((r.lost_seconds + r.start_seconds for r in resumed), 0.0), 2),
        parameters=nn.count_params(run.model),
        flops_per_token=session.reporter.flops_per_token,
        peak_flops=context.peak_flops,
        memory_bytes=memory_bytes(),
        tree_backend=nn.tree_backend(run.model, run.micro_tokens),
        device=str(jax.devices()[0].device_kind),
        devices=len(session.layout.devices),
        processes=jax.process_count(),
        architecture=run.model.architecture(),
        started_from=context.started_from,
        started_heldout_loss=None if first is None else first.heldout_loss,
    )
