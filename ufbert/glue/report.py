"""`glue.md` and `report.html` of a sweep: scores, learning curves, confusion tables, and how it all came about."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rich.console
import rich.table
import rich.text

from ufbert.glue.metrics import METRICS
from ufbert.glue.predictions import read_predictions
from ufbert.glue.results import DevResult, GlueResults, TaskResult
from ufbert.glue.tasks import TASKS
from ufbert.report.charts import Intervals, Line, LineChart, Track
from ufbert.report.page import Bullets, Page, Section, Table, html, markdown_grid
from ufbert.report.run_report import duration
from ufbert.runtime.files import to_json_text, write_text
from ufbert.runtime.machine import PROVENANCE


def write_glue_report(folder: Path, results: GlueResults) -> str:
    """Write `glue.md`, whose text is returned, and `report.html`. Raises UserError if the disk refuses."""
    text = glue_markdown(results)
    write_text(folder / "glue.md", text)
    write_text(folder / "report.html", html(glue_page(results, folder)))
    return text


def print_results(results: GlueResults) -> None:
    """Print what a terminal of 80 columns has room for: the scores over all seeds, what they fall short of, the averages."""
    console, table = rich.console.Console(highlight=False), rich.table.Table(box=None, pad_edge=False)
    head, rows = _score_grid(results)
    kept = [0, 1, 2, 3, len(head) - 2, len(head) - 1]  # all but the seeds'
    for i in kept:
        table.add_column(head[i], justify="right" if 2 <= i < len(head) - 1 else "left")
    for row in rows:
        table.add_row(*(rich.text.Text(row[i]) for i in kept))
    averages = [a for a in results.averages.values() if a.value is not None] if is_official(results) else []
    texts = [*shortfalls(results), *(f"{a.name}: {points(a.value or 0.0)}. {a.sentence}" for a in averages)]
    console.print(rich.console.Group("", table, *map(rich.text.Text, texts)))


def points(score: float, sign: Literal["", "+"] = "") -> str:
    """Format a score times 100, with one decimal, and with `sign` a plus before it if it is not negative."""
    return f"{round(100 * score, 1) + 0.0:{sign}.1f}"  # + 0.0 turns -0.0 into 0.0


def is_official(results: GlueResults) -> bool:
    """Tell if a sweep is one of GLUE's tasks, or of parts of them, and not of a task of one's own."""
    return not results.tasks or any(name in TASKS or task.cut_of for name, task in results.tasks.items())


def heading(results: GlueResults) -> str:
    """Name what a sweep was fine-tuned on, and the model: `GLUE: runs/mine/model`, `reviews: runs/mine/model`."""
    own = ", ".join(task.folder for task in results.tasks.values())
    return f"{'GLUE' if is_official(results) else own}: {results.model}"


def shortfalls(results: GlueResults) -> list[str]:
    """Say of each dev split and metric that a model without any knowledge would have got as far; [] if there is none."""
    texts = []
    for task, split, dev in _devs(results):
        for metric in task.metrics:
            if words := _shortfall(task, dev, metric):
                texts.append(f"{task.title(split)}: {metric} {points(dev.median[metric])} is {words}.")
    return texts


def _shortfall(task: TaskResult, dev: DevResult, metric: str) -> str:
    """Compare a median with what takes no knowledge: one answer to all rows, or for correlations answers by chance."""
    median, rows = dev.median[metric], dev.rows
    if metric not in ("accuracy", "f1"):
        chance = 2 / math.sqrt(max(rows, 1))  # two standard deviations of the correlation of independent vectors
        if median >= chance:
            return ""
        return f"not to be told from chance: answers that ignore the texts can reach {points(chance)} on {rows:,} rows"
    baseline, answer = dev.majority[metric], " or always ".join(_majority_classes(task, dev)) or "alike"
    counts = _class_counts(dev)
    if (
        metric == "f1" and len(counts) == 2
    ):  # it counts class 1, so that always answering that is what takes no knowledge
        labels = np.repeat(np.arange(2), counts)
        baseline, answer = METRICS["f1"](np.ones(len(labels), int), labels), task.label_names[1]
    if median > baseline:
        return ""
    unit = f"{points(baseline)}%" if metric == "accuracy" else points(baseline)
    return f"{'worse' if median < baseline else 'no better'} than always answering {answer} ({unit})"


def _class_counts(dev: DevResult) -> list[int]:
    """Count the dev rows of each true class; [] if no confusion table was kept."""
    return [sum(counts) for counts in next(iter(dev.confusion.values()), [])]


def _majority_classes(task: TaskResult, dev: DevResult) -> list[str]:
    """Name the class, or the classes, whose constant answer scores as `dev.majority` says."""
    counts = _class_counts(dev)
    labels = np.repeat(np.arange(len(counts)), counts)
    return [
        name
        for number, name in enumerate(task.label_names if len(labels) else ())
        if all(abs(METRICS[m](np.full(len(labels), number), labels) - dev.majority[m]) < 1e-9 for m in task.metrics)
    ]


def _devs(results: GlueResults) -> Iterator[tuple[TaskResult, str, DevResult]]:
    """Iterate over every dev split of every task."""
    return ((task, split, dev) for task in results.tasks.values() for split, dev in task.dev.items())


def _score_grid(results: GlueResults) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of scores, a row for each dev split and metric."""
    head = ["task", "metric", "median", "lowest to highest", *(f"seed {seed}" for seed in results.seeds), "majority"]
    rows = []
    for task, split, dev in _devs(results):
        for metric in task.metrics:
            each = [points(dev.seeds[seed][metric]) if seed in dev.seeds else "" for seed in results.seeds]
            spread = " to ".join(points(value) for value in dev.spread[metric])
            scores = [points(dev.median[metric]), spread, *each, points(dev.majority[metric])]
            rows.append([task.title(split), metric, *scores, _dev_rows(task, dev)])
    return [*head, "dev rows"], rows


def _dev_rows(task: TaskResult, dev: DevResult) -> str:
    """Say how many rows were scored, and if the score is an official one."""
    if task.cut_of:
        return f"{dev.rows:,}, a part of the task"
    if dev.rows == dev.official_rows:
        return f"{dev.rows:,}, official"
    return f"{dev.rows:,} of {dev.official_rows:,}" if dev.official_rows else f"{dev.rows:,}"


def _training_grid(results: GlueResults) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of how each task was trained."""
    head = ["task", "training rows", "cut to length", "broken, left out", "starts from", "learning rate", "seconds"]
    rows = [
        [
            task.folder, f"{task.train_rows:,}", f"{task.truncated_rows:,}", f"{task.skipped_rows:,}", task.starts_from,
            f"{task.lr:.2g}", f"{task.seconds:,.0f}", str(task.saved_seed),
        ]
        for task in results.tasks.values()
    ]  # fmt: skip
    return [*head, "seed kept"], rows


def _averages(results: GlueResults) -> list[tuple[str, str]]:
    """Return each average's name, and its value or the missing tasks, with a sentence that defines it; [] without GLUE."""
    texts = []
    for average in results.averages.values() if is_official(results) else ():
        missing = f"not computed for want of {', '.join(average.missing)}"
        value = missing if average.value is None else points(average.value)
        texts.append((average.name, f"{value}. {average.sentence}"))
    return texts


def _key(results: GlueResults) -> str:
    """Say how to read the table of scores."""
    key = (
        "Scores are times 100. Median, lowest and highest are over seeds; majority is the score of always giving the "
        "training rows' most frequent answer."
    )
    official = " Only rows marked official are the whole dev set that papers score."
    return key + official if is_official(results) else key


def glue_markdown(results: GlueResults) -> str:
    """Write the tables of a sweep as Markdown."""
    head, rows = _score_grid(results)
    parts = [
        f"# {heading(results)}",
        f"Protocol: {results.protocol}\n\nRows from {results.source}. {_key(results)}",
        markdown_grid(head, rows, numbers=range(2, len(head) - 1)),
        "\n".join(f"- **{text}**" for text in shortfalls(results)),
        "\n".join(f"- **{name}**: {text}" for name, text in _averages(results)),
        markdown_grid(*_training_grid(results), numbers=(1, 2, 3, 5, 6, 7)) + "\n",
    ]
    return "\n\n".join(part for part in parts if part)


def glue_page(results: GlueResults, folder: Path | None = None) -> Page:
    """Return the page of a sweep, with sample answers of the prediction files in its folder."""
    head, rows = _score_grid(results)
    scores = [
        Table(head, rows, range(2, len(head) - 1), strong_columns=[2]),
        _key(results),
        f"Rows from {results.source}.",
    ]
    averages = [f"{name}: {text}" for name, text in _averages(results)]
    curves = [chart for task in results.tasks.values() for chart in _curves(task)]
    confusions = [_confusion(task, split, dev) for task, split, dev in _devs(results) if dev.confusion]
    training = Table(*_training_grid(results), numbers=(1, 2, 3, 5, 6, 7))
    sections = [
        Section("Scores", [_overview(results), *([Bullets(texts)] if (texts := shortfalls(results)) else []), *scores])
        if results.tasks
        else None,
        Section("Averages", [Bullets(averages)], folded=all(a.value is None for a in results.averages.values()))
        if averages
        else None,
        Section("How each task was trained", [training]) if results.tasks else None,
        Section("Confusions", [_CONFUSION, *confusions], folded=True) if confusions else None,
        Section("Learning curves", curves, folded=True) if curves else None,
    ]
    return Page(
        title=heading(results),
        verdict=" ".join(_verdict(results)),
        sections=[section for section in sections if section],
        samples=_samples(results, folder) if folder else [],
        facts=_facts(results),
        configuration=to_json_text(results.options, indent=2),
    )


def _verdict(results: GlueResults) -> list[str]:
    """Say in plain sentences what the model scores, and where that is no more than a model without knowledge would."""
    if not results.tasks:
        return ["No task is finished yet."]
    tasks = results.tasks.values()
    each = [f"{t.title(next(iter(t.dev)))} {t.metrics[0]} {points(t.deciding.median[t.metrics[0]])}" for t in tasks]
    n_seeds = len(results.seeds)
    of = f"medians of {n_seeds} seeds" if n_seeds > 1 else "one seed, so that no spread is known"
    texts = [f"The model scores, times 100: {', '.join(each)} ({of})."]
    short = {text.split(":", 1)[0]: "" for text in shortfalls(results)}
    if short:
        texts.append(f"It does no better than a model without any knowledge would on {', '.join(short)}.")
    for average in results.averages.values() if is_official(results) else ():
        if average.value is not None:
            texts.append(f"{average.name}: {points(average.value)}.")
    return texts


def _facts(results: GlueResults) -> dict[str, Any]:
    """Return how the sweep came about: command, commit, processor and load first."""
    environment = results.environment
    first = {name: environment.get(name, "not recorded") for name in PROVENANCE}
    about = {
        "model": results.model,
        "protocol": f"{results.protocol.name} ({results.protocol.mode}): {results.protocol.text}",
        "rows": results.source,
        "time": duration(float(sum(task.seconds for task in results.tasks.values()))),
    }
    return first | about | {name: value for name, value in environment.items() if name not in PROVENANCE}


def _overview(results: GlueResults) -> Intervals:
    """Draw the first metric of every dev split: each seed, the median, and the majority's score."""
    tracks = []
    for task, split, dev in _devs(results):
        metric = task.metrics[0]
        low, high = (100 * end for end in dev.spread[metric])
        singles = [100 * scores[metric] for scores in dev.seeds.values()]
        base, name = 100 * dev.majority[metric], f"{task.title(split)}, {metric}"
        tracks.append(Track(name, 100 * dev.median[metric], low, high, singles, base))
    return Intervals("Median and range over seeds", "score times 100", tracks, baseline="majority")


def _curves(task: TaskResult) -> list[LineChart]:
    """Draw training loss and the first metric over epochs, a line for each seed; none if no curves were kept."""
    kept, metric = {seed: curve for seed, curve in task.curves.items() if curve}, task.metrics[0]
    if not kept:
        return []

    def lines(name: str, factor: float) -> list[Line]:
        return [
            Line(
                f"seed {seed}", [(p["epoch"], factor * p[name]) for p in curve if name in p and "epoch" in p], dots=True
            )
            for seed, curve in kept.items()
        ]

    level = {"majority": 100 * task.deciding.majority[metric]}
    return [
        LineChart(f"{task.folder}: training loss", "epoch", "loss", lines("loss", 1.0)),
        LineChart(f"{task.folder}: dev {metric}", "epoch", f"{metric} times 100", lines(metric, 100.0), levels=level),
    ]


_CONFUSION = "True class down, predicted class across, of the seed that was kept; the share is of the true class."


def _confusion(task: TaskResult, split: str, dev: DevResult) -> Table:
    """Tabulate true class (down) by predicted class (across) of the seed that was kept, darker for a larger share."""
    seed = task.saved_seed if task.saved_seed in dev.confusion else min(dev.confusion)
    rows, shades = [], {}
    for i, (name, counts) in enumerate(zip(task.label_names, dev.confusion[seed], strict=True)):
        shares = [count / max(1, sum(counts)) for count in counts]
        rows.append([name, *(f"{count:,} ({share:.0%})" for count, share in zip(counts, shares, strict=True))])
        shades |= {(i, j + 1): share for j, share in enumerate(shares)}
    head = ["true, given", *task.label_names]
    caption = f"{task.title(split)}, seed {seed}"
    return Table(head, rows, range(1, len(head)), caption=caption, shades=shades)


SAMPLES = 2
"""Right answers, and wrong ones, that are shown of a task."""


def _samples(results: GlueResults, folder: Path) -> list[Any]:
    """Tabulate the first right and the first wrong answers of every task, by the seed that was kept."""
    rows = []
    for name, task in results.tasks.items():
        split = next(iter(task.dev))
        kept = read_predictions(folder / "predictions" / f"{name}.{split}.tsv", task.label_names)
        if kept is None or task.saved_seed not in kept.predicted:
            continue
        answers = kept.predicted[task.saved_seed]
        if task.label_names:
            right = answers == kept.labels
            picks = [*np.flatnonzero(right)[:SAMPLES], *np.flatnonzero(~right)[:SAMPLES]]
            shown = [(task.label_names[int(kept.labels[i])], task.label_names[int(answers[i])]) for i in picks]
        else:
            picks = list(range(min(2 * SAMPLES, len(answers))))
            shown = [(f"{kept.labels[i]:.2f}", f"{answers[i]:.2f}") for i in picks]
        texts = [" / ".join(kept.rows[i][1:-1]) for i in picks]
        rows += [[task.title(split), text, given, answer] for text, (given, answer) in zip(texts, shown, strict=True)]
    return [Table(["task", "text", "given", "answer"], rows)] if rows else []
