"""A run as it stands: its configuration, what it has measured so far, and how it goes on or has ended."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ufbert.runtime.claim import is_claimed
from ufbert.runtime.metrics import EvaluationRecord, StepRecord
from ufbert.runtime.run_folder import SUMMARY_FILE, RunFile, Sample, Summary, read_run, read_samples, read_summary
from ufbert.runtime.typed import MAX_LINE, read_lines

State = Literal["finished", "ended", "running", "stopped"]
"""`ended`: it has said why, without a summary. `stopped`: it has not."""


@dataclass(frozen=True)
class RunRecords:
    """What a run folder holds for a reader."""

    folder: Path
    config: RunFile
    summary: Summary | None
    steps: list[StepRecord]
    """Those whose update was applied."""
    evaluations: list[EvaluationRecord]
    events: list[dict[str, Any]]
    damaged: int
    """Lines of metrics.jsonl that are not whole, and left out."""
    state: State
    ending: str
    """Why it has ended, a sentence."""
    samples: list[Sample]

    @property
    def step(self) -> int:
        """The last step that something was measured at."""
        return max((r.step for r in (*self.steps[-1:], *self.evaluations[-1:])), default=0)

    @property
    def spent(self) -> float:
        """Seconds of the budget."""
        if self.summary:
            return float(self.summary.spent_seconds)
        return max((r.spent for r in (*self.steps[-1:], *self.evaluations[-1:])), default=0.0)

    @property
    def tokens(self) -> int:
        """Tokens read."""
        if self.summary:
            return self.summary.tokens
        return max((r.tokens for r in (*self.steps[-1:], *self.evaluations[-1:])), default=0)

    @property
    def fraction(self) -> float:
        """Share of the budget spent."""
        return max((r.fraction for r in (*self.steps[-1:], *self.evaluations[-1:])), default=0.0)

    @property
    def heldout_loss(self) -> float | None:
        """Nats, of the model that was written, or of the last evaluation; None before the first."""
        if self.summary:
            return self.summary.heldout_loss
        return self.evaluations[-1].heldout_loss if self.evaluations else None

    @cached_property
    def architecture(self) -> str:
        """The model as it is trained, at its scale."""
        return self.config.run.model.architecture()

    @property
    def origin(self) -> str:
        """The preset and scale, or the model that it started from."""
        config = self.config
        return f"from {config.init_from}" if config.init_from else f"preset {config.config} at scale {config.scale}"


@dataclass(frozen=True)
class _Line:
    """Any line of metrics.jsonl."""

    event: str | None = None


def read_records_of(folder: Path, ending: str = "", at_work: bool = False) -> RunRecords:
    """Read a run folder. A run that has no summary has ended with `ending`, or is running if a process has claimed it.

    Otherwise it has stopped. The process that trains says so with `at_work`, since there may be no locks. Raises UserError for
    another folder, or if config.json or summary.json is damaged.
    """
    config, metrics = read_run(folder), folder / "metrics.jsonl"
    summary = read_summary(folder) if (folder / SUMMARY_FILE).exists() and not ending else None
    state: State = "running" if at_work or is_claimed(folder) else "stopped"
    if summary or ending:
        state = "finished" if summary else "ended"
    lines = list(read_lines(metrics, _Line))
    events = []
    if any(line.event for line in lines):  # else all of it need not be decoded once more
        events = [record for record in read_lines(metrics, dict[str, Any]) if "event" in record]
    return RunRecords(
        folder=folder,
        config=config,
        summary=summary,
        steps=[step for step in read_lines(metrics, StepRecord) if not step.skipped],
        evaluations=list(read_lines(metrics, EvaluationRecord)),
        events=events,
        damaged=_count_lines(metrics) - len(lines),
        state=state,
        ending=ending,
        samples=read_samples(folder),
    )


def _count_lines(path: Path) -> int:
    """Count the lines of a file as `read_lines` does; 0 if there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in iter(lambda: file.readline(MAX_LINE), b""))
