"""Task rows from the official TSV files: tab separated, UTF-8 (with or without a BOM), no quoting."""

from pathlib import Path

from ufbert.errors import UserError
from ufbert.glue.rows import Rows
from ufbert.glue.tasks import Task


def open_source(spec: str) -> Path:
    """The folder of `dir:PATH`. Raises UserError for another kind of source or a missing folder."""
    kind, _, rest = spec.partition(":")
    if kind != "dir" or not rest:
        raise UserError(f"There is no GLUE source {spec!r}; take dir:PATH, a folder of the official TSV files.")
    path = Path(rest)
    if not path.is_dir():
        raise UserError(f"The GLUE folder {path} does not exist.")
    return path


def read_split(root: Path, task: Task, split: str) -> Rows:
    """The rows of `root/<task folder>/<split>.tsv`.

    Raises UserError, with file and line, for a missing file, a missing column, a row with too few columns, or a label
    the task does not have.
    """
    path = root / task.folder / f"{split}.tsv"
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"The GLUE folder lacks {path}.") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    rows = [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(lines, 1) if line.strip("\r\n")]
    width, text_columns, label_column = _columns(path, task, rows)
    rows = rows[1:] if task.header else rows
    if not rows:
        raise UserError(f"{path} has no rows.")
    texts: list[list[str]] = [[] for _ in text_columns]
    labels = []
    for number, fields in rows:
        if len(fields) < width:
            raise UserError(f"{path}, line {number}: {len(fields)} columns, expected {width}.")
        for column, found in zip(text_columns, texts, strict=True):
            found.append(fields[column].strip())
        labels.append(_label(path, number, task, fields[label_column].strip()))
    return Rows(texts[0], texts[1] if len(texts) > 1 else None, labels)


def _columns(path: Path, task: Task, rows: list[tuple[int, list[str]]]) -> tuple[int, list[int], int]:
    """Columns a row must have, positions of the texts, position of the label."""
    if not task.header:
        return task.columns, [int(column) for column in task.text], int(task.label)
    header = rows[0][1] if rows else []
    missing = [str(name) for name in (*task.text, task.label) if name not in header]
    if missing:
        raise UserError(f"{path}, line 1: no column {', '.join(missing)} in the header.")
    return len(header), [header.index(str(name)) for name in task.text], header.index(str(task.label))


def _label(path: Path, number: int, task: Task, text: str) -> float:
    if task.is_regression:
        try:
            return float(text)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {text!r} is not a number.") from error
    if text not in task.labels:
        raise UserError(f"{path}, line {number}: {text!r} is not one of the labels {', '.join(task.labels)}.")
    return float(task.labels.index(text))
