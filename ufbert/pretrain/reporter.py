"""The reports of a run while it trains: records in `metrics.jsonl`, sentences on the console."""

from dataclasses import dataclass, replace
from typing import Any

from ufbert import nn
from ufbert.config import RunConfig
from ufbert.cost.flops import train_flops_per_token
from ufbert.pretrain.budget import Clock
from ufbert.pretrain.evaluation import Evaluation
from ufbert.pretrain.reference import Point, Reference, no_reference_complaint
from ufbert.pretrain.step import StepMetrics, TrainState
from ufbert.runtime.console import say, show
from ufbert.runtime.memory import memory_bytes
from ufbert.runtime.metrics import EvaluationRecord, StepRecord, Writer


@dataclass
class Reporter:
    """The reports of a session."""

    run: RunConfig
    clock: Clock
    metrics: Writer
    reference: Reference | None
    """A curve to hold the run to."""
    peak_flops: float
    """FLOP/s of all devices at best, 0 if unknown."""
    has_complained: bool = False

    def __post_init__(self) -> None:
        trees_are_masked = nn.tree_backend(self.run.model, self.run.micro_tokens) == "masked"
        self.flops_per_token = train_flops_per_token(self.run, masked_trees=trees_are_masked)

    def step(self, record: StepRecord, metrics: StepMetrics) -> bool:
        """Wait for a step that was dispatched as `record` says, and report it. Returns whether it was applied."""
        sums, applied, speed = metrics.sums, bool(metrics.applied), record.tokens_per_second
        count = max(float(sums.count), 1.0)
        record = replace(
            record,
            loss=float(sums.loss) / count,
            accuracy=float(sums.correct) / count,
            gradient_norm=float(metrics.norm),
            spent=round(self.clock.spent(), 3),
            extra_loss=float(sums.extra) / count if float(sums.extra) else None,
            utilisation=speed * self.flops_per_token / self.peak_flops if self.peak_flops else None,
            skipped=None if applied else True,
        )
        self._write(record)
        show(
            f"{self.clock.left(record.step)}  step {record.step:,}  {speed:,.0f} tokens/s  "
            f"{'next-token ' if record.next_token else ''}loss {record.loss:.3f}  lr {record.lr:.2e}"
        )
        return applied

    def evaluation(self, state: TrainState, result: Evaluation, unigram_loss: float) -> None:
        """Report an evaluation of `state`, and warn once if the run is far below the reference curve."""
        step, gain = int(state.step), unigram_loss - result.loss
        now = Point(self.clock.fraction(step), int(state.rows_seen) * self.run.data.seq_len, gain)
        usage: Any = result.usage or None  # its numbers may be NaN here, and null in the file
        self._write(
            EvaluationRecord(
                step, result.loss, result.accuracy, now.share, int(now.tokens), memory_bytes(), int(state.skipped),
                round(self.clock.spent(), 3), usage,
            )
        )  # fmt: skip
        say(
            f"step {step:,}: held-out loss {result.loss:.3f} nats ({gain:+.3f} below word frequency), "
            f"accuracy {result.accuracy:.1%}"
        )
        if now.share < self.run.train.next_token_until:  # masked tokens are not yet what it learns
            return
        complaint = no_reference_complaint(now) if self.reference is None else self.reference.complaint(now)
        if complaint is not None and not self.has_complained:
            self.has_complained = True
            say(f"warning: {complaint}")
            self.event(step, "off track", why=complaint)

    def resumption(self, step: int, spent_at_save: float, devices: int) -> None:
        """Report what an interruption cost: work after the checkpoint, redone or dropped, and the start-up."""
        lost = max(0.0, self.clock.spent_before - spent_at_save)
        start = self.clock.spent() - self.clock.spent_before
        say(
            f"resumed from the checkpoint of step {step:,}; {self.clock.left(step)}; the restart cost {lost:.1f} s of work "
            f"after that checkpoint and {start:.1f} s of start-up so far"
        )
        self.event(step, "resumed", lost_seconds=lost, start_seconds=start, devices=devices)

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Record what happened after `step`."""
        self.metrics.write({"step": step, "event": event, **facts})

    def _write(self, record: StepRecord | EvaluationRecord) -> None:
        self.metrics.write({name: value for name, value in vars(record).items() if value is not None})
