"""The GLUE tasks: columns of their sources, labels, metrics, splits, the form the GLUE server takes, and their rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ufbert.errors import UserError, near_miss


@dataclass(frozen=True)
class Task:
    """One task, official or custom."""

    name: str
    """`cola`; a cut of a task has its folder's name in lower case (`mnli-devsplit`)."""
    folder: str
    """Folder of the official download, and the task's name for a reader."""
    text: tuple[str | int, ...]
    """One or two text columns of the official TSV files: header names, or positions where a file has no header."""
    label: str | int
    """Label column of the official files."""
    labels: tuple[str, ...]
    """Label strings as they stand in the files, in class order; empty for regression."""
    label_names: tuple[str, ...]
    """Names of the classes for a reader."""
    metrics: tuple[str, ...]
    """Official metrics, the main one first."""
    hub_labels: tuple[str, ...] = ()
    """Names of the classes in the hub's dataset, if they are neither `labels` nor `label_names`."""
    header: bool = True
    """True if train and dev files have a header, as test files always do."""
    columns: int = 0
    """Columns of a file without a header."""
    hub_text: tuple[str, ...] = ("sentence1", "sentence2")
    """Text columns in `datasets` and `tensorflow_datasets`, whose label column is `label`, a class number or a value."""
    dev: tuple[str, ...] = ("dev",)
    """Dev splits; the first decides."""
    test: dict[str, str] = field(default_factory=lambda: {"test": ""})
    """Test splits, each with the stem of the file that the GLUE server takes ("" for the folder's name)."""
    cut_of: str = ""
    """The official task of which this is a part; "" for an official task. The score of a part is no official score."""

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def n_outputs(self) -> int:
        """Scores that the classifier gives a row: one per class, or one for regression."""
        return max(1, len(self.labels))


class Examples(NamedTuple):
    """The rows of one split of a task."""

    texts: list[str]
    pairs: list[str] | None
    """Second texts, for tasks on pairs."""
    labels: list[float] | None
    """Class numbers, or targets for regression; None for a test split without labels."""
    skipped: int = 0
    """Broken rows that were left out, as `--skip-bad-rows` asks."""


class TaskData(NamedTuple):
    """All rows of one task."""

    task: Task
    train: Examples
    dev: dict[str, Examples]
    """Labelled splits by name, those of `task.dev` that the source has; the first decides."""
    test: dict[str, Examples]
    """Splits without labels, those of `task.test` that the source has."""

    @property
    def deciding_split(self) -> str:
        """Name of the dev split that decides."""
        return next(iter(self.dev))

    @property
    def skipped(self) -> int:
        """Broken rows of all splits that were left out."""
        return sum(examples.skipped for examples in (self.train, *self.dev.values(), *self.test.values()))


BINARY = ("0", "1")
ENTAILED = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_MNLI_TESTS = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", "ax": "AX"}

TASKS = {
    task.name: task
    for task in (
        Task(
            "cola", "CoLA", (3,), 1, BINARY, ("unacceptable", "acceptable"), ("matthews", "accuracy"), header=False,
            columns=4, hub_text=("sentence",),
        ),
        Task(
            "sst2", "SST-2", ("sentence",), "label", BINARY, ("negative", "positive"), ("accuracy",),
            hub_text=("sentence",),
        ),
        Task(
            "mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", BINARY, ("different", "paraphrase"),
            ("f1", "accuracy"), hub_labels=("not_equivalent", "equivalent"),
        ),
        Task("stsb", "STS-B", _PAIR, "score", (), (), ("pearson", "spearman")),
        Task(
            "qqp", "QQP", ("question1", "question2"), "is_duplicate", BINARY, ("different", "duplicate"),
            ("f1", "accuracy"), hub_labels=("not_duplicate", "duplicate"), hub_text=("question1", "question2"),
        ),
        Task(
            "mnli", "MNLI", _PAIR, "gold_label", ("entailment", "neutral", "contradiction"),
            ("entailment", "neutral", "contradiction"), ("accuracy",), hub_text=("premise", "hypothesis"),
            dev=("dev_matched", "dev_mismatched"), test=_MNLI_TESTS,
        ),
        Task(
            "qnli", "QNLI", ("question", "sentence"), "label", ENTAILED, ("entailment", "not entailment"), ("accuracy",),
            hub_text=("question", "sentence"),
        ),
        Task("rte", "RTE", _PAIR, "label", ENTAILED, ("entailment", "not entailment"), ("accuracy",)),
        Task("wnli", "WNLI", _PAIR, "label", BINARY, ("not entailment", "entailment"), ("accuracy",)),
    )
}  # fmt: skip
"""In the order in which a sweep runs them."""


def find_task(name: str, others: Sequence[str] = ()) -> Task:
    """Return the official task of that name (`sst2`, `SST-2` and `sst-2` are one).

    Raises UserError, with the nearest of the official names and of `others` that could have been meant.
    """
    key = name.lower().replace("-", "").replace("_", "")
    if key in TASKS:
        return TASKS[key]
    raise UserError(f"There is no task {name!r}; {near_miss(key, [*others, *TASKS])}")


def cut_of(folder: str) -> Task | None:
    """Return the task of a folder that holds a part of an official one, or None for any other name.

    `MNLI-devsplit`, for example, holds a `train.tsv` and a `dev.tsv` cut from MNLI's dev set.
    """
    for task in TASKS.values():
        if folder.startswith(f"{task.folder}-"):
            return replace(task, name=folder.lower(), folder=folder, dev=("dev",), test={}, cut_of=task.name)
    return None
