"""The console: progress by phases, streams that may go away, and times as people read them."""

import contextlib
import math
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

from ufbert.runtime.signals import WATCHER

SLOW = 2.0
"""Seconds from which on a phase is named, and its time told."""
EVERY = 10.0
"""Seconds between two lines of a phase in a log."""


class _Phase:
    """A piece of work that is under way."""

    def __init__(self, name: str, stays: bool) -> None:
        self.name, self.stays, self.text = name, stays, ""
        self.began = self.news = time.monotonic()
        self.logged = -math.inf

    def line(self) -> str:
        """Write the phase's text, or its name, and the time that has passed since the last news of it."""
        passed = time.monotonic() - self.news
        if not self.text:
            return f"{self.name}  {clock(passed)}"
        return f"{self.text}  ({clock(passed)} ago)" if passed >= SLOW else self.text


class Progress:
    """The line that says which phase is under way, and for how long.

    A terminal has it as its last line, which rich draws four times a second. A notebook has it as an output that changes.
    A file or pipe gets whole lines: the name of a phase that turns out to be slow, and its text now and then.
    """

    def __init__(self) -> None:
        self.on_stdout = False
        """True for a command whose product is a folder; other commands' results have standard output for themselves."""
        self._phases: list[_Phase] = []
        self._lock = threading.RLock()
        self._live: Any = None
        """The `rich.live.Live` of a terminal."""
        self._output: Any = None
        """The handle of a notebook's output."""
        self._in_notebook = False
        self._lost: BrokenPipeError | None = None
        """Met by a thread, and kept for the main one."""

    @contextlib.contextmanager
    def phase(self, name: str, stays: bool = True) -> Generator[None]:
        """Show the name of what the block does, and for how long it has done it.

        A block that took two seconds leaves a line with its time, unless not `stays`. Phases nest: the innermost is shown.
        """
        phase = _Phase(name, stays)
        timer = threading.Timer(SLOW, self._announce, (phase,))
        timer.daemon = True
        with self._lock:
            if not self._phases:
                self._open()
            self._phases.append(phase)
        if stays and self._live is None:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            seconds = time.monotonic() - phase.began
            line = f"{name}: {seconds:.1f} s" if seconds < 60.0 else f"{name}: {clock(seconds)}"
            with self._lock:
                self._phases.remove(phase)
                has_output = not self._phases and self._close(line)
        if self._lost is not None:
            raise self._lost
        if stays and seconds >= SLOW and not has_output:
            print(line, file=self._stream(), flush=True)

    def show(self, text: str) -> None:
        """Replace the innermost phase's line. Texts that come too often are dropped."""
        if not self._phases:
            return
        phase = self._phases[-1]
        phase.text, phase.news = text, time.monotonic()
        if self._live is None and phase.news - phase.logged >= (1.0 if self._in_notebook else EVERY):
            self._log(phase, text)

    def _announce(self, phase: _Phase) -> None:
        try:
            with self._lock:
                if phase in self._phases and not phase.text:
                    self._log(phase, f"{phase.name} ...")
        except BrokenPipeError as error:
            self._lost = error

    def _log(self, phase: _Phase, text: str) -> None:
        phase.logged = time.monotonic()
        if not self._in_notebook:
            print(text, file=self._stream(), flush=True)
        elif self._output is None:
            self._output = _display(text)
        else:
            self._output.update(_rich_text(text))

    def _stream(self) -> Any:
        return sys.stdout if self.on_stdout else sys.stderr

    def _open(self) -> None:
        """Begin to show phases, in the way that the stream allows."""
        stream, self._in_notebook = self._stream(), False
        if stream is None or not (stream.isatty() or "IPython" in sys.modules):
            return
        import rich.console
        import rich.live

        console = rich.console.Console(file=stream)
        self._in_notebook = console.is_jupyter
        if console.is_interactive and not self._in_notebook:
            self._live = rich.live.Live(
                console=console, get_renderable=lambda: _rich_text(self._fitting(console.width)), transient=True,
                redirect_stdout=sys.stdout.isatty(), redirect_stderr=sys.stderr.isatty(),
            )  # fmt: skip
            self._live.start()
            console.show_cursor(True)  # rich hides it, and a process that is killed would leave it hidden

    def _close(self, line: str) -> bool:
        """Take the terminal's last line away. If a notebook has an output, it becomes `line`, and the return value is true."""
        live, output = self._live, self._output
        self._live = self._output = None
        if live is not None:
            live.stop()
        if output is not None:
            output.update(_rich_text(line))
        return output is not None

    def _fitting(self, width: int) -> str:
        """Return as many whole words of the innermost phase's line as a terminal has room for."""
        line = "".join(phase.line() for phase in self._phases[-1:])
        return textwrap.fill(line, max(width - 1, 10), max_lines=1, placeholder=" …")


def _rich_text(text: str) -> Any:
    import rich.text

    return rich.text.Text(text, no_wrap=True, overflow="ellipsis")


def _display(text: str) -> Any:
    import IPython.display

    return IPython.display.display(_rich_text(text), display_id=True)


PROGRESS = Progress()
"""The one line, because a process has one console."""
phase, show = PROGRESS.phase, PROGRESS.show


def say(text: str) -> None:
    """Print text that stays; on a terminal its lines break between words."""
    if sys.stdout.isatty():
        columns = shutil.get_terminal_size().columns
        wrap = textwrap.TextWrapper(columns, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
        text = "\n".join(wrap.fill(line) for line in text.split("\n"))
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
