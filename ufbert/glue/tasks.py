"""The GLUE tasks: columns of the official TSV files, labels and metrics."""

import difflib
from dataclasses import dataclass

from ufbert.errors import UserError


@dataclass(frozen=True)
class Task:
    """One task. Columns are header names, or positions where the official file has no header."""

    name: str
    folder: str
    """Folder of the official download."""
    text: tuple[str | int, ...]
    """One or two text columns."""
    label: str | int
    labels: tuple[str, ...]
    """Label strings as they stand in the files, in class order; empty for regression."""
    label_names: tuple[str, ...]
    """What a person calls the classes."""
    metrics: tuple[str, ...]
    """Official metrics, the main one first."""
    header: bool = True
    columns: int = 0
    """Columns of a file without a header."""

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def n_outputs(self) -> int:
        """Classifier scores: one for regression."""
        return max(1, len(self.labels))


TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", (3,), 1, ("0", "1"), ("unacceptable", "acceptable"), ("matthews", "accuracy"), False, 4),
        Task("sst2", "SST-2", ("sentence",), "label", ("0", "1"), ("negative", "positive"), ("accuracy",)),
        Task(
            "mrpc",
            "MRPC",
            ("#1 String", "#2 String"),
            "Quality",
            ("0", "1"),
            ("different", "paraphrase"),
            ("f1", "accuracy"),
        ),
        Task("stsb", "STS-B", ("sentence1", "sentence2"), "score", (), (), ("pearson", "spearman")),
        Task(
            "rte",
            "RTE",
            ("sentence1", "sentence2"),
            "label",
            ("entailment", "not_entailment"),
            ("entailment", "not entailment"),
            ("accuracy",),
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of that name (`sst2`, `SST-2` and `sst-2` are one). Raises UserError, with the nearest known name."""
    key = name.lower().replace("-", "").replace("_", "")
    if key in TASKS:
        return TASKS[key]
    near = difflib.get_close_matches(key, TASKS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known tasks: {', '.join(TASKS)}."
    raise UserError(f"There is no task {name!r}; {hint}")
