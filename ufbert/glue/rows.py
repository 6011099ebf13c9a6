"""A source of task rows, and what it gives."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from ufbert.glue.tasks import TASKS, Task


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


class Source(ABC):
    """A place that rows come from. A split is named as in `Task`: `train`, or one of `task.dev` or `task.test`."""

    @abstractmethod
    def place(self, task: Task, split: str) -> str:
        """What a person calls the place of a split: a file, or a split of a dataset."""

    @abstractmethod
    def has(self, task: Task, split: str) -> bool:
        """Whether the split is there, which says nothing about its rows. Raises UserError if the source cannot be asked."""

    @abstractmethod
    def read(self, task: Task, split: str) -> Rows | None:
        """The rows of a split, in its order, texts without blanks at their ends; None if the source has no such split.

        Raises UserError, naming the place and the line or row, for what `records.collect` refuses and for a column that is
        not there.
        """

    def cuts(self) -> list[Task]:
        """Parts of official tasks that lie in the source, complete or not."""
        return []

    def missing(self, task: Task) -> list[str]:
        """Places of the training rows and of the dev set that decides, those which the source lacks."""
        return [self.place(task, split) for split in ("train", task.dev[0]) if not self.has(task, split)]

    def tasks(self) -> list[Task]:
        """The complete tasks, official ones in the order of TASKS, then cuts by name."""
        return [task for task in (*TASKS.values(), *self.cuts()) if not self.missing(task)]
