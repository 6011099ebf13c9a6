"""Files of a sweep's answers: predictions for a reader and for `glue-table`, and submissions to the GLUE server."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ufbert.errors import UserError
from ufbert.glue.scores import decide
from ufbert.glue.sources.records import number
from ufbert.glue.tasks import Examples, Task
from ufbert.runtime.files import write_text


def write_predictions(folder: Path, task: Task, split: str, rows: Examples, scores: Mapping[int, np.ndarray]) -> Path:
    """Write `folder/predictions/TASK.SPLIT.tsv` and return its path.

    `scores` are classifier scores (rows, outputs) by seed. Columns: index, text, pair (for tasks on pairs), label (if rows
    have one), and for each seed prediction_SEED and, for classes, probability_SEED of the predicted class. Classes are named
    by `task.label_names`. Tabs separate columns without quoting, so that tabs and line ends within a text become blanks.
    Raises UserError if the disk refuses.
    """
    columns = {"index": [str(i) for i in range(len(rows.texts))], "text": [_plain(text) for text in rows.texts]}
    if rows.pairs is not None:
        columns["pair"] = [_plain(text) for text in rows.pairs]
    if rows.labels is not None:
        columns["label"] = _shown(task, rows.labels)
    for seed, outputs in scores.items():
        columns[f"prediction_{seed}"] = _shown(task, decide(task, outputs))
        if not task.is_regression:
            columns[f"probability_{seed}"] = [f"{p:.4f}" for p in _softmax(outputs).max(axis=-1)]
    lines = ["\t".join(columns), *map("\t".join, zip(*columns.values(), strict=True))]
    return _write_lines(folder / "predictions" / f"{task.name}.{split}.tsv", lines)


class Predictions(NamedTuple):
    """The contents of a prediction file."""

    rows: list[tuple[str, ...]]
    """Index, texts and label of each row, as written."""
    labels: np.ndarray
    """Class numbers or values (rows,)."""
    predicted: dict[int, np.ndarray]
    """The same, predicted, by seed."""


def read_predictions(path: Path, label_names: tuple[str, ...]) -> Predictions | None:
    """Read the predictions of a labelled split (`label_names` is empty for regression); None if there is no such file.

    Raises UserError for a damaged file.
    """
    try:
        head, *lines = [line.split("\t") for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
        label, names = head.index("label"), list(map(_plain, label_names))
        columns = list(zip(*lines, strict=True))
        seeds = {int(name[11:]): i for i, name in enumerate(head) if name.startswith("prediction_")}

        def numbers(column: Iterable[str]) -> np.ndarray:
            return np.array([names.index(text) if names else number(text) for text in column])

        predicted = {seed: numbers(columns[i]) for seed, i in seeds.items()}
        return Predictions([tuple(line[: label + 1]) for line in lines], numbers(columns[label]), predicted)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is not a whole prediction file: {error}.") from error


def write_submission(folder: Path, task: Task, split: str, scores: np.ndarray) -> Path:
    """Write one test split's answers as the GLUE server takes them, `folder/submission/RTE.tsv`, and return the path.

    `scores` are classifier scores (rows, outputs) in the order of the official test file. Classes are written as official
    label strings, STS-B's values within 0 to 5. Raises UserError if the disk refuses.
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


def _shown(task: Task, values: list[float] | np.ndarray) -> list[str]:
    return [f"{x:.6g}" if task.is_regression else _plain(task.label_names[int(x)]) for x in values]


def _softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _write_lines(path: Path, lines: Iterable[str]) -> Path:
    write_text(path, "".join(f"{line}\n" for line in lines))
    return path
