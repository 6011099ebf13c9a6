"""The results of a sweep: the format `glue.json`, written and read."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ufbert.errors import UserError
from ufbert.glue.metrics import METRICS
from ufbert.runtime.files import write_json
from ufbert.runtime.typed import Count, Header, decode, read_whole

FORMAT, FORMAT_VERSION = "ufbert-glue", 1
Scores = dict[str, float]
"""Metrics by name, as numbers between -1 and 1."""
Point = dict[str, int | float]
"""An epoch of a learning curve: `epoch`, `loss`, and metrics of the dev split that decides."""


@dataclass(frozen=True, kw_only=True)
class DevResult:
    """Scores on one dev split."""

    rows: Count
    official_rows: Count
    """Rows of the official dev set; 0 for a part of a task and for a custom task."""
    seeds: dict[int, Scores]
    median: Scores
    """Over seeds; of an even number the mean of the middle two."""
    spread: dict[str, tuple[float, float]]
    """Lowest and highest over seeds, by metric."""
    majority: Scores
    """Of always giving the training rows' most frequent class."""
    confusion: dict[int, list[list[Count]]]
    """Rows by true class and predicted class, by seed; empty for regression."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task of a sweep. Raises UserError if its parts contradict each other."""

    folder: str
    """The task's name for a reader."""
    cut_of: str
    """The official task of which this is a part, or ""."""
    metrics: tuple[str, ...]
    """The main one first."""
    label_names: tuple[str, ...]
    """In class order; empty for regression."""
    train_rows: Count
    skipped_rows: Count
    truncated_rows: Count
    lr: float
    """Peak learning rate; the best on dev if several were tried."""
    rates: dict[str, float] = field(default_factory=dict)
    """Median of the main metric for each learning rate that was tried."""
    saved_seed: int
    """Seed of the run whose model was saved."""
    dev: dict[str, DevResult]
    """By split; the first decides."""
    curves: dict[int, list[Point]]
    """By seed; empty if none was kept."""
    starts_from: str
    """`model`, or the task whose fine-tuned model the runs started from."""
    seconds: float

    def __post_init__(self) -> None:
        counts = len(self.metrics), len(self.dev), min((len(dev.seeds) for dev in self.dev.values()), default=0)
        if not all(counts):
            metrics, splits, seeds = counts
            raise UserError(f"{self.folder} has {metrics} metrics, {splits} dev splits, {seeds} seeds; none may be 0.")
        if unknown := [metric for metric in self.metrics if metric not in METRICS]:
            raise UserError(f"{self.folder} has {unknown[0]!r} among its metrics; known are {', '.join(METRICS)}.")
        classes = len(self.label_names)
        for title, dev in ((self.title(split), dev) for split, dev in self.dev.items()):
            for scores in (dev.median, dev.spread, dev.majority, *dev.seeds.values()):
                if missing := [metric for metric in self.metrics if metric not in scores]:
                    raise UserError(f"{title} lacks {missing[0]!r}, one of its metrics, in some of its scores.")
            for seed, table in dev.confusion.items():
                if [len(row) for row in table] != [classes] * classes:
                    raise UserError(f"{title} has a confusion table of seed {seed} that is not {classes} by {classes}.")

    @property
    def deciding(self) -> DevResult:
        """Scores on the dev split that decides."""
        return next(iter(self.dev.values()))

    def title(self, split: str) -> str:
        """Name a split for a reader: `RTE`, `MNLI matched`."""
        return self.folder + split.removeprefix("dev").replace("_", " ")


@dataclass(frozen=True)
class ProtocolResult:
    """The protocol as it was run, without which its scores compare with nothing."""

    name: str
    text: str
    mode: str
    """`fine-tuned`, `probe` or `from scratch`, and the teacher if there was one."""

    def __str__(self) -> str:
        return f"{self.name} ({self.mode}): {self.text}"


@dataclass(frozen=True)
class Average:
    """An average as papers print it."""

    name: str
    sentence: str
    value: float | None
    """None if a member is missing."""
    missing: list[str]


@dataclass(frozen=True)
class GlueResults:
    """All of a sweep."""

    model: str
    source: str
    protocol: ProtocolResult
    options: dict[str, Any]
    """Options of `ufbert finetune` that the scores depend on."""
    environment: dict[str, Any]
    tasks: dict[str, TaskResult]
    averages: dict[str, Average]

    @property
    def seeds(self) -> list[int]:
        """All seeds of any task, ascending."""
        return sorted({seed for task in self.tasks.values() for dev in task.dev.values() for seed in dev.seeds})

    def to_json(self) -> dict[str, Any]:
        """Return the contents of `glue.json`."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}


def write_results(folder: Path, results: GlueResults) -> None:
    """Write `glue.json`, whole or not at all. Raises UserError if the disk refuses."""
    write_json(folder / "glue.json", results.to_json())


def read_results(place: Path) -> GlueResults:
    """Read the sweep of a folder, or of its `glue.json`. Raises UserError for a missing, damaged or other file."""
    path = place / "glue.json" if place.is_dir() else place
    if not path.exists():
        raise UserError(f"{path} does not exist; name a folder that `ufbert finetune` wrote, or its glue.json.")
    text = read_whole(path)
    if decode(text, Header, str(path)) != Header(FORMAT, FORMAT_VERSION):
        raise UserError(f"{path} is not a glue.json of format version {FORMAT_VERSION}.")
    return decode(text, GlueResults, str(path))
