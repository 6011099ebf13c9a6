"""Where a run's numbers go: a JSONL file always, one live line on the console."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ufbert.errors import UserError


class JsonlWriter:
    """Appends one JSON object a line, flushed. A resumed run first drops what came after its checkpoint."""

    def __init__(self, path: Path, keep_through_step: int | None = None) -> None:
        self.path = path
        if keep_through_step is not None and path.is_file():
            kept = [json.dumps(r) for r in read_jsonl(path) if r.get("step", 0) <= keep_through_step]
            scratch = path.with_suffix(".partial")
            scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            os.replace(scratch, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a JSONL file; a last line cut short by a kill is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def write_json(path: Path, value: Any) -> None:
    """Write JSON under its final name only when it is whole. Raises UserError if the disk refuses."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
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
