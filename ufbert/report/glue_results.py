"""A sweep's `glue.json`, read."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ufbert.config.stored import FORMAT_VERSION
from ufbert.errors import UserError

FORMAT = {"format": "ufbert-glue", "format_version": FORMAT_VERSION}
"""What `glue.json` begins with."""

Scores = dict[str, float]
"""Metrics as numbers between -1 and 1, by name."""


class DevResult(NamedTuple):
    """The scores on one dev split."""

    rows: int
    official_rows: int
    """Rows of the official dev set; 0 for a part of a task and for a task of one's own."""
    seeds: dict[int, Scores]
    median: Scores
    spread: dict[str, tuple[float, float]]
    """Lowest and highest over seeds, by metric."""
    majority: Scores
    """Of always giving the training rows' most frequent class."""
    confusion: dict[int, list[list[int]]]
    """Rows by true class and predicted class, by seed; empty for regression."""


class TaskResult(NamedTuple):
    """One task of a sweep."""

    folder: str
    """The task's name for a reader."""
    cut_of: str
    """The official task of which this is a part, or ""."""
    metrics: tuple[str, ...]
    label_names: tuple[str, ...]
    """In class order; empty for regression."""
    train_rows: int
    skipped_rows: int
    truncated_rows: int
    starts_from: str
    lr: float
    seconds: float
    saved_seed: int
    dev: dict[str, DevResult]
    """By split; the first decides."""
    curves: dict[int, list[Scores]]
    """Epoch, training loss and dev scores after each epoch, by seed; empty where none was kept."""

    def title(self, split: str) -> str:
        """`RTE`, `MNLI matched`."""
        return self.folder + split.removeprefix("dev").replace("_", " ")


class Protocol(NamedTuple):
    """How the scores came about, without which they compare with nothing."""

    name: str
    text: str
    mode: str


class Average(NamedTuple):
    """An average as papers print it."""

    name: str
    sentence: str
    value: float | None
    """None where a member is missing."""
    missing: list[str]


class GlueResults(NamedTuple):
    """All of a sweep."""

    folder: Path
    model: str
    source: str
    protocol: Protocol
    options: dict[str, Any]
    environment: dict[str, Any]
    tasks: dict[str, TaskResult]
    averages: dict[str, Average]

    @property
    def seeds(self) -> list[int]:
        """All seeds of any task, ascending."""
        return sorted({seed for task in self.tasks.values() for dev in task.dev.values() for seed in dev.seeds})


def read_results(place: Path) -> GlueResults:
    """The sweep of a folder, or of its `glue.json`. Raises UserError for a file that is missing or not a whole one."""
    path = place / "glue.json" if place.is_dir() else place
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; name a folder that `ufbert finetune` wrote, or its glue.json."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict) or {key: found.get(key) for key in FORMAT} != FORMAT:
        raise UserError(f"{path} is not a glue.json of format version {FORMAT_VERSION}.")
    try:
        return GlueResults(
            path.parent,
            str(found["model"]),
            str(found["source"]),
            Protocol(*(str(found["protocol"][key]) for key in Protocol._fields)),
            dict(found["options"]),
            dict(found["environment"]),
            {name: _task(entry) for name, entry in found["tasks"].items()},
            {key: _averaged(entry) for key, entry in found["averages"].items()},
        )
    except KeyError as error:
        raise UserError(f"{path} is not a whole glue.json: it lacks {error}.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a whole glue.json: {error}.") from error


def _task(entry: dict[str, Any]) -> TaskResult:
    metrics, labels = tuple(map(str, entry["metrics"])), tuple(map(str, entry["label_names"]))
    return TaskResult(
        str(entry["folder"]),
        str(entry["cut_of"]),
        metrics,
        labels,
        *(int(entry[key]) for key in ("train_rows", "skipped_rows", "truncated_rows")),
        str(entry["starts_from"]),
        float(entry["lr"]),
        float(entry["seconds"]),
        int(entry["saved_seed"]),
        {split: _dev(found, metrics, len(labels)) for split, found in entry["dev"].items()},
        {int(seed): [_numbers(point) for point in curve] for seed, curve in entry["curves"].items()},
    )


def _dev(entry: dict[str, Any], metrics: tuple[str, ...], classes: int) -> DevResult:
    if not metrics or not entry["seeds"]:
        raise ValueError("a task without a metric or a seed")

    def scores(found: dict[str, Any]) -> Scores:
        return {name: float(found[name]) for name in metrics}

    spread = {name: tuple(map(float, entry["spread"][name])) for name in metrics}
    confusion = {int(seed): [[int(n) for n in row] for row in found] for seed, found in entry["confusion"].items()}
    if any([len(row) for row in found] != [classes] * classes for found in confusion.values()):
        raise ValueError(f"a confusion table that is not {classes} by {classes}")
    return DevResult(
        int(entry["rows"]),
        int(entry["official_rows"]),
        {int(seed): scores(found) for seed, found in entry["seeds"].items()},
        scores(entry["median"]),
        {name: (low, high) for name, (low, high) in spread.items()},
        scores(entry["majority"]),
        confusion,
    )


def _averaged(entry: dict[str, Any]) -> Average:
    value = entry["value"]
    missing = [str(reason) for reason in entry["missing"]]
    return Average(str(entry["name"]), str(entry["sentence"]), None if value is None else float(value), missing)


def _numbers(found: dict[str, Any]) -> Scores:
    return {name: float(value) for name, value in found.items()}
