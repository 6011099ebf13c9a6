"""`glue.md` and `report.html` of a sweep: scores, learning curves, confusion tables, and how it all came about."""

import html
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rich.console
import rich.table
import rich.text

from ufbert.glue.metrics import METRICS
from ufbert.glue.results import DevResult, GlueResults, Point, TaskResult
from ufbert.glue.tasks import TASKS
from ufbert.report.plain import facts, grid, markdown_grid, page, svg
from ufbert.runtime.files import write_text


def write_glue_report(folder: Path, results: GlueResults) -> str:
    """Write `glue.md`, whose text is returned, and `report.html`. Raises UserError if the disk refuses."""
    text = glue_markdown(results)
    write_text(folder / "glue.md", text)
    write_text(folder / "report.html", glue_page(results))
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


def glue_page(results: GlueResults) -> str:
    """Write the page of a sweep as self-contained HTML."""
    head, rows = _score_grid(results)
    pictures = [_overview(results)] if results.tasks else []
    curves = [picture for task in results.tasks.values() if (picture := _curves(task))]
    confusions = [_confusion(task, split, dev) for task, split, dev in _devs(results) if dev.confusion]
    body = [
        f"<p><b>{html.escape(results.protocol.name)}</b> ({html.escape(results.protocol.mode)}): "
        f"{html.escape(results.protocol.text)}</p>",
        *pictures,
        grid(head, rows, numbers=range(2, len(head) - 1)),
        *(f"<p><b>{html.escape(text)}</b></p>" for text in shortfalls(results)),
        f'<p class="note">{_key(results)} Rows from {html.escape(results.source)}.</p>',
        *(["<h2>Averages</h2>"] if is_official(results) else []),
        *(f"<p><b>{html.escape(name)}</b>: {html.escape(text)}</p>" for name, text in _averages(results)),
        "<h2>Training</h2>",
        grid(*_training_grid(results), numbers=(1, 2, 3, 5, 6, 7)),
        *(["<h2>Learning curves</h2>", *curves] if curves else []),
        *(["<h2>Confusions</h2>", f'<div class="row">{"".join(confusions)}</div>'] if confusions else []),
        f"<h2>Environment</h2>{facts(results.environment)}",
        f"<h2>Configuration</h2><pre>{html.escape(json.dumps(results.options, indent=2))}</pre>",
    ]
    return page(heading(results), "\n".join(body))


def _overview(results: GlueResults) -> str:
    """Draw the first metric of every dev split: each seed, the median, and the majority's score."""
    import matplotlib.figure

    devs = list(_devs(results))
    figure = matplotlib.figure.Figure(figsize=(9, 0.8 + 0.42 * len(devs)), layout="constrained")
    axis = figure.subplots()
    for y, (task, _, dev) in enumerate(devs):
        metric = task.metrics[0]
        median, base = 100 * dev.median[metric], 100 * dev.majority[metric]
        seeds = [100 * scores[metric] for scores in dev.seeds.values()]
        axis.plot([base, median], [y, y], color=_BLUE, lw=6, alpha=0.18, solid_capstyle="butt")
        axis.plot(base, y, "|", color="gray", ms=14, mew=2, label="" if y else "majority")
        axis.plot(seeds, [y] * len(seeds), "o", color=_BLUE, ms=5, alpha=0.5, mew=0, label="" if y else "a seed")
        axis.plot(median, y, "|", color=_BLUE, ms=18, mew=2.5, label="" if y else "median")
        axis.annotate(f"{median:.1f}", (1.01, y), xycoords=("axes fraction", "data"), va="center")
    axis.set_yticks(range(len(devs)), [f"{task.title(split)}, {task.metrics[0]}" for task, split, _ in devs])
    axis.set_ylim(len(devs) - 0.5, -0.5)
    axis.set_xlim(min(0, *axis.get_xlim()), 100)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return svg(figure)


_BLUE, _ORANGE = "tab:blue", "tab:orange"


def _curves(task: TaskResult) -> str:
    """Draw training loss and the first metric over epochs, a line for each seed; "" if no curves were kept."""
    import matplotlib.figure

    curves, metric = [curve for curve in task.curves.values() if curve], task.metrics[0]
    if not curves:
        return ""
    figure = matplotlib.figure.Figure(figsize=(9, 2.6), layout="constrained")
    loss, score = figure.subplots(1, 2)
    for curve in curves:
        _draw_curve(loss, curve, "loss", 1.0, _ORANGE)
        _draw_curve(score, curve, metric, 100.0, _BLUE)
    score.axhline(100 * task.deciding.majority[metric], color="gray", ls="--", lw=1, label="majority")
    score.legend(frameon=False, loc="lower right")
    loss.set_ylabel("training loss")
    score.set_ylabel(f"dev {metric}")
    for axis in (loss, score):
        axis.set_xlabel("epoch")
        axis.locator_params(axis="x", integer=True)
    return f"<h3>{html.escape(task.folder)}</h3>{svg(figure)}"


def _draw_curve(axis: Any, curve: list[Point], name: str, factor: float, color: str) -> None:
    drawn = [point for point in curve if name in point and "epoch" in point]
    epochs, values = [point["epoch"] for point in drawn], [factor * point[name] for point in drawn]
    axis.plot(epochs, values, "o-", color=color, lw=1.2, ms=3, alpha=0.6)


def _confusion(task: TaskResult, split: str, dev: DevResult) -> str:
    """Tabulate true class (down) by predicted class (across) of the seed that was kept, darker for a larger share."""
    seed = task.saved_seed if task.saved_seed in dev.confusion else min(dev.confusion)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in task.label_names)
    lines = []
    for name, counts in zip(task.label_names, dev.confusion[seed], strict=True):
        shares = [count / max(1, sum(counts)) for count in counts]
        cells = "".join(
            f'<td class="number" style="background: rgb(31 119 180 / {0.75 * share:.2f})">{count:,} '
            f'<span class="note">{share:.0%}</span></td>'
            for count, share in zip(counts, shares, strict=True)
        )
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return (
        f"<div><h3>{html.escape(task.title(split))}, seed {seed}</h3>"
        f"<table><tr><td class=note>true, given</td>{head}</tr>{''.join(lines)}</table></div>"
    )
