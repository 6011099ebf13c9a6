"""What a sweep leaves behind: the numbers of `glue.json`, prediction files, and files for the GLUE server."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ufbert.errors import UserError
from ufbert.glue.metrics import score
from ufbert.glue.rows import Rows
from ufbert.glue.tasks import TASKS, Task
from ufbert.runtime.files import write_text

DEV_ROWS = {
    "cola": {"dev": 1043}, "sst2": {"dev": 872}, "mrpc": {"dev": 408}, "stsb": {"dev": 1500}, "qqp": {"dev": 40430},
    "mnli": {"dev_matched": 9815, "dev_mismatched": 9832}, "qnli": {"dev": 5463}, "rte": {"dev": 277}, "wnli": {"dev": 71},
}  # fmt: skip
"""Rows of the official dev sets."""


def decide(task: Task, scores: np.ndarray) -> np.ndarray:
    """Class numbers, or values for regression, from classifier scores (rows, outputs)."""
    return scores[:, 0] if task.is_regression else scores.argmax(axis=-1)


def dev_outcome(task: Task, split: str, train: Rows, dev: Rows, scores: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """What `glue.json` says of one dev split, from the classifier scores (rows, outputs) of each seed's last epoch.

    `official_rows` is what the official dev set has, 0 for a part of a task and for a task of one's own; `confusion` is empty
    for regression.
    """
    labels = np.asarray(dev.labels)
    decisions = {seed: decide(task, found) for seed, found in scores.items()}
    per_seed = {seed: score(task.metrics, found, labels) for seed, found in decisions.items()}
    return {
        "rows": len(labels),
        "official_rows": DEV_ROWS.get(task.name, {}).get(split, 0),
        **summarise(task, per_seed),
        "majority": majority(task, train, dev),
        "confusion": {}
        if task.is_regression
        else {str(seed): confusion(task, found, labels) for seed, found in decisions.items()},
    }


def summarise(task: Task, per_seed: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """The scores of each seed, and of each metric the median over seeds (of an even number: the mean of the middle two)
    and the spread, `[lowest, highest]`."""
    found = {name: [float(scores[name]) for scores in per_seed.values()] for name in task.metrics}
    return {
        "seeds": {str(seed): {name: float(scores[name]) for name in task.metrics} for seed, scores in per_seed.items()},
        "median": {name: float(np.median(values)) for name, values in found.items()},
        "spread": {name: [min(values), max(values)] for name, values in found.items()},
    }


def majority(task: Task, train: Rows, dev: Rows) -> dict[str, float]:
    """The metrics on dev of always answering the training rows' most frequent class, or one value for regression.

    Of classes equally frequent, the first is taken. This is the baseline that papers quote (SST-2 50.9, MRPC F1 81.2, RTE
    52.7, WNLI 56.3); a correlation with a constant counts as 0.
    """
    labels = np.asarray(dev.labels)
    # All metrics of regression are correlations, to which one value is as good as another; the mean would leave rounding.
    answer = 0 if task.is_regression else np.bincount(np.asarray(train.labels, int)).argmax()
    return {name: float(value) for name, value in score(task.metrics, np.full(len(labels), answer), labels).items()}


def confusion(task: Task, predicted: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Rows of each true class (first index) that were given each class (second index)."""
    counts = np.zeros((task.n_outputs, task.n_outputs), int)
    np.add.at(counts, (np.asarray(labels, int), np.asarray(predicted, int)), 1)
    return counts.tolist()


class _Part(NamedTuple):
    """One number that goes into an average."""

    task: str
    split: str
    metric: str


def averages(tasks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The averages that papers print, from the `tasks` of `glue.json`: `name`, `sentence`, `value`, and in `missing` what
    keeps it from being computed. The value is None unless every member is there with all rows of its official dev set.

    The nine numbers are those of Geiping and Goldstein (2023, crammed BERT). One number a task, the mean of its metrics, is
    the GLUE benchmark's own rule (Wang et al. 2018, section 3), here without WNLI, as in Devlin et al. (2018).
    """
    kept = [task for task in TASKS.values() if task.name != "wnli"]
    nine = [[_Part(task.name, split, task.metrics[0])] for task in kept for split in task.dev]
    eight = [
        [_Part(task.name, split, metric) for split in task.dev for metric in _official_metrics(task)] for task in kept
    ]
    first, apart = "the first metric of every task but WNLI", "MNLI matched and mismatched apart"
    second = "of each the mean of its metrics and of MNLI's two dev sets"
    return {
        "nine": _average(tasks, "nine numbers", f"The mean of nine numbers: {first}, {apart}.", nine),
        "nine_without_cola": _average(
            tasks, "nine numbers without CoLA", f"The mean of eight numbers: {first} and CoLA, {apart}.", nine[1:]
        ),
        "eight": _average(
            tasks, "eight tasks", f"The mean of eight tasks, all but WNLI: {second}; of CoLA, Matthews alone.", eight
        ),
        "eight_without_cola": _average(
            tasks, "eight tasks without CoLA", f"The mean of seven tasks, all but WNLI and CoLA: {second}.", eight[1:]
        ),
    }


def _official_metrics(task: Task) -> tuple[str, ...]:
    """The metrics that make a task's score in the GLUE benchmark: for CoLA the first alone."""
    return task.metrics[:1] if task.name == "cola" else task.metrics


def _average(tasks: Mapping[str, Any], name: str, sentence: str, groups: list[list[_Part]]) -> dict[str, Any]:
    """An entry of `averages`: the mean over groups of the mean of each group."""
    splits = dict.fromkeys((part.task, part.split) for group in groups for part in group)
    missing = [reason for task, split in splits if (reason := _absence(tasks, task, split))]
    value = None
    if not missing:
        value = float(
            np.mean([np.mean([tasks[t]["dev"][split]["median"][metric] for t, split, metric in g]) for g in groups])
        )
    return {"name": name, "sentence": sentence, "value": value, "missing": missing}


def _absence(tasks: Mapping[str, Any], name: str, split: str) -> str:
    """Why a dev split of a task cannot be averaged; "" if it can."""
    title = TASKS[name].folder + split.replace("dev", "").replace("_", " ")
    found = tasks.get(name, {}).get("dev", {}).get(split)
    if found is None:
        cuts = [entry["folder"] for entry in tasks.values() if entry["cut_of"] == name]
        return f"{title} (only a part of it: {', '.join(cuts)})" if cuts else title
    whole = DEV_ROWS[name][split]
    return "" if found["rows"] == whole else f"{title} ({found['rows']:,} of {whole:,} dev rows)"


def write_predictions(folder: Path, task: Task, split: str, rows: Rows, scores: Mapping[int, np.ndarray]) -> Path:
    """Write `folder/predictions/TASK.SPLIT.tsv` and return its path.

    Columns: index, text, pair (for tasks on pairs), label (where rows have one), and for each seed prediction_SEED and,
    for classes, probability_SEED, that of the predicted class. Classes stand by `task.label_names`. `scores` are
    classifier scores (rows, outputs) by seed. Tab separated without quoting, so that tabs and line ends within a text
    become blanks. Raises UserError if the disk refuses.
    """
    columns = {"index": [str(i) for i in range(len(rows.texts))], "text": [_plain(text) for text in rows.texts]}
    if rows.pairs is not None:
        columns["pair"] = [_plain(text) for text in rows.pairs]
    if rows.labels is not None:
        columns["label"] = _shown(task, rows.labels)
    for seed, found in scores.items():
        columns[f"prediction_{seed}"] = _shown(task, decide(task, found))
        if not task.is_regression:
            columns[f"probability_{seed}"] = [f"{p:.4f}" for p in _softmax(found).max(axis=-1)]
    lines = ["\t".join(columns), *map("\t".join, zip(*columns.values(), strict=True))]
    return _write_lines(folder / "predictions" / f"{task.name}.{split}.tsv", lines)


class Predictions(NamedTuple):
    """A prediction file, read back."""

    rows: list[tuple[str, ...]]
    """Index, texts and label of each row, as written."""
    labels: np.ndarray
    """Class numbers or values (rows,)."""
    predicted: dict[int, np.ndarray]
    """The same, predicted, by seed."""


def read_predictions(path: Path, label_names: tuple[str, ...]) -> Predictions | None:
    """What `write_predictions` wrote of a labelled split (`label_names` empty for regression); None if there is no such file.

    Raises UserError for a file that is not one.
    """
    try:
        head, *lines = [line.split("\t") for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
        label, names = head.index("label"), list(map(_plain, label_names))
        columns = list(zip(*lines, strict=True))
        seeds = {int(name[11:]): i for i, name in enumerate(head) if name.startswith("prediction_")}

        def numbers(column: Iterable[str]) -> np.ndarray:
            return np.array([names.index(text) if names else float(text) for text in column])

        predicted = {seed: numbers(columns[i]) for seed, i in seeds.items()}
        return Predictions([tuple(line[: label + 1]) for line in lines], numbers(columns[label]), predicted)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is not a whole prediction file: {error}.") from error


def write_submission(folder: Path, task: Task, split: str, scores: np.ndarray) -> Path:
    """Write one test split's answers in the form the GLUE server takes, `folder/submission/RTE.tsv` and the like, and return
    the path. `scores` are classifier scores (rows, outputs) in the order of the official test file.

    Classes stand by the official label strings, STS-B's values within 0 to 5. Raises UserError if the disk refuses.
    """
    decisions = decide(task, scores)
    if task.is_regression:
        answers = [f"{value:.3f}" for value in np.clip(decisions, 0, 5)]
    else:
        answers = [task.labels[c] for c in decisions]
    lines = ["index\tprediction", *(f"{i}\t{answer}" for i, answer in enumerate(answers))]
    return _write_lines(folder / "submission" / f"{task.test[split] or task.folder}.tsv", lines)


def _plain(text: str) -> str:
    return text.replace("\t", " ").replace("\r", " ").replace("\n", " ")


def _shown(task: Task, values: Iterable[Any]) -> list[str]:
    return [f"{x:.6g}" if task.is_regression else _plain(task.label_names[int(x)]) for x in values]


def _softmax(scores: np.ndarray) -> np.ndarray:
    grown = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)


def _write_lines(path: Path, lines: Iterable[str]) -> Path:
    write_text(path, "".join(f"{line}\n" for line in lines))
    return path
