"""The yield of a budget: updates, tokens, memory and the parts of time, from counts and speeds. Arithmetic only."""

from dataclasses import replace
from typing import NamedTuple

from ufbert.config import RunConfig
from ufbert.cost.flops import routing_flops_per_token, train_flops_per_token
from ufbert.cost.speeds import Speeds
from ufbert.plan.counts import RunCounts, planned_flops
from ufbert.pretrain.budget import Budget, guessed_save_seconds
from ufbert.pretrain.schedules import Stage, n_checkpoints, rows_per_step, stage

ACCELERATOR_COMPILE_SECONDS = 60.0
"""Assumed seconds to compile a run's functions for an accelerator that is not here."""

_SLICES = 2000
"""Points of a run at which the ramping batch is evaluated."""


class Times(NamedTuple):
    """The seconds of a run, by use."""

    compilation: float
    updates: float
    evaluations: float
    checkpoints: float
    """Checkpoints on the way and the last save, model folder included."""

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return self.compilation + self.updates + self.evaluations + self.checkpoints


class RunPlan(NamedTuple):
    """The expected course of a run."""

    updates: float
    tokens: float
    tokens_per_second: float
    """While updates run."""
    rows_per_update: float
    """On average over the ramp."""
    flops_per_token: float
    """Analytic, forward and backward."""
    counted_flops_per_token: float
    """XLA's count of the compiled gradient."""
    bytes_per_token: float
    """XLA's count of the compiled gradient, on the backend that compiled it."""
    bound: str
    """The shares of a step's time."""
    seconds: Times


def micro_batch_seconds(run: RunConfig, counts: RunCounts, speeds: Speeds, *, masked_trees: bool, at: Stage) -> float:
    """Estimate the seconds of one micro-batch's gradient in a stage of the run.

    Operations are the larger of XLA's count and the analytic one: XLA sees the inside of no custom call, and the analytic
    count leaves out what is not a matrix product or a transform.
    """
    count, tokens = counts.gradient[run.train.micro_rows, at], run.train.micro_rows * run.data.seq_len
    only_this = replace(run, train=replace(run.train, next_token_until=float(at.next_token)))
    analytic = tokens * train_flops_per_token(only_this, masked_trees=masked_trees)
    flops = max(count.flops, analytic if at.length == run.data.seq_len else 0.0)
    return speeds.seconds(flops, tokens * routing_flops_per_token(run, masked_trees=masked_trees), count.bytes)


def plan_run(
    run: RunConfig, budget: Budget, counts: RunCounts, speeds: Speeds, *, masked_trees: bool, compile_seconds: float
) -> RunPlan:
    """Plan `run` within `budget` on a device of these speeds."""
    train, data = run.train, run.data
    micro = {
        at: micro_batch_seconds(run, counts, speeds, masked_trees=masked_trees, at=at) for _, at in counts.gradient
    }
    finish = speeds.seconds(counts.finish.flops, 0.0, counts.finish.bytes)
    evaluation = data.eval_rows / train.micro_rows * speeds.seconds(counts.evaluate.flops, 0.0, counts.evaluate.bytes)
    save = guessed_save_seconds(counts.state_bytes)
    saves = n_checkpoints(train, budget.seconds) + 1
    fixed = Times(compile_seconds, 0.0, (train.n_evals + 1) * evaluation, saves * save)
    trainable = None if budget.seconds is None else max(0.0, budget.seconds - fixed.total)

    points = _SLICES if budget.steps is None else min(_SLICES, budget.steps)
    updates = rows = seconds = 0.0
    for i in range(points):
        fraction = (i + 0.5) / points if budget.steps is None else i / points
        n_rows = rows_per_step(train, fraction)
        one = n_rows / train.micro_rows * micro[stage(run, fraction)] + finish
        n = (trainable or 0.0) / points / one if budget.steps is None else budget.steps / points
        updates, rows, seconds = updates + n, rows + n * n_rows, seconds + n * one
    last, tokens = stage(run, 1.0), train.micro_rows * data.seq_len
    count = counts.gradient[train.micro_rows, last]
    return RunPlan(
        updates=updates,
        tokens=rows * data.seq_len,
        tokens_per_second=rows * data.seq_len / max(seconds, 1e-9),
        rows_per_update=rows / max(updates, 1e-9),
        flops_per_token=planned_flops(run),
        counted_flops_per_token=count.flops / tokens,
        bytes_per_token=count.bytes / tokens,
        bound=_bound(speeds, micro[last], count.bytes),
        seconds=fixed._replace(updates=seconds),
    )


def _bound(speeds: Speeds, seconds: float, n_bytes: float) -> str:
    share = n_bytes / speeds.bandwidth / seconds
    return f"matrix products {1 - share:.0%}, the rest {share:.0%}"


def micro_batch_sizes(run: RunConfig) -> list[int]:
    """List the micro-batches whose memory is shown: a quarter to four times the configured one."""
    rows = run.train.micro_rows
    return sorted({max(1, rows // 4), max(1, rows // 2), rows, 2 * rows, 4 * rows})
