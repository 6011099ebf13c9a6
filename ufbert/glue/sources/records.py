"""The interface of all sources, and the way from the records of a file or a dataset to examples."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from ufbert.config.checks import shown
from ufbert.errors import UserError
from ufbert.glue.tasks import Examples, Task


class Source(ABC):
    """A place that rows come from. A split is named as in `Task`: `train`, or one of `task.dev` or `task.test`."""

    @abstractmethod
    def place(self, task: Task, split: str) -> str:
        """Name the file, or the split of a dataset, for a message."""

    @abstractmethod
    def has(self, task: Task, split: str) -> bool:
        """Tell if the split exists; its rows may still be broken. Raises UserError if the source cannot be asked."""

    @abstractmethod
    def _read(self, task: Task, split: str) -> Examples:
        """Read a split that exists."""

    def read(self, task: Task, split: str) -> Examples | None:
        """Read a split in its order, texts without blanks at their ends; None if the source has no such split.

        Raises UserError, naming the place and the line or row, for a row that `collect` refuses and for a missing column.
        """
        return self._read(task, split) if self.has(task, split) else None

    def cuts(self) -> list[Task]:
        """List the parts of official tasks in this source, complete or not."""
        return []

    def missing(self, task: Task) -> list[str]:
        """Name the places that lack the training rows or the dev set that decides."""
        return [self.place(task, split) for split in ("train", task.dev[0]) if not self.has(task, split)]


class Record(NamedTuple):
    """One row as a file or a dataset holds it."""

    number: int
    """Line of the file at which it begins, the first being 1; or row of a dataset's split, the first being 0."""
    values: dict[str, Any]
    """By column."""
    fault: str = ""
    """Fault of the whole row, whose values are then empty; "" for none."""


class Columns(NamedTuple):
    """The columns that become texts and labels. Texts are strings, or bytes that hold UTF-8."""

    text: tuple[str, ...]
    """One or two."""
    label: str = ""
    read_label: Callable[[Any], float] | None = None
    """Turns a label into a class number or a target, or raises ValueError with the reason. None if labels are not read."""


def collect(
    place: str, records: Iterable[Record], columns: Columns, skip_bad_rows: bool, unit: str = "line"
) -> Examples:
    """Turn the records of one split into examples. `unit` is what a record's number counts.

    `skip_bad_rows` leaves broken rows out and counts them. Raises UserError for a broken row otherwise, and for no rows.
    """
    texts: list[list[str]] = [[] for _ in columns.text]
    labels: list[float] = []
    skipped = 0
    for record in records:
        try:
            row_texts, label = _parse(record, columns)
        except ValueError as error:
            if not skip_bad_rows:
                remedy = "correct the row, or leave bad rows out with --skip-bad-rows"
                raise UserError(f"{place}, {unit} {record.number}: {error}; {remedy}.") from error
            skipped += 1
            continue
        for column, text in zip(texts, row_texts, strict=True):
            column.append(text)
        labels.append(label)
    if not labels:
        raise UserError(f"{place} has no rows" + (f"; {skipped} bad ones were left out." if skipped else "."))
    return Examples(texts[0], texts[1] if len(texts) > 1 else None, labels if columns.read_label else None, skipped)


def _parse(record: Record, columns: Columns) -> tuple[list[str], float]:
    """Return the texts and the label of a record, NaN if labels are not read. Raises ValueError with the reason."""
    if record.fault:
        raise ValueError(record.fault)
    texts = [_text(column, record.values.get(column)) for column in columns.text]
    if columns.read_label is None:
        return texts, math.nan
    label = record.values.get(columns.label)
    if label is None or (isinstance(label, str) and not label.strip()):
        raise ValueError(f"{columns.label} is missing")
    if isinstance(label, float) and math.isnan(label):  # so pandas marks a missing one
        raise ValueError(f"{columns.label} is missing (NaN)")
    if isinstance(label, list | tuple | dict | bytes | np.ndarray):
        raise ValueError(f"{columns.label} is {shown(label)}, not one label")
    return texts, columns.read_label(label)


def _text(column: str, value: Any) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{column} is not UTF-8") from error
    if not isinstance(value, str):
        raise ValueError(f"{column} is missing" if value is None else f"{column} is {shown(value)}, not a text")
    if not is_unicode(value):
        raise ValueError(f"{column} holds half of a surrogate pair")
    return value.strip()


def is_unicode(text: str) -> bool:
    """Tell if a text has neither undecodable bytes nor lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_columns(place: str, columns: Columns, present: Iterable[str]) -> None:
    """Raise UserError if a file or a dataset with the columns `present` lacks one that is read, or has it twice."""
    present = list(present)
    read = [name for name in (*columns.text, columns.label) if name]
    for name in read:
        if present.count(name) > 1:
            raise UserError(f"{place} has {present.count(name)} columns {name}; rename or remove all but one.")
    if lacking := [name for name in read if name not in present]:
        names = ", ".join(present) or "none"
        raise UserError(f"{place} has no column {' and no column '.join(lacking)}; it has {names}.")


def number(value: Any) -> float:
    """Convert to a finite number. Raises ValueError for anything else."""
    if isinstance(value, str) and "_" in value:
        raise ValueError(f"{value!r} is not a number")  # though Python reads 2020_01 as 202001
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError) as error:  # OverflowError: a whole number of 400 digits
        raise ValueError(f"{shown(value)} is not a number") from error
    if not math.isfinite(result):
        raise ValueError(f"{value!r} is not a finite number")
    return result


def single_number(value: Any) -> float:
    """Round to single precision, and to the shortest decimal of that. Raises ValueError for anything but a finite number.

    A text file may have more digits than a dataset of float32; so both give the same labels.
    """
    with np.errstate(over="ignore"):
        return number(str(np.float32(number(value))))


def class_number(labels: tuple[str, ...], value: Any) -> float:
    """Return the position of a label's text in `labels`. Raises ValueError for another text."""
    text = str(value).strip()
    if text not in labels:
        raise ValueError(f"{text!r} is not one of the labels {', '.join(labels)}")
    return float(labels.index(text))
