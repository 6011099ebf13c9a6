"""The console: a line that is rewritten in place, streams that may go away, and times as people read them."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from ufbert.runtime.signals import WATCHER


class LiveLine:
    """A line that is rewritten in place on a terminal, and printed every `every` seconds elsewhere."""

    def __init__(self, every: float = 10.0) -> None:
        self._every, self._last, self._width = every, -1e9, 0
        self._terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        """Replace the line. Calls that come too often are dropped."""
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


def open_descriptors() -> None:
    """Open the null device for each of standard input, output and error that the process was started without."""
    # Otherwise the first files that are opened would take their numbers, and what a library prints would land in them.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def silence(stream: Any) -> None:
    """Discard what a stream still holds, and all that is written to it from now on."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Console:
    """A text stream to a console, pipe or file that may go away or fill up: what cannot be written is dropped.

    If `stops`, a closed pipe asks the run to save and stop, as SIGPIPE would. Without a run it raises BrokenPipeError.
    """

    def __init__(self, stream: Any, stops: bool) -> None:
        self._stream, self._stops = stream, stops
        self.encoding, self.errors = stream.encoding, stream.errors

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def buffer(self) -> Any:
        return self._stream.buffer

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except BrokenPipeError:
            silence(self._stream)
            if self._stops and WATCHER.note is not None:
                WATCHER.note(signal.SIGPIPE, None)
            elif self._stops:
                raise
        except (OSError, ValueError, RuntimeError):
            pass  # a terminal that is gone, a full disk, or a signal handler that prints while the program prints


def clock(seconds: float) -> str:
    """Write a time as M:SS, or as H:MM:SS from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
