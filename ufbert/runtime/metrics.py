"""Metrics of a run: a JSONL file always, TensorBoard on request."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ufbert.errors import UserError
from ufbert.runtime.files import read_jsonl, to_json_text

Record = dict[str, Any]
"""Numbers of one update, evaluation or event, by name."""


@runtime_checkable
class Sink(Protocol):
    """Somewhere that records go."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Writer:
    """Gives every record to every sink."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class JsonlWriter:
    """Appends one JSON object a line, flushed. A resumed run first drops what came after its checkpoint.

    Raises UserError if the disk refuses.
    """

    def __init__(self, path: Path, keep_through_step: int | None = None) -> None:
        self.path = path
        try:
            if keep_through_step is not None and path.is_file():
                kept = [to_json_text(r) for r in read_jsonl(path) if _step(r) <= keep_through_step]
                scratch = path.with_suffix(".partial")
                scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                os.replace(scratch, path)
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
        with contextlib.suppress(OSError):  # what could not be flushed was reported when it was written
            self._file.close()


class TensorBoardWriter:
    """Every number as a TensorBoard scalar over updates, in `folder`. Raises UserError where tensorboardX is missing."""

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
    """The update that a record is of; infinite where it says none that can be one."""
    step = record.get("step", 0)
    return step if isinstance(step, int) else float("inf")
