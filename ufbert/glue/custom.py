"""A task of one's own: rows in TSV, CSV or JSON-lines files, described by a task file or by options."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from ufbert.errors import UserError
from ufbert.glue.metrics import METRICS
from ufbert.glue.records import Columns, class_number, collect, number, require_columns
from ufbert.glue.rows import Rows, TaskData
from ufbert.glue.table_files import read_table
from ufbert.glue.task_file import read_task_file
from ufbert.glue.tasks import TASKS, Task

MAX_WHOLE_NUMBERS = 20
"""Whole-number labels of which there are more are values, not classes, unless the task says otherwise."""
NUMBERS_SHARE = 0.95
"""Labels are numbers if at least this share of the training rows has one. What else stands there is then a broken row."""
RESERVED = ("glue.json", "glue.md", "partial", "predictions", "report.html", "submission")
"""Names in a sweep's folder that are not tasks' model folders."""
MAX_NAME = 100
"""Bytes of a task's name, which becomes a part of longer file names."""


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
    """Whether labels are values. By default they are if 95 % of the training rows or more have numbers, and one of these has a
    fraction or there are more than 20 different ones."""


OWN_KEYS = {field.name: field.type for field in fields(OwnTask) if field.name != "task_file"}
"""What a task file may say."""


def read_own(own: OwnTask, skip_bad_rows: bool = False, say: Callable[[str], object] = lambda line: None) -> TaskData:
    """All rows of one's own task. `say` gets a line where numbers could be classes or values, with what they are taken for.

    Raises UserError for a description that does not fit itself or the files, and for a broken row, a label that no training
    row has included; `skip_bad_rows` leaves such rows out and counts them.
    """
    own = _described(own)
    task = _task(own, _classes(own, skip_bad_rows, say))
    label = _number if task.is_regression else partial(_class, task.labels)
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
    _check_name(where, own.name)
    if own.labels and own.regression:
        raise UserError(f"{where} names labels and asks for regression; choose one.")
    if len(set(own.labels)) < len(own.labels):
        raise UserError(f"{where} names a label twice: {', '.join(own.labels)}.")
    return own


def _check_name(where: str, name: str) -> None:
    """Raises UserError for a name that cannot be a folder's in every file system, or is one of a sweep's own."""
    plain = name.casefold()
    if not re.fullmatch(r"\w[\w.-]*", name) or name.endswith(".") or len(name.encode()) > MAX_NAME:
        wanted = f"take letters, digits, - and _, at most {MAX_NAME} of them"
    elif plain in TASKS:
        wanted = "take no GLUE task's name"
    elif plain in RESERVED:
        wanted = "a sweep keeps something else under it; rename the task file, or name the task in it"
    else:
        return
    raise UserError(f"{where} cannot be named {name if len(name) < 60 else name[:57] + '...'!r}: {wanted}.")


def _task(own: OwnTask, labels: tuple[str, ...]) -> Task:
    """The task with these labels, none for values. Raises UserError if the parts of its description do not fit."""
    names = own.label_names or labels
    if len(names) != len(labels):
        raise UserError(f"The task has {len(labels)} labels ({_listed(labels)}) and {len(names)} label_names.")
    metrics = own.metrics or (
        ("accuracy", "f1") if len(labels) == 2 else ("accuracy",) if labels else ("pearson", "spearman")
    )
    _check_metrics(metrics, len(labels))
    text = (own.text, own.pair) if own.pair else (own.text,)
    test = {"test": ""} if own.test else {}
    return Task(own.name, own.name, text, own.label, labels, names, metrics, hub_text=text, test=test)


def _classes(own: OwnTask, skip_bad_rows: bool, say: Callable[[str], object]) -> tuple[str, ...]:
    """The classes in order, () where labels are values: those that the description names, or those of the training rows.

    Raises UserError for a broken training row, and for labels of which nothing can be learnt.
    """
    if own.labels or own.regression:
        return own.labels
    counts = _labels_in(own, skip_bad_rows)
    found, numbers = set(counts), {label for label in counts if _value(label) is not None}
    if own.regression is None and sum(counts[label] for label in numbers) >= NUMBERS_SHARE * counts.total():
        found = numbers
        if _are_values(own, numbers, say):
            return ()
    elif own.regression is None and len(found) > counts.total() / 2 > MAX_WHOLE_NUMBERS / 2:
        raise UserError(
            f"{own.train}: the {counts.total()} rows have {len(found)} different labels, of which nothing can be learnt; is "
            f"{own.label} the right column? --labels takes them for classes or for values all the same."
        )
    _check_alike(own.train, found)
    return tuple(sorted(found, key=float if found == numbers else str))


def _are_values(own: OwnTask, numbers: set[str], say: Callable[[str], object]) -> bool:
    """Whether labels that are numbers are values, not classes. Says so, and how to have the other."""
    if len(numbers) == 1:
        raise UserError(f"{own.train}: all rows have the label {min(numbers)}, so that there is nothing to learn.")
    fraction = next((label for label in sorted(numbers) if not float(label).is_integer()), "")
    are_values = bool(fraction) or len(numbers) > MAX_WHOLE_NUMBERS
    size = f"{len(numbers)} whole ones, {'' if are_values else 'not '}more than {MAX_WHOLE_NUMBERS}"
    why = f"{fraction} has a fraction" if fraction else f"there are {size}"
    taken, other = ("values", "classes") if are_values else (f"{len(numbers)} classes", "values")
    say(
        f"the labels in {own.label} are numbers and taken for {taken}, since {why}; for {other} give --labels {other}, or "
        f"in a task file regression: {str(not are_values).lower()}"
    )
    return are_values


def _labels_in(own: OwnTask, skip_bad_rows: bool) -> Counter[str]:
    """How many training rows have each label. Raises UserError for a broken row, and if all rows have one label."""
    counts: Counter[str] = Counter()

    def count(label: Any) -> float:
        counts[_label_text(label)] += 1
        return math.nan

    texts = (own.text, own.pair) if own.pair else (own.text,)
    _read(own.train, Columns(texts, own.label, count), skip_bad_rows)
    if len(counts) == 1:
        raise UserError(f"{own.train}: all rows have the label {min(counts)}, so that there is nothing to learn.")
    return counts


def _check_alike(place: str, labels: set[str]) -> None:
    """Raises UserError for two labels that a person would take for one: equal but for case or blanks, or as numbers."""
    seen: dict[str | Decimal, str] = {}
    for label in sorted(labels):
        is_number = _value(label) is not None
        key = Decimal(label) if is_number else " ".join(unicodedata.normalize("NFKC", label).casefold().split())
        other = seen.setdefault(key, label)
        if other != label:
            raise UserError(
                f"{place} has the labels {other!r} and {label!r}, which are perhaps one; write them alike, or name both under "
                "`labels` in a task file."
            )


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


def _number(value: Any) -> float:
    return number(_label_text(value))


def _value(text: str) -> float | None:
    try:
        return number(text)
    except ValueError:
        return None
