"""A sweep: every task, every run, and what is written after each."""

import importlib.metadata
import json
import platform as host
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ufbert.config.stored import FORMAT_VERSION
from ufbert.errors import UserError
from ufbert.glue.command import FREE_ON_RESUME, FinetuneOptions
from ufbert.glue.finetune import Diverged, Run, Trace, Tuned, finetune_task, format_metrics, metrics_of
from ufbert.glue.outcome import averages, dev_outcome, write_predictions, write_submission
from ufbert.glue.protocols import Protocol
from ufbert.glue.rows import Rows, TaskData
from ufbert.glue.tasks import Task
from ufbert.hub.folder import ModelFolder, load_model, save_model
from ufbert.report.glue_report import write_glue_report
from ufbert.runtime.console import LiveLine
from ufbert.runtime.files import write_json


def sweep(options: FinetuneOptions, protocol: Protocol, model: ModelFolder, sets: list[TaskData]) -> dict[str, Any]:
    """Fine-tune on every task and return what `glue.json` in the output folder holds; it is written after each task."""
    folder, live = Path(options.out), LiveLine(every=10.0)
    results = _begin(folder, options, protocol, model)
    teachers = {data.task.name: _teacher(options.teacher, data.task) for data in sets} if options.teacher else {}
    print(f"protocol {protocol.name}: {protocol.text(model.config)}")
    eta = _Eta([_work(data, protocol) for data in sets])
    failed: list[str] = []
    mnli = next((data.task.name for data in sets if "mnli" in (data.task.name, data.task.cut_of)), "")
    for number, data in enumerate(sets, 1):
        task, began = data.task, time.monotonic()
        if task.name in results["tasks"]:
            live.say(f"[{number}/{len(sets)}] {task.name}: done before")
            eta.skip(number - 1)
            continue
        runs = [
            Run(seed, lr) for lr in protocol.rates or (protocol.tune.peak_lr(model.config),) for seed in protocol.seeds
        ]
        live.say(
            f"[{number}/{len(sets)}] {task.name}: {len(data.train.texts):,} training and {len(_first(data.dev).texts):,} dev "
            f"rows, {len(runs)} run(s){_counted(data)}"
        )
        first = task.name in protocol.mnli_first
        if first and mnli not in results["tasks"]:
            failed.append(f"{task.name}, for want of {mnli}")
            eta.skip(number - 1)
            continue
        start = load_model(folder / mnli) if first else model
        done = _runs(
            options, protocol, start, data, runs, teachers.get(task.name), folder, live, eta, f"[{number}/{len(sets)}]"
        )
        if not done:
            failed.append(task.name)
            continue
        entry = _finish_task(folder, data, done, protocol)
        entry |= {"starts_from": mnli if first else "model", "seconds": time.monotonic() - began}
        results["tasks"][task.name] = entry
        results["averages"] = averages(results["tasks"])
        live.say(f"[{number}/{len(sets)}] {task.name}: {_said(entry)} ({entry['seconds']:.0f} s)")
        write_json(folder / "glue.json", results)
        shutil.rmtree(folder / "partial", ignore_errors=True)
    if failed and not results["tasks"]:
        raise UserError(_failure(failed))
    table, page = write_glue_report(folder)
    print(
        f"\n{table.read_text(encoding='utf-8')}\nresults {folder / 'glue.json'}, {table}, {page}; one model folder per task"
    )
    if failed:
        raise UserError(_failure(failed))
    return results


def _failure(tasks: list[str]) -> str:
    return (
        f"No run of {'; '.join(tasks)} kept a finite loss, so that no model of it was saved; take a lower rate (--tune.lr) or "
        "clip gradients (--tune.clip-norm 1), in a new --out."
    )


def _begin(folder: Path, options: FinetuneOptions, protocol: Protocol, model: ModelFolder) -> dict[str, Any]:
    """A new `glue.json`, or on resuming the one that is there. Raises UserError if that is of other options."""
    asked = json.loads(json.dumps({k: v for k, v in asdict(options).items() if k not in FREE_ON_RESUME}))
    path = folder / "glue.json"
    if options.resume:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before, version = dict(found["options"]), found["format_version"]
        except FileNotFoundError as error:
            raise UserError(f"There is no sweep in {folder} to resume.") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged, so the sweep cannot go on: {error}; start a new one.") from error
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}; this ufbert reads {FORMAT_VERSION}. Resume it with its own."
            )
        for name, value in asked.items():
            if name in before and before[name] != value:  # an option that is newer than the sweep
                raise UserError(
                    f"{folder} was started with {name}={before.get(name)}; it cannot go on with {name}={value}."
                )
        return found
    mode = "probe" if options.probe else "from scratch" if options.from_scratch else "fine-tuned"
    results = {
        "format": "ufbert-glue",
        "format_version": FORMAT_VERSION,
        "model": options.model,
        "source": options.task_file or options.train or options.glue_source,
        "protocol": {
            "name": protocol.name,
            "text": f"{protocol.text(model.config)} ({protocol.source})",
            "mode": f"{mode}, taught by {options.teacher}" if options.teacher else mode,
        },
        "options": asked,
        "environment": {
            "python": host.python_version(),
            "machine": host.platform(),
            **{name: importlib.metadata.version(name) for name in ("ufbert", "jax", "flax", "optax")},
        },
        "tasks": {},
        "averages": averages({}),
    }
    write_json(path, results)
    return results


def _runs(
    options: FinetuneOptions,
    protocol: Protocol,
    model: ModelFolder,
    data: TaskData,
    runs: list[Run],
    teacher: ModelFolder | None,
    folder: Path,
    live: LiveLine,
    eta: "_Eta",
    where: str,
) -> list[Tuned]:
    """All runs of a task that did not diverge, as many at once as asked for. What groups gave is kept in `partial/` until the
    task is done."""
    size, done = options.runs_at_once or len(runs), []
    groups = [runs[i : i + size] for i in range(0, len(runs), size)]
    for number, group in enumerate(groups):
        kept = [_stored(folder, data, run) for run in group]
        if all(kept):
            done += [one for one in kept if isinstance(one, Tuned)]
            live.say(f"{where} {data.task.name}, {_named(group)}: done before")
            continue

        def progress(step: int, total: int, what: str, number: int = number, group: list[Run] = group) -> None:
            left = eta.left((number + step / total) / len(groups))
            live.show(
                f"{where} {data.task.name}, {_named(group)}: {what}, update {step:,}/{total:,}; {left} left in all"
            )

        found = finetune_task(
            model, data, protocol.tune, group, from_scratch=options.from_scratch, probe=options.probe, teacher=teacher,
            keep_best=options.keep == "best", progress=progress,
        )  # fmt: skip
        for one in found:
            said = f"dev {format_metrics(_first(one.metrics))}" if isinstance(one, Tuned) else _said_of(one)
            live.say(f"{where} {data.task.name}, {_named([one.run])}: {said}")
            if len(groups) > 1:
                _store(folder, data, one)
        done += [one for one in found if isinstance(one, Tuned)]
    eta.task_done()
    return done


def _place(folder: Path, data: TaskData, run: Run) -> Path:
    return folder / "partial" / f"{data.task.name}-{run.seed}-{run.lr:g}"


def _said_of(diverged: Diverged) -> str:
    return f"the loss was no finite number any more at update {diverged.update:,}, so that this run does not count"


def _store(folder: Path, data: TaskData, tuned: Tuned | Diverged) -> None:
    """Keep a run until its task is done; the model folder comes last and marks it whole."""
    place = _place(folder, data, tuned.run)
    place.mkdir(parents=True, exist_ok=True)
    if isinstance(tuned, Diverged):
        return write_json(place / "diverged.json", {"update": tuned.update})
    arrays: dict[str, Any] = {"losses": tuned.trace.losses, **tuned.trace.scores}
    np.savez(place / "arrays.npz", **arrays)
    write_json(place / "trace.json", {"curve": tuned.trace.curve, "truncated": tuned.trace.truncated})
    save_model(place / "model", tuned.model)


def _stored(folder: Path, data: TaskData, run: Run) -> Tuned | Diverged | None:
    """A run that was kept, or None."""
    place = _place(folder, data, run)
    if (place / "diverged.json").is_file():
        return Diverged(run, json.loads((place / "diverged.json").read_text(encoding="utf-8"))["update"])
    if not (place / "model").is_dir():
        return None
    with np.load(place / "arrays.npz") as found:
        scores = {name: found[name] for name in found.files}
    kept = json.loads((place / "trace.json").read_text(encoding="utf-8"))
    trace = Trace(kept["curve"], scores.pop("losses"), scores, kept["truncated"])
    return Tuned(run, load_model(place / "model"), metrics_of(data, scores), trace)


def _finish_task(folder: Path, data: TaskData, done: list[Tuned], protocol: Protocol) -> dict[str, Any]:
    """Choose the rate, write the median run's model folder, predictions and submissions, and return the task's entry."""
    task, main = data.task, data.task.metrics[0]
    by_rate: dict[float, list[Tuned]] = {}
    for one in done:
        by_rate.setdefault(one.run.lr, []).append(one)
    medians = {lr: float(np.median([_first(one.metrics)[main] for one in runs])) for lr, runs in by_rate.items()}
    lr = max(medians, key=lambda rate: (len(by_rate[rate]), medians[rate]))  # a rate that wrecks some seeds comes last
    runs = by_rate[lr]
    order = np.argsort([_first(one.metrics)[main] for one in runs], kind="stable")
    saved = runs[int(order[(len(runs) - 1) // 2])]
    save_model(folder / task.name, saved.model)
    for split, rows in (data.dev | data.test).items():
        write_predictions(folder, task, split, rows, {one.run.seed: one.trace.scores[split] for one in runs})
    for split in data.test:
        write_submission(folder, task, split, saved.trace.scores[split])
    return {
        "folder": task.folder,
        "cut_of": task.cut_of,
        "metrics": list(task.metrics),
        "label_names": list(task.label_names),
        "train_rows": len(data.train.texts),
        "skipped_rows": sum(rows.skipped for rows in (data.train, *data.dev.values(), *data.test.values())),
        "truncated_rows": saved.trace.truncated,
        "lr": lr,
        "rates": {f"{rate:g}": median for rate, median in medians.items()},
        "saved_seed": saved.run.seed,
        "dev": {
            split: dev_outcome(task, split, data.train, rows, {one.run.seed: one.trace.scores[split] for one in runs})
            for split, rows in data.dev.items()
        },
        "curves": {str(one.run.seed): one.trace.curve for one in runs},
    }


def _teacher(place: str, task: Task) -> ModelFolder:
    """The model that teaches a task. Raises UserError if it was made for other labels."""
    folder = Path(place) / task.name if (Path(place) / task.name).is_dir() else Path(place)
    teacher = load_model(folder)
    if teacher.task is None or teacher.task.labels != task.label_names or teacher.task.independent:
        raise UserError(f"The teacher {folder} was not fine-tuned for {task.name}'s labels.")
    return teacher


class _Eta:
    """What is left of a sweep, by the work that each task is expected to be and the time that work took so far."""

    def __init__(self, work: list[float]) -> None:
        self._work, self._now, self._done, self._began = work, 0, 0.0, time.monotonic()

    def skip(self, number: int) -> None:
        """A task was done by an earlier session."""
        self._work[number], self._now = 0.0, number + 1

    def task_done(self) -> None:
        self._done, self._now = self._done + self._work[self._now], self._now + 1

    def left(self, share: float) -> str:
        """Time left when this share of the current task is done."""
        done = self._done + share * self._work[self._now]
        seconds = int((time.monotonic() - self._began) * (sum(self._work) - done) / max(done, 1e-9))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}"


def _work(data: TaskData, protocol: Protocol) -> float:
    """What a task costs, in characters read: three passes' worth for a training row, one for a dev row, of every run."""

    def characters(rows: Rows) -> int:
        return sum(map(len, rows.texts)) + sum(map(len, rows.pairs or []))

    scored = sum(characters(rows) for rows in data.dev.values())
    runs = len(protocol.seeds) * max(1, len(protocol.rates))
    epochs = protocol.tune.epochs * (3.0 * characters(data.train) + scored)
    return runs * (epochs + sum(map(characters, data.test.values())))


def _first(splits: dict[str, Any]) -> Any:
    return next(iter(splits.values()))


def _counted(data: TaskData) -> str:
    skipped = sum(rows.skipped for rows in (data.train, *data.dev.values(), *data.test.values()))
    return f", {skipped:,} broken rows left out" if skipped else ""


def _named(runs: list[Run]) -> str:
    seeds, rates = sorted({run.seed for run in runs}), sorted({run.lr for run in runs})
    what = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {','.join(map(str, seeds))}"
    return what if len(rates) == 1 and len(runs) > 1 else f"{what} at {', '.join(f'{rate:.2g}' for rate in rates)}"


def _said(entry: dict[str, Any]) -> str:
    """The median and spread of each metric, in points."""
    dev = _first(entry["dev"])
    return ", ".join(
        f"{name} {100 * dev['median'][name]:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        for name, (low, high) in dev["spread"].items()
    )
