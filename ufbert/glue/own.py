"""A task of one's own: rows in TSV, CSV or JSON-lines files, described by a task file or by options."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ufbert.errors import UserError
from ufbert.glue.metrics import METRICS
from ufbert.glue.records import Columns, class_number, collect, number, require_columns
from ufbert.glue.rows import Rows, TaskData
from ufbert.glue.tables import read_table
from ufbert.glue.task_file import read_task_file
from ufbert.glue.tasks import TASKS, Task

MAX_WHOLE_NUMBERS = 20
"""Whole-number labels of which there are more are values, not classes, unless the task says otherwise."""


@dataclass(frozen=True)
class OwnTask:
    """A task of one's own: a task file, or at least train, dev, text and label."""

    task_file: str = ""
    """JSON file that holds an object of the options below, or Python file that defines TASK as one; paths in it start at its
    folder."""
    name: str = ""
    """Name of the task; by default the task file's, else `own`."""
    train: str = ""
    """Training rows: .tsv (no quoting), .csv (with quotes) or .jsonl, each also with .gz; tables begin with a header."""
    dev: str = ""
    """Labelled rows that decide."""
    test: str = ""
    """Rows to predict, whose labels are not read."""
    text: str = ""
    """Column of the text."""
    pair: str = ""
    """Column of the second text, for a task on pairs."""
    label: str = ""
    """Column of the label."""
    labels: tuple[str, ...] = ()
    """Labels as they stand in the files, in class order; by default those of the training rows, sorted."""
    label_names: tuple[str, ...] = ()
    """What a person calls the classes; by default the labels."""
    metrics: tuple[str, ...] = ()
    """The main one first: accuracy, f1, matthews, pearson, spearman; by default accuracy (and f1 for two classes), or pearson
    and spearman."""
    regression: bool | None = None
    """Whether labels are values; by default they are if all of the training rows are numbers and either one has a fraction or
    there are more than 20 different ones."""


OWN_KEYS = {field.name: field.type for field in fields(OwnTask) if field.name != "task_file"}
"""What a task file may say."""


def read_own(own: OwnTask, skip_bad_rows: bool = False) -> TaskData:
    """All rows of one's own task.

    Raises UserError for a description that does not fit itself or the files, and for a broken row, a label that no training
    row has included; `skip_bad_rows` leaves such rows out and counts them.
    """
    own = _described(own)
    task = _task(own)
    label = number if task.is_regression else partial(_class, task.labels)
    labelled = Columns(tuple(map(str, task.text)), own.label, label)
    train, dev = (_read(path, labelled, skip_bad_rows) for path in (own.train, own.dev))
    test = {"test": _read(own.test, Columns(labelled.text), skip_bad_rows)} if own.test else {}
    return TaskData(task, train, {"dev": dev}, test)


def _read(path: str, columns: Columns, skip_bad_rows: bool) -> Rows:
    table = read_table(Path(path))
    if table.columns is not None:
        require_columns(path, columns, table.columns)
    return collect(path, table.records, columns, skip_bad_rows)


def _described(own: OwnTask) -> OwnTask:
    """The task with all that is needed to read it. Raises UserError if something is lacking or does not fit."""
    where = own.task_file or "The task"
    if own.task_file:
        if replace(own, task_file="") != OwnTask():
            raise UserError("A task file says all about its task; leave out the other options that describe one.")
        own = OwnTask(**read_task_file(Path(own.task_file), OWN_KEYS))
    own = replace(own, name=own.name or "own", labels=tuple(map(_label_text, own.labels)))
    if lacking := [key for key in ("train", "dev", "text", "label") if not getattr(own, key)]:
        raise UserError(f"{where} lacks {' and '.join(lacking)}; it needs train, dev, text and label.")
    if not re.fullmatch(r"\w[\w.-]*", own.name) or own.name.lower() in TASKS:
        raise UserError(
            f"{where} cannot be named {own.name!r}: take letters, digits, - and _, and no GLUE task's name."
        )
    if own.labels and own.regression:
        raise UserError(f"{where} names labels and asks for regression; choose one.")
    if len(set(own.labels)) < len(own.labels):
        raise UserError(f"{where} names a label twice: {', '.join(own.labels)}.")
    return own


def _task(own: OwnTask) -> Task:
    """The task, with what its description leaves to the training rows. Raises UserError if the parts do not fit."""
    labels = own.labels
    if not labels and own.regression is not True:
        found = _labels_in(own)
        numbers = [value for value in map(_value, found) if value is not None]
        if len(numbers) < len(found):
            labels = tuple(sorted(found))
        elif own.regression is False or (
            len(numbers) <= MAX_WHOLE_NUMBERS and all(value == int(value) for value in numbers)
        ):
            labels = tuple(sorted(found, key=float))
        if len(labels) == 1:
            raise UserError(f"{own.train}: all rows have the label {labels[0]}, so that there is nothing to learn.")
    names = own.label_names or labels
    if len(names) != len(labels):
        raise UserError(f"The task has {len(labels)} labels ({_listed(labels)}) and {len(names)} label_names.")
    metrics = own.metrics or (
        ("accuracy", "f1") if len(labels) == 2 else ("accuracy",) if labels else ("pearson", "spearman")
    )
    _check_metrics(metrics, len(labels))
    text = (own.text, own.pair) if own.pair else (own.text,)
    return Task(
        own.name,
        own.name,
        text,
        own.label,
        labels,
        names,
        metrics,
        hub_text=text,
        test={"test": ""} if own.test else {},
    )


def _labels_in(own: OwnTask) -> set[str]:
    """Every label of the training rows, those of broken rows left out: they are named when the rows are read. Raises UserError
    if there is none."""
    table = read_table(Path(own.train))
    if table.columns is not None:
        require_columns(own.train, Columns((own.text,), own.label), table.columns)
    values = (record.values.get(own.label) for record in table.records)
    found = {_label_text(value) for value in values if value is not None} - {""}
    if not found:
        raise UserError(f"{own.train} has no rows with a label.")
    return found


def _check_metrics(metrics: Iterable[str], n_labels: int) -> None:
    fitting = {0: ("pearson", "spearman"), 2: ("accuracy", "f1", "matthews")}.get(n_labels, ("accuracy",))
    kind = f"{n_labels} labels" if n_labels else "values for labels"
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"There is no metric {name!r}; take {', '.join(METRICS)}.")
        if name not in fitting:
            raise UserError(f"The metric {name} does not fit a task with {kind}; take {' or '.join(fitting)}.")


def _class(labels: tuple[str, ...], value: Any) -> float:
    text = _label_text(value)
    if text not in labels:
        raise ValueError(f"the label {text!r} is not one of the task's, {_listed(labels)}")
    return class_number(labels, text)


def _listed(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:MAX_WHOLE_NUMBERS]) + (", ..." if len(labels) > MAX_WHOLE_NUMBERS else "")


def _label_text(value: Any) -> str:
    """A label as text; a whole number is the same label with and without a decimal point."""
    text = str(value).strip()
    return text.partition(".")[0] if re.fullmatch(r"[+-]?\d+\.0*", text) else text


def _value(text: str) -> float | None:
    try:
        return number(text)
    except ValueError:
        return None
