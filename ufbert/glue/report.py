"""`glue.md` and `report.html` of a GLUE sweep: scores, learning curves, confusion tables, and how it all came about."""

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ufbert.glue.results import Average, DevResult, GlueResults, Point, TaskResult
from ufbert.report.page import facts, grid, markdown_grid, page, svg
from ufbert.runtime.files import write_text


def write_glue_report(folder: Path, results: GlueResults) -> str:
    """Write `glue.md`, whose text is returned, and `report.html`. Raises UserError if the disk refuses."""
    text = glue_markdown(results)
    write_text(folder / "glue.md", text)
    write_text(folder / "report.html", glue_page(results))
    return text


def points(score: float, sign: Literal["", "+"] = "") -> str:
    """Format a score times 100, with one decimal, and with `sign` a plus before it if it is not negative."""
    return f"{round(100 * score, 1) + 0.0:{sign}.1f}"  # + 0.0 turns -0.0 into 0.0


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
    return f"{dev.rows:,} of {dev.official_rows:,}" if dev.official_rows else f"{dev.rows:,}, not GLUE's"


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


def _averages(averages: dict[str, Average]) -> list[tuple[str, str]]:
    """Return each average's name, and its value or the missing tasks, with a sentence that defines it."""
    texts = []
    for average in averages.values():
        missing = f"not computed for want of {', '.join(average.missing)}"
        value = missing if average.value is None else points(average.value)
        texts.append((average.name, f"{value}. {average.sentence}"))
    return texts


_KEY = (
    "Scores are times 100. Median, lowest and highest are over seeds; majority is the score of always giving the training "
    "rows' most frequent answer. Only rows marked official are the whole dev set that papers score."
)


def glue_markdown(results: GlueResults) -> str:
    """Write the tables of a sweep as Markdown."""
    head, rows = _score_grid(results)
    return "\n\n".join(
        [
            f"# GLUE: {results.model}",
            f"Protocol: {results.protocol}\n\nRows from {results.source}. {_KEY}",
            markdown_grid(head, rows, numbers=range(2, len(head) - 1)),
            "\n".join(f"- **{name}**: {text}" for name, text in _averages(results.averages)),
            markdown_grid(*_training_grid(results), numbers=(1, 2, 3, 5, 6, 7)) + "\n",
        ]
    )


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
        f'<p class="note">{_KEY} Rows from {html.escape(results.source)}.</p>',
        "<h2>Averages</h2>",
        *(f"<p><b>{html.escape(name)}</b>: {html.escape(text)}</p>" for name, text in _averages(results.averages)),
        "<h2>Training</h2>",
        grid(*_training_grid(results), numbers=(1, 2, 3, 5, 6, 7)),
        *(["<h2>Learning curves</h2>", *curves] if curves else []),
        *(["<h2>Confusions</h2>", f'<div class="row">{"".join(confusions)}</div>'] if confusions else []),
        f"<h2>Environment</h2>{facts(results.environment)}",
        f"<h2>Configuration</h2><pre>{html.escape(json.dumps(results.options, indent=2))}</pre>",
    ]
    return page(f"GLUE: {results.model}", "\n".join(body))


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
