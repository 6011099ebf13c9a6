"""What a source gives: the rows of a task."""

from typing import NamedTuple

from ufbert.glue.tasks import Task


class Rows(NamedTuple):
    """Rows of one split."""

    texts: list[str]
    pairs: list[str] | None
    """Second texts, for tasks on pairs."""
    labels: list[float] | None
    """Class numbers, or targets for regression; None for a test split, whose labels nobody has."""
    skipped: int = 0
    """Broken rows that were left out, where that was asked for."""


class TaskData(NamedTuple):
    """All rows of one task."""

    task: Task
    train: Rows
    dev: dict[str, Rows]
    """Labelled splits by name, those of `task.dev` that the source has; the first decides."""
    test: dict[str, Rows]
    """Splits without labels, those of `task.test` that the source has."""
