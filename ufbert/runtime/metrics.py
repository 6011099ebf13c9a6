"""Metrics of a run: a JSONL file always, TensorBoard on request."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from msgspec import Meta

from ufbert.errors import UserError
from ufbert.runtime.files import to_json_text, write_text
from ufbert.runtime.typed import Count, read_lines

Record = dict[str, Any]
"""Numbers of a step, an evaluation or an event, by name."""


@dataclass(frozen=True)
class StepRecord:
    """A step in `metrics.jsonl`, where None is left out. What has a default is known once the step is done.

    A step whose loss was not finite has null there, and is not read.
    """

    step: Count
    lr: float
    mask_rate: float
    rows: Count
    length: Count
    """Tokens of the pieces that rows were cut into."""
    fraction: float
    """Share of the budget spent when the step began."""
    tokens: Count
    """Consumed since the run began."""
    tokens_per_second: float
    loss: float = 0.0
    accuracy: float = 0.0
    gradient_norm: float = 0.0
    spent: float = 0.0
    """Seconds of the budget."""
    extra_loss: float | None = None
    utilisation: float | None = None
    skipped: bool | None = None


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation in `metrics.jsonl`, where None is left out. One whose loss was not finite is not read."""

    step: Count
    heldout_loss: float
    heldout_accuracy: float
    fraction: float
    """Share of the budget."""
    tokens: Count
    memory_bytes: Count
    skipped_updates: Count
    spent: float
    """Seconds of the budget."""
    usage: dict[str, dict[str, float | None]] | None = None
    """By layer, the shares of its tree, leaves or experts in use."""


@dataclass(frozen=True)
class Resumed:
    """A line of metrics.jsonl about a run that went on: seconds of work that were lost, and that the start took."""

    step: Count
    lost_seconds: float
    start_seconds: float


@dataclass(frozen=True)
class Spent:
    """Of any line of metrics.jsonl, how much of the budget was spent by then."""

    spent: Annotated[float, Meta(ge=0, le=1e12)]


def read_records(path: Path) -> list[Record]:
    """Read every whole line of a JSONL file of numbers; what a kill or damage left of others is passed over."""
    return list(read_lines(path, dict[str, Any]))


@runtime_checkable
class Sink(Protocol):
    """A destination of records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Writer:
    """Writes every record to every sink."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class JsonlWriter:
    """Appends records to a file, one JSON object a line, and flushes each.

    A resumed run first drops the records after `keep_through_step`, the step of its checkpoint. Raises UserError if the disk
    refuses.
    """

    def __init__(self, path: Path, keep_through_step: int | None = None) -> None:
        self.path = path
        if keep_through_step is not None and path.is_file():
            kept = [to_json_text(r) for r in read_records(path) if _step(r) <= keep_through_step]
            write_text(path, "".join(line + "\n" for line in kept))
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write {path}: {error.strerror}.") from error

    def write(self, record: Record) -> None:
        try:
            self._file.write(to_json_text(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"Cannot write {self.path}: {error.strerror}.") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what cannot be flushed was reported when it was written
            self._file.close()


class TensorBoardWriter:
    """Writes every number to `folder` as a TensorBoard scalar over steps. Raises UserError if tensorboardX is missing."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError(
                "--tensorboard needs the package tensorboardX: `uv sync --extra tensorboard` or `pip install tensorboardX`."
            ) from error
        self._writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        scope = "heldout" if "heldout_loss" in record else "train"
        for name, value in _scalars(record):
            self._writer.add_scalar(f"{scope}/{name}", value, record.get("step", 0))

    def close(self) -> None:
        self._writer.close()


def _scalars(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, float(value)


def _step(record: Record) -> int | float:
    """Return the step of a record, or infinity if the record names none that is a whole number."""
    step = record.get("step", 0)
    return step if isinstance(step, int) else float("inf")
