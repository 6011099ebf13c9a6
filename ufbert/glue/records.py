"""From the records of a file or a dataset to the rows of a split: texts, labels, and what to do about broken ones."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from ufbert.errors import UserError
from ufbert.glue.rows import Rows


class Record(NamedTuple):
    """One row as it was found."""

    number: int
    """Line of the file at which it begins, the first being 1; or row of a dataset's split, the first being 0."""
    values: dict[str, Any]
    """By column."""
    fault: str = ""
    """What is wrong with the whole row, whose values are then empty."""


class Columns(NamedTuple):
    """Which columns become texts and labels. Texts are texts, or bytes that hold UTF-8."""

    text: tuple[str, ...]
    """One or two."""
    label: str = ""
    read_label: Callable[[Any], float] | None = None
    """From what stands in the label column to a class number or a value, raising ValueError with what is wrong; None where
    labels are not read."""


def collect(place: str, records: Iterable[Record], columns: Columns, skip_bad_rows: bool, unit: str = "line") -> Rows:
    """The rows of one split. `unit` is what a record's number counts.

    Raises UserError for the first bad row, or counts and leaves out all of them with `skip_bad_rows`; raises it too if no row
    is left.
    """
    texts: list[list[str]] = [[] for _ in columns.text]
    labels: list[float] = []
    skipped = 0
    for record in records:
        try:
            found, label = _parse(record, columns)
        except ValueError as error:
            if not skip_bad_rows:
                raise UserError(
                    f"{place}, {unit} {record.number}: {error}; mend the row, or leave bad rows out with --skip-bad-rows."
                ) from error
            skipped += 1
            continue
        for column, text in zip(texts, found, strict=True):
            column.append(text)
        labels.append(label)
    if not labels:
        raise UserError(f"{place} has no rows" + (f"; {skipped} bad ones were left out." if skipped else "."))
    return Rows(texts[0], texts[1] if len(texts) > 1 else None, labels if columns.read_label else None, skipped)


def _parse(record: Record, columns: Columns) -> tuple[list[str], float]:
    """The texts and the label of a record, NaN where labels are not read. Raises ValueError with what is wrong."""
    if record.fault:
        raise ValueError(record.fault)
    texts = [_text(column, record.values.get(column)) for column in columns.text]
    if columns.read_label is None:
        return texts, math.nan
    label = record.values.get(columns.label)
    if label is None or (isinstance(label, str) and not label.strip()):
        raise ValueError(f"{columns.label} is missing")
    if isinstance(label, float) and math.isnan(label):  # what pandas has for a missing one
        raise ValueError(f"{columns.label} is missing (NaN)")
    if isinstance(label, list | tuple | dict | bytes | np.ndarray):
        raise ValueError(f"{columns.label} is {_shown(label)}, not one label")
    return texts, columns.read_label(label)


def _text(column: str, value: Any) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{column} is not UTF-8") from error
    if not isinstance(value, str):
        raise ValueError(f"{column} is missing" if value is None else f"{column} is {_shown(value)}, not a text")
    if not is_unicode(value):
        raise ValueError(f"{column} holds half of a surrogate pair")
    return value.strip()


def _shown(value: Any) -> str:
    """A value's beginning, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: undecodable bytes and lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_columns(place: str, columns: Columns, there: Iterable[str]) -> None:
    """Raises UserError if a file or a dataset that has the columns `there` lacks one that is read, or has it twice."""
    there = list(there)
    read = [name for name in (*columns.text, columns.label) if name]
    for name in read:
        if there.count(name) > 1:
            raise UserError(f"{place} has {there.count(name)} columns {name}; rename or remove all but one.")
    lacking = [name for name in read if name not in there]
    if lacking:
        raise UserError(
            f"{place} has no column {' and no column '.join(lacking)}; it has {', '.join(there) or 'none'}."
        )


def number(value: Any) -> float:
    """A finite number. Raises ValueError for anything else."""
    if isinstance(value, str) and "_" in value:
        raise ValueError(f"{value!r} is not a number")  # though Python reads 2020_01 as 202001
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{value!r} is not a number") from error
    if not math.isfinite(found):
        raise ValueError(f"{value!r} is not a finite number")
    return found


def single_number(value: Any) -> float:
    """A finite number in single precision, as its shortest decimal: what a text file, which may have more digits, and a
    dataset of float32 have in common. Raises ValueError for anything else."""
    with np.errstate(over="ignore"):
        return number(str(np.float32(number(value))))


def class_number(labels: tuple[str, ...], value: Any) -> float:
    """The place of a label's text in `labels`. Raises ValueError for another."""
    text = str(value).strip()
    if text not in labels:
        raise ValueError(f"{text!r} is not one of the labels {', '.join(labels)}")
    return float(labels.index(text))
