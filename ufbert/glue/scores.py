"""From the classifier's scores of dev rows to the numbers of a sweep's results."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Shaped

from ufbert.glue.metrics import score
from ufbert.glue.results import Average, DevResult, Scores, TaskResult
from ufbert.glue.tasks import TASKS, Examples, Task, TaskData

DEV_ROWS = {
    "cola": {"dev": 1043}, "sst2": {"dev": 872}, "mrpc": {"dev": 408}, "stsb": {"dev": 1500}, "qqp": {"dev": 40430},
    "mnli": {"dev_matched": 9815, "dev_mismatched": 9832}, "qnli": {"dev": 5463}, "rte": {"dev": 277}, "wnli": {"dev": 71},
}  # fmt: skip
"""Rows of the official dev sets."""

Outputs = Float[np.ndarray, "rows c"]
"""The classifier's scores."""


def decide(task: Task, scores: Outputs) -> Shaped[np.ndarray, " rows"]:
    """Return class numbers, or values for regression."""
    return scores[:, 0] if task.is_regression else scores.argmax(axis=-1)


def split_metrics(data: TaskData, split: str, scores: Outputs) -> Scores:
    """Compute the task's metrics on a dev split. A score that is not finite counts as 0."""
    decisions = decide(data.task, np.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0))
    return score(data.task.metrics, decisions, np.asarray(data.dev[split].labels))


def dev_metrics(data: TaskData, scores: Mapping[str, Outputs]) -> dict[str, Scores]:
    """Compute the task's metrics on every dev split, from scores by split."""
    return {split: split_metrics(data, split, scores[split]) for split in data.dev}


def dev_result(
    task: Task, split: str, train: Examples, dev: Examples, metrics: dict[int, Scores], scores: Mapping[int, Outputs]
) -> DevResult:
    """Summarise one dev split, from each seed's metrics and the classifier's scores that gave them."""
    labels = np.asarray(dev.labels)
    by_metric = {name: [metrics[seed][name] for seed in metrics] for name in task.metrics}
    tables = {} if task.is_regression else {s: confusion(task, decide(task, scores[s]), labels) for s in scores}
    return DevResult(
        rows=len(labels),
        official_rows=DEV_ROWS.get(task.name, {}).get(split, 0),
        seeds={seed: {name: float(metrics[seed][name]) for name in task.metrics} for seed in metrics},
        median={name: float(np.median(values)) for name, values in by_metric.items()},
        spread={name: (float(min(values)), float(max(values))) for name, values in by_metric.items()},
        majority=majority(task, train, dev),
        confusion=tables,
    )


def majority(task: Task, train: Examples, dev: Examples) -> Scores:
    """Score on dev the constant answer: the training rows' most frequent class, or any value for regression.

    Of equally frequent classes the first is taken. This is the baseline that papers quote (SST-2 50.9, MRPC F1 81.2, RTE
    52.7, WNLI 56.3). A correlation with a constant counts as 0.
    """
    labels = np.asarray(dev.labels)
    # All metrics of regression are correlations, for which one value is as good as another; the mean would leave rounding.
    answer = 0 if task.is_regression else np.bincount(np.asarray(train.labels, int)).argmax()
    return {name: float(value) for name, value in score(task.metrics, np.full(len(labels), answer), labels).items()}


def confusion(
    task: Task, predicted: Shaped[np.ndarray, " rows"], labels: Shaped[np.ndarray, " rows"]
) -> list[list[int]]:
    """Count the rows of each true class (first index) by predicted class (second index)."""
    counts = np.zeros((task.n_outputs, task.n_outputs), int)
    np.add.at(counts, (np.asarray(labels, int), np.asarray(predicted, int)), 1)
    return counts.tolist()


_Member = tuple[str, str, str]
"""Task, dev split and metric of a number that goes into an average."""


def averages(tasks: Mapping[str, TaskResult]) -> dict[str, Average]:
    """Compute the averages that papers print. A value is None unless every member has all rows of its official dev set.

    The nine numbers are those of Geiping and Goldstein (2023, crammed BERT). One number a task, the mean of its metrics, is
    the GLUE benchmark's own rule (Wang et al. 2018, section 3), here without WNLI, as in Devlin et al. (2018).
    """
    kept = [task for task in TASKS.values() if task.name != "wnli"]
    nine = [[(task.name, split, task.metrics[0])] for task in kept for split in task.dev]
    official = {task.name: task.metrics[:1] if task.name == "cola" else task.metrics for task in kept}
    eight = [[(task.name, split, metric) for split in task.dev for metric in official[task.name]] for task in kept]
    first, apart = "the first metric of every task but WNLI", "MNLI matched and mismatched apart"
    mean = "of each the mean of its metrics and of MNLI's two dev sets"
    defined = {
        "nine": ("nine numbers", f"nine numbers: {first}, {apart}.", nine),
        "nine_without_cola": ("nine numbers without CoLA", f"eight numbers: {first} and CoLA, {apart}.", nine[1:]),
        "eight": ("eight tasks", f"eight tasks, all but WNLI: {mean}; of CoLA, Matthews alone.", eight),
        "eight_without_cola": ("eight tasks without CoLA", f"seven tasks, all but WNLI and CoLA: {mean}.", eight[1:]),
    }
    return {
        key: _average(tasks, name, f"The mean of {sentence}", groups)
        for key, (name, sentence, groups) in defined.items()
    }


def _average(tasks: Mapping[str, TaskResult], name: str, sentence: str, groups: list[list[_Member]]) -> Average:
    """Return the mean over groups of the mean of each group."""
    splits = dict.fromkeys((task, split) for group in groups for task, split, _ in group)
    missing = [reason for task, split in splits if (reason := _absence(tasks, task, split))]
    if missing:
        return Average(name, sentence, None, missing)
    means = [np.mean([tasks[task].dev[split].median[metric] for task, split, metric in group]) for group in groups]
    return Average(name, sentence, float(np.mean(means)), [])


def _absence(tasks: Mapping[str, TaskResult], name: str, split: str) -> str:
    """Say why a dev split of a task cannot be averaged; "" if it can."""
    title = TASKS[name].folder + split.replace("dev", "").replace("_", " ")
    if name not in tasks or split not in tasks[name].dev:
        cuts = [task.folder for task in tasks.values() if task.cut_of == name]
        return f"{title} (only a part of it: {', '.join(cuts)})" if cuts else title
    rows, whole = tasks[name].dev[split].rows, DEV_ROWS[name][split]
    return "" if rows == whole else f"{title} ({rows:,} of {whole:,} dev rows)"
