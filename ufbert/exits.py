"""The ways out of the process: requests to stop, a console that is gone, and an end that nothing can hold up.

Only the command line uses these (`run` of `__main__`); who calls the package from Python keeps the handlers they have.
"""

import contextlib
import os
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
HURRYING = (signal.SIGTERM, signal.SIGINT)
"""Those that end the process at once when they follow another. A terminal that closes may send SIGHUP twice."""
GRACE = 5.0
"""Seconds that a stop with nothing to save, or the interpreter's own end, may take."""


class Stopped(KeyboardInterrupt):
    """A signal to stop came while there was nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Watcher:
    """Hears of signals in a thread of its own: the main thread hears of none while it compiles, or waits in a library."""

    def __init__(self) -> None:
        self.unsaved = False
        """Whether there is work that a stop must wait for until it is saved."""
        self.note: Callable[[int, Any], None] | None = None
        """Takes a request to stop without ending anything, where a run does that."""
        self._ears: socket.socket | None = None
        self._mouth: socket.socket | None = None
        self._first: int | None = None

    def start(self) -> None:
        """Handle the signals in `STOPPING` from now on, but for SIGHUP where it is ignored (nohup)."""
        self._ears, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        for number in STOPPING:
            if number in HURRYING or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_like_any_process)
        threading.Thread(target=self._listen, args=(self._ears,), name="signals", daemon=True).start()

    def forget(self) -> None:
        """What was asked has been overtaken by the end of the work."""
        self._first = None

    def _listen(self, ears: socket.socket) -> None:
        waiting_since, console = time.monotonic(), _poll_of_pipe(1)
        while True:
            if console is not None and self.note is not None and console.poll(0):
                self.note(signal.SIGPIPE, None)  # a run prints seldom, and would be long in noticing
                console = None
            heard = ears.recv(64) if select.select([ears], [], [], 0.2)[0] else b""
            for number in heard:
                if number in HURRYING and self._first is not None:
                    leave(128 + number, f"{signal.Signals(number).name}: ended at once")
                if number in STOPPING:
                    self._first = self._first or number
            if self._first is None or self.unsaved:
                waiting_since = time.monotonic()
            elif time.monotonic() - waiting_since > GRACE:
                leave(128 + self._first, f"{signal.Signals(self._first).name}: stopped, with nothing to save")


WATCHER = Watcher()
"""The process has one set of signals, and so one that watches them."""


def _poll_of_pipe(number: int) -> Any:
    """What tells, when polled, that the reader of this pipe is gone; None if the descriptor is no pipe."""
    if not hasattr(select, "poll") or not stat.S_ISFIFO(os.fstat(number).st_mode):
        return None
    poll = select.poll()
    poll.register(number, 0)  # which leaves POLLERR
    return poll


def _stop(number: int, frame: Any) -> None:
    raise Stopped(number)


def _like_any_process() -> None:
    """In a forked child: what stops it is its parent's business, and must not be taken for a request to the parent."""
    signal.set_wakeup_fd(-1)
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def leave(code: int, sentence: str) -> None:
    """End the process at once. The last resort: what would be waited for is saved, or known to be lost."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:  # a pipe that nobody reads must not hold it either
            os.write(2, f"{sentence}\n".encode())
    os._exit(code)


def leave_soon(code: int) -> None:
    """End the process in `GRACE` seconds, if the interpreter has not ended by then: it waits for every thread of every library,
    and a write to a disk that hangs never returns."""

    def end() -> None:
        time.sleep(GRACE)
        os._exit(code)

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    threading.Thread(target=end, name="end", daemon=True).start()


def open_descriptors() -> None:
    """Give a process that was started without standard input, output or error the null device: else the first files that it
    opens take their places, and what a library prints is written into them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def silence(stream: Any) -> None:
    """Send what a stream still holds, and all that follows, nowhere."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Console:
    """A text stream to a console, pipe or file that may go away or fill up: what cannot be written is dropped.

    A closed pipe asks a run to save and stop, as SIGPIPE would; where nothing takes such a request it raises BrokenPipeError,
    if `stops`.
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
            pass  # a terminal that is gone, a full disk, a signal's handler that prints while the program does
