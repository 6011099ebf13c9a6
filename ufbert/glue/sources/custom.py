"""A custom task: rows in TSV, CSV or JSON-lines files, described by a task file or by options."""

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

from ufbert.config.checks import shown
from ufbert.errors import UserError, near_miss
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
class CustomTask:
    """Description of a custom task, as options or a task file hold it. Raises UserError if it contradicts itself."""

    name: str = "own"
    """Name of the task; by default the task file's."""
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

    def __post_init__(self) -> None:
        if missing := [key for key in ("train", "dev", "text", "label") if not getattr(self, key)]:
            raise UserError(f"the task lacks {' and '.join(missing)}; it needs train, dev, text and label.")
        _check_name(self.name)
        if self.labels and self.regression:
            raise UserError("the task names labels and asks for regression; choose one.")
        if len(set(self.classes)) < len(self.classes):
            raise UserError(f"the task names a label twice: {', '.join(self.classes)}.")

    @property
    def classes(self) -> tuple[str, ...]:
        """`labels` as texts."""
        return tuple(map(_label_text, self.labels))

    @property
    def texts(self) -> tuple[str, ...]:
        """One or two text columns."""
        return (self.text, self.pair) if self.pair else (self.text,)


def read_custom(
    custom: CustomTask, skip_bad_rows: bool = False, say: Callable[[str], object] = lambda line: None
) -> TaskData:
    """Read all rows of a custom task. If numbers could be classes or values, `say` gets a line with the decision.

    `skip_bad_rows` leaves broken rows out and counts them; a row whose label no training row has is broken too. Raises
    UserError for a broken row otherwise, and for a description that contradicts itself or the files.
    """
    task = _task(custom, _classes(custom, skip_bad_rows, say))
    label = _value if task.is_regression else partial(_class, task.labels)
    columns = Columns(custom.texts, custom.label, label)
    train, dev = (_read(path, columns, skip_bad_rows) for path in (custom.train, custom.dev))
    test = {"test": _read(custom.test, Columns(custom.texts), skip_bad_rows)} if custom.test else {}
    return TaskData(task, train, {"dev": dev}, test)


def _read(path: str, columns: Columns, skip_bad_rows: bool) -> Examples:
    table = read_table(Path(path))
    if table.columns is not None:
        require_columns(path, columns, table.columns)
    return collect(path, table.records, columns, skip_bad_rows)


def read_task_file(path: Path) -> CustomTask:
    """Read a task file: a JSON object, or a Python file that defines TASK.

    Raises UserError, naming the file and the field, if it cannot be read or does not describe a task.
    """
    values = _python_values(path) if path.suffix == ".py" else _json_values(path)
    known = [field.name for field in fields(CustomTask)]
    if not isinstance(values, dict):
        raise UserError(f"{path} does not describe a task: it must be an object with some of {', '.join(known)}.")
    for key in map(str, values):
        if key not in known:
            raise UserError(f"{path}: {shown(key)} is unknown; {near_miss(key, known)}")
    custom = convert({"name": path.stem, **values}, CustomTask, str(path))
    train, dev, test = (str(path.parent / name) if name else "" for name in (custom.train, custom.dev, custom.test))
    return replace(custom, train=train, dev=dev, test=test)


def _json_values(path: Path) -> Any:
    try:
        text = read_whole(path).decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=object_of_pairs, parse_constant=number)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not readable JSON: {error.msg} in line {error.lineno}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8.") from error
    except (ValueError, RecursionError) as error:  # a key twice, a number of 5,000 digits, NaN, 1,000 brackets
        raise UserError(f"{path} is not readable JSON: {error}.") from error


def _python_values(path: Path) -> Any:
    try:
        return runpy.run_path(str(path)).get("TASK")
    except FileNotFoundError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (Exception, SystemExit) as error:  # it may raise anything
        raise UserError(f"{path} fails with {type(error).__name__}: {error}.") from error


def _check_name(name: str) -> None:
    """Raise UserError for a name that some file system refuses, or that a sweep uses for another file."""
    plain = name.casefold()
    if not re.fullmatch(r"\w[\w.-]*", name) or name.endswith(".") or len(name.encode()) > MAX_NAME:
        wanted = f"take letters, digits, - and _, at most {MAX_NAME} of them"
    elif plain in TASKS:
        wanted = "take no GLUE task's name"
    elif plain in RESERVED:
        wanted = "a sweep keeps something else under it; rename the task file, or name the task in it"
    else:
        return
    raise UserError(f"the task cannot be named {name if len(name) < 60 else name[:57] + '...'!r}: {wanted}.")


def _task(custom: CustomTask, labels: tuple[str, ...]) -> Task:
    """Build the task with these labels, none for values. Raises UserError if the parts of its description do not fit."""
    names = tuple(map(str, custom.label_names)) or labels
    if len(names) != len(labels):
        raise UserError(f"The task has {len(labels)} labels ({_listed(labels)}) and {len(names)} label_names.")
    usual = {0: ("pearson", "spearman"), 2: ("accuracy", "f1")}.get(len(labels), ("accuracy",))
    metrics = custom.metrics or usual
    _check_metrics(metrics, len(labels))
    return Task(
        custom.name, custom.name, custom.texts, custom.label, labels, names, metrics, hub_text=custom.texts,
        test={"test": ""} if custom.test else {},
    )  # fmt: skip


def _classes(custom: CustomTask, skip_bad_rows: bool, say: Callable[[str], object]) -> tuple[str, ...]:
    """Return the classes in order, as the description names them or as the training rows have them; () if labels are values.

    Raises UserError for a broken training row, and for labels from which nothing can be learnt.
    """
    if custom.labels or custom.regression:
        return custom.classes
    counts = _label_counts(custom, skip_bad_rows)
    labels, numbers = set(counts), set(filter(_is_number, counts))
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

    _read(custom.train, Columns(custom.texts, custom.label, count), skip_bad_rows)
    if len(counts) == 1:
        raise UserError(f"{custom.train}: all rows have the label {min(counts)}, so that there is nothing to learn.")
    return counts


def _check_alike(place: str, labels: set[str]) -> None:
    """Raise UserError for two labels that a reader would take for one: equal as numbers, or up to case and blanks."""
    seen: dict[str | Decimal, str] = {}
    for label in sorted(labels):
        key = Decimal(label) if _is_number(label) else " ".join(unicodedata.normalize("NFKC", label).casefold().split())
        other = seen.setdefault(key, label)
        if other != label:
            pair = f"the labels {other!r} and {label!r}, which are perhaps one"
            raise UserError(f"{place} has {pair}; write them alike, or name both under `labels` in a task file.")


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


def _value(label: Any) -> float:
    return number(_label_text(label))


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(number(label))
    except ValueError:
        return False
