"""A custom task: rows in TSV, CSV or JSON-lines files, described by a task file or by options."""

import difflib
import json
import math
import re
import runpy
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
from ufbert.glue.sources.records import Columns, class_number, collect, number, require_columns
from ufbert.glue.sources.table_files import object_of_pairs, read_table
from ufbert.glue.tasks import TASKS, Examples, Task, TaskData
from ufbert.runtime.typed import convert, read_whole

MAX_WHOLE_NUMBERS = 20
"""More different whole-number labels than this are values, not classes, unless the task says otherwise."""
NUMBERS_SHARE = 0.95
"""Labels are numbers if at least this share of the training rows has one. Any other label is then a broken row."""
RESERVED = ("glue.json", "glue.md", "partial", "predictions", "report.html", "submission")
"""Names in a sweep's folder that are not tasks' model folders."""
MAX_NAME = 100
"""Bytes of a task's name, which becomes a part of longer file names."""


Label = str | bool | int | float
"""A label as a task file may have it."""


@dataclass(frozen=True)
class TaskFile:
    """Description of a custom task, as a task file holds it; at least train, dev, text and label are needed."""

    name: str = ""
    """Name of the task; by default the task file's, else `own`."""
    train: str = ""
    """Training rows: .tsv (no quoting), .csv (with quotes) or .jsonl, each also with .gz; tables begin with a header."""
    dev: str = ""
    """Labelled rows that decide."""
    test: str = ""
    """Rows to predict; their labels are not read."""
    text: str = ""
    """Column of the text."""
    pair: str = ""
    """Column of the second text, for a task on pairs."""
    label: str = ""
    """Column of the label."""
    labels: tuple[Label, ...] = ()
    """Labels as they stand in the files, in class order; by default those of the training rows, sorted."""
    label_names: tuple[Label, ...] = ()
    """Names of the classes for a reader; by default the labels."""
    metrics: tuple[str, ...] = ()
    """The main one first: accuracy, f1, matthews, pearson, spearman; by default accuracy (and f1 for two classes), or pearson
    and spearman."""
    regression: bool | None = None
    """True if labels are values, False if they are classes. None takes them for values if at least 95 % of the training rows
    have numbers, and one of these has a fraction or there are more than 20 different ones."""


@dataclass(frozen=True)
class CustomTask(TaskFile):
    """Description of a custom task: the fields of a task file, or the path of one."""

    task_file: str = ""
    """JSON file that holds an object of the fields above, or Python file that defines TASK as one. Its paths are relative to
    its folder."""


def read_custom(
    custom: CustomTask, skip_bad_rows: bool = False, say: Callable[[str], object] = lambda line: None
) -> TaskData:
    """Read all rows of a custom task. If numbers could be classes or values, `say` gets a line with the decision.

    `skip_bad_rows` leaves broken rows out and counts them; a row whose label no training row has is broken too. Raises
    UserError for a broken row otherwise, and for a description that contradicts itself or the files.
    """
    custom = _complete(custom)
    task = _task(custom, _classes(custom, skip_bad_rows, say))
    label = _number if task.is_regression else partial(_class, task.labels)
    labelled = Columns(tuple(map(str, task.text)), custom.label, label)
    train, dev = (_read(path, labelled, skip_bad_rows) for path in (custom.train, custom.dev))
    test = {"test": _read(custom.test, Columns(labelled.text), skip_bad_rows)} if custom.test else {}
    return TaskData(task, train, {"dev": dev}, test)


def _read(path: str, columns: Columns, skip_bad_rows: bool) -> Examples:
    table = read_table(Path(path))
    if table.columns is not None:
        require_columns(path, columns, table.columns)
    return collect(path, table.records, columns, skip_bad_rows)


def _complete(custom: CustomTask) -> CustomTask:
    """Return the description with its task file read. Raises UserError if a field is missing or does not fit."""
    where = custom.task_file or "The task"
    if custom.task_file:
        if replace(custom, task_file="") != CustomTask():
            raise UserError("A task file says all about its task; leave out the other options that describe one.")
        custom = read_task_file(Path(custom.task_file))
    labels = tuple(map(_label_text, custom.labels))
    custom = replace(custom, name=custom.name or "own", labels=labels)
    if lacking := [key for key in ("train", "dev", "text", "label") if not getattr(custom, key)]:
        raise UserError(f"{where} lacks {' and '.join(lacking)}; it needs train, dev, text and label.")
    _check_name(where, custom.name)
    if custom.labels and custom.regression:
        raise UserError(f"{where} names labels and asks for regression; choose one.")
    if len(set(labels)) < len(labels):
        raise UserError(f"{where} names a label twice: {', '.join(labels)}.")
    return custom


def read_task_file(path: Path) -> CustomTask:
    """Read a task file: a JSON object, or a Python file that defines TASK.

    Raises UserError, naming the file and the field, if it cannot be read or does not describe a task.
    """
    values = _python_values(path) if path.suffix == ".py" else _json_values(path)
    known = [field.name for field in fields(TaskFile)]
    if not isinstance(values, dict):
        raise UserError(f"{path} does not describe a task: it must be an object with some of {', '.join(known)}.")
    for key in map(str, values):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"take {', '.join(known)}."
            raise UserError(f"{path}: {key!r} is unknown; {hint}")
    read = convert(values, TaskFile, str(path))
    files = {key: str(path.parent / getattr(read, key)) for key in ("train", "dev", "test") if getattr(read, key)}
    described: dict[str, Any] = {**vars(read), "name": values.get("name", path.stem), **files}
    return CustomTask(**described)


def _json_values(path: Path) -> Any:
    try:
        return json.loads(
            read_whole(path).decode("utf-8-sig"), object_pairs_hook=object_of_pairs, parse_constant=number
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: broken JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8.") from error
    except (ValueError, RecursionError) as error:  # a key twice, a number of 5,000 digits, NaN, 1,000 brackets
        raise UserError(f"{path}: broken JSON ({error}).") from error


def _python_values(path: Path) -> Any:
    try:
        return runpy.run_path(str(path)).get("TASK")
    except FileNotFoundError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (Exception, SystemExit) as error:  # it may raise anything
        raise UserError(f"{path} fails with {type(error).__name__}: {error}.") from error


def _check_name(where: str, name: str) -> None:
    """Raises UserError for a name that cannot be a folder's in every file system, or is one of a sweep's custom."""
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


def _task(custom: CustomTask, labels: tuple[str, ...]) -> Task:
    """Build the task with these labels, none for values. Raises UserError if the parts of its description do not fit."""
    names = tuple(map(str, custom.label_names)) or labels
    if len(names) != len(labels):
        raise UserError(f"The task has {len(labels)} labels ({_listed(labels)}) and {len(names)} label_names.")
    metrics = custom.metrics or (
        ("accuracy", "f1") if len(labels) == 2 else ("accuracy",) if labels else ("pearson", "spearman")
    )
    _check_metrics(metrics, len(labels))
    text = (custom.text, custom.pair) if custom.pair else (custom.text,)
    test = {"test": ""} if custom.test else {}
    return Task(custom.name, custom.name, text, custom.label, labels, names, metrics, hub_text=text, test=test)


def _classes(custom: CustomTask, skip_bad_rows: bool, say: Callable[[str], object]) -> tuple[str, ...]:
    """Return the classes in order, as the description names them or as the training rows have them; () if labels are values.

    Raises UserError for a broken training row, and for labels from which nothing can be learnt.
    """
    if custom.labels or custom.regression:
        return tuple(map(str, custom.labels))
    counts = _label_counts(custom, skip_bad_rows)
    labels, numbers = set(counts), {label for label in counts if _value(label) is not None}
    if custom.regression is None and sum(counts[label] for label in numbers) >= NUMBERS_SHARE * counts.total():
        labels = numbers
        if _are_values(custom, numbers, say):
            return ()
    elif custom.regression is None and len(labels) > counts.total() / 2 > MAX_WHOLE_NUMBERS / 2:
        raise UserError(
            f"{custom.train}: the {counts.total()} rows have {len(labels)} different labels, from which nothing can be learnt; "
            f"is {custom.label} the right column? With --labels they are taken for classes or for values all the same."
        )
    _check_alike(custom.train, labels)
    return tuple(sorted(labels, key=float if labels == numbers else str))


def _are_values(custom: CustomTask, numbers: set[str], say: Callable[[str], object]) -> bool:
    """Decide if labels that are numbers are values, not classes; `say` gets the decision and how to choose the other."""
    if len(numbers) == 1:
        raise UserError(f"{custom.train}: all rows have the label {min(numbers)}, so that there is nothing to learn.")
    fraction = next((label for label in sorted(numbers) if not float(label).is_integer()), "")
    are_values = bool(fraction) or len(numbers) > MAX_WHOLE_NUMBERS
    size = f"{len(numbers)} whole ones, {'' if are_values else 'not '}more than {MAX_WHOLE_NUMBERS}"
    why = f"{fraction} has a fraction" if fraction else f"there are {size}"
    taken, other = ("values", "classes") if are_values else (f"{len(numbers)} classes", "values")
    say(
        f"the labels in {custom.label} are numbers and taken for {taken}, since {why}; for {other} give --labels {other}, or "
        f"in a task file regression: {str(not are_values).lower()}"
    )
    return are_values


def _label_counts(custom: CustomTask, skip_bad_rows: bool) -> Counter[str]:
    """Count the training rows of each label. Raises UserError for a broken row, and if all rows have one label."""
    counts: Counter[str] = Counter()

    def count(label: Any) -> float:
        counts[_label_text(label)] += 1
        return math.nan

    texts = (custom.text, custom.pair) if custom.pair else (custom.text,)
    _read(custom.train, Columns(texts, custom.label, count), skip_bad_rows)
    if len(counts) == 1:
        raise UserError(f"{custom.train}: all rows have the label {min(counts)}, so that there is nothing to learn.")
    return counts


def _check_alike(place: str, labels: set[str]) -> None:
    """Raise UserError for two labels that a reader would take for one: equal as numbers, or up to case and blanks."""
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
    """Convert a label to text; a whole number is the same label with and without a decimal point."""
    text = str(value).strip()
    return text.partition(".")[0] if re.fullmatch(r"[+-]?\d+\.0*", text) else text


def _number(value: Any) -> float:
    return number(_label_text(value))


def _value(text: str) -> float | None:
    try:
        return number(text)
    except ValueError:
        return None
