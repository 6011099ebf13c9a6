"""A sweep: every task, every run, and the files that are written after each."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from ufbert.errors import UserError
from ufbert.glue.finetune import Diverged, Run, Trace, Tuned, finetune_task
from ufbert.glue.predictions import write_predictions, write_submission
from ufbert.glue.protocols import Protocol
from ufbert.glue.report import points, print_results, write_glue_report
from ufbert.glue.results import GlueResults, Point, ProtocolResult, TaskResult, read_results, write_results
from ufbert.glue.scores import averages, dev_metrics, dev_result
from ufbert.glue.tasks import Examples, Task, TaskData
from ufbert.hub.folder import ModelFolder, load_model, save_model
from ufbert.options.finetune import FREE_ON_RESUME, FinetuneOptions
from ufbert.options.given import Given, argument_words
from ufbert.runtime.console import clock, phase, say, show
from ufbert.runtime.files import write_json
from ufbert.runtime.machine import environment
from ufbert.runtime.typed import Count, read_typed


class SweepInputs(NamedTuple):
    """All that a sweep reads."""

    options: FinetuneOptions
    """With the hyper-parameters of the protocol."""
    protocol: Protocol
    model: ModelFolder
    tasks: list[TaskData]
    given: Given
    """The options that were named."""


def sweep(inputs: SweepInputs, folder: Path) -> GlueResults:
    """Fine-tune on every task and return the results; `glue.json` in `folder` is written after each task.

    Raises UserError if a task has no run with a finite loss, after the other tasks are done.
    """
    options, protocol, model, tasks, _ = inputs
    results = _start_results(inputs, folder)
    teachers = {data.task.name: _teacher(options.teacher, data.task) for data in tasks} if options.teacher else {}
    say(f"protocol {protocol.name}: {protocol.text(model.config)}")
    progress = SweepProgress(tasks, protocol)
    mnli = next((data.task.name for data in tasks if "mnli" in (data.task.name, data.task.cut_of)), "")
    failed: list[str] = []
    for number, data in enumerate(tasks):
        task, began = data.task, time.monotonic()
        progress.current = number
        if task.name in results.tasks:
            progress.skip()
            progress.say("done before")
            continue
        rates = protocol.rates or (protocol.tune.peak_lr(model.config),)
        runs = [Run(seed, lr) for lr in rates for seed in protocol.seeds]
        progress.say(_describe_rows(data, len(runs)))
        starts_from = mnli if task.name in protocol.mnli_first else "model"
        if starts_from == mnli and mnli not in results.tasks:
            failed.append(f"{task.name}, for want of {mnli}")
            progress.skip()
            continue
        start = model if starts_from == "model" else load_model(folder / mnli)
        with phase(f"fine-tuning on {task.name}", stays=False):
            tuned = _run_all(inputs, start, data, runs, teachers.get(task.name), folder, progress)
        if not tuned:
            failed.append(task.name)
            continue
        result = _finish_task(folder, data, tuned, starts_from, began)
        done = {**results.tasks, task.name: result}
        results = replace(results, tasks=done, averages=averages(done))
        medians = ", ".join(
            f"{name} {points(result.deciding.median[name])} ({points(low)} to {points(high)})"
            for name, (low, high) in result.deciding.spread.items()
        )
        progress.say(f"{medians} ({result.seconds:.0f} s)")
        write_results(folder, results)
        shutil.rmtree(folder / "partial", ignore_errors=True)
    if results.tasks:
        files = ", ".join(str(folder / name) for name in ("glue.json", "glue.md", "report.html"))
        with phase("drawing the report"):
            write_glue_report(folder, results)
        print_results(results)
        print(f"\nresults {files}; one model folder per task")
    if failed:
        raise UserError(
            f"No run of {'; '.join(failed)} kept a finite loss, so that no model of it was saved; take a lower rate "
            "(--tune.lr) or clip gradients (--tune.clip-norm 1), in a new --out."
        )
    return results


def _start_results(inputs: SweepInputs, folder: Path) -> GlueResults:
    """Write a new `glue.json`, or on resuming read the one of the folder. Raises UserError if that has other options."""
    options, protocol, model, _, given = inputs
    asked = {name: value for name, value in asdict(options).items() if name not in FREE_ON_RESUME}
    if options.resume:
        return _resumed_results(folder, asked)
    mode = "probe" if options.probe else "from scratch" if options.from_scratch else "fine-tuned"
    if options.teacher:
        mode += f", taught by {options.teacher}"
    run_protocol = ProtocolResult(protocol.name, f"{protocol.text(model.config)} ({protocol.source})", mode)
    facts = environment(["ufbert", "finetune", *argument_words(given)], ("ufbert", "jax", "flax", "optax"))
    source = options.task_file or options.train or options.glue_source
    results = GlueResults(options.model, source, run_protocol, asked, dict(facts), tasks={}, averages=averages({}))
    write_results(folder, results)
    return results


def _resumed_results(folder: Path, asked: dict[str, object]) -> GlueResults:
    if not (folder / "glue.json").exists():
        raise UserError(f"There is no sweep in {folder} to resume.")
    try:
        results = read_results(folder)
    except UserError as error:
        raise UserError(f"The sweep in {folder} is damaged and cannot go on; start a new one. {error}") from error
    for name, value in asked.items():
        before = results.options.get(name, value)  # an option that is newer than the sweep had its default
        if before != value:
            raise UserError(f"{folder} was started with {name}={before}; it cannot go on with {name}={value}.")
    return results


def _run_all(
    inputs: SweepInputs,
    start: ModelFolder,
    data: TaskData,
    runs: list[Run],
    teacher: ModelFolder | None,
    folder: Path,
    progress: "SweepProgress",
) -> list[Tuned]:
    """Run all runs of a task, as many at once as `--runs-at-once` says, and return those that did not diverge.

    The outcomes of groups are kept in `partial/` until the task is done.
    """
    options, size = inputs.options, inputs.options.runs_at_once or len(runs)
    groups = [runs[i : i + size] for i in range(0, len(runs), size)]
    outcomes: list[Tuned | Diverged] = []
    for number, group in enumerate(groups):
        stored = [outcome for run in group if (outcome := _load_outcome(folder, data, run))]
        if len(stored) == len(group):
            outcomes += stored
            progress.say("done before", group)
            continue

        def show(step: int, total: int, event: str, number: int = number, group: list[Run] = group) -> None:
            progress.show(f"{event}  update {step:,}/{total:,}", (number + step / total) / len(groups), group)

        new = finetune_task(
            start, data, inputs.protocol.tune, group, from_scratch=options.from_scratch, probe=options.probe,
            teacher=teacher, keep_best=options.keep == "best", progress=show,
        )  # fmt: skip
        for outcome in new:
            progress.say(_describe_outcome(data, outcome), [outcome.run])
            if len(groups) > 1:
                _save_outcome(folder, data, outcome)
        outcomes += new
    return [outcome for outcome in outcomes if isinstance(outcome, Tuned)]


@dataclass(frozen=True)
class _Stored:
    """`trace.json` of a run that is kept."""

    curve: list[Point]
    truncated: Count


def _outcome_folder(folder: Path, data: TaskData, run: Run) -> Path:
    return folder / "partial" / f"{data.task.name}-{run.seed}-{run.lr:g}"


def _save_outcome(folder: Path, data: TaskData, outcome: Tuned | Diverged) -> None:
    """Keep a run until its task is done; the model folder is written last and marks it whole."""
    place = _outcome_folder(folder, data, outcome.run)
    place.mkdir(parents=True, exist_ok=True)
    if isinstance(outcome, Diverged):
        return write_json(place / "diverged.json", {"update": outcome.update})
    trace = outcome.trace
    np.savez(place / "arrays.npz", allow_pickle=False, losses=trace.losses, **trace.scores)
    write_json(place / "trace.json", {"curve": trace.curve, "truncated": trace.truncated})
    save_model(place / "model", outcome.model)


def _load_outcome(folder: Path, data: TaskData, run: Run) -> Tuned | Diverged | None:
    """Load a run that was kept; None if there is none, or if it is damaged and must be run again."""
    place = _outcome_folder(folder, data, run)
    try:
        if (place / "diverged.json").is_file():
            return Diverged(run, read_typed(place / "diverged.json", dict[str, Count])["update"])
        if not (place / "model").is_dir():
            return None
        stored = read_typed(place / "trace.json", _Stored)
        with np.load(place / "arrays.npz") as arrays:
            losses = arrays["losses"]
            scores = {split: arrays[split] for split in data.dev | data.test}
        model = load_model(place / "model")
    except (UserError, OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    shapes = {split: (len(rows.texts), data.task.n_outputs) for split, rows in (data.dev | data.test).items()}
    if losses.ndim != 1 or {split: array.shape for split, array in scores.items()} != shapes:
        return None
    trace = Trace(stored.curve, losses, scores, stored.truncated)
    return Tuned(run, model, dev_metrics(data, scores), trace)


def _finish_task(folder: Path, data: TaskData, tuned: list[Tuned], starts_from: str, began: float) -> TaskResult:
    """Choose the rate, write the median run's model folder, predictions and submissions, and return the task's result."""
    task = data.task

    def main_metric(run: Tuned) -> float:
        return run.metrics[data.deciding_split][task.metrics[0]]

    by_rate: dict[float, list[Tuned]] = {}
    for run in tuned:
        by_rate.setdefault(run.run.lr, []).append(run)
    medians = {lr: float(np.median([main_metric(run) for run in runs])) for lr, runs in by_rate.items()}
    lr = max(medians, key=lambda rate: (len(by_rate[rate]), medians[rate]))  # a rate that wrecks some seeds comes last
    runs = by_rate[lr]
    saved = sorted(runs, key=main_metric)[(len(runs) - 1) // 2]
    save_model(folder / task.name, saved.model)
    scores = {split: {run.run.seed: run.trace.scores[split] for run in runs} for split in data.dev | data.test}
    for split, examples in (data.dev | data.test).items():
        write_predictions(folder, task, split, examples, scores[split])
    for split in data.test:
        write_submission(folder, task, split, saved.trace.scores[split])
    metrics = {split: {run.run.seed: run.metrics[split] for run in runs} for split in data.dev}
    return TaskResult(
        folder=task.folder, cut_of=task.cut_of, metrics=task.metrics, label_names=task.label_names,
        train_rows=len(data.train.texts), skipped_rows=data.skipped, truncated_rows=saved.trace.truncated, lr=lr,
        rates={f"{rate:g}": median for rate, median in medians.items()}, saved_seed=saved.run.seed,
        dev={
            split: dev_result(task, split, data.train, examples, metrics[split], scores[split])
            for split, examples in data.dev.items()
        },
        curves={run.run.seed: run.trace.curve for run in runs}, starts_from=starts_from,
        seconds=time.monotonic() - began,
    )  # fmt: skip


def _teacher(place: str, task: Task) -> ModelFolder:
    """Load the model that teaches a task. Raises UserError if it was fine-tuned for other labels."""
    folder = Path(place) / task.name if (Path(place) / task.name).is_dir() else Path(place)
    teacher = load_model(folder)
    if teacher.task is None or teacher.task.labels != task.label_names or teacher.task.independent:
        raise UserError(f"The teacher {folder} was not fine-tuned for {task.name}'s labels.")
    return teacher


class SweepProgress:
    """The lines that a sweep prints. They estimate the time left by the expected work of each task."""

    def __init__(self, tasks: list[TaskData], protocol: Protocol) -> None:
        self._names = [data.task.name for data in tasks]
        self._work, self._began = [expected_work(data, protocol) for data in tasks], time.monotonic()
        self.current = 0
        """Number of the task at work."""

    def skip(self) -> None:
        """Expect no work for the current task."""
        self._work[self.current] = 0.0

    def say(self, text: str, runs: Sequence[Run] = ()) -> None:
        """Print a line about the current task, or about some of its runs."""
        say(f"{self._where}, {_describe_runs(runs)}: {text}" if runs else f"{self._where}: {text}")

    def show(self, text: str, share: float, runs: Sequence[Run]) -> None:
        """Show the time left in all, and a text about some runs of the current task, of which this share is done."""
        done = sum(self._work[: self.current]) + share * self._work[self.current]
        left = clock((time.monotonic() - self._began) * (sum(self._work) - done) / max(done, 1e-9))
        show(f"{left} left in all  {self._where}  {text}  {_describe_runs(runs)}")

    @property
    def _where(self) -> str:
        return f"[{self.current + 1}/{len(self._names)}] {self._names[self.current]}"


def expected_work(data: TaskData, protocol: Protocol) -> float:
    """Estimate a task's cost in characters read: three passes' worth for a training row, one for a dev row, of every run."""

    def characters(examples: Examples) -> int:
        return sum(map(len, examples.texts)) + sum(map(len, examples.pairs or []))

    runs = len(protocol.seeds) * max(1, len(protocol.rates))
    epochs = protocol.tune.epochs * (3.0 * characters(data.train) + characters(data.dev[data.deciding_split]))
    return runs * (epochs + sum(map(characters, (data.dev | data.test).values())))


def _describe_rows(data: TaskData, runs: int) -> str:
    dev = len(data.dev[data.deciding_split].texts)
    skipped = f", {data.skipped:,} broken rows left out" if data.skipped else ""
    return f"{len(data.train.texts):,} training and {dev:,} dev rows, {runs} run(s){skipped}"


def _describe_runs(runs: Sequence[Run]) -> str:
    seeds, rates = sorted({run.seed for run in runs}), sorted({run.lr for run in runs})
    text = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {','.join(map(str, seeds))}"
    return text if len(rates) == 1 and len(runs) > 1 else f"{text} at {', '.join(f'{rate:.2g}' for rate in rates)}"


def _describe_outcome(data: TaskData, outcome: Tuned | Diverged) -> str:
    if isinstance(outcome, Diverged):
        return f"the loss was not finite at update {outcome.update:,}, so that this run does not count"
    metrics = outcome.metrics[data.deciding_split]
    return f"dev {', '.join(f'{name} {points(value)}' for name, value in metrics.items())}"
