"""Signals: requests to stop, and an exit that nothing can hold up.

Only the command line installs these handlers; a program that calls the package from Python keeps its own.
"""

import contextlib
import math
import os
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""Signals that ask the process to stop."""
HURRYING = (signal.SIGTERM, signal.SIGINT)
"""Those that end the process at once if they follow another. SIGHUP does not: a terminal that closes may send it twice."""
ECHO = 1.0
"""Seconds after a request in which another is taken for the same: a launcher (`uv run`) passes on the signal that the terminal
or a service manager has sent to both."""
GRACE = 5.0
"""Seconds that a stop with nothing to save, or the interpreter's exit, may take."""


class Stopped(KeyboardInterrupt):
    """Raised by a signal to stop while there is nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Watcher:
    """Listens for signals in a thread of its own: Python runs no handler while the main thread is inside a library."""

    def __init__(self) -> None:
        self.unsaved = False
        """True while there is work that a stop must wait for until it is saved."""
        self.note: Callable[[int, Any], None] | None = None
        """Set by a run: records a request to stop instead of ending the process."""
        self.at_end: Callable[[int], Any] | None = None
        """Set by a run: called with the exit status before a process that a library holds up is ended."""
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._first: int | None = None
        self._first_at = 0.0
        self.heard = -math.inf
        """Time at which a handler heard of a request last."""

    def is_echo(self) -> bool:
        """True if a signal that comes now belongs to a request that a handler has heard of."""
        return time.monotonic() - self.heard <= ECHO

    def start(self) -> None:
        """Handle the signals in `STOPPING` from now on, except SIGHUP if it is ignored (nohup)."""
        # The C part of Python's signal handling writes each signal's number here at once, whatever the main thread does.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOPPING:
            if number in HURRYING or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_restore_handlers)
        threading.Thread(target=self._listen, args=(self._reader,), name="signals", daemon=True).start()

    def forget(self) -> None:
        """Forget a request to stop, because the work has ended by itself."""
        self._first, self.heard = None, -math.inf

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        """Let a stop wait while the block runs."""
        before, self.unsaved = self.unsaved, True
        try:
            yield
        finally:
            self.unsaved = before

    def _listen(self, reader: socket.socket) -> None:
        waiting_since, console = time.monotonic(), _poll_of_pipe(1)
        while True:
            if console is not None and self.note is not None and console.poll(0):
                self.note(signal.SIGPIPE, None)  # a run prints so seldom that it would notice late
                console = None
            for number in reader.recv(64) if select.select([reader], [], [], 0.2)[0] else b"":
                if number in STOPPING and self._first is None:
                    self._first, self._first_at = number, time.monotonic()
                elif number in HURRYING and time.monotonic() - self._first_at > ECHO:
                    leave(128 + number, f"{signal.Signals(number).name}: ended at once")
            if self._first is None or self.unsaved:
                waiting_since = time.monotonic()
            elif time.monotonic() - waiting_since > GRACE:
                if self.at_end is not None:
                    self.at_end(128 + self._first)
                leave(128 + self._first, f"{signal.Signals(self._first).name}: stopped, with nothing to save")


WATCHER = Watcher()
"""The one watcher, because a process has one set of signal handlers."""


def _poll_of_pipe(number: int) -> Any:
    """Return a poll that reports when the reader of a pipe is gone, or None if the descriptor is not a pipe."""
    if not hasattr(select, "poll") or not stat.S_ISFIFO(os.fstat(number).st_mode):
        return None
    poll = select.poll()
    poll.register(number, 0)  # no events, so that only POLLERR is reported
    return poll


def _stop(number: int, frame: Any) -> None:
    if not WATCHER.is_echo():
        WATCHER.heard = time.monotonic()
        raise Stopped(number)


def _restore_handlers() -> None:
    """Give a forked child Python's own handlers: a signal to it is not a request to its parent."""
    signal.set_wakeup_fd(-1)
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def leave(code: int, sentence: str) -> None:
    """Print a sentence to standard error and end the process at once, without any clean-up."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:  # a full pipe that nobody reads must not block the exit
            os.write(2, f"{sentence}\n".encode())
    os._exit(code)


def leave_soon(code: int) -> None:
    """End the process in `GRACE` seconds if the interpreter has not ended by then.

    The interpreter waits for every thread of every library, and a write to a disk that hangs never returns.
    """

    def end() -> None:
        time.sleep(GRACE)
        os._exit(code)

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    threading.Thread(target=end, name="end", daemon=True).start()


class StopSignals:
    """While entered, records the first signal of `STOPPING` in `asked` instead of ending the process.

    A second SIGTERM or SIGINT, more than `ECHO` seconds later, ends the process. A standard output that nobody reads any more
    counts as SIGPIPE. SIGHUP stays ignored if it was (nohup). Outside the main thread Python allows no handlers, and no signal
    is recorded.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        WATCHER.note = self._note
        for number in STOPPING:
            if number in HURRYING or signal.getsignal(number) is not signal.SIG_IGN:
                try:
                    self._before[number] = signal.signal(number, self._note)
                except ValueError:
                    break
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        WATCHER.note, WATCHER.unsaved = None, False
        if kind is None:
            WATCHER.forget()  # the work is done and saved
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def save_first(self) -> None:
        """Make a request to stop wait from now on until the run has saved its work."""
        WATCHER.unsaved = True

    def _note(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            if number in HURRYING and not WATCHER.is_echo():
                signal.signal(number, self._before[signal.Signals(number)])
                signal.raise_signal(number)
            return
        self.asked, WATCHER.heard = signal.Signals(number), time.monotonic()
        # The console may be gone, or in the middle of a line.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            print(f"{self.asked.name}: saving; once more ends it at once", flush=True)
