"""Where a run's numbers go: a JSONL file always, TensorBoard on request, one live line on the console."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ufbert.errors import UserError

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


def memory_bytes() -> int:
    """Most memory used so far: of the first accelerator, or of this process on a CPU."""
    import jax

    found = jax.local_devices()[0].memory_stats()
    if found and "peak_bytes_in_use" in found:
        return int(found["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _step(record: Record) -> int | float:
    """The update that a record is of; infinite where it says none that can be one."""
    step = record.get("step", 0)
    return step if isinstance(step, int) else float("inf")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The object of every whole line of a JSONL file; a last line cut short by a kill is left out, and so is other damage."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def to_json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which knows no NaN and no infinity: such a number becomes null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write JSON under its final name only when it is whole. Raises UserError if the disk refuses."""
    write_text(path, to_json_text(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under its final name only when it is whole, with its line ends as they are.

    Makes the folder where it is missing. Raises UserError if the disk refuses.
    """
    scratch = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8", newline="")
        os.replace(scratch, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error


class LiveLine:
    """One line that is rewritten in place on a terminal, and printed every `every` seconds elsewhere."""

    def __init__(self, every: float = 10.0) -> None:
        self._every, self._last, self._width = every, -1e9, 0
        self._terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        """Replace the line; may be called as often as one likes."""
        now = time.monotonic()
        if now - self._last < (0.1 if self._terminal else self._every):
            return
        self._last = now
        if self._terminal:
            print("\r" + text.ljust(self._width), end="", flush=True)
            self._width = len(text)
        else:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._terminal and self._width:
            print("\r" + " " * self._width + "\r", end="")
            self._width = 0
        print(text, flush=True)
