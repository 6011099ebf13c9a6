"""Signals: requests to stop, and an end that nothing can hold up.

Only the command line installs these; who calls the package from Python keeps the handlers they have.
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


class StopSignals:
    """While entered, the first signal of `STOPPING` is noted in `asked` instead of ending the process; a second SIGTERM or
    SIGINT ends it. A standard output that nobody reads any more is noted as SIGPIPE.

    Outside the main thread, where no handler can be set, no signal is ever noted. SIGHUP stays ignored where it is (nohup).
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
            WATCHER.forget()  # all is done and saved
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def save_first(self) -> None:
        """From now on there is work in memory, which a request to stop waits for."""
        WATCHER.unsaved = True

    def _note(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            return
        self.asked = signal.Signals(number)
        if (
            threading.current_thread() is threading.main_thread()
        ):  # the watcher, which hears of a closed pipe, has its own
            for known in HURRYING:
                if known in self._before:
                    signal.signal(known, self._before[known])
        with contextlib.suppress(
            OSError, ValueError, RuntimeError
        ):  # the console may be gone, or in use at this moment
            print(f"{self.asked.name}: saving; once more ends it at once", flush=True)
