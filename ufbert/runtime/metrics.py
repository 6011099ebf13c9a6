"""Metrics of a run: a JSONL file always, TensorBoard and Trackio on request."""

import contextlib
import importlib
import io
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from msgspec import Meta

from ufbert.errors import UserError, first_line
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
    next_token: bool | None = None
    """True if next tokens were predicted, not masked ones; `mask_rate` was then without effect."""


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


TRACKERS = {"tensorboard": "tensorboardX", "trackio": "trackio"}
"""The package of each tracker. Its extra has the tracker's name."""
TRACKIO_PROJECT = "ufbert"


def check_trackers(names: Sequence[str]) -> None:
    """Import the packages of trackers. Raises UserError for one that is missing or broken."""
    for name in names:
        try:
            importlib.import_module(TRACKERS[name])
        except ImportError as error:
            package, why = TRACKERS[name], first_line(error)
            raise UserError(
                f"--track {name} needs the package {package}: `uv sync --extra {name}` or `pip install {package}` ({why})."
            ) from error


class TensorBoardWriter:
    """Writes every number to `folder` as a TensorBoard scalar over steps."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        for name, value in _scoped(record).items():
            self._writer.add_scalar(name, value, record.get("step", 0))

    def close(self) -> None:
        self._writer.close()


class TrackioWriter:
    """Writes every number to Trackio's database on this machine, as a run of the project `ufbert` over steps.

    A run of this `name` that is there goes on if `resumed`. Nothing leaves the machine: no Space, server, webhook or account
    that the environment names is used, and nothing about the hardware is recorded.
    """

    def __init__(self, name: str, resumed: bool) -> None:
        import trackio

        resume = "allow" if resumed else "never"
        with _no_network(), contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                TRACKIO_PROJECT, name, resume=resume, embed=False, auto_log_gpu=False, auto_log_cpu=False
            )

    def write(self, record: Record) -> None:
        if values := _scoped(record):
            self._run.log(values, step=int(record.get("step", 0)))

    def close(self) -> None:
        import trackio

        with _no_network(), contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()


@contextlib.contextmanager
def _no_network() -> Generator[None]:
    """Hide from Trackio the places that it would send to, and keep it from asking the hub whose token this is."""
    import huggingface_hub.constants as hub

    places = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL", "TRACKIO_BUCKET_ID")
    hidden = {name: os.environ.pop(name) for name in places if name in os.environ}
    offline, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = offline
        os.environ.update(hidden)


def _scoped(record: Record) -> dict[str, float]:
    """Return the numbers of a record by names such as `train/loss`, without the step."""
    scope = "heldout" if "heldout_loss" in record else "train"
    return {f"{scope}/{name}": value for name, value in _scalars(record)}


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
